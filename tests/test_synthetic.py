"The synthetic world: a picture depends on its seed and number alone, its truth is exact, and the publishers' readers read it."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from emoca_nb import photographs as P
from emoca_nb import synthetic as S
from emoca_nb.core import BadFile, EmocaError, load_pickle
from emoca_nb.data import aff_wild2, affectnet, afew_va, consistent, vggface2
from emoca_nb.open_head import EMOTIONS
from emoca_nb.renderer import HeadRenderer, project, shade_sh

SMALL = 32  # pixels: fast, and everything is drawn as in large pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A set in AffectNet's layout, drawn by two processes."
    root = tmp_path_factory.mktemp("world") / "affectnet"
    return S.synthesize("affectnet", root, 70, seed=3, size=SMALL, workers=2)


@pytest.fixture(scope="module")
def truth(world):
    return S.ground_truth(world)


def content(root):
    "Everything but truth and settings."
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and "ground_truth" not in p.parts and p.suffix != ".json"}


def same_truth(a, b):
    assert a.keys() == b.keys()
    for k in a: np.testing.assert_array_equal(a[k], b[k], k)


# ---------------------------------------------------------------------------- chance


def test_a_picture_depends_on_seed_and_number_alone():
    alone = P.draw(P.draw_scene(3, 41), SMALL)
    for i in (7, 40, 3): P.draw(P.draw_scene(3, i), SMALL)
    P.draw_person.cache_clear(), P.skin_of.cache_clear()
    again = P.draw(P.draw_scene(3, 41), SMALL)
    np.testing.assert_array_equal(alone.image, again.image)
    np.testing.assert_array_equal(alone.vertices, again.vertices)
    assert (alone.image != P.draw(P.draw_scene(4, 41), SMALL).image).any()


def test_processes_do_not_matter(world, truth, tmp_path):
    "Two processes drew the set; this one, on two threads, draws the same bytes."
    torch.set_num_threads(2)
    (alone := tmp_path / "alone").mkdir()
    S.draw_shard(alone, "affectnet", 3, SMALL, False, 60, 70)  # another cut of the shards
    ours = content(world)
    assert all(ours[k] == v for k, v in content(alone).items())
    same_truth({k: v[60:] for k, v in truth.items()}, S.ground_truth(alone))


def test_a_killed_run_is_taken_up(world, truth, tmp_path):
    root = tmp_path / "killed"
    code = f"from emoca_nb.synthetic import synthesize; synthesize('affectnet', {str(root)!r}, 70, seed=3, size={SMALL}, workers=1)"
    run = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    first = root / "ground_truth/00000000-00000064.npz"
    while not first.exists() and run.poll() is None: time.sleep(.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert first.exists() and not json.loads((root / "synthetic.json").read_text())["done"] and not (root / "training.csv").exists()
    written = first.stat().st_mtime_ns
    S.synthesize("affectnet", root, 70, seed=3, size=SMALL, workers=1)
    assert first.stat().st_mtime_ns == written
    ours = {k: v for k, v in content(root).items() if not Path(k).name.startswith(".")}
    assert ours == content(world)
    same_truth(truth, S.ground_truth(root))


def test_a_finished_set_is_used_again(world):
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    assert S.synthesize("affectnet", world, 70, seed=3, size=SMALL) == world
    assert before == {p: p.stat().st_mtime_ns for p in world.rglob("*")}


@pytest.mark.parametrize("change, said", [(dict(seed=4), "seed 3"), (dict(size=16), "size 32"), (dict(plain=True), "plain False"), (dict(n=60), "n 70"), (dict(layout="vggface2"), "layout affectnet")])
def test_other_settings_are_refused(world, change, said):
    with pytest.raises(EmocaError, match=f"another set.*{said}"): S.synthesize(**{**dict(layout="affectnet", root=world, n=70, seed=3, size=SMALL), **change})


@pytest.mark.parametrize("bad, said", [(dict(layout="affecnet"), "Did you mean 'affectnet'"), (dict(n=0), "at least one"), (dict(size=8), "16 pixels"), (dict(seed=-1), "not negative")])
def test_nonsense_is_refused(tmp_path, bad, said):
    with pytest.raises(EmocaError, match=said): S.synthesize(**{**dict(layout="affectnet", root=tmp_path / "x", n=1), **bad})
    assert not (tmp_path / "x").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EmocaError, match="not empty"): S.synthesize("affectnet", tmp_path, 1, size=SMALL, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


# ---------------------------------------------------------------------------- people and expressions


def test_skins_are_spread_over_tones():
    tones = np.array([P.draw_person(0, i).tone for i in range(300)])
    counts = np.histogram(tones, 5, (P.skins()[1][0], P.skins()[1][-1]))[0]
    assert counts.min() > 35, counts


def test_prototypes_survive_habits():
    "Among all prototypes, the one that a person's expression resembles most is of the emotion that was meant."
    flat, right = P.prototypes().reshape(24, 51), 0
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)
    for i in range(400):
        scene = P.draw_scene(1, i, emotion=1 + i % 7)
        right += (flat @ scene.units).argmax() // 3 == scene.emotion
    assert right / 400 > .85, right


