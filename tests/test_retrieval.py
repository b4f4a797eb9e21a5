"Emotion retrieval: search and measures against plain loops, interrupted builds, wrong and broken files, the browser of neighbours without a browser."
import base64
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from emoca_nb import retrieval as R
from emoca_nb.core import BadFile, EmocaError
from emoca_nb.data import FaceDataset, collate, image_folder
from emoca_nb.emotion_net import EmotionNet
from emoca_nb.encoders import Encoders
from emoca_nb.faces import Detection


def faces_of(n, **columns): return FaceDataset(dict(path=[f"{i}.png" for i in range(n)], **columns), name="faces")


def index_of(vectors, folder, **columns):
    "An index of bare vectors."
    return R.build_index(faces_of(len(vectors), **columns), R.given_space("vectors", vectors), folder)


def labelled(n, seed, videos, people=5, unknown=0.1):
    "Random labels, a tenth of them absent."
    r = np.random.default_rng(seed)
    video = np.sort(r.integers(videos, size=n))
    absent = r.random((3, n)) < unknown
    return dict(video=[f"v{v}" for v in video], frame=np.arange(n), identity=[None if a else f"p{v % people}" for v, a in zip(video, absent[0])],
                expression=np.where(absent[1], np.nan, r.integers(8, size=n)), valence=np.where(absent[2], np.nan, r.uniform(-1, 1, n)),
                arousal=np.where(absent[2], np.nan, r.uniform(-1, 1, n)))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    vectors = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    return index_of(vectors, tmp_path_factory.mktemp("index") / "a", **labelled(300, 1, 20))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Thirty pictures of three videos on the disk."
    folder, r = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    paths = [str(folder / f"{i:02}.png") for i in range(30)]
    for p in paths: Image.fromarray(r.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(p)
    return FaceDataset(dict(path=paths, expression=np.arange(30) % 4, video=[f"v{i // 5}" for i in range(30)]), size=20, name="pictures")


COLOUR = R.Space("colour", "mean colour", lambda batch: batch.image.mean((2, 3)))


def tiny_net(): return EmotionNet("toy", nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12)), nn.Linear(12, 10))


# ---- spaces

def test_fingerprint_sees_every_tensor():
    net = tiny_net()
    marks = {R.fingerprint(net)}
    for t in net.state_dict().values():
        with torch.no_grad(): t.view(-1)[0] += 1
        marks.add(R.fingerprint(net))
    assert len(marks) == 1 + len(net.state_dict())
    assert R.fingerprint(net.half()) not in marks
    assert R.fingerprint(np.zeros(4, np.float32)) != R.fingerprint(np.zeros((2, 2), np.float32)) != R.fingerprint(np.zeros((2, 2), np.int32))


def test_network_spaces_say_what_the_network_says(pictures):
    net = tiny_net().eval()
    x = torch.stack([pictures[i].image for i in range(3)]) / 255
    batch = collate([pictures[i] for i in range(3)]).to("cpu")
    with torch.no_grad(): said = net(x)
    torch.testing.assert_close(R.feature_space(net, device="cpu").embed(batch), said.feature)
    torch.testing.assert_close(R.affect_space(net, device="cpu").embed(batch), torch.stack([said.valence, said.arousal], 1))
    assert R.feature_space(net, device="cpu").fingerprint != R.affect_space(net, device="cpu").fingerprint


def test_expression_codes(pictures, tmp_path):
    torch.manual_seed(0)
    encoders = Encoders("efficientnet_lite0")
    space = R.codes_space(encoders, device="cpu", size=64)
    index = R.build_index(pictures.subset(np.arange(4)), space, tmp_path / "codes")
    assert index.features.shape == (4, encoders.layout["exp"] + 3)
    with torch.no_grad(): codes = encoders(nn.functional.interpolate(pictures[2].image[None] / 255, (64, 64), mode="bilinear", align_corners=False))
    np.testing.assert_allclose(index.features[2], torch.cat([codes.exp, codes.jaw], 1)[0], atol=1e-5)


