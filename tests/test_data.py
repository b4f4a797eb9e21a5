"""Data sets in their publishers' layouts, broken files, samplers, augmentation, the loader."""
import json
import logging
import math
import pickle
from collections import Counter

import av
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from emoca_nb.core import BadFile, EmocaError, UnsafeFile
from emoca_nb.data import (AFFECTNET, MIRROR_68, RECIPES, TURN, Augment, BalancedSampler, Batch, EpochSampler, FaceDataset, GroupSampler, Recipe,
                           Sample, Skipped, Video, afew_va, aff_wild2, affectnet, affectnet8, balanced_weights, check_data, check_data_command,
                           class_index, collate, consistent, draw, face_mask, facial_expressions, folds, image_folder, loader, mirror, move,
                           open_layout, raf_db, vggface2, video_file, voxceleb2)

POINTS = np.stack([20 + 24 * np.random.default_rng(0).random(68), 16 + 30 * np.random.default_rng(1).random(68)], 1)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "emoca_nb")


def picture(path, seed=0, size=64, **options):
    """A drawn picture: noise around a grey that belongs to the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 40, (size, size, 3)) + 20 * (seed % 10)
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


def faces(folder, n=8, **options):
    records = [dict(path=picture(folder / f"{i}.png", i), expression=i % 8, valence=i / n, arousal=-i / n, identity=str(i // 2),
                    landmarks=POINTS) for i in range(n)]
    return FaceDataset(records, size=32, **options)


def affectnet_set(root, lines, split="training"):
    root.mkdir(parents=True, exist_ok=True)
    points = ";".join(f"{v:.3f}" for v in POINTS.ravel())
    text = [",".join(AFFECTNET)] + [f"{name},20,16,24,30,{points if p is None else p},{e},{v},{a}" for name, e, v, a, p in lines]
    (root / f"{split}.csv").write_text("\n".join(text))
    for i, (name, *_) in enumerate(lines): picture(root / "Manually_Annotated/Manually_Annotated_Images" / name, i)
    return root


# the dataset -----------------------------------------------------------------

def test_absent_labels_stay_absent(tmp_path):
    data = FaceDataset([dict(path=picture(tmp_path / "a.png")),
                        dict(path=picture(tmp_path / "b.png"), expression=0, valence=0.0, arousal=0.0, identity="x", landmarks=POINTS)], size=32)
    empty, full = data[0], data[1]
    assert all(getattr(empty, n) is None for n in ("landmarks", "expression", "valence", "arousal", "identity", "video", "frame", "mask"))
    assert (full.expression, full.valence, full.arousal, full.identity) == (0, 0.0, 0.0, "x")
    batch = collate([empty, full]).to()
    assert batch.expression.tolist() == [-1, 0] and batch.identity.tolist() == [-1, 0]
    assert batch.valence.isnan().tolist() == [True, False] and batch.landmarks.isnan().all((1, 2)).tolist() == [True, False]
    assert batch.mask is None and batch.action_units is None


def test_batch_moves_pixels_as_bytes(tmp_path):
    raw = collate([faces(tmp_path)[i] for i in range(3)])
    assert raw.image.dtype == torch.uint8
    assert torch.equal(raw.to().image, raw.image.float() / 255)
    assert torch.equal(raw.to().to().image, raw.to().image)


def test_mask_of_some_is_nan_for_others(tmp_path):
    np.save(tmp_path / "m.npy", np.ones((64, 64), bool))
    data = FaceDataset([dict(path=picture(tmp_path / "a.png"), mask=tmp_path / "m.npy"), dict(path=picture(tmp_path / "b.png", 1))], size=32)
    batch = collate([data[0], data[1]]).to()
    assert (batch.mask[0] == 1).all() and batch.mask[1].isnan().all()


def test_mask_moves_with_the_crop(tmp_path):
    mask = np.zeros((64, 64), np.float32)
    mask[:32] = 1
    np.save(tmp_path / "m.npy", mask)
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sample = FaceDataset([dict(path=tmp_path / "a.png", mask=tmp_path / "m.npy", landmarks=POINTS)], size=48, scale=1.0)[0]
    bright = sample.image[0] > 127
    assert (bright == sample.mask[0].bool()).float().mean() > 0.97


def test_label_map_keeps_the_face(tmp_path):
    labels = np.zeros((64, 64), np.uint8)
    labels[10:50, 10:50], labels[10:20] = 1, 17
    np.save(tmp_path / "m.npy", labels)
    sample = FaceDataset([dict(path=picture(tmp_path / "a.png"), mask=tmp_path / "m.npy")], size=64)[0]
    assert sample.mask[0, 30, 30] == 1 and sample.mask[0, 15, 30] == 0 and sample.mask[0, 60, 60] == 0


def test_draws_depend_on_seed_epoch_and_row_alone(tmp_path):
    data = faces(tmp_path, scale=(1.4, 1.8), shift=0.1, margin=False)
    assert torch.equal(data[3 + TURN].image, data[3 + TURN].image)
    assert not torch.equal(data[3].image, data[3 + TURN].image)
    assert torch.equal(data.subset([3])[0].image, data[3].image)
    assert not torch.equal(faces(tmp_path, scale=(1.4, 1.8), seed=1)[3].image, faces(tmp_path, scale=(1.4, 1.8))[3].image)


def test_training_crop_is_the_published_one(tmp_path):
    data = FaceDataset([dict(path=picture(tmp_path / f"{i}.png", i), landmarks=POINTS) for i in range(300)], size=8, scale=(1.4, 1.8), margin=False)
    (left, top), (right, bottom) = POINTS.min(0), POINTS.max(0)
    sides = []
    for i in range(300):
        crop = data._crop(i, 0, np.zeros((64, 64, 3), np.uint8), POINTS, None, data.rules[0])
        sides.append(crop.side)
        assert crop.center == pytest.approx(((left + right) / 2, (top + bottom) / 2))
    box = (right - left + bottom - top) / 2
    assert all(int(1.4 * box) <= s <= 1.8 * box for s in sides) and max(sides) - min(sides) >= 0.3 * box


def test_shift_moves_by_parts_of_the_box(tmp_path):
    data = faces(tmp_path, shift=0.1, margin=False, scale=1.5)
    box = np.mean(POINTS.max(0) - POINTS.min(0))
    centers = np.array([data._crop(0, e, np.zeros((64, 64, 3), np.uint8), POINTS, None, data.rules[0]).center for e in range(200)])
    off = np.abs(centers - (POINTS.max(0) + POINTS.min(0)) / 2) / box
    assert 0.09 < off.max() <= 0.1 + 1e-9


def test_whole_picture_of_the_right_size_is_left_alone(tmp_path):
    sample = FaceDataset([dict(path=picture(tmp_path / "a.png", size=48))], size=48)[0]
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "a.png")))


@pytest.mark.parametrize("by", [None, "identity", "video"])
def test_split_is_disjoint_and_complete(tmp_path, by):
    data = FaceDataset([dict(path=f"{i}.png", identity=f"p{i % 7}" if i % 5 else None, video=f"v{i % 11}") for i in range(100)])
    parts = data.split((0.6, 0.2, 0.2), by=by, seed=3)
    assert sorted(p for part in parts for p in part.paths) == sorted(data.paths)
    if by:
        names = [{n for n in getattr(part, by) if n is not None} for part in parts]
        assert not (names[0] & names[1] | names[0] & names[2] | names[1] & names[2])
    again = data.split((0.6, 0.2, 0.2), by=by, seed=3)
    assert all(a.paths.tolist() == b.paths.tolist() for a, b in zip(parts, again))
    assert parts[0].paths.tolist() != data.split((0.6, 0.2, 0.2), by=by, seed=4)[0].paths.tolist()


def test_joined_sets_keep_people_and_crops_apart(tmp_path):
    a, b = faces(tmp_path / "a"), faces(tmp_path / "b", crop="whole")
    both = a + b
    assert len(set(both.person)) == 8 and both.person[0] != both.person[8]
    assert torch.equal(both[8].image, b[0].image) and torch.equal(both[0].image, a[0].image)
    without = FaceDataset([dict(path=picture(tmp_path / "c.png"))], size=32)
    assert (a + without)[8].landmarks is None and (without + a)[1].landmarks is not None


def test_records_are_checked():
    with pytest.raises(EmocaError, match="a record has no emotion"): FaceDataset([dict(path="a", emotion=1)])
    data = FaceDataset([dict(path="a", expression=9), dict(path="b", valence=1.2), dict(path="c", arousal=math.inf), dict(path=None),
                        dict(path="d"), dict(path="d"), dict(path="e", expression=1.5)])
    assert data.paths.tolist() == ["d"] and len(data.problems) == 6 and set(data.problems.kind) == {"skipped"}
    assert len(FaceDataset([])) == 0


# what is broken --------------------------------------------------------------

def spoil(folder):
    """Every kind of broken picture; returns the names that cannot be used."""
    whole = picture(folder / "good.jpg", 1)
    jpeg = whole.read_bytes()
    contents = {"truncated.jpg": jpeg[: len(jpeg) // 2], "empty.jpg": b"", "page.jpg": b"<html>not found</html>", "zeros.png": bytes(4000)}
    for name, content in contents.items(): (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    picture(folder / "tiny.png", size=4)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return {"truncated.jpg", "empty.jpg", "page.jpg", "zeros.png", "folder.jpg", "tiny.png", "huge.png", "missing.jpg"}


def oddities(folder):
    """Unusual pictures that can be used, and what a check says about them."""
    im = Image.open(picture(folder / "plain.png", 3))
    im.convert("CMYK").save(folder / "cmyk.jpg")
    im.convert("L").save(folder / "grey.jpg")
    im.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.asarray(im)[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    (folder / "misnamed.jpg").write_bytes((folder / "plain.png").read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(folder / "turned.jpg", exif=exif)
    return {"cmyk.jpg": "CMYK colours", "grey.jpg": "a grey picture", "alpha.png": "transparency", "deep.png": "more than 8 bits",
            "misnamed.jpg": "a PNG file called .jpg", "turned.jpg": "turned by its EXIF tag"}


def test_many_skipped_faces_are_counted_not_listed(tmp_path, caplog):
    data = FaceDataset([dict(path=tmp_path / f"{i}.png") for i in range(30)], size=32, max_bad=1)
    caplog.set_level(logging.WARNING, "emoca_nb")
    assert not list(loader(data, 30))
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 9 and "only counted" in told[7] and "30 of 30 faces skipped" in told[8]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_survives_every_broken_file(tmp_path, workers, caplog):
    bad, good = spoil(tmp_path), ["good.jpg", *oddities(tmp_path), "plain.png"]
    names = sorted(bad) + good
    data = FaceDataset([dict(path=tmp_path / n) for n in names], size=32, max_bad=0.9)
    caplog.set_level(logging.WARNING, "emoca_nb")
    batches = loader(data, 3, shuffle=True, workers=workers)
    for _ in range(2):
        seen = [p for batch in batches for p in batch.path]
        assert sorted(seen) == sorted(str(tmp_path / n) for n in good)
        assert {s.path for s in batches.skipped} == {str(tmp_path / n) for n in bad}
        assert f"{len(bad)} of {len(names)} faces skipped" in caplog.records[-1].getMessage()


def test_too_many_broken_files_stop_the_run(tmp_path):
    spoil(tmp_path)
    names = ["truncated.jpg", "empty.jpg", "missing.jpg", *(picture(tmp_path / f"{i}.png", i).name for i in range(20))]
    data = FaceDataset([dict(path=tmp_path / n) for n in names], size=32)
    with pytest.raises(EmocaError, match="check-data"): list(loader(data, 4))
    few = data.subset([0, *range(3, 23)])
    assert sum(map(len, loader(few, 4))) == 20


def test_a_wrong_folder_is_noticed_early(tmp_path):
    data = FaceDataset([dict(path=tmp_path / f"{i}.png") for i in range(10_000)], size=32)
    with pytest.raises(EmocaError, match="11 of 11 faces cannot be read"): list(loader(data, 4))


@pytest.mark.parametrize("content", [np.zeros((5, 2)), np.zeros((68, 1)), np.full((68, 2), np.nan), np.array(["x"] * 68)])
def test_bad_landmark_files_are_skipped(tmp_path, content):
    np.save(tmp_path / "l.npy", content)
    data = FaceDataset([dict(path=picture(tmp_path / "a.png"), landmarks=tmp_path / "l.npy")], size=32)
    assert isinstance(data.__getitems__([0])[0], Skipped)


def test_landmark_file_with_code_is_refused_and_skipped(tmp_path):
    class Bomb:
        def __reduce__(self): return (print, ("boom",))
    a = np.empty(1, object)
    a[0] = Bomb()
    np.save(tmp_path / "l.npy", a, allow_pickle=True)
    data = FaceDataset([dict(path=picture(tmp_path / "a.png"), landmarks=tmp_path / "l.npy")], size=32)
    skipped, = data.__getitems__([0])
    assert "refused" in skipped.reason


def test_mask_of_another_size_is_skipped(tmp_path):
    np.save(tmp_path / "m.npy", np.ones((10, 10)))
    data = FaceDataset([dict(path=picture(tmp_path / "a.png"), mask=tmp_path / "m.npy")], size=32)
    assert "a mask of shape (64, 64)" in data.__getitems__([0])[0].reason


def test_a_mistake_in_the_program_is_not_a_bad_file(tmp_path):
    data = faces(tmp_path, crop="box")
    data.rules = ({**data.rules[0], "scale": "wide", "crop": "landmarks"},)
    with pytest.raises(TypeError): data.__getitems__([0])


def test_groups_lose_the_whole_group():
    grey = torch.zeros(3, 4, 4, dtype=torch.uint8)
    samples = [Sample(grey, "a", person=0), Sample(grey, "b", person=0), Sample(grey, "c", person=1), Skipped("d", 3, "torn"),
               Sample(grey, "e", person=2), Sample(grey, "f", person=2)]
    batch = collate(samples, group=2)
    assert batch.path == ["a", "b", "e", "f"] and [s.path for s in batch.skipped] == ["d"]


def test_check_lists_each_case_once(tmp_path):
    bad, notes = spoil(tmp_path), oddities(tmp_path)
    records = [dict(path=tmp_path / n) for n in [*sorted(bad), *notes, "plain.png", "plain.png"]]
    data = FaceDataset([*records, dict(path=tmp_path / "good.jpg", valence=3)], size=32)
    table = check_data(data)
    name = table.path.map(lambda p: p.rpartition("/")[2])
    assert set(name[table.kind == "skipped"]) == bad | {"plain.png", "good.jpg"}
    assert dict(zip(name[table.kind == "note"], table.reason[table.kind == "note"])) == notes
    assert len(table) == len(bad) + len(notes) + 2
    assert table.reason.map(len).min() > 5


def test_command_tells_by_exit_code_and_report(tmp_path):
    picture(tmp_path / "set/happy/a.jpg")
    run = lambda *args: CliRunner().invoke(check_data_command, [*map(str, args), "--workers", "0"])
    assert run(tmp_path / "set").exit_code == 0
    (tmp_path / "set/happy/b.jpg").write_bytes(b"")
    done = run(tmp_path / "set", "--report", tmp_path / "bad.csv")
    assert done.exit_code == 1 and "an empty file" in done.output and "1 faces can be used" in done.output
    assert pd.read_csv(tmp_path / "bad.csv").path.str.endswith("b.jpg").sum() == 1
    (tmp_path / "bare").mkdir()
    assert run(tmp_path / "bare").exit_code == 2 and run(tmp_path / "set", "--layout", "raf_db").exit_code == 2


# AffectNet -------------------------------------------------------------------

def lines(*rows): return [(f"{i % 3}/{i:04}.jpg", *row, None) for i, row in enumerate(rows)]


def test_affectnet_labels_and_rules(tmp_path):
    root = affectnet_set(tmp_path, lines((0, 0, 0), (7, -0.4, 0.1), (8, 0.1, 0.2), (9, -2, -2), (10, -2, -2), (3, -2, 0.3)))
    read = lambda **o: affectnet(root, size=32, **o)
    assert read().expression.tolist() == [0, 7, -1]
    assert read(ignore_invalid="like_emonet").expression.tolist() == [0, 7]
    every = read(ignore_invalid=False)
    assert every.expression.tolist() == [0, 7, -1, -1, -1, 3]
    assert np.isnan(every.valence).tolist() == [False, False, False, True, True, True] and every.arousal[5] == np.float32(0.3)
    assert read(classes=7).expression.tolist() == [0] and read(classes=5).expression.tolist() == [0]
    assert read().problems.kind.tolist() == ["rule"] * 3 and read().problems.row.tolist() == [5, 6, 7]
    assert np.allclose(every.landmarks[0], POINTS, atol=1e-3) and every.boxes[0].tolist() == [20, 16, 44, 46]
    assert every[1].expression == 7 and every[1].landmarks.abs().max() < 1


def test_affectnet_bad_rows(tmp_path):
    rows = [("a.jpg", 1, "nan", 0, None), ("b.jpg", 1, "", 0, None), ("c.jpg", 1, 1.01, 0, None), ("d.jpg", 1, 0, -1.5, None),
            ("e.jpg", 11, 0, 0, None), ("f.jpg", "x", 0, 0, None),
            ("g.jpg", 1, 0, 0, "1;2;3"), ("h.jpg", 1, 0, 0, ";".join(["nan"] * 136)), ("i.jpg", 1, 0, 0, None), ("i.jpg", 2, 0, 0, None),
            ("", 1, 0, 0, None)]
    root = affectnet_set(tmp_path, [r for r in rows if r[0]])
    with open(root / "training.csv", "a") as f: f.write("\n,0,0,9,9," + ";".join(["1"] * 136) + ",1,0,0")
    data = affectnet(root, size=32)
    assert [p[-5:] for p in data.paths] == ["i.jpg"]
    assert sorted(data.problems.row) == [2, 3, 4, 5, 6, 7, 8, 9, 11, 12]


def test_affectnet_commas_between_landmarks(tmp_path):
    root = affectnet_set(tmp_path, [("a.jpg", 1, 0, 0, '"[' + ",".join(f"{v:.3f}" for v in POINTS.ravel()) + ']"')], "testing_emonet_split_clean")
    assert np.allclose(affectnet(root, "testing_emonet_split_clean").landmarks[0], POINTS, atol=1e-3)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\0\1\2" * 100, '"' + "x" * 1000])
def test_affectnet_csv_that_is_none(tmp_path, text):
    (tmp_path / "training.csv").write_text(text)
    with pytest.raises(BadFile, match="training.csv"): affectnet(tmp_path)


def test_toisoul_split(tmp_path):
    root = affectnet_set(tmp_path, lines(*[(1, 0.5, 0.1)] * 10))
    entry = dict(expression=np.int64(3), valence=np.float64(0.1), arousal=0.9, expression_correct=np.bool_(True), landmarks=np.zeros((68, 2)))
    parts = dict(val={"x/AffectNet/0/0000.jpg": entry, "1/0001.jpg": {**entry, "expression_correct": 0}, "2/0002.jpg": {**entry, "expression": 8}},
                 test={"0/0003.jpg": entry})
    for name, part in parts.items(): (root / f"{name}_fullpath.pkl").write_bytes(pickle.dumps(part))
    splits = "training_emonet_split", "validation_emonet_split", "validation_emonet_split_clean", "testing_emonet_split_clean"
    size = {split: len(affectnet(root, split, emonet=root)) for split in splits}
    assert list(size.values()) == [6, 3, 1, 1]
    assert affectnet(root, "validation_emonet_split", emonet=root).expression.tolist() == [1, 1, 1]
    clean = affectnet(root, "validation_emonet_split_clean", emonet=root)
    assert clean.expression.tolist() == [3] and clean.arousal[0] == np.float32(0.9)
    affectnet_set(root, lines((2, -0.5, 0.1)), "validation_emonet_split")
    assert affectnet(root, "validation_emonet_split", emonet=root).expression.tolist() == [2]


def test_toisoul_pickle_with_code_is_refused(tmp_path):
    root = affectnet_set(tmp_path, lines((1, 0.5, 0.1)))
    class Bomb:
        def __reduce__(self): return (print, ("boom",))
    (root / "val_fullpath.pkl").write_bytes(pickle.dumps({"0/0000.jpg": Bomb()}))
    with pytest.raises(UnsafeFile, match="print"): affectnet(root, "validation_emonet_split", emonet=root)


def test_cleaned_rule_against_its_table():
    rng = np.random.default_rng(0)
    e, v, a = rng.integers(0, 8, 4000), rng.uniform(-1, 1, 4000), rng.uniform(-1, 1, 4000)
    def slow(e, v, a):
        r = (v * v + a * a) ** 0.5
        return [r < 0.2, v > 0 and r > 0.2, v < 0 and r > 0.2, a > 0 and r > 0.2, a >= 0 and v <= 0 and r > 0.2, v < 0 and r > 0.3,
                a > 0 and r > 0.2, v < 0 and r > 0.2][e]
    assert consistent(e, v, a).tolist() == [bool(slow(*x)) for x in zip(e, v, a)]


def test_agreeing_filter(tmp_path):
    root = affectnet_set(tmp_path, lines((1, 0.5, 0), (1, -0.5, 0), (8, 0.5, 0)))
    assert affectnet(root, agreeing=True).valence.tolist() == [0.5]


def test_class_index():
    assert class_index(torch.arange(-1, 8), 5).tolist() == [-1, 0, 1, 2, 3, -1, -1, 4, -1]
    assert class_index(torch.arange(-1, 8), 8).tolist() == list(range(-1, 8))


def test_affectnet8_two_ways(tmp_path):
    for i in range(3):
        picture(tmp_path / f"train_set/images/{i}.jpg", i)
        (tmp_path / "train_set/annotations").mkdir(exist_ok=True)
        for kind, value in dict(exp=i, val=0.1 * i, aro=-0.1 * i).items():
            np.save(tmp_path / f"train_set/annotations/{i}_{kind}.npy", np.array(str(value)) if i else np.float64(value))
    (tmp_path / "cage.csv").write_text("number,exp,val,aro\n2,2,0.2,-0.2\n0,x,0,0\n1,1,,0\n")
    whole, part = affectnet8(tmp_path, size=32), affectnet8(tmp_path, csv=tmp_path / "cage.csv", size=32)
    assert whole.expression.tolist() == [0, 1, 2] and np.allclose(whole.arousal, [0, -0.1, -0.2])
    assert part.expression.tolist() == [2] and part.problems.row.tolist() == [3, 4] and part[0].expression == 2


# the others ------------------------------------------------------------------

def afew_set(root, videos=10, frames=3):
    for v in range(1, videos + 1):
        said = {f"{f:05}": dict(valence=v - 5, arousal=f, landmarks=POINTS.tolist()) for f in range(frames)}
        for f in range(frames): picture(root / f"{v:03}/{f:05}.png", v * 10 + f)
        (root / f"{v:03}/{v:03}.json").write_text(json.dumps(dict(video_id=f"{v:03}", actor=f"actor {v % 4}", frames=said)))
    return root


def test_afew_va(tmp_path):
    data = afew_va(afew_set(tmp_path), size=32)
    assert len(data) == 30 and data.valence.min() == np.float32(-0.4) and data.arousal.max() == np.float32(0.2)
    sample = data[4]
    assert (sample.video, sample.frame, sample.identity) == ("002", 1, "actor 2") and sample.expression is None
    tests = [part for _, part in folds(data)]
    assert sorted(p for t in tests for p in t.paths) == sorted(data.paths) and all(len(t) == 6 for t in tests)
    assert all(not set(a.video) & set(b.video) for a, b in folds(data))
    assert [len(p) for p in data.split((0.6, 0.2, 0.2), by="video")] == [18, 6, 6]


GOOD_FRAME = dict(valence=0, arousal=0, landmarks=POINTS.tolist())


WRONG = dict(valence=None), dict(valence=10**400), dict(landmarks=[[1, 2]]), dict(landmarks="x"), dict(valence=99)


BAD_FRAMES = [("00000", GOOD_FRAME | change) for change in WRONG] + [("00000", []), ("one", GOOD_FRAME), ("9" * 5000, GOOD_FRAME)]


@pytest.mark.parametrize("name, said", BAD_FRAMES)
def test_afew_va_bad_frames(tmp_path, name, said):
    (tmp_path / "001").mkdir()
    (tmp_path / "001/001.json").write_text(json.dumps(dict(frames={name: said})))
    data = afew_va(tmp_path)
    assert len(data) == 0 and len(data.problems) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"frames": 3}', "[" * 100_000, "{", '{"frames": {}}'])
def test_afew_va_bad_json(tmp_path, text):
    (tmp_path / "001").mkdir()
    (tmp_path / "001/001.json").write_text(text)
    with pytest.raises(BadFile, match="001.json"): afew_va(tmp_path)


def test_afew_va_oblong_pixels(tmp_path):
    root = afew_set(tmp_path, 1, 1)
    picture(root / "001/00000.png", size=64)
    Image.new("RGB", (720, 576)).save(root / "001/00000.png")
    wide = afew_va(root, size=32)[0].landmarks
    flat = afew_va(root, size=32, stretch=None)[0].landmarks
    ratio = lambda p: float((p[:, 0].max() - p[:, 0].min()) / (p[:, 1].max() - p[:, 1].min()))
    assert ratio(wide) / ratio(flat) == pytest.approx(4 / 3, rel=1e-3)


def test_aff_wild2(tmp_path):
    notes = tmp_path / "annotations"
    for name, text in {"VA_Set/Training_Set/1.txt": "valence,arousal\n0.5,-0.5\n-5,0.1\n0.1,-5\n0.2,0.3\n0.4\n",
                       "VA_Set/Validation_Set/2_right.txt": "valence,arousal\n0,0\n",
                       "EXPR_Set/Training_Set/1.txt": "\n".join(["Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other", *map(str, range(-1, 9))]),
                       "AU_Set/Training_Set/1.txt": "AU1,AU2\n0,1\n-1,1\n2,0\n"}.items():
        (notes / name).parent.mkdir(parents=True, exist_ok=True)
        (notes / name).write_text(text)
    for i in range(1, 11): picture(tmp_path / f"cropped_aligned/1/{i:05}.jpg", i)
    picture(tmp_path / "cropped_aligned/2_right/00001.jpg")
    va = aff_wild2(tmp_path, size=32)
    assert va.frame.tolist() == [1, 4] and va.valence.tolist() == [0.5, np.float32(0.2)] and va.problems.kind.tolist() == ["rule", "rule", "skipped"]
    assert va[1].path.endswith("1/00004.jpg")
    assert aff_wild2(tmp_path, split="validation").video.tolist() == ["2_right"]
    expr = aff_wild2(tmp_path, "expr")
    assert expr.expression.tolist() == [0, 6, 5, 4, 1, 2,
                                        3] and expr.frame.tolist() == list(range(2, 9)) and Counter(expr.problems.kind) == {"rule": 2, "skipped": 1}
    units = aff_wild2(tmp_path, "au", size=32)
    assert units.unit_names == ("AU1", "AU2") and units[0].action_units.tolist() == [0, 1] and len(units) == 1
    with pytest.raises(BadFile): aff_wild2(tmp_path, "au", "validation")
    (tmp_path / "cropped_aligned/1/00004.jpg").unlink()
    assert aff_wild2(tmp_path).frame.tolist() == [1] and aff_wild2(tmp_path).problems.reason.str.contains("no face found").sum() == 1


def test_raf_db(tmp_path):
    base = tmp_path / "basic"
    (base / "EmoLabel").mkdir(parents=True)
    lines = [f"train_{i:05}.jpg {i}" for i in range(1, 8)] + ["train_00008.jpg 0", "train_00009.jpg x", "test_0001.jpg 7", ""]
    (base / "EmoLabel/list_patition_label.txt").write_text("\n".join(lines))
    for i in range(1, 8):
        picture(base / f"Image/aligned/train_{i:05}_aligned.jpg", i)
        picture(base / f"Image/original/train_{i:05}.jpg", i)
    (base / "Annotation/boundingbox").mkdir(parents=True)
    (base / "Annotation/boundingbox/train_00001_boundingbox.txt").write_text("10.5 11 50 52 \n")
    data = raf_db(tmp_path, size=32)
    assert data.expression.tolist() == [3, 4, 5, 1, 2, 6, 0] and data.problems.row.tolist() == [8, 9]
    assert raf_db(tmp_path, "test").expression.tolist() == [0]
    original = raf_db(tmp_path, pictures="original", size=32)
    assert original.boxes[0].tolist() == [10.5, 11, 50,
                                          52] and np.isnan(original.boxes[1]).all() and original[0].image.shape == original[1].image.shape


def test_identity_sets_and_their_batches(tmp_path):
    for person in range(4):
        for i in range(5):
            name = f"n{person:06}/{i:04}_01"
            picture(tmp_path / f"train/{name}.jpg", person)
            for folder, array in {"train_annotated_torch7": np.c_[POINTS, POINTS[:, :1]], "seg": np.ones((64, 64, 1))}.items():
                (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
                np.save(tmp_path / folder / f"{name}.npy", array)
    rows = [[f"n{p:06}/{i:04}_01" for i in range(5)] + ["n000003/0000_01"] for p in range(3)]
    np.save(tmp_path / "list.npy", np.array(rows))
    data = vggface2(tmp_path, tmp_path / "list.npy", masks="seg", size=32)
    assert len(data) == 15 and len(vggface2(tmp_path)) == 20
    for batch in loader(data, 8, GroupSampler(data.person, 2, seed=1), workers=2):
        assert (batch.identity[0::2] == batch.identity[1::2]).all() and (batch.index[0::2] != batch.index[1::2]).all() and batch.mask.min() == 1
    (tmp_path / "train/n000000/0000_01.jpg").write_bytes(b"")
    batches = list(loader(data, 4, GroupSampler(data.person, 2, seed=1)))
    assert all(len(b) % 2 == 0 and (b.identity[0::2] == b.identity[1::2]).all() for b in batches)
    with pytest.raises(EmocaError, match="whole groups"): loader(data, 5, GroupSampler(data.person, 2))


@pytest.mark.parametrize("names", [np.array(["../../etc/passwd"]), np.array(["/etc/passwd"]), np.arange(3)])
def test_name_lists_stay_inside(tmp_path, names):
    picture(tmp_path / "train/n1/1.jpg")
    np.save(tmp_path / "list.npy", names)
    with pytest.raises(BadFile, match="list.npy"): vggface2(tmp_path, tmp_path / "list.npy")


def test_voxceleb2_keeps_the_first_frame_and_consecutive_frames(tmp_path):
    for clip in range(3):
        for frame in range(7): picture(tmp_path / f"images_cropped/id{clip // 2}/v{clip}/00001/{frame:05}.png", clip)
    data = voxceleb2(tmp_path, landmarks=None, size=32)
    assert sorted(set(data.identity)) == ["id0", "id1"] and data.frame.min() == 0 and data.labels.groupby("video").size().tolist() == [7, 7, 7]
    clips = pd.factorize(data.video)[0]
    groups = GroupSampler(clips, 3, consecutive=True).order(0).reshape(-1, 3)
    assert len(groups) == 6 and (np.diff(data.frame[groups], axis=1) == 1).all()


def test_facial_expressions(tmp_path):
    (tmp_path / "data").mkdir()
    rows = ["user.id,image,emotion", "1,Al_Pacino_0001.jpg,ANGER", "1,Al_Pacino_0002.jpg,happiness", "2,Dileep_17.jpg,Neutral",
            "3,f_28685k.jpg,joyish", "1,Al_Pacino_0001.jpg,sadness"]
    (tmp_path / "data/legend.csv").write_text("\n".join(rows))
    data = facial_expressions(tmp_path)
    assert data.expression.tolist() == [6, 1, 0] and data.identity.tolist() == ["Al_Pacino", "Al_Pacino", "Dileep"]
    assert sorted(data.problems.row) == [5, 6]


def test_facial_expressions_at_hand(root):
    folder = root.parent / "shared/data/facial_expressions"
    if not folder.is_dir(): pytest.skip("needs the photographs in ../shared/data/facial_expressions, which are not on this machine")
    data = facial_expressions(folder, size=64)
    assert len(data) == 2526 and Counter(data.expression.tolist()) == {0: 900, 1: 900, 3: 268, 6: 204, 2: 159, 5: 73, 4: 13, 7: 9}
    parts = [facial_expressions(folder, part, size=64) for part in ("training", "validation", "testing")]
    people = [set(part.identity) for part in parts]
    assert sum(map(len, parts)) == 2526 and sum(map(len, people)) == len(set.union(*people)) == len(set(data.identity))
    shares = np.stack([np.bincount(part.expression, minlength=8)[[0, 1, 2, 3, 6]] for part in parts])
    assert (abs(shares / shares.sum(0) - [[.6], [.2], [.2]]) < .1).all()
    assert data[100].image.shape == (3, 64, 64)


def test_image_folder_and_layouts(tmp_path):
    for name in ("Anger", "3", "misc", ".hidden"): picture(tmp_path / name / "a.png")
    data = image_folder(tmp_path, size=32)
    assert sorted(data.expression.tolist()) == [-1, 3, 6]
    assert image_folder(tmp_path, classes=False).expression.tolist() == [-1, -1, -1]
    assert [d.name for d in open_layout(tmp_path)] == [tmp_path.name]
    with pytest.raises(EmocaError, match="choose one of"): open_layout(tmp_path, "affectnet9")


@pytest.mark.parametrize("codec, options", [("mpeg4", dict(g="10")), ("mpeg4", dict(g="12", bf="2")), ("libx264", dict(g="9", bf="3"))])
def test_video_frames_in_any_order(tmp_path, codec, options):
    path = str(tmp_path / "v.mp4")
    try:
        with av.open(path, "w") as out:
            stream = out.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(30): out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 5 * i + 40, np.uint8))))
            out.mux(stream.encode())
    except (av.FFmpegError, ValueError): pytest.skip(f"this build of PyAV cannot encode {codec}")
    video = Video(path)
    whole = [f.to_ndarray(format="rgb24") for f in av.open(path).decode(video=0)]
    assert len(video) == len(whole) == 30
    for i in [0, 1, 2, 29, 7, 8, 6, 25, 10, 9, 9, 0]: assert np.array_equal(video[i], whole[i]), i
    with pytest.raises(IndexError): video[30]
    data = video_file(path, every=10, size=32)
    assert data.frame.tolist() == [0, 10, 20] and data[1].video == "v"
    for batch in loader(data, 3, workers=2): assert len(batch) == 3


def test_broken_videos(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0" * 5000)
    (tmp_path / "b.mp4").write_bytes(b"")
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        with pytest.raises(BadFile, match=name): Video(tmp_path / name)
    data = FaceDataset([dict(path=tmp_path / "a.mp4", frame=0)], size=32)
    assert isinstance(data.__getitems__([0])[0], Skipped)


# detectors -------------------------------------------------------------------

def test_landmarks_are_found_where_the_records_have_none(tmp_path, monkeypatch):
    pytest.importorskip("dlib"), pytest.importorskip("face_recognition_models")
    monkeypatch.setenv("EMOCA_NB_DATA", str(tmp_path / "cache"))
    from skimage.data import astronaut
    Image.fromarray(astronaut()).save(tmp_path / "a.png")
    picture(tmp_path / "noise.png")
    data = FaceDataset([dict(path=tmp_path / "a.png"), dict(path=tmp_path / "noise.png")], size=64, detector="dlib")
    sample, skipped = data.__getitems__([0, 1])
    assert sample.landmarks.shape == (68, 2) and sample.landmarks.abs().max() < 1 and skipped.reason == "none (dlib) instead of a face"
    assert FaceDataset([dict(path=tmp_path / "a.png")], size=64)[0].landmarks is None


# samplers and loader ---------------------------------------------------------

def labels(n=2000, seed=0):
    rng = np.random.default_rng(seed)
    e = rng.choice(8, n, p=[0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.08, 0.02])
    return pd.DataFrame(dict(expression=e, valence=rng.beta(2, 5, n) * 2 - 1, arousal=rng.beta(5, 2, n) * 2 - 1))


def test_weights_are_one_over_the_true_count():
    table = labels()
    weights = balanced_weights(table)
    assert all(weights[i] == 1 / (table.expression == e).sum() for i, e in enumerate(table.expression))
    for by, columns in dict(valence=["valence"], arousal=["arousal"], va=["valence", "arousal"]).items():
        weights, cells = balanced_weights(table, by, bins=10), (np.floor((table[columns] + 1) * 5)).apply(tuple, axis=1)
        counts = Counter(cells)
        assert np.allclose(weights, [1 / counts[c] for c in cells]) and weights.sum() == pytest.approx(len(counts))


def test_weights_of_absent_labels():
    table = labels(50)
    table.loc[3, "valence"], table.loc[4, "expression"] = np.nan, -1
    assert balanced_weights(table, "va")[3] == 0 and balanced_weights(table)[4] == 0 and balanced_weights(table, "arousal")[3] > 0
    with pytest.raises(EmocaError, match="no face has a label"): balanced_weights(table.assign(expression=-1))
    with pytest.raises(EmocaError, match="not by 'mood'"): balanced_weights(table, "mood")
    assert balanced_weights(pd.DataFrame(dict(valence=[-1.0, 1.0, 1.0])).assign(expression=-1), "valence").tolist() == [1, 0.5, 0.5]


def test_balanced_draws_are_balanced():
    table = labels()
    drawn = table.expression[BalancedSampler(balanced_weights(table), 16_000, seed=2).order(0)]
    assert np.abs(np.bincount(drawn, minlength=8) / 2000 - 1).max() < 0.08


@pytest.mark.parametrize("make",
                         [lambda: EpochSampler(100, 5), lambda: BalancedSampler(np.arange(100), seed=5),
                          lambda: GroupSampler(np.arange(100) // 7, 3, seed=5)])
def test_order_is_a_function_of_seed_and_epoch(make):
    one, two = make(), make()
    for _ in range(3): list(one)
    one.set_epoch(4), two.set_epoch(4)
    assert list(one) == list(two) and len(list(one)) == len(one)
    first = [i % TURN for i in one]
    one.set_epoch(5)
    assert {i // TURN for i in one} == {5} and [i % TURN for i in one] != first


def test_groups_cover_everybody_over_epochs():
    person = np.array([0] * 7 + [1] * 3 + [2] * 2 + [-1] * 4)
    sampler, seen = GroupSampler(person, 3), set()
    for epoch in range(20):
        groups = sampler.order(epoch).reshape(-1, 3)
        assert all(len({*person[g]}) == 1 and len({*g}) == 3 for g in groups) and len(groups) == 3
        seen |= set(groups.flatten())
    assert seen == set(range(10))
    with pytest.raises(EmocaError, match="nobody has 9"): GroupSampler(person, 9)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_data(tmp_path, workers):
    data = faces(tmp_path, 12, scale=(1.2, 1.6), shift=0.1)
    def run(workers):
        batches = loader(data, 4, shuffle=True, seed=7, workers=workers)
        for epoch in (0, 1):
            batches.sampler.set_epoch(epoch)
            yield from batches
    for a, b in zip(run(0), run(workers), strict=True):
        assert torch.equal(a.image, b.image) and a.path == b.path and torch.equal(a.landmarks, b.landmarks)


def test_a_run_can_go_on_in_the_middle_of_an_epoch(tmp_path):
    data = faces(tmp_path, 12, scale=(1.2, 1.6))
    batches = loader(data, 3, shuffle=True)
    batches.sampler.set_epoch(2)
    whole = list(batches)
    rest = list(batches.sampler)[6:]
    late = collate(data.__getitems__(rest[:3])).to()
    assert torch.equal(late.image, whole[2].image) and late.index.tolist() == whole[2].index.tolist()


# crops kept on disk ----------------------------------------------------------

def test_kept_crops_follow_their_pictures(tmp_path):
    data = faces(tmp_path / "a")
    kept = data.cached(tmp_path / "kept")
    for batch in loader(kept, 4, workers=2): pass
    assert kept.store["known"].all()
    for i in range(8): assert torch.equal(kept[i].image, data[i].image) and torch.equal(kept[i].landmarks, data[i].landmarks)
    assert len(list((tmp_path / "kept").iterdir())) == 1 and data.cached(tmp_path / "kept").store["known"].all()
    picture(tmp_path / "a/3.png", 77)
    assert not data.cached(tmp_path / "kept").store["known"].any()
    assert not faces(tmp_path / "a", scale=1.3).cached(tmp_path / "kept").store["known"].any()


def test_kept_crops_of_bad_and_maskless_faces(tmp_path):
    np.save(tmp_path / "m.npy", np.ones((64, 64)))
    data = FaceDataset([dict(path=picture(tmp_path / "a.png"), mask=tmp_path / "m.npy"), dict(path=picture(tmp_path / "b.png")),
                        dict(path=tmp_path / "c.png")], size=32)
    kept = data.cached(tmp_path / "kept")
    for _ in range(2):
        a, b, c = kept.__getitems__([0, 1, 2]) if _ == 0 else (kept[0], kept[1], None)
        assert a.mask.min() == 1 and b.mask is None and b.landmarks is None and (c is None or isinstance(c, Skipped))
    assert kept.store["known"].tolist() == [2, 1, 0]
    file, = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(BadFile, match="delete the file"): data.cached(tmp_path / "kept")


# masks and augmentation ------------------------------------------------------

def test_mirror_names_are_an_involution_and_symmetric():
    assert [MIRROR_68[i] for i in MIRROR_68] == list(range(68))
    assert [i for i in range(68) if MIRROR_68[i] == i] == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]
    image, points = torch.rand(2, 3, 8, 8), torch.rand(2, 68, 2) * 2 - 1
    flipped, moved = mirror(image, points)
    assert torch.equal(flipped[..., 0], image[..., -1]) and torch.allclose(moved[:, 45, 0], -points[:, 36, 0])
    assert torch.equal(moved[:, 8, 1], points[:, 8, 1])


def test_face_mask_against_the_hull():
    from scipy.spatial import Delaunay
    points = torch.tensor(np.random.default_rng(0).uniform(-0.7, 0.7, (1, 68, 2)), dtype=torch.float32)
    grid = (np.stack(np.meshgrid(np.arange(96), np.arange(96)), -1) + 0.5) / 48 - 1
    inside = Delaunay(points[0].numpy()).find_simplex(grid) >= 0
    mask = face_mask(points, 96)[0, 0].numpy()
    assert (mask[inside] == 1).mean() > 0.999 and (mask != inside).mean() < 0.02
    assert face_mask(torch.full((1, 68, 2), 9.0), 32).sum() == 0 and face_mask(torch.full((1, 68, 2), math.nan), 32).isnan().all()


def batch_of(n=6, size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 68, 2, generator=g) - 0.5
    image = torch.nn.functional.interpolate(torch.rand(n, 3, 8, 8, generator=g), size, mode="bicubic").clamp(0, 1)
    return Batch(image, points, *[torch.zeros(n)] * 5, path=[""] * n, mask=face_mask(points, size))


def test_recipes_are_the_published_ones():
    for name, (low, high, shift) in dict(emoca=(0.9, 1.1, 0.05), emotion=(0.8, 1.2, 0.1)).items():
        d = draw(RECIPES[name], 20_000, torch.Generator().manual_seed(0))
        zoom, angle = d.matrix[:, :, :2].det().sqrt(), torch.rad2deg(torch.atan2(d.matrix[:, 1, 0], d.matrix[:, 0, 0]))
        assert low <= zoom.min() < low + 0.01 and high - 0.01 < zoom.max() <= high + 1e-6
        assert 9.9 < angle.abs().max() <= 10.001 and 2 * shift * 0.99 < d.matrix[:, :, 2].abs().max() <= 2 * shift + 1e-6
        assert not d.flip.any() and ((d.kind.bincount(minlength=5) / 20_000 - 0.2).abs() < 0.015).all()
        for kind, (a, b) in enumerate([(50, 90), (0, 10), (0, 1.5), (0, 0.5)]):
            amount = d.amount[d.kind == kind]
            assert a <= amount.min() < a + 0.02 * (b - a) and b - 0.02 * (b - a) < amount.max() <= b


def test_augmentation_is_a_function_of_seed_and_step():
    batch, augment = batch_of(), Augment("emotion", seed=3)
    torch.manual_seed(0)
    one = augment(batch, 10)
    torch.manual_seed(99)
    two = Augment("emotion", seed=3)(batch, 10)
    assert torch.equal(one.image, two.image) and torch.equal(one.landmarks, two.landmarks) and torch.equal(one.mask, two.mask)
    assert not torch.equal(one.image, augment(batch, 11).image) and not torch.equal(one.image, Augment("emotion", seed=4)(batch, 10).image)
    assert 0 <= one.image.min() and one.image.max() <= 1 and one.image.shape == batch.image.shape
    assert torch.equal(Augment("none")(batch, 1).image, batch.image)
    with pytest.raises(EmocaError, match="there is no recipe"): Augment("emocca")


def test_picture_landmarks_and_mask_move_together():
    batch = batch_of(size=128)
    moved = move(batch, draw(Recipe((0.9, 1.1), 20, 0.05, flip=0.5), 6, torch.Generator().manual_seed(4)))
    again = face_mask(moved.landmarks, 128)
    assert ((moved.mask > 0.5).float() != again).float().mean() < 0.01
    look = lambda b: torch.nn.functional.grid_sample(b.image, b.landmarks[:, :, None], align_corners=False)[..., 0]
    flipped = draw(Recipe((0.9, 1.1), 20, 0.05, flip=0.5), 6, torch.Generator().manual_seed(4)).flip
    assert 0 < flipped.sum() < 6
    before = look(batch)
    before[flipped] = before[flipped][..., MIRROR_68]
    assert (look(moved) - before).abs().max() < 0.02


def test_absent_landmarks_and_masks_stay_absent():
    batch = batch_of()
    batch.landmarks[1], batch.mask[2] = math.nan, math.nan
    out = Augment("emoca")(batch, 0)
    assert out.landmarks.isnan().all((1, 2)).tolist() == [False, True] + [False] * 4
    assert out.mask.isnan().flatten(1).all(1).tolist() == [False, False, True] + [False] * 3


def test_jpeg_is_like_jpeg():
    """kornia's differentiable codec beside libjpeg's, on a picture with edges."""
    import io
    image = batch_of(1, 64).image
    image[..., 20:40, 20:40] = torch.tensor([0.9, 0.2, 0.1])[None, :, None, None]
    batch = Batch(image, torch.zeros(1, 68, 2), *[torch.zeros(1)] * 5, path=[""])
    tries = (Augment(Recipe(jpeg=(50, 50)))(batch, step).image for step in range(50))
    ours = next(out for out in tries if (out - image).abs().max() > 0.01)
    file = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=50)
    theirs = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None] / 255
    error = (theirs - image).abs().mean()
    assert (ours - theirs).abs().mean() < 1.5 * error
