"Losses against independent computation in NumPy, by finite differences, and on what is missing."
from dataclasses import FrozenInstanceError, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.autograd import gradcheck

from emoca_nb import losses as L
from emoca_nb.losses import STAGES, Compared, LossWeights, compare, total

B = 3


@pytest.fixture
def rng():
    torch.manual_seed(1)
    return np.random.default_rng(1)


def doubles(*shape): return torch.randn(*shape, dtype=torch.double, requires_grad=True)
def close(found, expected, tolerance=1e-6): return np.allclose(np.asarray(found.detach()), expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- emotion
@pytest.mark.parametrize("metric, distance", [
    ("l2", lambda a, b: np.sqrt(((a - b) ** 2).sum())), ("mse", lambda a, b: ((a - b) ** 2).mean()), ("l1", lambda a, b: np.abs(a - b).mean()),
    ("cosine", lambda a, b: 1 - a @ b / np.sqrt(a @ a * (b @ b)))])
def test_emotion(rng, metric, distance):
    a, b = rng.standard_normal((2, B, 2048))
    expected = [distance(x, y) for x, y in zip(a, b)]
    found = L.emotion_loss(torch.tensor(a), torch.tensor(b), metric, each=True)
    assert close(found, expected) and close(L.emotion_loss(torch.tensor(a), torch.tensor(b), metric), np.mean(expected))
    assert gradcheck(lambda x, y: L.emotion_loss(x, y, metric), (doubles(B, 7), doubles(B, 7)))
    if metric == "mse": assert close(L.emotion_loss(torch.tensor(a), torch.tensor(b), metric), torch.nn.functional.mse_loss(torch.tensor(a), torch.tensor(b)))


# ---------------------------------------------------------------- pixels
def test_photometric(rng):
    a, b, mask = rng.random((B, 3, 5, 6)), rng.random((B, 3, 5, 6)), (rng.random((B, 1, 5, 6)) > 0.5).astype(float)
    difference = mask * np.abs(a - b)
    tensors = [torch.tensor(x) for x in (a, b, mask)]
    assert close(L.photometric_loss(*tensors), difference.mean())
    assert close(L.photometric_loss(*tensors, "pixels", each=True), difference.mean((1, 2, 3)))
    assert close(L.photometric_loss(*tensors, "mask"), difference.sum() / (3 * mask.sum()))
    assert close(L.photometric_loss(*tensors, "mask", each=True), difference.sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3))))
    assert close(L.photometric_loss(*tensors, "sum"), difference.sum((1, 2, 3)).mean())
    assert close(L.photometric_loss(*tensors[:2]), np.abs(a - b).mean())


def test_a_masked_pixel_gives_no_gradient():
    picture, mask = doubles(1, 3, 4, 4), torch.zeros(1, 1, 4, 4).double()
    mask[..., 1, 2] = 1
    L.photometric_loss(picture, torch.zeros(1, 3, 4, 4).double(), mask).backward()
    assert (picture.grad != 0).sum() == 3 and picture.grad[0, :, 1, 2].all()


# ---------------------------------------------------------------- landmarks
def deca_weights():
    w = np.ones(68)
    for i in (5, 6, 10, 11): w[i] = 2
    for i in (*range(27, 36), *range(48, 68)): w[i] = 1.5
    for i in (30, 31, 35, 48, 54): w[i] = 3
    return w


def test_landmarks(rng):
    p, t, seen = rng.standard_normal((B, 68, 2)), rng.standard_normal((B, 68, 2)), (rng.random((B, 68)) > 0.3).astype(float)
    w = deca_weights() * seen
    expected = (w * np.abs(p - t).sum(-1)).sum() / (2 * w.sum())
    P, T, S = map(torch.tensor, (p, t, seen))
    assert close(L.landmark_loss(P, T, visible=S), expected)
    assert close(L.landmark_loss(P, T, visible=S), expected), "a second call must see the same weights"
    each = (w * np.abs(p - t).sum(-1)).sum(1) / (2 * w.sum(1))
    assert close(L.landmark_loss(P, T, visible=S, each=True), each)
    assert close(L.landmark_loss(P, T, "equal"), np.abs(p - t).mean()) and close(L.landmark_loss(P, T, "equal", metric="mse"), ((p - t) ** 2).mean())
    unknown = np.where(seen[..., None] > 0, t, np.nan)
    assert close(L.landmark_loss(P, torch.tensor(unknown)), expected)
    assert close(L.landmark_loss(P, T, torch.tensor(deca_weights())), L.landmark_loss(P, T))