def test_valence_and_arousal():
    scenes = [P.draw_scene(2, i) for i in range(1500)]
    emotion, place = np.array([s.emotion for s in scenes]), np.stack([s.affect for s in scenes])
    assert np.linalg.norm(place, axis=1).max() <= 1 + 1e-6
    assert consistent(emotion, *place.T).mean() > .93
    assert np.bincount(emotion, minlength=8).min() > 140
    far = np.hypot(*place[emotion > 0].T)
    assert np.corrcoef(far, [s.intensity for s in scenes if s.emotion])[0, 1] > .6


def test_units_of_a_scene_are_its_codes():
    scene = P.draw_scene(0, 5)
    codes = P.codes_of(scene)
    assert torch.equal(codes["exp"][0], torch.from_numpy(scene.units[:50])) and codes["pose"][0, 3] == pytest.approx(scene.units[50] * P.JAW_OPEN)
    assert {k: tuple(v.shape) for k, v in codes.items()} == dict(shape=(1, 100), exp=(1, 50), pose=(1, 6), eye_pose=(1, 6), eyelid=(1, 2), tex=(1, 50), light=(1, 9, 3))


def test_wrinkles_follow_their_side():
    names, depth = P.wrinkle_maps()[0], P.wrinkle_depths(np.eye(51)[P.units_at("mouthSmile")[0]], .5)
    assert all((d > 0) == (n in ("crowLeft", "foldLeft", "bracketLeft")) for n, d in zip(names, depth - P.wrinkle_depths(np.zeros(51), .5)))
    old, young = (P.wrinkle_depths(np.ones(51), a) for a in (1, 0))
    assert (old > young).all()


# ---------------------------------------------------------------------------- truth


def test_truth_makes_the_vertices_and_landmarks(truth):
    codes = {k: torch.from_numpy(truth[k]) for k in ("shape", "exp", "pose", "eye_pose", "eyelid")}
    out = P.pose_head(codes)
    assert np.abs(out.vertices.numpy() - truth["vertices"]).max() < 1e-4
    for name, points in (("landmarks", out.landmarks2d), ("mediapipe", out.landmarks_mp)):
        assert np.abs(project(points, torch.from_numpy(truth["cam"]))[..., :2].numpy() - truth[name]).max() < 1e-4


@pytest.mark.parametrize("index", [0, 9])
def test_plain_pictures_are_the_models_own(index):
    photo = P.draw(replace(P.draw_scene(0, index), effects=P.PLAIN), 128)
    codes, head = {k: torch.from_numpy(v)[None] for k, v in photo.codes.items()}, P.head_layer().head
    drawn = HeadRenderer(head, 128)(P.pose_head(codes).vertices, codes["cam"], head.albedo.albedo(codes["tex"]), codes["light"])
    face = (drawn.mask_face[0, 0] > .9).numpy() & (photo.labels == P.LABELS.index("face"))
    gap = np.abs(photo.image / 255 - drawn.image[0].clamp(0, 1).movedim(0, -1).numpy())
    assert gap[face].mean() < .01
    rich = P.draw(P.draw_scene(0, index), 128).image
    assert np.abs(rich / 255 - drawn.image[0].clamp(0, 1).movedim(0, -1).numpy())[face].mean() > .03


def test_labels_fit_the_mesh():
    photo = P.draw(replace(P.draw_scene(0, 9), effects=P.PLAIN), 128)
    codes, head = {k: torch.from_numpy(v)[None] for k, v in photo.codes.items()}, P.head_layer().head
    drawn = HeadRenderer(head, 128)(torch.from_numpy(photo.vertices)[None], codes["cam"])
    assert ((photo.labels > 0) == (drawn.alpha[0, 0] > 0).numpy()).mean() > .99
    sure = (drawn.mask_face[0, 0] > .95).numpy() & (drawn.alpha[0, 0] > 0).numpy()
    assert (photo.labels[sure] == 1).mean() > .97