def test_faces_without_labels_have_no_place(tmp_path):
    index = R.build_index(faces_of(4, valence=[0.1, np.nan, 0.3, 0.4], arousal=[0.0, 0.0, np.nan, 0.5]), R.label_space(), tmp_path / "a")
    assert index.row.tolist() == [0, 3]
    np.testing.assert_allclose(index.features, [[0.1, 0], [0.4, 0.5]], atol=1e-6)
    with pytest.raises(EmocaError, match="no face has a place"): R.build_index(faces_of(3), R.label_space(), tmp_path / "b")


# ---- search

@pytest.mark.parametrize("metric", R.METRICS)
@pytest.mark.parametrize("n, d, q", [(300, 6, 4), (50, 1, 1), (700, 33, 30)])
def test_search_is_brute_force(tmp_path, metric, n, d, q):
    r = np.random.default_rng(n)
    vectors, x = r.normal(size=(n, d)).astype(np.float32), r.normal(size=(q, d)).astype(np.float32)
    index = index_of(vectors, tmp_path / "a")
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    exact = np.linalg.norm(x[:, None] - vectors[None], axis=2) if metric == "l2" else 1 - unit(x) @ unit(vectors).T
    distance, number = index.search(x, 10, metric)
    np.testing.assert_allclose(distance, np.sort(exact, 1)[:, :10], atol=2e-3 if metric == "l2" else 1e-5)
    np.testing.assert_allclose(np.take_along_axis(exact, number, 1), np.sort(exact, 1)[:, :10], atol=1e-4)


def test_search_at_its_borders(index):
    distance, number = index.search(index.features[3], 10_000)
    assert number.shape == (1, 300) and sorted(number[0]) == list(range(300)) and number[0, 0] == 3 and distance[0, 0] < 1e-3
    for wrong, message in ((np.zeros((1, 5)), "5 numbers"), (np.full((1, 6), np.nan), "no place"), (np.full((1, 6), np.inf), "no place")):
        with pytest.raises(EmocaError, match=message): index.search(wrong)
    with pytest.raises(EmocaError, match="there is no distance 'l1'"): index.search(index.features[:1], metric="l1")
    for wrong in (dict(k=0), dict(candidates=0), dict(k=-1)):
        with pytest.raises(EmocaError, match="at least one"): index.of([0], **wrong)
    with pytest.raises(EmocaError, match="build_lists"): index.search(index.features[:1], probes=1)