@pytest.mark.parametrize("name, n", [("eye", 68), ("mouth", 68), ("corner", 68), ("eye_mp", 105), ("eye_mp_released", 105), ("mouth_mp", 105), ("corner_mp", 105)])
def test_relative(rng, name, n):
    p, t = rng.standard_normal((B, n, 2)), rng.standard_normal((B, n, 2))
    P, T = torch.tensor(p), torch.tensor(t)
    def length(x, a, b): return np.sqrt(((x[:, a] - x[:, b]) ** 2).sum(-1))
    by_length = np.stack([np.abs(length(p, a, b) - length(t, a, b)) for a, b in L.PAIRS[name]], 1)
    by_offset = np.stack([np.abs((t[:, a] - t[:, b]) - (p[:, a] - p[:, b])).sum(-1) for a, b in L.PAIRS[name]], 1)
    assert close(L.relative_loss(P, T, name), by_length.mean()) and close(L.relative_loss(P, T, name, each=True), by_length.mean(1))
    assert close(L.relative_loss(P, T, name, "offset"), by_offset.sum(1).mean()) and close(L.relative_loss(P, T, name, "offset", each=True), by_offset.sum(1))
    shift = P + torch.tensor([0.7, -0.2]).double()
    for form in ("distance", "offset"):
        assert close(L.relative_loss(shift, T, name, form), L.relative_loss(P, T, name, form).numpy()), "a shift of the head must not count"
        assert gradcheck(lambda x: L.relative_loss(x, T, name, form), doubles(B, n, 2))


def test_relative_with_unknown_and_with_closed_eyes():
    p, t = doubles(2, 68, 2), torch.randn(2, 68, 2).double()
    t[0] = torch.nan
    t[1, 37] = torch.nan
    for form in ("distance", "offset"):
        loss = L.relative_loss(p, t, "eye", form, each=True)
        assert loss[0] == 0 and loss[1] > 0
        gradient, = torch.autograd.grad(loss.sum(), p)
        assert gradient.isfinite().all() and not gradient[0].any() and not gradient[1, [37, 41]].any()
    shut = torch.zeros(1, 68, 2, requires_grad=True)
    L.relative_loss(shut, torch.rand(1, 68, 2), "eye").backward()
    assert shut.grad.isfinite().all()


MP_LIPS = {(185, 146), (40, 91), (39, 181), (37, 84), (0, 17), (267, 314), (269, 405), (270, 321), (409, 375),
           (191, 95), (80, 88), (81, 178), (82, 87), (13, 14), (312, 317), (311, 402), (310, 318), (415, 324)}
MP_LIDS = {(246, 7), (161, 163), (160, 144), (159, 145), (158, 153), (157, 154), (173, 155), (466, 249), (388, 390), (387, 373), (386, 374), (385, 380), (384, 381), (398, 382)}


def test_pairs_of_mediapipe_are_anatomical():
    from emoca_nb.flame import FLAME
    flame = FLAME.load()
    ids = flame.head.mediapipe.ids
    assert tuple(ids.tolist()) == L.MEDIAPIPE_105 and len(set(L.MEDIAPIPE_105)) == 105
    assert {(ids[a], ids[b]) for a, b in L.PAIRS["eye_mp"]} == MP_LIDS
    assert {(ids[a], ids[b]) for a, b in L.PAIRS["mouth_mp"]} == MP_LIPS
    points = flame().landmarks_mp[0]
    for name, pairs in dict(eye_mp=L.PAIRS["eye_mp"], mouth_mp=L.PAIRS["mouth_mp"][:9]).items():
        upper, lower = (points[[pair[i] for pair in pairs]] for i in (0, 1))
        assert ((upper - lower)[:, 1] > 0).all(), f"{name}: the first of a pair lies above the second"
        assert ((upper - lower)[:, 0].abs() < 6e-3).all(), f"{name}: pairs do not cross"
    for a, b in L.PAIRS["corner_mp"]: assert (points[a] - points[b])[0].abs() > 0.03


