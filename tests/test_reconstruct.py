"""Reconstruction: files and what is in them, resuming, hostile and unusual pictures, trouble with the disk, the command's exit codes, the desk."""
import errno
import io
import json
import os
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest
import torch
import trimesh
from click.testing import CliRunner
from PIL import Image
from skimage.data import astronaut

from emoca_nb import reconstruct as module
from emoca_nb.core import EmocaError
from emoca_nb.encoders import Codes, Encoders, neutral_codes
from emoca_nb.faces import detectors
from emoca_nb.reconstruct import CannotWrite, Reconstructor, Studio, find_pictures, jobs_of, pick_model, reconstruct, reconstruct_command, writable

pytestmark = pytest.mark.skipif(all(detectors().values()), reason="needs a face detector: pip install emoca-nb[dlib]")


@pytest.fixture(scope="module")
def work(): return Reconstructor("fit", "none", "cpu")


@pytest.fixture(autouse=True)
def same_work(monkeypatch, request):
    """The command builds the same reconstructor once."""
    if "work" in request.fixturenames: monkeypatch.setattr(module, "Reconstructor", lambda *_: request.getfixturevalue("work"))


@pytest.fixture(scope="module")
def photo(): return astronaut()


@pytest.fixture(scope="module")
def finished(work, photo, tmp_path_factory):
    """The astronaut, reconstructed: the folder of her files, and the results."""
    place = tmp_path_factory.mktemp("finished")
    Image.fromarray(photo).save(place / "astronaut.png")
    return place, reconstruct(place / "astronaut.png", place / "out", work=work)


def command(*arguments): return CliRunner().invoke(reconstruct_command, [str(a) for a in arguments])


def saved(path, picture, **options):
    Image.fromarray(picture).save(path, **options)
    return path


def test_astronaut_is_found_fitted_and_written(finished):
    place, results = finished
    [result] = results
    [head] = result.heads
    assert head.error < .035
    files = {f"face1{end}" for end in (".npz", ".json", ".obj", ".mtl", "_texture.png", ".glb", ".png")} | {"overlay.jpg", "reconstruction.json"}
    assert {p.name for p in (place / "out/astronaut").iterdir()} == files
    assert not [p for p in (place / "out").iterdir() if p.name.startswith(".")], "nothing is left of the work"


def test_codes_come_back_from_the_npz(finished, work):
    place, results = finished
    head, codes = results[0].heads[0], Codes.load(place / "out/astronaut/face1.npz")
    assert [n for n, _ in codes.items()] == [n for n, _ in head.codes.items()]
    vertices = work.flame(**codes.head()).vertices[0].numpy()
    mesh = trimesh.load(place / "out/astronaut/face1.obj", process=False, maintain_order=True)
    assert mesh.faces.shape == work.flame.head.faces.shape
    assert abs(vertices.min(0) - mesh.vertices.min(0)).max() < 1e-5 and abs(vertices.max(0) - mesh.vertices.max(0)).max() < 1e-5


def test_summary_says_what_is_known_and_invents_nothing(finished):
    summary = json.loads((finished[0] / "out/astronaut/face1.json").read_text())
    assert summary["emotion"] is None and summary["made"] == "fit" and summary["detector"]
    assert summary["units"]["mouthSmileLeft"] > .3 and len(summary["landmarks"]) == 68
    assert summary["codes"] == dict(shape=[100], tex=[50], exp=[50], pose=[6], cam=[3], light=[9, 3])


def test_glb_moves(finished, work):
    import pygltflib
    glb = pygltflib.GLTF2().load(str(finished[0] / "out/astronaut/face1.glb"))
    [mesh] = glb.meshes
    assert set(work.flame.head.expression_names[:50]) <= set(mesh.extras["targetNames"])
    weight = dict(zip(mesh.extras["targetNames"], mesh.weights))
    assert weight["mouthSmileLeft"] == pytest.approx(finished[1][0].heads[0].codes.exp[0, work.flame.head.expression_names.index("mouthSmileLeft")].item(), abs=1e-5)
    assert {"jaw", "eyeLeft", "eyeRight"} <= {n.name for n in glb.nodes}


def test_overlay_is_the_whole_photograph(finished, photo):
    overlay = np.asarray(Image.open(finished[0] / "out/astronaut/overlay.jpg"))
    assert overlay.shape == photo.shape
    same = np.abs(overlay.astype(int) - photo).max(-1) < 40
    assert same[300:].mean() > .98 and same[:200, 150:300].mean() < .8


