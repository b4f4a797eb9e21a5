"""The viewer without a browser: geometry, codes, throttling, files, hostile input."""
import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from emoca_nb.core import EmocaError
from emoca_nb.flame import FLAME
from emoca_nb.open_head import EMOTIONS
from emoca_nb.renderer import project
from emoca_nb.export import split_seams
from emoca_nb.viewer import FOV, Face, HeadViewer, panels, perspective, portrait


@pytest.fixture(scope="module")
def viewer(): return HeadViewer()


@pytest.fixture(autouse=True)
def start_neutral(request):
    if "viewer" in request.fixturenames: request.getfixturevalue("viewer").reset()


def press(box, description):
    """Click the button of that name, as the browser does."""
    def walk(w):
        yield w
        for child in getattr(w, "children", ()): yield from walk(child)
    [button] = [w for w in walk(box) if type(w).__name__ == "Button" and w.description == description]
    button.click()
    return [w for w in walk(box)]


def test_seams_keep_every_corner(viewer):
    head = viewer.face.head
    vertex_of, uv_of, triangles = split_seams(head.faces, head.uv_faces)
    assert (vertex_of[triangles] == head.faces).all() and (uv_of[triangles] == head.uv_faces).all()
    assert len(np.unique(np.stack([vertex_of, uv_of]), axis=1).T) == len(vertex_of)


def test_perspective_of_a_distant_camera_is_orthographic():
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) - .5
    half = np.tan(np.radians(.01) / 2) * 1e4
    far = perspective(points.numpy().astype(float), [0, 0, 1e4, 0, 0, 0, 0, 1, 0], .01)
    near = project(points[None], torch.tensor([[1 / half, 0, 0]]))[0].numpy()
    np.testing.assert_allclose(far[:, :2], near[:, :2], atol=1e-3)
    assert (np.argsort(far[:, 2]) == np.argsort(near[:, 2])).all()


def test_portrait_holds_the_whole_head_at_any_size():
    vertices = HeadViewer().vertices
    for scale in (.01, 1, 1000):
        seen = perspective(vertices * scale, portrait(vertices * scale), FOV)
        assert np.abs(seen[:, :2]).max() < 1 and np.abs(seen[:, :2]).max() > .7 and (seen[:, 2] > 0).all()


def test_each_slider_moves_its_own_code(viewer):
    for (code, index), (slider, control) in viewer.sliders.items():
        slider.value = control.high
        assert np.isclose(viewer.face.codes[code][index], control.high * control.unit)
        viewer.reset()
        assert viewer.face.codes[code][index] == 0 and np.isclose(slider.value, 0)


def test_set_agrees_with_the_layer(viewer):
    rng = np.random.default_rng(0)
    identity, neck = rng.normal(size=100), np.array([.1, -.2, .05])
    viewer.set(identity=identity, neck=neck, units=dict(mouthSmileLeft=.8))
    expression = torch.zeros(1, viewer.face.flame.n_exp)
    expression[0, viewer.face.head.expression_names.index("mouthSmileLeft")] = .8
    expected = viewer.face.flame(torch.tensor(identity)[None].float(), expression, neck_pose=torch.tensor(neck)[None].float()).vertices[0]
    np.testing.assert_allclose(viewer.vertices, expected, atol=1e-6)
    np.testing.assert_array_equal(viewer.mesh.vertices, viewer.vertices[viewer.vertex_of])


def test_gaze_is_up_and_left(viewer):
    eye = viewer.face.head.regions["left_eyeball"]
    def direction():
        ball = viewer.vertices[eye]
        return ball[front] - ball.mean(0)
    front = viewer.vertices[eye][:, 2].argmax()
    rest = direction()
    viewer.set(gaze=[.3, 0])
    assert direction()[1] > rest[1] + 1e-3, "up"
    viewer.set(gaze=[0, .3])
    assert direction()[0] > rest[0] + 1e-3, "towards the head's own left"


def test_jaw_opens_downwards(viewer):
    low = viewer.vertices[:, 1].min()
    closed = viewer.vertices.copy()
    viewer.set(units=dict(jawOpen=1))
    assert viewer.face.codes["jaw"][0] > .2
    chin = np.abs(viewer.vertices - closed).max(-1).argmax()
    assert viewer.vertices[chin, 1] < closed[chin, 1] - .005 and low < closed[chin, 1]


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_emotion_button(viewer, emotion):
    neutral = viewer.vertices.copy()
    press(viewer, emotion)
    moved = np.abs(viewer.vertices - neutral).max()
    assert (moved < 1e-4) if emotion == "Neutral" else (moved > 2e-3)


def test_intensity_rescales_the_chosen_emotion(viewer):
    neutral = viewer.vertices.copy()
    widgets = press(viewer, "Happy")
    full = np.abs(viewer.vertices - neutral).sum()
    [strength] = [w for w in widgets if getattr(w, "description", "") == "intensity"]
    strength.value = .5
    half = np.abs(viewer.vertices - neutral).sum()
    strength.value = 1
    assert .2 < half / full < .8


def test_another_person_keeps_the_expression(viewer):
    viewer.set(emotion="Sad")
    expression, texture = viewer.face.codes["expression"].copy(), viewer.mesh.texture
    press(viewer, "Another person")
    assert (viewer.face.codes["expression"] == expression).all() and viewer.face.codes["identity"].std() > .3
    assert viewer.mesh.texture != texture


def test_only_vertices_are_sent_for_an_expression(viewer):
    changed = []
    viewer.mesh.observe(lambda change: changed.append(change["name"]))
    viewer.set(units=dict(jawOpen=.5))
    viewer.mesh.unobserve_all()
    assert changed == ["vertices"]


