"The open head: what its file promises, and what its names mean."
import numpy as np, pytest, torch
from emoca_nb import build_open_head, open_head
from emoca_nb.core import AssetMissing, EmocaError
from emoca_nb.flame import FLAME, HeadModel, open_head_path
from emoca_nb.open_head import EMOTIONS, EXPRESSION_UNITS, PROTOTYPES, UNITS, emotion_codes, skin_codes, unit_codes

FLAME_REGIONS = {"eye_region", "neck", "left_eyeball", "right_eyeball", "right_ear", "right_eye_region", "forehead", "lips", "nose", "scalp", "boundary", "face", "left_ear", "left_eye_region"}


@pytest.fixture(scope="module")
def head(): return HeadModel.load()


@pytest.fixture(scope="module")
def flame(): return FLAME.load(n_exp=51)


def side_of(head, moved):
    "The share of a displacement (V,3) on the subject's left (x > 0)."
    size = np.linalg.norm(moved.astype(np.float64), axis=1)
    return size[head.v_template[:, 0] > 0].sum() / size.sum()


def test_the_file_is_small_and_complete(head):
    assert open_head_path().stat().st_size < 8e6
    assert set(head.regions) == FLAME_REGIONS
    assert {"face", "face_eye", "eyes", "lips", "nose", "forehead", "neck", "scalp", "ears"} <= set(head.uv_masks)
    assert len(head.albedo) == 50 and head.eyelids.shape == (2, *head.v_template.shape) and head.shapedirs.shape[-1] == 100
    assert head.landmarks is not None and len(head.mediapipe.ids) == 105 and "CC0" in head.credit


def test_the_mesh_is_sound(head):
    faces = head.faces
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    assert np.unique(edges, axis=0, return_counts=True)[1].max() == 2
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len(np.unique(directed, axis=0)) == len(directed)    # neighbours turn the same way round
    assert set(np.unique(faces)) == set(range(len(head.v_template)))
    assert head.uv.min() >= 0 and head.uv.max() <= 1
    u, x = head.uv[head.uv_faces].mean(1)[:, 0], head.v_template[faces].mean(1)[:, 0]
    front = np.isin(faces, head.regions["face"]).all(1)
    assert np.corrcoef(u[front], x[front])[0, 1] > .95    # the texture is seen as in a photograph, not mirrored


@pytest.mark.parametrize("unit", EXPRESSION_UNITS)
def test_each_unit_moves_its_own_side(head, unit):
    share = side_of(head, head.expdirs[..., EXPRESSION_UNITS.index(unit)])
    if unit in ("jawLeft", "jawRight", "mouthLeft", "mouthRight"): assert .2 < share < .8
    elif unit.endswith("Left"): assert share > .6
    elif unit.endswith("Right"): assert share < .4
    else: assert .35 < share < .65


def test_lids_meet_and_stay_off_the_eyeball(head, flame):
    for side, columns in (("left", [42, 43, 44, 45, 46, 47]), ("right", [36, 37, 38, 39, 40, 41])):
        ball = head.regions[f"{side}_eyeball"].astype(int)
        for weight in np.linspace(0, 1, 11):
            out = flame(torch.zeros(1, 100), unit_codes({f"eyeBlink{side.capitalize()}": weight}, n_exp=51)["exp"][None])
            lids, eye = out.landmarks2d[0, columns], out.vertices[0, ball]
            centre = (eye[0] + eye[-1]) / 2
            assert (lids - centre).norm(dim=1).min() > (eye[0] - centre).norm()
        assert (lids[[1, 2], 1] - lids[[5, 4], 1]).abs().max() < 1.5e-3


def test_eyelid_offsets_are_the_blink(head):
    for k, unit in enumerate(("eyeBlinkLeft", "eyeBlinkRight")):
        assert np.array_equal(head.eyelids[k].astype(np.float32), head.expdirs[..., EXPRESSION_UNITS.index(unit)].astype(np.float32))
        assert abs(side_of(head, head.eyelids[k]) - (1 - k)) < 1e-3


def test_expression_and_jaw_leave_the_eyeballs(head):
    balls = np.concatenate([head.regions["left_eyeball"], head.regions["right_eyeball"]]).astype(int)
    assert not head.expdirs[balls].any()