def test_texture_shows_the_photograph_and_the_head_turns(work, finished, photo):
    head = finished[1][0].heads[0]
    texture = work.texture(photo, head)
    assert texture.shape == (512, 512, 3) and texture.dtype == np.uint8
    red, blue = photo.copy(), photo.copy()
    red[..., 1:], blue[..., :2] = 0, 0
    changed = (work.texture(red, head) != work.texture(blue, head)).any(-1)
    assert .05 < changed.mean() < .6
    aside = work.aside(head, texture)
    assert aside.shape == (3, 224, 224) and aside.std() > .1


def test_second_run_skips_and_changes_are_noticed(work, photo, tmp_path):
    path = saved(tmp_path / "me.png", photo)
    assert not reconstruct(path, tmp_path / "out", work=work)[0].finished_before
    stamp = (tmp_path / "out/me/face1.glb").stat().st_mtime_ns
    assert reconstruct(path, tmp_path / "out", work=work)[0].finished_before
    assert (tmp_path / "out/me/face1.glb").stat().st_mtime_ns == stamp
    (tmp_path / "out/me/reconstruction.json").write_text("{ broken")
    assert not reconstruct(path, tmp_path / "out", work=work)[0].finished_before, "an index that cannot be read does not count as finished"
    saved(path, photo[:, ::-1])
    assert not reconstruct(path, tmp_path / "out", work=work)[0].finished_before, "the picture has changed"


def test_faces_of_many_pictures_share_batches(work, photo, finished, monkeypatch):
    sizes, heads = [], type(work).heads
    monkeypatch.setattr(type(work), "heads", lambda self, photos, faces: sizes.append(len(faces)) or heads(self, photos, faces))
    results = reconstruct([photo, photo[:, ::-1].copy(), photo], batch_size=2, work=work)
    assert sizes == [2, 1] and len(results) == 3
    for result in (results[0], results[2]):
        torch.testing.assert_close(result.heads[0].codes.exp, finished[1][0].heads[0].codes.exp, atol=.05, rtol=0)


def test_thirty_faces(work, photo):
    crowd = np.tile(photo[40:220, 130:310], (5, 6, 1))
    results = reconstruct(crowd, work=work, batch_size=32)
    assert len(results[0].heads) >= 28
    assert np.median([h.error for h in results[0].heads]) < .04
    assert work.overlay(crowd, results[0].heads).shape == crowd.shape
    assert len(reconstruct(crowd, work=work, max_faces=3)[0].heads) == 3


@pytest.mark.parametrize("kind", ["grey", "alpha", "turned", "large", "sixteen"])
def test_unusual_pictures(kind, work, photo, tmp_path):
    im, options = Image.fromarray(photo), {}
    if kind == "grey": im = im.convert("L")
    if kind == "alpha": im.putalpha(Image.fromarray(np.tile(np.linspace(128, 255, 512).astype(np.uint8), (512, 1))))
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        im, options = im.rotate(90, expand=True), dict(exif=exif)
    if kind == "large": im = im.resize((4000, 4000))
    if kind == "sixteen": im = Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257)
    im.save(path := tmp_path / "picture.png", **options)
    results = reconstruct(path, tmp_path / "out", work=work)
    assert not results.failed and results[0].heads[0].error < .04
    size = json.loads((tmp_path / "out/picture/reconstruction.json").read_text())["size"]
    assert size == ([4000, 4000] if kind == "large" else [512, 512])


def test_bad_pictures_do_not_stop_the_others(work, photo, tmp_path):
    saved(tmp_path / "good.png", photo)
    saved(tmp_path / "nobody.png", np.full((200, 200, 3), 128, np.uint8))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:5000])
    saved(tmp_path / "dot.png", photo[:2, :2])
    (tmp_path / "folder").mkdir()
    ran = command(tmp_path, tmp_path / "folder", tmp_path / "missing.png", tmp_path / "*.tif", "-o", tmp_path / "out")
    assert ran.exit_code == 1 and (tmp_path / "out/good/face1.glb").is_file()
    for name, why in dict(nobody="no face", empty="empty", text="not an image", cut="truncated", dot="too small", folder="no picture in this folder", missing="missing").items():
        assert any(name in line and why in line for line in ran.output.splitlines()), f"{name}: {ran.output}"
    assert "no picture in this pattern" in ran.output and "8 failed" in ran.output
    assert command(tmp_path / "good.png", "-o", tmp_path / "out").exit_code == 0