def test_fast_changes_share_a_frame_and_the_last_one_wins(viewer):
    drawn = []
    async def drag():
        viewer.mesh.observe(lambda _: drawn.append(1), "vertices")
        slider, _ = viewer.sliders["jaw", 0]
        for value in np.linspace(1, 20, 50): slider.value = value
        await asyncio.sleep(.2)
        viewer.mesh.unobserve_all("vertices")
    asyncio.run(drag())
    assert 1 <= len(drawn) < 25
    np.testing.assert_allclose(viewer.vertices, viewer.face.vertices(), atol=1e-7)
    assert np.isclose(viewer.face.codes["jaw"][0], np.radians(20), atol=1e-4)


@pytest.mark.parametrize("bad, message", [
    (dict(units=dict(smirk=1)), "'smirk' is not a face unit"), (dict(nose=[1]), "'nose' is not a code"), (dict(jaw=[1, 2, 3, 4]), "jaw has 3 numbers"),
    (dict(identity=[np.nan]), "not finite"), (dict(emotion="Hangry"), "Hangry")])
def test_bad_codes_are_refused_and_nothing_changes(viewer, bad, message):
    before = {k: v.copy() for k, v in viewer.face.codes.items()}
    with pytest.raises((ValueError, KeyError, EmocaError), match=message): viewer.set(**bad)
    assert all((viewer.face.codes[k] == v).all() for k, v in before.items())


def test_picture_shows_what_the_browser_camera_sees(viewer):
    front = viewer.face.picture(128, viewer.plot.camera)
    assert front.shape == (128, 128, 3) and .15 < (front < 250).any(-1).mean() < .9
    x, y, z, *rest = viewer.plot.camera
    try:
        viewer.plot.camera = [x + z, y, 0, *rest]
        side = viewer.face.picture(128, viewer.plot.camera)
    finally: viewer.plot.camera = [x, y, z, *rest]
    assert (np.abs(side.astype(int) - front).max(-1) > 20).mean() > .1


def test_png(viewer, tmp_path):
    viewer.set(emotion="Happy")
    assert Image.open(viewer.save(tmp_path / "a.png")).size == (512, 512)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_obj_keeps_topology_and_carries_the_skin(viewer, tmp_path):
    mesh = trimesh.load(viewer.save(tmp_path / "a.obj"), process=False, maintain_order=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mtl", "a.obj", "a_texture.png"]
    lines = (tmp_path / "a.obj").read_text().splitlines()
    vertices = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    np.testing.assert_allclose(vertices, viewer.vertices, atol=1e-6)
    assert sum(line.startswith("f ") for line in lines) == len(viewer.face.head.faces) == len(mesh.faces)
    assert mesh.visual.material.image.size == (256, 256)


def test_glb_holds_mesh_and_skin(viewer, tmp_path):
    scene = trimesh.load(viewer.save(tmp_path / "a.glb"), process=False)
    [mesh] = scene.geometry.values()
    np.testing.assert_allclose(mesh.vertices[mesh.faces], viewer.vertices[viewer.face.head.faces], atol=1e-6)
    np.testing.assert_allclose(mesh.visual.uv[mesh.faces], viewer.face.head.uv[viewer.face.head.uv_faces], atol=1e-5)
    assert np.asarray(mesh.visual.material.baseColorTexture).shape[:2] == (256, 256)


@pytest.mark.parametrize("name, message", [("head.txt", "ending"), ("head", "ending"), ("no/folder/a.png", "no folder"), ("my head.obj", "letters"), ("a\0.png", "cannot write")])
def test_bad_file_names(viewer, tmp_path, name, message):
    with pytest.raises(EmocaError, match=message): viewer.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(viewer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmocaError): viewer.save(tmp_path / "file" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(EmocaError, match="a.png"): viewer.save(tmp_path / "a.png")


def test_widget_tells_of_a_bad_name(viewer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [name] = [w for w in press(viewer, "Reset") if getattr(w, "description", "") == "save as"]
    try:
        name.value = "no/folder/<b>"
        widgets = press(viewer, "PNG")
        [said] = [w for w in widgets if type(w).__name__ == "HTML"]
        assert "no folder" in said.value and "<b>" not in said.value
        name.value = "fine"
        press(viewer, "GLB")
        assert "wrote" in said.value and (tmp_path / "fine.glb").exists()
    finally: name.value = "head"


def test_head_without_names_uv_or_skin(shared):
    flame = FLAME.load(shared / "golden/flame_tiny.pkl", shared / "golden/landmark_embedding_tiny.npy", n_shape=3, n_exp=2)
    plain = HeadViewer(flame)
    plain.set(expression=[1], identity=[0, 2])
    assert set(panels(plain.face)) <= {"Expression", "Pose", "Shape"} and plain.face.picture(32).shape == (32, 32, 3)
    for bad in (dict(emotion="Happy"), dict(units=dict(jawOpen=1))):
        with pytest.raises(ValueError, match="name"): plain.set(**bad)
    assert b"vt" not in plain.face.files(Path("a.obj"))["a.obj"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_of_another_precision(dtype):
    face = Face(FLAME.load().to(dtype))
    assert face.vertices().dtype == np.float32 and face.picture(32).shape == (32, 32, 3)


def test_names_of_files(viewer, tmp_path):
    assert viewer.face.save(tmp_path / "a.PNG").is_file()
    for name, words in ((tmp_path / "b c.obj", "'b c'"), ("~nobody_of_this_name/a.png", "not known"), (tmp_path / "a.jpg", "give .png")):
        with pytest.raises(EmocaError, match=words): viewer.face.save(name)