# ---------------------------------------------------------------- priors
def test_priors(rng):
    code, light, jaw, expected = rng.standard_normal((B, 50)), rng.standard_normal((B, 9, 3)), rng.standard_normal((B, 3)), rng.standard_normal((B, 3))
    C = torch.tensor(code)
    assert close(L.code_loss(C), 0.5 * (code**2).sum()) and close(L.code_loss(C, each=True), 0.5 * (code**2).sum(1))
    assert close(L.code_loss(C, "norm"), (code**2).sum(1).mean()) and close(L.code_loss(C, "norm", each=True), (code**2).sum(1))
    assert close(L.code_loss(C, "mean"), (code**2).mean()) and close(L.code_loss(C, "mean", each=True), (code**2).mean(1))
    deviation = (light - light.mean(2, keepdims=True)) ** 2
    assert close(L.light_loss(torch.tensor(light)), deviation.mean()) and close(L.light_loss(torch.tensor(light), each=True), deviation.mean((1, 2)))
    moved = torch.tensor(jaw), torch.tensor(expected)
    assert close(L.jaw_loss(*moved), ((jaw - expected) ** 2).sum(1).mean()) and close(L.jaw_loss(moved[0], form="mean"), (jaw**2).mean())
    assert close(L.jaw_loss(*moved, "distance", each=True), np.sqrt(((jaw - expected) ** 2).sum(1)))


# ---------------------------------------------------------------- identity, lips, layers
def test_identity_input_is_scaled_twice(rng):
    images = rng.random((2, 3, 224, 224)).astype(np.float32)
    cut = (images[:, ::-1] * 255 - np.array(L.VGGFACE2_MEAN, np.float32)[:, None, None])[:, :, 10:214, 10:214]
    for doubled in (True, False):
        expected = torch.nn.functional.interpolate(torch.tensor(np.ascontiguousarray(cut)) * (2 if doubled else 1) - (1 if doubled else 0), [224, 224], mode="bilinear")
        assert torch.allclose(L.vggface2_input(torch.tensor(images), doubled), expected, atol=1e-3)


def test_perceptual(rng):
    a, b = ([torch.tensor(rng.standard_normal(s)) for s in ((B, 4, 6, 6), (B, 8, 3, 3))] for _ in range(2))
    assert close(L.perceptual_loss(a, b), sum((x - y).abs().mean() for x, y in zip(a, b)))
    with pytest.raises(ValueError): L.perceptual_loss(a, b[:1])


def test_mouth_window_is_the_cut_at_whole_pixels():
    images, points = torch.rand(1, 3, 224, 224), torch.zeros(1, 68, 2)
    x, y = 120, 150  # the window's middle, between pixels
    points[:, 48:] = torch.tensor([x / 112 - 1, y / 112 - 1])
    grey = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(L.mouth_window(images, points), (grey[..., y - 44 : y + 44, x - 44 : x + 44] - 0.421) / 0.165, atol=1e-3)


# ---------------------------------------------------------------- detail
def test_detail_terms(rng):
    z, seen, shading = rng.standard_normal((2, 1, 16, 20)), (rng.random((2, 1, 16, 20)) > 0.05) * rng.random((2, 1, 16, 20)), rng.standard_normal((2, 3, 16, 20))
    Z = torch.tensor(z)
    assert close(L.displacement_loss(Z), np.abs(z).mean())
    eroded = np.stack([scipy.ndimage.binary_erosion(s[0] > 0, np.ones((5, 5)))[None] for s in seen])
    assert 0 < eroded.mean() < 1 and close(L.symmetry_loss(Z, torch.tensor(seen)), ((1 - eroded) * np.abs(z - z[..., ::-1])).sum())
    across, down = np.diff(shading[:, :, 1:-1], axis=3), np.diff(shading[..., 1:-1], axis=2)
    assert close(L.smoothness_loss(torch.tensor(shading)), (across**2).mean() + (down**2).mean())


def test_id_mrf_by_loops(rng):
    ours, theirs = rng.standard_normal((2, 2, 5, 3, 4))
    expected = 0
    for a, b in zip(ours, theirs):
        mean = b.mean(0)
        a, b = ((x - mean).reshape(5, -1) for x in (a, b))
        d = np.array([[(1 - a[:, q] @ b[:, p] / np.linalg.norm(a[:, q]) / np.linalg.norm(b[:, p])) / 2 for q in range(12)] for p in range(12)])
        w = np.exp((1 - d / (d.min(0) + 1e-5)) / 0.5)
        expected -= np.log((w / w.sum(0)).max(1).mean())
    assert close(L.id_mrf_loss(torch.tensor(ours), torch.tensor(theirs)), expected)