def test_names_never_collide(work, photo, tmp_path):
    for place in ("a", "b"): (tmp_path / place).mkdir()
    paths = [saved(tmp_path / n, photo) for n in ("a/me.png", "a/me.jpg", "b/me.png")]
    jobs = jobs_of(paths, tmp_path / "out")
    assert len({j.folder for j in jobs}) == 3
    reconstruct(paths[0], tmp_path / "out", work=work)
    [job] = jobs_of([paths[2]], tmp_path / "out")
    assert job.folder.name != "me", "that folder belongs to another picture"
    [job] = jobs_of([paths[0]], tmp_path / "out")
    assert job.folder.name == "me"


def test_results_are_not_taken_for_photographs(finished):
    pictures, lost = find_pictures(finished[0], finished[0] / "out")
    assert [p.name for p in pictures] == ["astronaut.png"] and not lost
    assert len(find_pictures([finished[0] / "astronaut.png", str(finished[0] / "*.png")])[0]) == 1, "each picture once"


def test_output_that_cannot_be_written(work, photo, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotWrite, match="file"): reconstruct(photo, tmp_path / "file", work=work)
    with pytest.raises(CannotWrite): writable(tmp_path / "file/below")
    ran = command(saved(tmp_path / "a.png", photo), "-o", tmp_path / "file")
    assert ran.exit_code == 1 and isinstance(ran.exception, (SystemExit, EmocaError))


@pytest.mark.parametrize("what", ["save", "write_glb", "np"])
def test_full_disk_keeps_what_is_finished(what, work, photo, tmp_path, monkeypatch):
    paths = [saved(tmp_path / f"{n}.png", p) for n, p in (("a", photo), ("b", photo[:, ::-1].copy()))]
    full, calls = OSError(errno.ENOSPC, "No space left on device"), []
    def sometimes(real):
        def call(*args, **options):
            calls.append(1)
            if len(calls) > 1: raise full
            return real(*args, **options)
        return call
    if what == "save": monkeypatch.setattr(Image.Image, "save", lambda self, f, *a, _save=Image.Image.save, **o: sometimes(_save)(self, f, *a, **o) if str(f).endswith(".jpg") else _save(self, f, *a, **o))
    if what == "write_glb": monkeypatch.setattr(module, "write_glb", sometimes(module.write_glb))
    if what == "np": monkeypatch.setattr(np, "savez", sometimes(np.savez))
    with pytest.raises(CannotWrite, match="disk is full"): reconstruct(paths, tmp_path / "out", work=work)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a"], "the first is whole, nothing is left of the second"
    monkeypatch.undo()
    assert [r.finished_before for r in reconstruct(paths, tmp_path / "out", work=work)] == [True, False]


def test_interrupt_keeps_what_is_finished(work, photo, tmp_path, monkeypatch):
    paths = [saved(tmp_path / f"{n}.png", photo[:, ::d].copy()) for n, d in (("a", 1), ("b", -1))]
    done, glb = [], module.write_glb
    def stop_at_second(*args):
        done.append(1)
        if len(done) == 2: raise KeyboardInterrupt
        glb(*args)
    monkeypatch.setattr(module, "write_glb", stop_at_second)
    ran = command(*paths, "-o", tmp_path / "out", "--batch-size", 1)
    assert ran.exit_code == 130 and "1 pictures are finished" in ran.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a"]
    assert {"face1.glb", "reconstruction.json"} <= {p.name for p in (tmp_path / "out/a").iterdir()}


def test_usage(tmp_path, work):
    assert command().exit_code == 2
    assert command("x.png", "--batch-size", "0").exit_code == 2
    assert command("x.png", "--detector", "eyes").exit_code == 2
    with pytest.raises(EmocaError, match="batch_size"): reconstruct("x.png", batch_size=0, work=work)


def test_encoders_take_the_fits_place(photo, tmp_path, work, monkeypatch):
    """A checkpoint of encoders that always say "the mean face": regressed codes, and a refinement that starts there."""
    monkeypatch.undo()
    net = Encoders("mobilenet_v3").start(neutral_codes(work.flame), 0.)
    net.save(tmp_path / "mean.pt")
    regress = Reconstructor(str(tmp_path / "mean.pt"), "none", "cpu")
    [result] = reconstruct(photo, work=regress)
    torch.testing.assert_close(result.heads[0].codes.exp, torch.zeros(1, 50), atol=1e-4, rtol=0)
    assert "mean.pt" in regress.made and result.heads[0].error > .05
    regress.refine = True
    [refined] = reconstruct(photo, work=regress)
    assert refined.heads[0].error < .035 and "refined" in regress.made


