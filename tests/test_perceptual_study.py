"""The perceptual study: tasks, forms and results in files, hostile results, the estimator and its tests against other code, the command line, other data by papermill."""
import csv
import dataclasses
import json
import re

import numpy as np
import pandas as pd
import papermill
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from emoca_nb import perceptual_study as ps
from emoca_nb.core import BadFile, EmocaError
from emoca_nb.open_head import EMOTIONS

EACH = 3


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """21 pictures, three of each emotion, two methods; each file is of another colour."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for i, emotion in enumerate(np.repeat(ps.BASIC, EACH)):
        files = {}
        for j, kind in enumerate(("real", "good", "poor")):
            files[kind] = str(folder / f"{kind}{i}.png")
            Image.new("RGB", (40, 30), (12 * i, 80 * j, 255 - 12 * i)).save(files[kind])
        rows.append(dict(picture=f"p{i}", emotion=int(emotion), easy=i % 4 == 0 and i < 20, **files))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def key(table): return ps.make_key(table, 3)


@pytest.fixture(scope="module")
def crowd(): return ps.Crowd(ps.blurred(.8), ps.blurred(.98), dict(good=ps.blurred(.7), poor=ps.blurred(.3, 0)))


@pytest.fixture(scope="module")
def results(key, crowd): return ps.simulated_results(key, crowd, dict(good=["attentive"] * 5 + ["careless"], poor=["attentive"] * 5 + ["biased"]), 1)


def written(frame, path, **options):
    frame.to_csv(path, index=False, **options)
    return path


# ---- tasks and files

def test_each_task_shows_photographs_renderings_of_one_method_and_easy_photographs_again(table, key):
    for method, task in key.groupby("method"):
        assert task.task.nunique() == 1 and task.position.tolist() == list(range(1, 2 * len(table) + 5 + 1))
        shown = {kind: set(rows.image) for kind, rows in task.groupby("kind")}
        assert shown["real"] == set(table.real) and shown["rendering"] == set(table[method]) and shown["qualification"] == set(table.real[table.easy])
    assert not (key[key.method == "good"].picture.to_numpy() == key[key.method == "poor"].picture.to_numpy()).all(), "each method has an order of its own"


def test_order_is_the_seeds_and_mixes_kinds(table):
    tasks = [ps.make_task(table, "good", s) for s in range(20)]
    assert tasks[0].equals(ps.make_task(table, "good", 0)) and len({tuple(t.picture) for t in tasks}) == 20
    place = np.concatenate([t.position[t.kind == "qualification"] for t in tasks])
    assert abs(place.mean() - (len(tasks[0]) + 1) / 2) < 5, "the repeated photographs come anywhere"


def test_two_pictures_of_one_name_or_no_method_are_refused(table):
    with pytest.raises(EmocaError, match="two pictures are called 'p0'"): ps.make_key(table.assign(picture=["p0", *table.picture[:-1]]))
    with pytest.raises(EmocaError, match="no column with a method"): ps.make_key(table.drop(columns=["good", "poor"]))


def test_files_of_a_study_fit_together_and_tell_nothing(table, key, tmp_path):
    folder = ps.write_study(key, tmp_path / "study", "https://example.org/", 32)
    with open(folder / "batch.csv", newline="") as file: lines = list(csv.DictReader(file))
    template = (folder / "template.html").read_text()
    words = set(re.findall(r"\$\{(\w+)\}", template))
    assert len(lines) == 2 and all(words == set(line) for line in lines), "every word of the form is a column of the batch"
    assert {v.removeprefix("https://example.org/") for line in lines for k, v in line.items() if k != "task"} == {p.name for p in folder.glob("pictures/*")}
    for line in lines:
        page = (folder / f"task-{line['task']}.html").read_text()
        assert "${" not in page and page.count("data:image/jpeg") == len(key) // 2 and "http" not in page.replace("https://www.mturk.com", "")
        said = re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", page.partition("page(document")[2])
        assert not re.search(r"good|poor|qualification|\.png", said) and len(said) < 3000
    shown = Image.open(next(folder.glob("pictures/*")))
    assert max(shown.size) == 32 and not shown.getexif() and not {"comment", "icc_profile"} & set(shown.info)
    assert ps.read_key(folder / "key.csv").equals(key)


def test_pictures_lose_what_their_files_said(tmp_path):
    picture, exif = Image.new("RGB", (20, 20)), Image.Exif()
    exif[0x010E] = "Anger, reconstructed by poor"
    picture.save(tmp_path / "a.jpg", exif=exif, comment=b"Anger")
    assert b"Anger" in (tmp_path / "a.jpg").read_bytes() and b"Anger" not in ps.jpeg(tmp_path / "a.jpg")


@pytest.mark.parametrize("value", ['a"b', "</script>", "a b", "a\\b", "a\nb"])
def test_what_would_break_out_of_a_page_is_refused(value):
    with pytest.raises(EmocaError, match="cannot stand"): ps.fill(ps.form(1), dict(task=value, image_1="x"))


def test_texts_cannot_close_the_script():
    page = ps.form(1, question="</script><img src=x>", instructions=["</title><b>"])
    assert page.count("</script>") == 1 and "<img src=x>" not in page and "<b>" not in page


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.drop(columns="easy"), "no easy"), (lambda t: t.assign(emotion="Hunger"), "'Hunger' in line 2")])
def test_bad_table_of_pictures_is_named(table, change, message, tmp_path):
    with pytest.raises(BadFile, match=message): ps.read_pictures(written(change(table), tmp_path / "t.csv"))


def test_table_of_pictures_is_read_as_written(table, tmp_path):
    path = written(table.assign(emotion=table.emotion.map(EMOTIONS.__getitem__), easy=table.easy.astype(int)), tmp_path / "t.csv")
    assert ps.read_pictures(path).equals(table)


@pytest.mark.parametrize(("change", "message"), [
    (lambda k: k.drop(columns="method"), "no method"), (lambda k: k.assign(position="first"), "'first'"), (lambda k: k.assign(position=1), "one twice")])
def test_bad_key_is_named(key, change, message, tmp_path):
    with pytest.raises(BadFile, match=message): ps.read_key(written(change(key), tmp_path / "key.csv"))


# ---- results, whole and damaged

def test_results_of_platform_and_desk_are_read_alike(key, results, tmp_path):
    platform = results.assign(**{f"Input.image_{i}": "https://example.org/" + ps.file_name(p) for i, p in zip(key.position[:47], key.image[:47])}, AssignmentStatus="Submitted")
    platform = platform[platform["Input.task"] == key.task[0]]
    one = ps.read_results(written(platform, tmp_path / "platform.csv"), key)
    for _, row in results.iterrows(): written(row.to_frame().T, tmp_path / f"desk-{row.WorkerId}.csv")
    (tmp_path / "platform.csv").unlink()
    many = ps.read_results(tmp_path, key)
    assert one.problems == many.problems == ()
    same = many.table[many.table.worker.isin(one.table.worker)]
    order = ["worker", "position"]
    assert same.sort_values(order).reset_index(drop=True).equals(one.table.sort_values(order).reset_index(drop=True))
    assert len(many.table) == len(results) * 47


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_spreadsheets_encodings_and_separators(key, results, encoding, sep, tmp_path):
    found = ps.read_results(written(results, tmp_path / "r.csv", sep=sep, encoding=encoding), key)
    assert not found.problems and found.table.worker.nunique() == len(results) and (found.table.answer >= 0).all()


def damaged(results, change):
    frame = results.astype(str)
    change(frame)
    return frame


def cell(line, column, value):
    """Write a value into the cell of a line of the file, of which the first is the header."""
    def change(frame): frame.loc[line - 2, column] = value
    return change


@pytest.mark.parametrize(("change", "line", "message", "lost"), [
    (cell(4, "WorkerId", ""), 4, "no WorkerId", 1),
    (cell(5, "Input.task", "other"), 5, "no task 'other'", 1),
    (cell(6, "AssignmentId", "x"), None, None, 0),
    (cell(3, "Answer.answer_7", ""), 3, r"no answer to 1 of 47 pictures \(7\)", 0),
    (cell(3, "Answer.answer_9", "Hunger"), 3, "answer 9 is 'Hunger'", 0),
    (cell(3, "Answer.answer_9", "nan"), 3, "answer 9 is 'nan'", 0),
    (cell(3, "Answer.answer_9", "=1+1"), 3, "answer 9 is '=1[+]1'", 0),
    (cell(3, "AssignmentStatus", "Rejected"), 3, "rejected", 1),
    (cell(3, "Input.image_1", "https://example.org/0123.jpg"), 3, "image 1 is '0123.jpg'", 1),
])
def test_damaged_cells_are_named_with_their_line(key, results, change, line, message, lost, tmp_path):
    found = ps.read_results(written(damaged(results, change), tmp_path / "r.csv"), key)
    assert found.table.worker.nunique() == len(results) - lost
    if line is None: assert not found.problems
    else:
        [problem] = found.problems
        assert (problem.file, problem.line) == ("r.csv", line) and re.search(message, problem.what)


def test_duplicate_assignment_and_worker_with_two_tasks(key, results, tmp_path):
    frame = results.astype(str)
    frame.loc[2, "AssignmentId"] = frame.AssignmentId[0]
    frame.loc[8, "WorkerId"] = frame.WorkerId[1]
    found = ps.read_results(written(frame, tmp_path / "r.csv"), key)
    assert [(p.line, re.search(r"\((.*)\)", p.what)[1]) for p in found.problems] == [(4, "r.csv, line 2"), (10, "r.csv, line 3")]
    assert found.table[found.table.worker == frame.WorkerId[1]].task.nunique() == 1
    assert not any(w in str(p) for p in found.problems for w in frame.WorkerId), "participants are not named"


def test_missing_answer_columns_count_as_missing_answers(key, results, tmp_path):
    found = ps.read_results(written(results.drop(columns=["Answer.answer_3", "Answer.answer_4"]), tmp_path / "r.csv"), key)
    assert (found.table.answer < 0).sum() == 2 * len(results) and all("(3, 4)" in p.what for p in found.problems)
    assert np.isfinite(ps.consistency(found.table, 50).consistency).all() and np.isfinite(ps.rater_agreement(found.table).kappa).all()


@pytest.mark.parametrize(("content", "message"), [
    (b"", "an empty file"), (b"\n\n", "an empty file"), (b"WorkerId,Answer.answer_1\na,Happy\n", "no AssignmentId, Input.task"), (b"PK\x03\x04\0\0\0", "no text"),
    (b"WorkerId,WorkerId,AssignmentId,Input.task\n1,2,3,4\n", "WorkerId more than once")])
def test_file_that_is_no_results_file_is_left_out_and_the_others_count(key, results, content, message, tmp_path):
    written(results, tmp_path / "sound.csv")
    (tmp_path / "bad.csv").write_bytes(content)
    found = ps.read_results(tmp_path, key)
    [problem] = found.problems
    assert problem.file == "bad.csv" and message in problem.what and found.table.worker.nunique() == len(results)
    with pytest.raises(EmocaError, match="no assignment that can be used"): ps.read_results(tmp_path / "bad.csv", key)


def test_short_long_and_unclosed_lines(key, results, tmp_path):
    text = results.to_csv(index=False)
    (tmp_path / "r.csv").write_text(text + "a,b\n" + '"never closed,' + "x" * 200_000)
    found = ps.read_results(tmp_path / "r.csv", key)
    assert [p.line for p in found.problems] == [len(results) + 2, len(results) + 3] and found.table.worker.nunique() == len(results)


def test_line_numbers_count_line_breaks_in_cells(key, results, tmp_path):
    frame = results.astype(str).assign(Remark="one\ntwo\nthree")
    frame.loc[3, "Answer.answer_1"] = "?"
    [problem] = ps.read_results(written(frame, tmp_path / "r.csv"), key).problems
    assert problem.line == 2 + 3 * 3


def test_latin1_is_read_and_named(key, results, tmp_path):
    frame = results.astype(str).assign(Remark=["café" if i == 2 else "" for i in range(len(results))])
    found = ps.read_results(written(frame, tmp_path / "r.csv", encoding="latin-1"), key)
    assert [p.line for p in found.problems] == [4] and found.table.worker.nunique() == len(results)


def test_folder_without_files_and_no_such_file(key, tmp_path):
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(EmocaError): ps.read_results(path, key)


# ---- screening

def labelled(key, method="good", worker="w", **wrong):
    """A participant who sees the truth, but for some kinds of pictures: kind=number of wrong answers."""
    rows = key[key.method == method].copy()
    rows["answer"] = rows.emotion
    for kind, n in wrong.items():
        pictures = rows.picture[rows.kind == "qualification"].tolist()[:n]
        at = (rows.kind == kind) & rows.picture.isin(pictures)
        rows.loc[at, "answer"] = 0
    return rows.assign(worker=worker)


@pytest.mark.parametrize(("wrong", "misclassified", "inconsistent", "kept"), [
    ({}, 0, 0, True), (dict(real=1), 1, 1, True), (dict(qualification=1), 1, 1, True), (dict(real=2), 2, 2, False), (dict(qualification=2), 2, 2, False),
    (dict(real=2, qualification=2), 2, 0, False), (dict(real=1, qualification=1), 1, 0, True)])
def test_rule_of_the_paper(key, wrong, misclassified, inconsistent, kept):
    [row] = ps.screen(labelled(key, **wrong)).itertuples()
    assert (row.misclassified, row.inconsistent, row.kept) == (misclassified, inconsistent, kept)


def test_wrong_answers_elsewhere_do_not_matter(key):
    rows = labelled(key)
    rows.loc[(rows.kind == "rendering"), "answer"] = 0
    assert ps.screen(rows).kept.all()


def test_missing_qualification_answers_pass_nothing(key):
    rows = labelled(key)
    rows.loc[rows.kind == "qualification", "answer"] = -1
    assert not ps.screen(rows).kept.any()


# ---- the estimate

def test_consistency_is_the_mean_of_participants_shares(key):
    half = labelled(key, worker="b")
    pictures = half.picture.unique()[:10]
    half.loc[(half.kind == "rendering") & half.picture.isin(pictures), "answer"] = 0
    answers = pd.concat([labelled(key, worker="a"), half])
    assert ps.consistency(answers, 50).consistency["good"] == pytest.approx((1 + 11 / 21) / 2)


def test_photographs_shown_again_do_not_count(key):
    rows = labelled(key, qualification=5)
    assert ps.consistency(rows, 50).consistency["good"] == 1


def test_missing_answers_are_left_out_of_the_mean(key):
    rows = labelled(key)
    rows.loc[(rows.kind == "rendering") & rows.picture.isin(["p1", "p2"]), "answer"] = -1
    rows.loc[(rows.kind == "rendering") & (rows.picture == "p3"), "answer"] = 0
    assert ps.consistency(rows, 50).consistency["good"] == pytest.approx(18 / 19)


def test_variances_of_known_parts():
    rng = np.random.default_rng(0)
    h = .1 * rng.normal(size=(4000, 6, 1)) + .3 * rng.normal(size=(4000, 1, 20)) + .4 * rng.normal(size=(4000, 6, 20))
    assert ps.total_variance(*ps.variances(h)).mean() == pytest.approx(h.mean((1, 2)).var(), rel=.06)
    assert ps.variances(h)[2].mean() == pytest.approx(.16 / 120, rel=.03)


def test_variances_with_missing_answers_are_near_those_without():
    rng = np.random.default_rng(0)
    h = (rng.random((400, 12, 40)) < .3 + .5 * rng.random((400, 1, 40))).astype(float)
    gaps = np.where(rng.random(h.shape) < .05, np.nan, h)
    for a, b in zip(ps.variances(h), ps.variances(gaps)): assert b.mean() == pytest.approx(a.mean(), rel=.1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_interval_of_few(shape):
    h = np.random.default_rng(0).integers(2, size=shape).astype(float)
    low, high = ps.interval(h, draws=300)
    assert 0 <= low <= h.mean() <= high <= 1


def test_interval_of_unanimous_answers_is_a_point(): assert ps.interval(np.ones((5, 7)), draws=100) == (1, 1)


def test_tests_of_a_difference_are_the_textbooks():
    rng = np.random.default_rng(1)
    x, y = (rng.random((3, 8, 30)) < .6).astype(float), (rng.random((3, 6, 30)) < .5).astype(float)
    p = ps.gap_tests(x, y)
    assert p["participants"] == pytest.approx(stats.ttest_ind(x.mean(2), y.mean(2), axis=1, equal_var=False).pvalue)
    assert p["pictures"] == pytest.approx(stats.ttest_rel(x.mean(1), y.mean(1), axis=1).pvalue)
    assert p["both"].shape == (3,)


def test_no_difference_gives_no_p_value_below_one():
    same = np.tile([[1., 0.]], (4, 3))
    assert all(p == 1 for p in ps.gap_tests(same, same).values())


def test_false_alarms_of_the_test_over_both_stay_at_five_percent(crowd):
    emotion, easy = np.repeat(ps.BASIC, 5), np.zeros(35, bool)
    rates = ps.power((.5, .5), crowd, emotion, easy, 25, 500, 2)
    assert rates["both"] < .08 < rates["participants"]


def test_intervals_hold_the_truth(crowd):
    emotion, easy = np.repeat(ps.BASIC, 5), np.zeros(35, bool)
    rng = np.random.default_rng(5)
    world = ps.draw_world(crowd, emotion, easy, rng, 500)
    said = ps.simulate(world, "good", np.zeros((500, 10), int), crowd, rng)
    agree, target = (said["real"] == said["rendering"]).astype(float), ps.expected_consistency(crowd, emotion, easy, "good")
    limits = np.array([ps.interval(a, draws=300) for a in agree])
    assert .92 < ((limits[:, 0] <= target) & (target <= limits[:, 1])).mean() < .985
    assert agree.mean() == pytest.approx(target, abs=.01)


def test_pairs_are_corrected(key, crowd, results, tmp_path):
    found = ps.read_results(written(results, tmp_path / "r.csv"), key).table
    three = pd.concat([found, found[found.method == "good"].assign(method="same", worker=lambda t: t.worker + "x")])
    raw, corrected = ps.compare(found, 50), ps.compare(three, 50)
    pair = raw.index[0]
    assert len(raw) == 1 and len(corrected) == 3 and corrected.loc[pair, "both"] > raw.loc[pair, "both"]
    assert corrected.difference.abs().min() == 0


def test_methods_shown_for_other_pictures_are_not_compared(key):
    other = labelled(key, "poor", "v")
    assert len(ps.compare(pd.concat([labelled(key), other[other.picture != "p1"]]), 20)) == 1, "what both have is compared"
    with pytest.raises(EmocaError, match="same pictures"): ps.compare(pd.concat([labelled(key), other.assign(picture=other.picture + "x")]), 20)


# ---- confusion, classifier, raters

def test_counts_of_labels(key):
    rows = labelled(key)
    rows.loc[(rows.kind == "rendering") & (rows.emotion == 4), "answer"] = 3
    matrix = ps.count_labels(rows)["good"]
    assert matrix[4, 3] == EACH and matrix[4, 4] == 0 and np.trace(matrix) == 18 and matrix.sum() == 21
    assert np.trace(ps.count_labels(rows, "truth", "real")["good"]) == 21


def test_figure_has_a_bar_and_a_count_for_each_cell(key):
    counts = ps.count_labels(pd.concat([labelled(key), labelled(key, "poor", "v")]))
    figure = ps.draw_labels(counts, "a", "b")
    [ax] = figure.axes
    assert sum(p.get_width() > 0 for p in ax.patches) == 14 and [t.get_text() for t in ax.texts] == ["3"] * 14
    assert max(p.get_width() for p in ax.patches) == pytest.approx(.72)


def test_classifier_agreement(key):
    rows = labelled(key)
    rows.loc[(rows.kind == "rendering") & (rows.emotion < 4), "answer"] = 0
    truth = dict(zip(rows.picture, rows.emotion))
    got = ps.classifier_agreement(rows, dict(good=truth), 50).loc["good"]
    assert got.real == 1 and got.rendering == pytest.approx(4 / 7)
    with pytest.raises(EmocaError, match="no prediction of good for picture"): ps.classifier_agreement(rows, dict(good={}), 5)


def test_rater_agreement_of_a_textbook_example():
    """Fleiss (1971) as told by Wikipedia: 10 subjects, 14 raters, 5 categories, kappa 0.210."""
    counts = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])
    rows = [dict(worker=w, picture=i, answer=c, method="m", kind=kind) for i, line in enumerate(counts) for w, c in enumerate(np.repeat(range(5), line)) for kind in ("real", "rendering")]
    got = ps.rater_agreement(pd.DataFrame(rows))
    assert got.kappa.to_numpy() == pytest.approx([.210] * 2, abs=5e-4) and (got.alpha > got.kappa).all()


@pytest.mark.parametrize(("content", "message"), [("picture,emotion\n1,Sad\n", "no method"), ("picture,method,emotion\n1,good,Hungry\n", "'Hungry' in line 2"), ("", "expected a CSV")])
def test_bad_predictions_are_named(content, message, tmp_path):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(BadFile, match=message): ps.read_predictions(tmp_path / "p.csv")


def test_published_value_stands_beside_a_method_of_the_paper(key):
    rows = labelled(key).assign(method="EMOCA (coarse)")
    assert ps.consistency(rows, 20).published["EMOCA (coarse)"] == .68 and "published" not in ps.consistency(labelled(key), 20)


# ---- forced choice

def test_published_counts_give_the_published_verdicts():
    rivals = ("DECA", "EMOCAv2", "Deep3D", "FOCUS")
    got = ps.preference_tests(dict(zip(rivals, (603, 461, 510, 534))), dict(zip(rivals, (77, 219, 170, 146))))
    assert (got.verdict == "ours preferred").all() and (got.p < .01).all()
    assert got.p["EMOCAv2"] == pytest.approx(4 * stats.binomtest(461, 680).pvalue)
    turned = ps.preference_tests(dict(a=77, b=340), dict(a=603, b=340))
    assert turned.verdict.tolist() == ["theirs preferred", "no difference shown"]


@pytest.fixture(scope="module")
def many():
    names = [f"{s}{i}" for s in "am" for i in range(20)]
    return pd.DataFrame(dict(picture=names, set=[n[0] for n in names], **{m: [f"{m}/{n}.png" for n in names] for m in ("real", "ours", "x", "y")}))


def test_forced_choice_is_balanced(many):
    key = ps.make_choices(many, "ours", participants=10, questions=16)
    assert key.groupby(["task", "method"]).size().eq(8).all() and not key.duplicated(["task", "picture"]).any()
    assert key.groupby(["method", "picture"]).size().between(1, 3).all(), "10 participants ask every pair twice or nearly so"
    assert key.groupby(["task", key.picture.str[0]]).size().eq(8).all()
    left = key.ours == "Left"
    assert (key.left[left].str.startswith("ours/")).all() and (key.right[~left].str.startswith("ours/")).all()
    assert all(a.split("/")[1] == b.split("/")[1] == c.split("/")[1] for a, b, c in zip(key.image, key.left, key.right))


@pytest.mark.parametrize(("questions", "message"), [(15, "shared equally"), (0, "shared equally"), (44, "a set has 20 pictures")])
def test_forced_choice_that_cannot_be_balanced(many, questions, message):
    with pytest.raises(EmocaError, match=message): ps.make_choices(many, "ours", 3, questions)


def test_answers_of_a_forced_choice_come_back_as_preferences(many, tmp_path):
    key = ps.make_choices(many, "ours", participants=12, questions=16)
    path = written(ps.simulated_choices(key, dict(x=.95, y=.05)), tmp_path / "r.csv")
    got = ps.preferences(ps.read_results(path, key, ps.side_number).table)
    assert got.wins["x"] > 84 and got.wins["y"] < 12 and (got.wins + got.losses == 96).all() and got.verdict.to_dict() == dict(x="ours preferred", y="theirs preferred") and (got.participants < .01).all()


# ---- simulator

def test_simulated_answers_follow_the_matrices(crowd):
    rng, emotion, easy = np.random.default_rng(0), np.repeat(ps.BASIC, 5), np.arange(35) % 7 == 0
    plain = dataclasses.replace(crowd, habits={"attentive": ps.Habit(1e-6, 1e3)})
    said = ps.simulate(ps.draw_world(plain, emotion, easy, rng, 400), "poor", np.zeros((400, 10), int), plain, rng)
    assert (said["real"] == emotion)[..., ~easy].mean() == pytest.approx(.8, abs=.01) and (said["real"] == emotion)[..., easy].mean() == pytest.approx(.98, abs=.01)
    assert (said["rendering"] == 0)[said["real"] > 0].mean() == pytest.approx(crowd.rendering["poor"][1, 0], abs=.01)
    assert (said["real"] == said["again"]).mean() > .9


def test_biased_participants_have_their_favourite(crowd):
    rng, emotion = np.random.default_rng(0), np.repeat(ps.BASIC, 5)
    said = ps.simulate(ps.draw_world(crowd, emotion, np.zeros(35, bool), rng, 200), "good", np.full((200, 5), 2), crowd, rng)
    assert (said["real"] == 1).mean() > .55


def test_simulated_results_say_so(results): assert results.WorkerId.str.startswith("simulated-").all() and set(results.Simulated) == {"attentive", "careless", "biased"}


# ---- the desk

def test_desk_saves_each_answer_and_goes_on(key, tmp_path):
    task = key.task[0]
    desk = ps.RatingDesk(key, task, "ada", tmp_path)
    for i in range(5): desk.heard(dict(position=i, answer=i))
    assert ps.RatingDesk(key, task, "ada", tmp_path).state["position"] == 5 and ps.RatingDesk(key, task, "bob", tmp_path).state["position"] == 0
    desk.heard(dict(position=5, to=2))
    assert desk.state["position"] == 2 and desk.state["answer"] == 2
    desk.heard(dict(position=2, answer=7))
    for i in range(3, 47): desk.heard(dict(position=i, answer=1))
    assert desk.state["position"] == 47 and desk.state["answered"] == 47 and desk.state["pictures"] == []
    found = ps.read_results(tmp_path, key)
    assert not found.problems and found.table.sort_values("position").answer.tolist() == [0, 1, 7] + [1] * 44


@pytest.mark.parametrize("message", [dict(position=0), dict(position=0, answer=8), dict(position=0, answer=-1), dict(position=0, answer="Happy"), dict(position=9, answer=1),
                                     dict(answer=1), dict(position=0, to=30), {}])
def test_odd_messages_answer_nothing(key, message, tmp_path):
    desk = ps.RatingDesk(key, key.task[0], "ada", tmp_path)
    desk.heard(message)
    assert desk.answers == {} and desk.state["position"] == 0 and not list(tmp_path.iterdir())


def test_answer_that_cannot_be_saved_is_not_taken(key, tmp_path):
    (tmp_path / "file").write_text("")
    desk = ps.RatingDesk(key, key.task[0], "ada", tmp_path / "file")
    desk.heard(dict(position=0, answer=1))
    assert desk.answers == {} and desk.state["position"] == 0 and "cannot be written" in desk.state["note"]


@pytest.mark.parametrize("worker", ["", "../ada", "a b", "ä", "x" * 41])
def test_participants_codes_are_file_names(key, worker, tmp_path):
    with pytest.raises(EmocaError, match="code is made of"): ps.RatingDesk(key, key.task[0], worker, tmp_path)


# ---- command line and notebook

def run(*arguments): return CliRunner().invoke(ps.study_command, [str(a) for a in arguments])


def test_command_line_from_pictures_to_report(table, crowd, tmp_path):
    made = run("make", written(table, tmp_path / "pictures.csv"), tmp_path / "study", "--size", 24)
    assert made.exit_code == 0 and "2 tasks of 47 pictures" in made.output
    key = ps.read_key(tmp_path / "study/key.csv")
    frame = ps.simulated_results(key, crowd, dict(good=["attentive"] * 4, poor=["attentive"] * 4)).astype(str)
    frame.loc[0, "Answer.answer_1"] = "?"
    said = written(pd.DataFrame(dict(picture=table.picture, method="good", emotion=table.emotion)), tmp_path / "p.csv")
    done = run("analyse", written(frame, tmp_path / "r.csv"), "--key", tmp_path / "study/key.csv", "--out", tmp_path / "report", "--draws", 50, "--predictions", said)
    assert done.exit_code == 0 and "r.csv, line 2: answer 1 is '?'" in done.output
    report = (tmp_path / "report/results.md").read_text()
    assert "## Consistency" in report and "## Classifier" in report and "answer 1 is '?'" in report and "simulated-attentive" not in report
    assert {p.name for p in tmp_path.glob("report/*.png")} == {f"{n}.png" for n in ps.FIGURES}
    assert pd.read_csv(tmp_path / "report/consistency.csv").method.tolist()[0] == "good"


def test_study_of_whom_nobody_is_left(key, tmp_path):
    rows = labelled(key, real=5)
    with pytest.raises(EmocaError, match="all participants fail"): ps.analyse(ps.Results(rows, ()), tmp_path, "nobody")


def test_notebook_analyses_other_data(root, table, key, crowd, tmp_path, monkeypatch):
    """Pictures, key and results of another study, by parameters."""
    monkeypatch.setenv("EMOCA_NB_REPORTS", str(tmp_path / "reports"))
    write = dict(pictures=written(table, tmp_path / "pictures.csv"), key=written(key, tmp_path / "key.csv"))
    frame = ps.simulated_results(key, crowd, dict(good=["attentive"] * 6, poor=["attentive"] * 6), 2)
    write |= dict(results=written(frame, tmp_path / "answers.csv"),
                  predictions=written(pd.DataFrame(dict(picture=list(table.picture) * 2, method=["good"] * 21 + ["poor"] * 21, emotion=list(table.emotion) * 2)), tmp_path / "p.csv"))
    values = {k: str(v) for k, v in write.items()} | dict(each=EACH, twice=5, participants=4, size=32, draws=60, studies=12)
    papermill.execute_notebook(root / "nbs/08_perceptual_study.ipynb", tmp_path / "done.ipynb", values, cwd=root / "nbs", progress_bar=False, kernel_name="python3")
    report = (tmp_path / "reports/perceptual_study/results.md").read_text()
    assert "answers of people (answers.csv)" in report and "12 participants" in report and "| good |" in report
    assert json.loads((tmp_path / "done.ipynb").read_text())["metadata"]["papermill"]["exception"] is None