def test_jaw_angle_is_jaw_open(flame):
    still, opened = (flame(torch.zeros(1, 100), pose=unit_codes(jawOpen=w)["pose"][None]).landmarks2d[0] for w in (0., 1.))
    assert still[62, 1] - still[66, 1] < 2e-3 < .025 < opened[62, 1] - opened[66, 1]


def test_the_inner_lips_part_with_the_jaw(head, flame):
    """Closed lips touch; each inner landmark must still lie on its own lip."""
    closed, opened = flame(torch.zeros(1, 100)), flame(torch.zeros(1, 100), **{k: x[None] for k, x in unit_codes(jawOpen=1, n_exp=51).items()})
    gap = lambda out, pairs: (out[0, [a for a, _ in pairs]] - out[0, [b for _, b in pairs]]).norm(dim=-1)
    pairs = [(61, 67), (62, 66), (63, 65)]
    assert gap(closed.landmarks2d, pairs).max() < .003 and gap(opened.landmarks2d, pairs).min() > .01
    assert torch.equal(opened.landmarks2d[0, 60:], opened.landmarks3d[0, 60:])
    ids = head.mediapipe.ids.tolist()
    pairs = [(ids.index(a), ids.index(b)) for a, b in ((191, 95), (80, 88), (81, 178), (82, 87), (13, 14), (312, 317), (311, 402), (310, 318), (415, 324))]
    assert gap(closed.landmarks_mp, pairs).max() < .003 and gap(opened.landmarks_mp, pairs).min() > .004


def test_the_contour_slides_on_the_far_side(head, flame):
    angle = torch.tensor([0., 30, -30]).deg2rad()
    pose = torch.zeros(3, 6)
    pose[:, 1] = angle
    out = flame(torch.zeros(3, 100), pose=pose)
    face = out.vertices[:, head.regions["face"].astype(int)]
    x = out.landmarks2d[:, :17, 0]
    # on the far side the contour is the outline: at its height, nothing of the face lies farther out
    for row, sign, points in ((1, 1, range(12, 17)), (2, -1, range(0, 5))):
        for k in points:
            level = (face[row, :, 1] - out.landmarks2d[row, k, 1]).abs() < .004
            assert (sign * face[row, level, 0]).max() < sign * x[row, k] + .004
    assert torch.allclose(out.landmarks2d[1, :17, 0].flip(0), -out.landmarks2d[2, :17, 0], atol=2e-3)


def test_unit_codes():
    assert len(UNITS) == 52 and set(UNITS) == {*EXPRESSION_UNITS, "jawOpen"}
    assert torch.equal(unit_codes(mouthSmile=.5)["exp"], unit_codes(mouthSmileLeft=.5, mouthSmileRight=.5)["exp"])
    assert unit_codes({"jawOpen": .5})["pose"][3] == pytest.approx(open_head.JAW_OPEN / 2)
    with pytest.raises(EmocaError, match="browDown"): unit_codes(browDwn=1)
    with pytest.raises(EmocaError, match="n_exp=51"): unit_codes(tongueOut=1)
    for n in (0, -1, 100):
        with pytest.raises(EmocaError, match="1 to 51"): unit_codes(n_exp=n)
    assert unit_codes(tongueOut=1, n_exp=51)["exp"][50] == 1


def test_emotions():
    assert EMOTIONS == ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")
    codes = {(e, k): emotion_codes(e, variant=k) for e in EMOTIONS for k in range(len(PROTOTYPES[e]))}
    flat = torch.stack([torch.cat([c["exp"], c["pose"]]) for c in codes.values()])
    assert torch.cdist(flat, flat).fill_diagonal_(9).min() > .05
    assert all(len(PROTOTYPES[e]) >= 3 for e in EMOTIONS) and not emotion_codes("Anger", 0)["exp"].any()
    for bad in (dict(emotion="happy"), dict(emotion="Happy", variant=7), dict(emotion="Happy", variant=-1)):
        with pytest.raises(EmocaError): emotion_codes(**bad)


def test_skins_are_natural(head):
    skins = head.albedo.albedo(skin_codes(200, torch.Generator().manual_seed(1)))
    assert ((skins < 0) | (skins > 1)).float().mean() < .01
    forehead, brow = skins[:, :, 95, 128].mean(1), skins[:, :, 70:100, 95:120].mean(1).amin((1, 2))
    assert (brow < forehead).float().mean() > .9


def test_builder_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(build_open_head, "find_spec", lambda name: None)
    with pytest.raises(AssetMissing, match="build-head"): build_open_head.MakeHuman()