def test_models_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("EMOCA_NB_SETTINGS", str(tmp_path / "settings.ini"))
    (tmp_path / "settings.ini").write_text("[paths]\ndata = data\n")
    assert pick_model() == "fit" and pick_model("deca") == "deca"
    for name in ("flame/FLAME2020/generic_model.pkl", "deca/deca_model.tar"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(b"x")
    assert pick_model() == "deca"
    (tmp_path / "data/emoca/EMOCA_v2_lr_mse_20").mkdir(parents=True)
    assert pick_model() == "emoca_v2_lr_mse_20"
    with pytest.raises(EmocaError): Reconstructor("deca", "none", "cpu")
    with pytest.raises(EmocaError): Reconstructor(str(tmp_path / "absent.pt"), "none", "cpu")


def test_the_package_has_an_encoder(photo):
    [found] = reconstruct(photo, model="open_encoder", emotion="none", device="cpu")
    head, = found.heads
    assert head.error < .07 and head.codes.exp.abs().max() > .1
    upper, lower = head.landmarks[61:64, 1], head.landmarks[[67, 66, 65], 1]
    assert (lower - upper).min() > 2, "she smiles with her teeth"


def test_desk(work, photo):
    studio = Studio(work=work, pictures=dict(astronaut=photo, wall=np.zeros((64, 64, 3), np.uint8)))
    studio.choice.value = "astronaut"
    assert studio.head.error < .035 and Image.open(io.BytesIO(bytes(studio.sheet.value))).size == (896, 224)
    studio.choice.value = "wall"
    assert "no face" in studio.said.value
    Image.fromarray(photo).save(file := io.BytesIO(), "png")
    studio.upload.value = [dict(name="<b>me.png", type="image/png", size=1, content=memoryview(file.getvalue()), last_modified=datetime.now())]
    assert studio.said.value.startswith("&lt;b&gt;me.png: error")
    studio.show("broken.png", b"nothing")
    assert "not an image" in studio.said.value


def test_killed_run_is_taken_up_again(photo, tmp_path):
    """A real process, killed with its folder half filled: the next run finishes it, and removes what was left."""
    saved(tmp_path / "a.png", photo)
    code = ("import os, signal\nfrom emoca_nb import reconstruct as m\n"
            f"m.write_glb = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nm.reconstruct({str(tmp_path / 'a.png')!r}, {str(tmp_path / 'out')!r}, model='fit', emotion='none')\n")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1")).returncode == -9
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".a.part"]
    reconstruct(tmp_path / "a.png", tmp_path / "out", model="fit", emotion="none")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_a_head_without_texture_coordinates(work, finished, photo, tmp_path):
    """FLAME without its template: no texture, a plain mesh, and everything else."""
    import dataclasses
    from emoca_nb.fitting import Fitter
    from emoca_nb.flame import FLAME, AlbedoSpace
    bare = Reconstructor.__new__(Reconstructor)
    torch.nn.Module.__init__(bare)
    head = dataclasses.replace(work.flame.head, name="generic_model", expression_names=(), uv=None, uv_faces=None, albedo=None)
    bare.flame, bare.albedo = FLAME.load(head).eval(), AlbedoSpace.constant()
    bare.fitter, bare.encoders, bare.emotion, bare.model, bare.refine, bare.device = Fitter(bare.flame, bare.albedo), None, None, "fit", False, torch.device("cpu")
    [result] = reconstruct(photo, tmp_path / "out", work=bare)
    files = {p.name for p in result.folder.iterdir()}
    assert {"face1.obj", "face1.glb", "face1.npz", "overlay.jpg"} <= files and "face1_texture.png" not in files
    assert json.loads((result.folder / "face1.json").read_text())["units"] == {}


def test_the_package_brings_an_emotion_network(photo, tmp_path, monkeypatch):
    monkeypatch.setenv("EMOCA_NB_DATA", str(tmp_path))
    work = Reconstructor("fit", device="cpu")
    [head] = reconstruct(photo, work=work)[0].heads
    assert head.emotion["expression"] == "Happy" and abs(sum(head.emotion["probabilities"].values()) - 1) < 1e-3
    assert -1 <= head.emotion["valence"] <= 1 and -1 <= head.emotion["arousal"] <= 1