def test_a_hidden_landmark_is_not_visible():
    scene = replace(P.draw_scene(0, 9), turn=np.radians([0, 80, 0]).astype(np.float32), effects=P.PLAIN)
    seen = P.draw(scene, SMALL)  # turned to the left: the left eye is behind the nose
    assert not seen.visible[42:48].any() and seen.visible[[36, 37, 41]].all()
    front = P.draw(replace(scene, turn=np.zeros(3, np.float32)), SMALL)
    assert front.visible.mean() > .95 and front.mediapipe_visible.mean() > .9
    away = P.draw(replace(scene, framing=np.array([1.6, .8, 0])), SMALL)
    assert not away.visible[np.abs(away.landmarks).max(1) > 1].any() and (np.abs(away.landmarks).max(1) > 1).any()


def test_lamps_keep_their_harmonics():
    "Harmonics of a lamp: linear in its colour, turned with it, and near the clamped cosine."
    up, front = np.array([[0, 1, 0, 1, 1, 1]], np.float32), np.array([[0, 0, 1, 1, 1, 1]], np.float32)
    both = np.concatenate([up, front * [1, 1, 1, .5, .5, .5]]).astype(np.float32)
    assert np.allclose(P.lamp_harmonics(both), P.lamp_harmonics(up) + .5 * P.lamp_harmonics(front), atol=1e-5)
    n = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    shading = shade_sh(n.T[None, :, :, None], torch.from_numpy(P.lamp_harmonics(up))[None])[0, 0, :, 0]
    assert (shading - n[:, 1].clamp(min=0)).abs().max() < .1


@pytest.mark.parametrize("effect", ["wrinkles", "shadows", "shine", "hollows"])
def test_each_effect_changes_the_face(effect):
    scene = replace(P.draw_scene(0, 24), prop=False)
    with_, without = (P.draw(replace(scene, effects=e), 64) for e in (scene.effects, replace(scene.effects, **{effect: 0})))
    assert np.abs(with_.image.astype(int) - without.image).max() > 3
    np.testing.assert_array_equal(with_.landmarks, without.landmarks)


# ---------------------------------------------------------------------------- formats


def test_affectnet_and_emonet(world, truth):
    parts = {s: affectnet(world, s, size=SMALL, emonet=world) for s in ("training", "validation", "training_emonet_split", "validation_emonet_split_clean", "testing_emonet_split_clean")}
    where = {str(world / p): i for i, p in enumerate(truth["path"])}
    people = {s: {truth["identity"][where[p]] for p in d.labels.path} for s, d in parts.items()}
    assert not people["training"] & people["validation"] and people["training"] | people["validation"] == set(truth["identity"])
    cleaned = [people[s] for s in ("training_emonet_split", "validation_emonet_split_clean", "testing_emonet_split_clean")]
    assert all(cleaned) and sum(map(len, cleaned)) == len(set.union(*cleaned))
    for data in parts.values():
        rows = [where[p] for p in data.labels.path]
        np.testing.assert_array_equal(data.labels.expression, truth["emotion"][rows])
        np.testing.assert_allclose(data.labels.valence.astype(float), truth["valence"][rows], atol=1e-5)
        np.testing.assert_allclose(data.landmarks, S.pixels_of(truth["landmarks"][rows], SMALL), atol=.006)
    assert all(len(s.image) == 3 for s in (parts["training"][i] for i in range(4)))


def test_emonet_pickles_are_safe(world):
    labels = load_pickle(world / "val_fullpath.pkl")
    assert {"expression", "valence", "arousal", "expression_correct", "landmarks", "faceX"} <= set(next(iter(labels.values())))


def test_vggface2(tmp_path):
    root = S.synthesize("vggface2", tmp_path, 20, size=SMALL, workers=1)
    truth, listed = S.ground_truth(root), np.load(root / "train_list.npy")
    assert listed.shape == (2, 6) and all(len({n.split("/")[0] for n in row[:5]}) == 1 != len({n.split("/")[0] for n in row}) for row in listed)
    data = vggface2(root, masks="train_segmentation", size=SMALL)
    assert len(data) == 20 and len(set(data.labels.identity)) == 3
    order = {str(root / p): i for i, p in enumerate(truth["path"])}
    points = np.load(root / "train_annotated_torch7" / "n000001/0001_01.npy")
    np.testing.assert_allclose(points, S.pixels_of(truth["landmarks"][0], SMALL), atol=1e-3)
    mask = np.load(root / "train_segmentation/n000001/0001_01.npy")
    np.testing.assert_array_equal(mask > .5, np.isin(truth["masks"][order[str(root / "train/n000001/0001_01.jpg")]], (1, 2, 3)))