def test_vectors_stay_on_the_disk(index):
    assert isinstance(index.features, np.memmap) and isinstance(index.vectors("cosine"), np.memmap)
    assert not index.features.flags.writeable
    np.testing.assert_allclose(np.linalg.norm(index.vectors("cosine"), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("metric", R.METRICS)
def test_lists(tmp_path, metric):
    r = np.random.default_rng(5)
    vectors = (r.normal(size=(40, 8))[r.integers(40, size=4000)] + 0.2 * r.normal(size=(4000, 8))).astype(np.float32)
    index = index_of(vectors, tmp_path / "a")
    index.build_lists(metric, lists=32, chunk=1000)
    exact = index.search(vectors[:100], 10, metric)
    every, few, one = (index.search(vectors[:100], 10, metric, probes=p) for p in (32, 8, 1))
    np.testing.assert_allclose(every[0], exact[0], atol=2e-3)
    assert R.recall(one[1], exact[1]) <= R.recall(few[1], exact[1]) <= R.recall(every[1], exact[1])
    assert R.recall(few[1], exact[1]) > 0.9 and R.recall(every[1], exact[1]) > 0.99
    again = R.open_index(tmp_path / "a")
    np.testing.assert_array_equal(again.search(vectors[:100], 10, metric, probes=8)[1], few[1])


def slow_pick(groups, own, k, candidates):
    out, seen, looked = [], {own}, 0
    for place, g in enumerate(groups):
        if g < 0 or g == own: continue
        looked += 1
        if looked > candidates: break
        if g not in seen: out.append(place); seen.add(g)
    return (out + [-1] * k)[:k]


@pytest.mark.parametrize("seed", range(20))
def test_one_per_group_is_the_loop(seed):
    r = np.random.default_rng(seed)
    groups, own = r.integers(-1, 9, size=(7, 25)), r.integers(-1, 9, size=7)
    for k, candidates in ((3, 100), (12, 10), (40, 25)):
        want = [slow_pick(g, o, k, candidates) for g, o in zip(groups, own)]
        assert R.one_per_group(groups, own, k, candidates).tolist() == want


def test_neighbours_of_different_videos(index):
    asked = np.arange(0, 300, 7)
    for candidates in (None, 100, 20):
        found = index.of(asked, k=8, candidates=candidates)
        for i, numbers, distance in zip(asked, found.number, found.distance):
            there = numbers >= 0
            videos = index.group[numbers[there]]
            assert len(set(videos)) == there.sum() and index.group[i] not in videos
            assert (np.diff(distance[there]) >= 0).all() and np.isinf(distance[~there]).all()
    everything = index.of(asked, k=8, candidates=None)
    assert (everything.number >= 0).all()
    exact = np.linalg.norm(index.features[asked][:, None] - index.features[None], axis=2)
    nearest = [[min(exact[q][index.group == g]) for g in set(index.group) - {index.group[i]}] for q, i in enumerate(asked)]
    np.testing.assert_allclose(everything.distance, np.sort(nearest, 1)[:, :8], atol=2e-3)


def test_too_few_videos_leave_places_empty(tmp_path):
    index = index_of(np.eye(4), tmp_path / "a", video=["a", "a", "b", "b"], frame=range(4))
    found = index.of([0], k=3, candidates=None)
    assert (found.number[0] >= 0).tolist() == [True, False, False] and index.group[found.number[0, 0]] == index.group[2]


# ---- measures

def slow_measures(index, i, numbers):
    t, k = index.table, len(numbers)
    others = [g for g in sorted(set(index.group)) if g != index.group[i]]
    members = {g: np.flatnonzero(index.group == g) for g in others}
    near = [n for n in numbers if n >= 0]
    share = lambda label: np.mean([np.mean(label[members[g]] == label[i]) for g in others])
    out = dict.fromkeys("precision ndcg best chance va_distance va_chance same_person same_chance".split(), math.nan)
    e, p, va = t.expression.to_numpy(), index.person, t[["valence", "arousal"]].to_numpy()
    has = sum((e[members[g]] == e[i]).any() for g in others)
    if e[i] >= 0 and has:
        hits = [n >= 0 and e[n] == e[i] for n in numbers]
        dcg = lambda h: sum(x / math.log2(j + 2) for j, x in enumerate(h))
        out |= dict(precision=np.mean(hits), ndcg=dcg(hits) / dcg([1] * min(k, has)), best=min(k, has) / k, chance=share(e))
    if not np.isnan(va[i]).any():
        gap = np.linalg.norm(va - va[i], axis=1)
        if len(known := [gap[n] for n in near if not np.isnan(gap[n])]): out["va_distance"] = np.mean(known)
        weights = [(gap[j], 1 / len(members[g])) for g in others for j in members[g] if not np.isnan(gap[j])]
        out["va_chance"] = np.average([w[0] for w in weights], weights=[w[1] for w in weights])
    if p[i] >= 0 and share(p) > 0 and near: out |= dict(same_person=np.mean([p[n] == p[i] for n in near]), same_chance=share(p))
    return out


def test_measures_are_the_loop(index):
    asked = np.arange(0, 300, 11)
    found = index.of(asked, k=6, candidates=7)
    judged = R.judge(index, asked, found)
    want = pd.DataFrame([slow_measures(index, i, n) for i, n in zip(asked, found.number)])
    pd.testing.assert_frame_equal(judged[list(want)], want, check_dtype=False, atol=1e-6)
    assert (found.number < 0).any() and judged.precision.isna().any() and judged.same_person.isna().any(), "the difficult cases occur"
    assert (judged.found == (found.number >= 0).sum(1)).all()


def test_chance_is_what_random_vectors_reach(tmp_path):
    n = 2000
    r = np.random.default_rng(0)
    affect = dict(valence=r.uniform(-1, 1, n), arousal=r.uniform(-1, 1, n))
    columns = dict(expression=r.integers(4, size=n), identity=[f"p{i}" for i in r.integers(40, size=n)], **affect)
    index = index_of(r.normal(size=(n, 5)), tmp_path / "a", **columns)
    judged = R.judge(index, np.arange(n), index.of(np.arange(n), k=10))
    said = R.summary(judged)
    assert abs(said.precision - judged.chance.mean()) < 0.01 and abs(said.va_distance - judged.va_chance.mean()) < 0.01 and 0.85 < said.leakage < 1.15


def test_leakage_is_seen(tmp_path):
    r = np.random.default_rng(1)
    person = np.repeat(np.arange(20), 10)
    vectors = r.normal(size=(20, 8))[person] + 0.05 * r.normal(size=(200, 8))
    index = index_of(vectors, tmp_path / "a", identity=[f"p{p}" for p in person], expression=r.integers(3, size=200))
    said = R.summary(R.judge(index, np.arange(200), index.of(np.arange(200), k=9)))
    assert said.same_person > 0.99 and said.leakage == pytest.approx(199 / 9, rel=0.02)


def test_interval_covers(tmp_path):
    "Of 200 sets of queries, five alike in each of 30 clusters, 95 % of the intervals should hold the true mean."
    r, inside = np.random.default_rng(0), 0
    for seed in range(200):
        cluster = np.repeat(np.arange(30), 5)
        judged = pd.DataFrame(dict(cluster=cluster, precision=0.5 + r.normal(size=30)[cluster] + 0.1 * r.normal(size=150)))
        low, high = R.interval(judged, draws=300, seed=seed)
        inside += low < 0.5 < high
    assert 178 <= inside <= 200
    assert all(map(math.isnan, R.interval(pd.DataFrame(dict(cluster=[0], precision=[np.nan])))))


def test_per_class(index):
    judged = R.judge(index, np.arange(300), index.of(np.arange(300)))
    table = R.per_class(judged)
    for name, value in table.items(): assert value == pytest.approx(judged.precision[judged.expression == R.EMOTIONS.index(name)].mean())


# ---- files

def test_a_finished_index_is_opened(pictures, tmp_path):
    first = R.build_index(pictures, COLOUR, tmp_path / "a", batch=7)
    def never(batch): raise AssertionError("embedded again")
    again = R.build_index(pictures, R.Space("colour", "mean colour", never), tmp_path / "a")
    np.testing.assert_array_equal(again.features, first.features)
    assert not {p.name for p in (tmp_path / "a").iterdir()} & {"building.json", "rows.i64"}


def test_other_network_faces_or_labels_are_refused(pictures, tmp_path):
    net = tiny_net()
    R.build_index(pictures, R.feature_space(net, device="cpu"), tmp_path / "a")
    other = tiny_net()
    other.load_state_dict(net.state_dict())
    R.build_index(pictures, R.feature_space(other, device="cpu"), tmp_path / "a")
    with torch.no_grad(): other.backbone[2].weight[0] += 1e-6
    with pytest.raises(EmocaError, match="index of the space"): R.build_index(pictures, R.feature_space(other, device="cpu"), tmp_path / "a")
    with pytest.raises(EmocaError, match="faces and labels"): R.open_index(tmp_path / "a", faces=pictures.subset(np.arange(29)))
    relabelled = FaceDataset(pictures.labels.assign(expression=1), size=20)
    with pytest.raises(EmocaError, match="faces and labels"): R.open_index(tmp_path / "a", faces=relabelled)


def test_a_building_index_of_another_space_is_refused(pictures, tmp_path):
    def stops(batch): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): R.build_index(pictures, R.Space("a", "a", stops), tmp_path / "a")
    with pytest.raises(EmocaError, match="index of the space 'a', not 'mean colour'"): R.build_index(pictures, COLOUR, tmp_path / "a")


KILLED = """
import sys, time, numpy as np
from emoca_nb import retrieval as R
from emoca_nb.data import image_folder
def slow(batch):
    time.sleep(.15)
    print("batch", flush=True)
    return batch.image.mean((2, 3))
R.build_index(image_folder(sys.argv[1], classes=False, size=20), R.Space("colour", "mean colour", slow), sys.argv[2], batch=3)
"""


def test_a_killed_build_goes_on(pictures, tmp_path):
    folder = os.path.dirname(pictures.paths[0])
    run = subprocess.Popen([sys.executable, "-c", KILLED, folder, tmp_path / "a"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(4): assert run.stdout.readline() == "batch\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = json.loads((tmp_path / "a/building.json").read_text())["done"]
    assert 0 < done < 30
    faces, embedded = image_folder(folder, classes=False, size=20), []
    def counted(batch):
        embedded.extend(batch.index.tolist())
        return batch.image.mean((2, 3))
    index = R.build_index(faces, R.Space("colour", "mean colour", counted), tmp_path / "a", batch=4)
    assert embedded == list(range(done, 30)), "only what was missing"
    whole = R.build_index(faces, COLOUR, tmp_path / "b")
    np.testing.assert_array_equal(index.features, whole.features)
    pd.testing.assert_frame_equal(index.table, whole.table)


def test_what_was_written_after_the_last_note_is_cut_off(pictures, tmp_path):
    calls = []
    def fails_third(batch):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return batch.image.mean((2, 3))
    with pytest.raises(KeyboardInterrupt): R.build_index(pictures, R.Space("colour", "mean colour", fails_third), tmp_path / "a", batch=5)
    for name in ("features.f32", "rows.i64"):
        with open(tmp_path / "a" / name, "ab") as f: f.write(b"half of a bat")
    index = R.build_index(pictures, COLOUR, tmp_path / "a", batch=5)
    np.testing.assert_array_equal(index.features, R.build_index(pictures, COLOUR, tmp_path / "b").features)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/building.json").write_text(json.dumps(json.loads((tmp_path / "b/index.json").read_text()) | dict(kept=9, done=9)))
    with pytest.raises(BadFile, match="bytes of a run that was interrupted"): R.build_index(pictures, COLOUR, tmp_path / "c")


def test_unreadable_pictures_are_left_out(tmp_path):
    for i in range(40): Image.new("RGB", (20, 20), (6 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_bytes(b"broken")
    faces = image_folder(tmp_path, classes=False, size=20)
    index = R.build_index(faces, COLOUR, tmp_path / "index", batch=8)
    assert index.row.tolist() == [i for i in range(40) if i != 7]
    assert index.table.path.tolist() == [faces.paths[i] for i in index.row]
    np.testing.assert_allclose(index.features[:, 0], 6 * index.row / 255, atol=1e-6)


DAMAGES = "no json,other format,list,negative,text,short,long,no features,no table,columns,rows,words,class".split(",")


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_files_are_named(index, tmp_path, damage):
    folder = tmp_path / "a"
    shutil.copytree(index.folder, folder)
    about, table = json.loads((folder / "index.json").read_text()), pd.read_csv(folder / "table.csv")
    write = lambda value: (folder / "index.json").write_text(json.dumps(value))
    features = (folder / "features.f32").read_bytes()
    match damage:
        case "no json": (folder / "index.json").write_bytes(b"\xff\x00{")
        case "other format": write(about | dict(format="index 7"))
        case "list": write([about])
        case "negative": write(about | dict(kept=-300))
        case "text": write(about | dict(width="6"))
        case "short": (folder / "features.f32").write_bytes(features[:-4])
        case "long": (folder / "features.f32").write_bytes(features + b"1234")
        case "no features": (folder / "features.f32").unlink()
        case "no table": (folder / "table.csv").unlink()
        case "columns": table.drop(columns="group").to_csv(folder / "table.csv", index=False)
        case "rows": table[:-1].to_csv(folder / "table.csv", index=False)
        case "words": table.assign(group="one").to_csv(folder / "table.csv", index=False)
        case "class": table.assign(expression=8).to_csv(folder / "table.csv", index=False)
    with pytest.raises(BadFile, match=str(folder)): R.open_index(folder)


@pytest.mark.parametrize("damage", ["noise", "cut", "other"])
def test_broken_lists_are_named(tmp_path, damage):
    vectors = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    index = index_of(vectors, tmp_path / "a")
    path = index.build_lists(lists=8)
    if damage == "noise": path.write_bytes(b"noise" * 100)
    if damage == "cut": path.write_bytes(path.read_bytes()[:60])
    if damage == "other": path.write_bytes(index_of(vectors[:400], tmp_path / "b").build_lists(lists=8).read_bytes())
    with pytest.raises(BadFile, match="lists"): R.open_index(tmp_path / "a").search(vectors[:1], probes=1)


def test_a_folder_with_other_things_is_left_alone(pictures, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(EmocaError, match="holds no index"): R.build_index(pictures, COLOUR, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(BadFile, match="index.json"): R.open_index(tmp_path)


TOGETHER = """
import sys, numpy as np, torch, faiss
from emoca_nb import retrieval as R
from emoca_nb.data import image_folder, loader
faiss.omp_set_num_threads(2); torch.set_num_threads(2)
x = np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)
for _ in range(2):
    torch.rand(300, 300) @ torch.rand(300, 300)
    faiss.knn(x[:50], x, 10)
    faces = image_folder(sys.argv[1], classes=False, size=20)
    assert sum(len(b) for b in loader(faces, 8, workers=2)) == 30
    torch.nn.Conv2d(3, 8, 3)(torch.rand(4, 3, 64, 64)).sum().backward()
print("done")
"""


def test_faiss_torch_and_forked_readers_live_together(pictures):
    command = [sys.executable, "-c", TOGETHER, os.path.dirname(pictures.paths[0])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ | dict(OMP_NUM_THREADS="2"))
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-2000:]


# ---- Aff-Wild2

def aff_wild(root, videos):
    "Videos of three frames: name -> tasks it is labelled for."
    for video, tasks in videos.items():
        for frame in (1, 2, 3):
            (file := root / f"cropped_aligned/{video}/{frame:05}.jpg").parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (80 * frame, 9, 9)).save(file)
        classes = "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"
        text = dict(VA="valence,arousal\n0.5,0.25\n-5,-5\n-0.5,0.125\n", EXPR=f"{classes}\n4\n1\n7\n")
        for task in tasks:
            (file := root / f"{task}_Set/{'Validation' if video == 'c' else 'Train'}_Set/{video}.txt").parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text[task])


def test_both_kinds_of_labels_are_joined(tmp_path):
    aff_wild(tmp_path, dict(a=["VA", "EXPR"], b=["VA"], c=["EXPR"]))
    labels = R.aff_wild2_both(tmp_path, size=20).labels.set_index(["video", "frame"])
    assert sorted(labels.index) == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 3), ("c", 1), ("c", 2)]
    assert labels.expression.to_dict() == {("a", 1): 1, ("a", 2): 6, ("a", 3): -1, ("b", 1): -1, ("b", 3): -1, ("c", 1): 1, ("c", 2): 6}
    assert labels.valence["a"].tolist()[::2] == [0.5, -0.5] and math.isnan(labels.valence["a", 2]) and labels.valence["c"].isna().all()
    (tmp_path / "empty/cropped_aligned").mkdir(parents=True)
    with pytest.raises(BadFile, match="text files"): R.aff_wild2_both(tmp_path / "empty")


# ---- pictures and the browser

def png(colour, size=(30, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_place_of_a_picture(pictures):
    vector, crop, note = R.embed_picture(png((51, 102, 204)), COLOUR, 32, "whole")
    np.testing.assert_allclose(vector, [0.2, 0.4, 0.8], atol=1e-6)
    assert crop.shape == (3, 32, 32) and note == ""
    with pytest.raises(EmocaError, match="no place in the space"): R.embed_picture(png((1, 2, 3)), R.label_space())
    with pytest.raises(BadFile): R.embed_picture(b"no picture", COLOUR)


def test_no_face_is_said(monkeypatch):
    monkeypatch.setattr(R, "detect", lambda image, detector: Detection((), image.shape[:2], "none"))
    vector, crop, note = R.embed_picture(png((51, 102, 204)), COLOUR, 32)
    assert crop.shape == (3, 32, 32) and "no face was found" in note


@pytest.fixture
def browser(pictures, tmp_path):
    spaces = {"colour": COLOUR, "given": R.given_space("given", np.arange(30.0)[:, None])}
    indices = {name: R.build_index(pictures, space, tmp_path / name) for name, space in spaces.items()}
    return R.FaceBrowser(pictures, indices, {"colour": COLOUR}, k=4, detector="whole")


def test_a_click_makes_a_neighbour_the_query(browser):
    assert len(browser.near.faces) == 4 and len(browser.offer.faces) == 4
    wanted = browser.listed[2]
    browser.near.clicked({"clicked": 2})
    assert browser.row == wanted and wanted not in browser.listed
    browser.offer.clicked({"clicked": 1})
    assert browser.row == browser.offered[1]
    video = browser.faces.video[browser.row]
    assert video not in {browser.faces.video[i] for i in browser.listed}


MESSAGES = [None, [], {}, *({"clicked": i} for i in (None, "1", -1, 4, True, 0.5, [0]))]


@pytest.mark.parametrize("message", MESSAGES)
def test_other_messages_do_nothing(browser, message):
    before = browser.row, list(browser.listed)
    browser.near.clicked(message)
    assert (browser.row, browser.listed) == before


def test_space_and_distance_are_used(browser):
    browser.ask(12)
    browser.space.value = "given"
    assert browser.listed[0] in (9, 15) and "by given" in browser.said.value
    browser.metric.value = "cosine"
    assert len(browser.listed) == 4
    browser.take([dict(name="x.png", content=memoryview(png((200, 0, 0))))])
    assert "no place" in browser.said.value and browser.near.faces == []
    browser.space.value = "colour"
    assert browser.query.faces[0]["text"] == "your picture" and len(browser.near.faces) == 4


def test_errors_are_shown_as_text(browser):
    browser.take([dict(name="<b>x</b>.png", content=b"<script>")])
    assert "color:#b00" in browser.said.value and "<script>" not in browser.said.value
    browser.say("<b>bold</b>")
    assert "&lt;b&gt;" in browser.said.value


def test_faces_of_one_emotion_are_offered(browser):
    browser.emotion.value = "Sad"
    assert {browser.faces.expression[i] for i in browser.offered} == {2}
    browser.emotion.value = "Contempt"
    assert browser.offered == [] and browser.offer.faces == [] and "no face is Contempt" in browser.said.value


def test_a_still_picture_stands_in_for_the_browser(browser):
    bundle = browser._repr_mimebundle_()
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"]))).size == (5 * 72, 72 + 12)


def test_sheet_shows_empty_places(pictures, tmp_path):
    index = R.build_index(pictures, COLOUR, tmp_path / "a")
    found = index.of([0, 1], k=8)
    sheet = R.neighbour_sheet(pictures, {"colour": (index, np.array([0, 1]), found)}, 20)
    image = np.asarray(Image.open(io.BytesIO(sheet.data)))
    assert image.shape == (2 * 32, 9 * 20, 3)
    assert (found.number[:, 5:] < 0).all() and np.abs(image[14:30, -20:].astype(int) - 230).max() < 8