# ---------------------------------------------------------------- shape consistency
def test_shuffling_stays_within_people():
    groups = torch.tensor([4, 4, -1, 4, 2, 2, -1])
    for seed in range(20):
        order = L.shuffle_within(groups, torch.Generator().manual_seed(seed))
        assert (groups[order] == groups).all() and order[2] == 2 and order[6] == 6 and sorted(order.tolist()) == list(range(7))
    again = [L.shuffle_within(groups, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


# ---------------------------------------------------------------- stages
def everything(dtype=torch.float32):
    "A record with all there can be."
    r = lambda *shape: torch.randn(*shape, dtype=dtype)
    codes = SimpleNamespace(shape=r(B, 100), tex=r(B, 50), exp=r(B, 50), pose=r(B, 6), light=r(B, 9, 3))
    return Compared(codes, (r(B, 68, 2), r(B, 68, 2)), (r(B, 105, 2), r(B, 105, 2)), (r(B, 3, 8, 8), r(B, 3, 8, 8)), torch.ones(B, 1, 8, 8), (r(B, 9), r(B, 9)),
                    (r(B, 9), r(B, 9)), (r(B, 9), r(B, 9)), ((r(B, 4, 3, 3),), (r(B, 4, 3, 3),)), torch.ones(B, 68), r(B, 3))


ALL = LossWeights(**{name: 0.5 for name in L.LOSSES})


def test_every_weight_has_its_term():
    floats = {f.name for f in fields(LossWeights) if f.default == 0.0 and not isinstance(f.default, str)}
    assert set(L.LOSSES) == floats
    terms = compare(everything(), ALL)
    assert set(terms) == floats and all(t.ndim == 0 and t > 0 for t in terms.values())
    assert torch.allclose(total(terms, ALL), sum(terms.values()) / 2)


@pytest.mark.parametrize("form", ["mean", "norm", "sum"])
def test_pictures_apart_make_the_batch(form):
    weights, record = replace(ALL, code_form=form), everything(torch.double)
    apart, together = compare(record, weights, each=True), compare(record, weights)
    for name, values in apart.items():
        joined = values.sum() if form == "sum" and name in ("shape", "tex", "exp") else values.mean()
        assert values.shape == (B,) and torch.allclose(joined, together[name]), name


def test_stages_hold_the_published_weights():
    of = lambda stage: {n: getattr(STAGES[stage], n) for n in L.LOSSES if getattr(STAGES[stage], n)}
    assert of("deca_pretrain") == dict(landmarks=1, eye=1, mouth=0.5, shape=1e-4, exp=1e-4)
    assert of("deca_coarse") == dict(landmarks=1, eye=1, mouth=0.5, photometric=2, identity=0.2, shape=1e-4, exp=1e-4, tex=1e-4, light=1)
    assert of("emoca") == dict(emotion=1, photometric=2, eye=0.5, mouth=0.5, corner=0.5, shape=1e-4, exp=1e-4, tex=1e-5, light=12)
    assert of("emoca_paper") == dict(emotion=1, photometric=2, eye=0.5, mouth=0.5, corner=0.5, exp=1e-4)
    assert STAGES["emoca"].emotion_metric == "mse" and STAGES["emoca_paper"].emotion_metric == "l2"
    assert of("smirk_pretrain") == dict(landmarks_mp=100, contour=100, exp=1e-2)
    for name, stage in STAGES.items(): assert total(compare(everything(), stage), stage).isfinite(), name


def test_a_stage_is_frozen_and_knows_its_names():
    with pytest.raises(FrozenInstanceError): STAGES["emoca"].emotion = 0
    with pytest.raises(TypeError, match="emotoin"): replace(STAGES["emoca"], emotoin=0)
    assert "emotion" not in compare(everything(), replace(STAGES["emoca"], emotion=0))


@pytest.mark.parametrize("change, missing", [(dict(emotion=None), "emotion"), (dict(pictures=None), "pictures"), (dict(codes=None), "codes.exp, codes.light"),
                                              (dict(codes=SimpleNamespace(exp=torch.ones(1, 2), tex=None, shape=torch.ones(1, 2))), "codes.light, codes.tex")])
def test_what_is_missing_is_named(change, missing):
    with pytest.raises(ValueError, match=f"ask for .*{missing}"): compare(replace(everything(), **change), STAGES["emoca"])


@pytest.mark.parametrize("call", [
    lambda r: L.emotion_loss(*r.emotion, "l3"), lambda r: L.photometric_loss(*r.pictures, norm="area"), lambda r: L.landmark_loss(*r.landmarks, "fan"),
    lambda r: L.landmark_loss(*r.landmarks, metric="huber"), lambda r: L.relative_loss(*r.landmarks, "nose"), lambda r: L.relative_loss(*r.landmarks, "eye", "angle"),
    lambda r: L.code_loss(r.codes.exp, "max"), lambda r: L.jaw_loss(r.jaw, form="angle")])
def test_unknown_forms_are_named(call):
    with pytest.raises(ValueError, match="is none of"): call(everything())