def test_videos(tmp_path):
    films = afew_va(S.synthesize("afew_va", tmp_path / "afew", 49, size=SMALL, workers=1))
    truth = S.ground_truth(tmp_path / "afew", ("valence", "arousal", "video", "identity"))
    assert len(films) == 96 and set(films.labels.video) == {"001", "002"} and len(set(truth["identity"])) == 1  # two videos of a person
    np.testing.assert_allclose(films.labels.arousal.astype(float), truth["arousal"], atol=.0501)


def test_aff_wild2(tmp_path):
    root = S.synthesize("aff_wild2", tmp_path, 1, size=SMALL, workers=1)
    truth = S.ground_truth(root, ("emotion", "valence", "units"))
    va, expr, au = (aff_wild2(root, task, "validation", size=SMALL) for task in ("va", "expr", "au"))
    np.testing.assert_allclose(va.labels.valence.astype(float), truth["valence"], atol=.001)
    np.testing.assert_array_equal(expr.labels.expression, truth["emotion"][truth["emotion"] < 7])
    assert au.unit_names == tuple(S.ACTION_UNITS) and len(au) == 64
    np.testing.assert_array_equal(np.stack([au[i].action_units for i in (0, 20)]), S.action_units(truth["units"])[[0, 20]])


def test_a_video_is_smooth_and_has_an_apex():
    n, moved, closed = 200, [], 0
    for video in range(6):
        k = S.draw_track(5, video, n)
        assert np.abs(np.diff(k.units, axis=0)).max() < .5 and np.abs(np.diff(k.turn, axis=0)).max() < np.radians(2) and np.abs(np.diff(k.affect, axis=0)).max() < .2
        assert k.intensity.max() > .45 and np.linalg.norm(k.affect, axis=1).max() <= 1 + 1e-6
        assert (k.emotion[k.intensity > .35] > 0).all() and (k.intensity[k.emotion == 0] == 0).all()
        moved.append(set(k.emotion))
        closed += k.lids.max() > .9
    assert len(set.union(*moved)) > 3 and closed >= 4


# ---------------------------------------------------------------------------- reading


def test_names_of_the_truth(world):
    assert set(S.ground_truth(world, ("emotion",))) == {"emotion"} and set(S.ground_truth(world, ("masks",))) == {"masks"}
    with pytest.raises(EmocaError, match="no truth called 'emotions'"): S.ground_truth(world, ("emotions",))


def test_no_truth_and_broken_truth(tmp_path):
    with pytest.raises(EmocaError, match="no ground truth"): S.ground_truth(tmp_path)
    (tmp_path / "ground_truth").mkdir()
    (tmp_path / "ground_truth/00000000-00000064.npz").write_bytes(b"PK not really")
    with pytest.raises(BadFile): S.ground_truth(tmp_path)


def test_command(tmp_path):
    said = CliRunner().invoke(S.synthesize_command, ["affectnet", str(tmp_path / "set"), "-n", "2", "--size", "16", "--workers", "1", "--plain"])
    assert said.exit_code == 0 and said.output.splitlines()[-1] == f"2 pictures in {tmp_path / 'set'}"
    wrong = CliRunner().invoke(S.synthesize_command, ["imagenet", str(tmp_path / "x")])
    assert wrong.exit_code == 2 and "affectnet" in wrong.output


def test_labels_of_emotions_are_affectnets():
    assert EMOTIONS == ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")


def test_a_set_without_a_folder_lies_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOCA_NB_DATA", str(tmp_path))
    root = S.synthesize("affectnet", None, 3, seed=4, size=32, workers=1)
    assert root.parent == tmp_path / "synthetic" and S.world_mark() in root.name
    made = (root / "training.csv").stat().st_mtime_ns
    assert S.synthesize("affectnet", None, 3, seed=4, size=32, workers=1) == root and (root / "training.csv").stat().st_mtime_ns == made
    others = {S.synthesize("affectnet", None, n, seed=seed, size=size, workers=1, plain=plain) for n, seed, size, plain in ((4, 4, 32, False), (3, 5, 32, False), (3, 4, 24, False), (3, 4, 32, True))}
    assert len(others | {root}) == 5
