"""The FLAME layer and its files: parity with recorded values, gradients, round trips and files that lie"""
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, scipy.sparse, torch, trimesh
from torch.autograd import gradcheck, gradgradcheck

from emoca_nb import flame as fl
from emoca_nb.core import BadFile, EmocaError, UnsafeFile
from emoca_nb.flame import FLAME, AlbedoSpace, HeadModel, LandmarkEmbedding, MediaPipeEmbedding

GOLDEN = Path(__file__).parents[1] / ".." / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden")


def pins(rng, n_faces, *shape):
    return rng.integers(0, n_faces, shape), rng.dirichlet([1, 1, 1], shape).astype(np.float32)


def ball(S=7, E=5, parents=(-1, 0, 1, 1, 1), subdivisions=2, seed=0):
    "An ellipsoid with random bases, and every optional part"
    rng, mesh = np.random.default_rng(seed), trimesh.creation.icosphere(subdivisions)
    V, F, J = len(mesh.vertices), len(mesh.faces), len(parents)
    noise = lambda *s: (rng.normal(size=s) * .01).astype(np.float32)
    uv, uv_faces = rng.random((V + 5, 2)).astype(np.float32), rng.integers(0, V + 5, (F, 3))
    return HeadModel(
        "ball", (mesh.vertices * [.08, .12, .1]).astype(np.float32), np.asarray(mesh.faces), noise(V, 3, S), noise(V, 3, E), noise(V, 3, 9 * (J - 1)),
        rng.dirichlet(np.ones(V), J).astype(np.float32), rng.dirichlet(np.full(J, .3), V).astype(np.float32), np.array(parents), uv=uv, uv_faces=uv_faces,
        landmarks=LandmarkEmbedding(*pins(rng, F, 51), *pins(rng, F, 79, 17), *pins(rng, F, 68)), mediapipe=MediaPipeEmbedding(*pins(rng, F, 105), np.arange(105)),
        eyelids=noise(2, V, 3), albedo=AlbedoSpace(rng.integers(0, 256, (256, 256, 3), np.uint8), rng.integers(-127, 128, (3, 256, 256, 3), np.int8), np.full(3, .001, np.float32)),
        regions=dict(face=np.arange(40), lips=np.arange(40, 60)), uv_masks=dict(face=rng.integers(0, 256, (256, 256), np.uint8), face_eye=np.zeros((256, 256), np.uint8)),
        expression_names=tuple(f"e{i}" for i in range(E)), credit="made of noise")


def layer(head=None, **kw):
    return FLAME(ball() if head is None else head, **dict(n_shape=7, n_exp=5) | kw)


def codes(B, dtype=torch.float32, seed=0, scale=.3):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(B, n, generator=g).to(dtype) * scale for k, n in dict(shape=7, exp=5, pose=6, eye_pose=6, neck_pose=3, eyelid=2).items()}


def same_arrays(a, b):
    a, b = a.to_arrays(), b.to_arrays()
    assert a.keys() == b.keys()
    for k in a: assert np.asarray(a[k]).dtype == np.asarray(b[k]).dtype and np.array_equal(a[k], b[k]), k


# ---------------------------------------------------------------- parity
@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_dir(): pytest.skip("needs ../shared/golden")
    expected = {k: torch.tensor(v) for k, v in np.load(GOLDEN / "flame_tiny_expected.npz").items()}
    return FLAME.load(GOLDEN / "flame_tiny.pkl", GOLDEN / "landmark_embedding_tiny.npy"), expected


def run(model, z, **kw): return model(z["shape"], z["exp"], z["pose"], z["eye_pose"], **kw)


@pytest.mark.parametrize("name", ["vertices", "landmarks2d", "landmarks3d"])
def test_agrees_with_the_published_layer(golden, name):
    model, z = golden
    assert (getattr(run(model, z), name) - z[name]).abs().max() < 1e-6


def test_agrees_in_double_and_bfloat16(golden):
    model, z = golden
    double = FLAME(model.head).double()
    assert (run(double, z).vertices - z["vertices"]).abs().max() < 1e-6 and run(double, z).vertices.dtype == torch.float64
    half = FLAME(model.head).bfloat16()
    error = (run(half, z).vertices.float() - z["vertices"]).abs().max() / z["vertices"].abs().max()
    assert run(half, z).vertices.dtype == torch.bfloat16 and 1e-5 < error < .03


def test_the_other_yaw_convention_mirrors_the_contour(golden):
    model, z = golden
    other = FLAME(model.head, yaw_convention="flame_pytorch")
    a, b = run(model, z), run(other, z)
    assert torch.equal(a.vertices, b.vertices) and torch.equal(a.landmarks2d[:, 17:], b.landmarks2d[:, 17:])
    turned = fl.contour_rows(fl.rodrigues(z["pose"][:, :3])) != 0
    assert not torch.equal(a.landmarks2d[turned, :17], b.landmarks2d[turned, :17])


def test_fewer_components_are_the_others_at_zero(golden):
    model, z = golden
    few = FLAME(model.head, n_shape=10, n_exp=3)
    cut = dict(z, shape=z["shape"] * (torch.arange(100) < 10), exp=z["exp"] * (torch.arange(50) < 3))
    assert torch.allclose(few(z["shape"][:, :10], z["exp"][:, :3], z["pose"], z["eye_pose"]).vertices, run(model, cut).vertices, atol=1e-6)
    many = FLAME(model.head, n_shape=300, n_exp=100)
    pad = lambda x, n: torch.nn.functional.pad(x, (0, n - x.shape[1]))
    assert torch.allclose(many(pad(z["shape"], 300), pad(z["exp"], 100), z["pose"], z["eye_pose"]).vertices, z["vertices"], atol=1e-6)


@pytest.mark.parametrize("where", ["npz", "exported"])
def test_the_golden_model_comes_back_from_every_format(golden, tmp_path, where):
    model, z = golden
    if where == "npz":
        model.head.save(tmp_path / "flame_tiny.npz")
        back = HeadModel.load(tmp_path / "flame_tiny.npz")
        same_arrays(model.head, back)
    else:
        model.head.export_flame_files(tmp_path)
        back = HeadModel.load(tmp_path / "generic_model.npz", tmp_path / "landmark_embedding.npy")
    out = run(FLAME(back), z)
    assert (out.vertices - z["vertices"]).abs().max() < 1e-6 and (out.landmarks2d - z["landmarks2d"]).abs().max() < 1e-6


# ---------------------------------------------------------------- the maths, against a plain per-vertex loop
def by_hand(head, x):
    "One head, vertex by vertex in numpy"
    v = head.v_template + head.shapedirs @ x["shape"] + head.expdirs @ x["exp"]
    joints = head.J_regressor @ v
    turns = [trimesh.transformations.rotation_matrix(np.linalg.norm(r), r)[:3, :3] for r in np.concatenate([x["pose"][:3], x["neck_pose"], x["pose"][3:], x["eye_pose"]]).reshape(-1, 3)]
    v = v + head.posedirs @ np.concatenate([(R - np.eye(3)).ravel() for R in turns[1:]])
    world = []
    for k, p in enumerate(head.parents):
        G = np.eye(4)
        G[:3, :3], G[:3, 3] = turns[k], joints[k] - (joints[p] if p >= 0 else 0)
        world.append(world[p] @ G if p >= 0 else G)
    carried = np.stack([v @ G[:3, :3].T + G[:3, 3] - G[:3, :3] @ j for G, j in zip(world, joints)], 1)
    lids = x["eyelid"][0] * head.eyelids[0] + x["eyelid"][1] * head.eyelids[1]
    return (head.weights[..., None] * carried).sum(1) + lids


def test_agrees_with_a_plain_loop():
    x, model = codes(3, torch.float64), layer().double()
    out = model(**x).vertices
    for i in range(3):
        assert np.allclose(out[i], by_hand(model.head, {k: v[i].numpy() for k, v in x.items()}), atol=1e-7)


@pytest.mark.parametrize("cache", [1, 40_000, 1 << 30])
def test_pieces_do_not_change_the_result(monkeypatch, cache):
    x, model = codes(9), layer()
    whole, gradient = {}, {}
    for c in (cache, 2 << 20):
        monkeypatch.setattr(fl, "CACHE", c)
        y = {k: v.clone().requires_grad_() for k, v in x.items()}
        whole[c] = model(**y).vertices
        gradient[c] = torch.autograd.grad(whole[c].square().sum(), list(y.values()))
    assert torch.allclose(whole[cache], whole[2 << 20], atol=1e-7)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradient[cache], gradient[2 << 20]))


def test_rotations_are_rotations():
    r = torch.randn(50, 3).double() * 3
    R = fl.rodrigues(r)
    assert torch.allclose(R @ R.mT, torch.eye(3).double().expand(50, 3, 3), atol=1e-6) and torch.allclose(torch.linalg.det(R), torch.ones(50).double(), atol=1e-6)
    assert torch.allclose((R @ r[..., None])[..., 0], r, atol=1e-6)


def test_global_rotation_is_rigid():
    model = layer().double()
    a = model(pose=torch.tensor([[.4, -.3, .2, 0, 0, 0]]).double()).vertices[0]
    b = model().vertices[0]
    assert torch.allclose(torch.cdist(a, a), torch.cdist(b, b), atol=1e-7) and not torch.allclose(a, b, atol=1e-3)


# ---------------------------------------------------------------- gradients
def test_gradcheck_rotations():
    r = torch.cat([torch.zeros(1, 3), torch.full((1, 3), 1e-6), torch.randn(4, 3)]).double().requires_grad_()
    assert gradcheck(fl.rodrigues, r)


def test_gradcheck_skinning():
    g = torch.Generator().manual_seed(1)
    points, transforms = (torch.randn(*s, generator=g).double().requires_grad_() for s in ((2, 3, 6), (2, 4, 3, 4)))
    weights = torch.rand(4, 6, generator=g).double().softmax(0)
    assert gradcheck(fl.skin, (points, transforms, weights)) and gradgradcheck(fl.skin, (points, transforms, weights))


@pytest.mark.parametrize("output", [0, 1, 2, 3])
def test_gradcheck_of_the_layer(output):
    model = layer(ball(subdivisions=0)).double()
    x = {k: v.requires_grad_() for k, v in codes(2, torch.float64).items()}
    assert gradcheck(lambda *a: model(*a)[output], tuple(x.values()), atol=1e-6, fast_mode=True)


def test_gradient_of_a_resting_head_is_finite():
    pose = torch.zeros(2, 6, requires_grad=True)
    out = layer()(pose=pose)
    (out.vertices.square().sum() + out.landmarks2d.sum()).backward()
    assert pose.grad.isfinite().all() and pose.grad.abs().max() > 0


def test_jacobian_by_vmap():
    model = layer(ball(subdivisions=0)).double()
    f = lambda e: model(exp=e[None]).landmarks3d[0]
    J = torch.func.jacrev(f)(torch.zeros(5).double())
    slow = torch.autograd.functional.jacobian(f, torch.zeros(5).double())
    assert torch.allclose(J, slow, atol=1e-10) and J.shape == (68, 3, 5)


# ---------------------------------------------------------------- sizes, types, batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("B", [0, 1, 3])
def test_batches_and_types(B, dtype):
    model = layer().to(dtype)
    out = model(**codes(B, dtype))
    assert [tuple(o.shape) for o in out] == [(B, 162, 3), (B, 68, 3), (B, 68, 3), (B, 105, 3)] and all(o.dtype == dtype and o.isfinite().all() for o in out)
    assert out.vertices.is_contiguous()


def test_empty_batch_has_a_gradient():
    x = {k: v.requires_grad_() for k, v in codes(0).items()}
    layer()(**x).vertices.sum().backward()
    assert x["pose"].grad.shape == (0, 6)


def test_batch_items_do_not_touch_each_other():
    model, x = layer(), codes(5)
    together = model(**x)
    for i in range(5):
        for a, b in zip(together, model(**{k: v[i:i + 1] for k, v in x.items()})): assert torch.allclose(a[i], b[0], atol=1e-6)


def test_what_is_left_out_is_zero():
    model, x = layer(), codes(4)
    zeros = {k: torch.zeros_like(v) for k, v in x.items()}
    for k in x:
        assert torch.allclose(model(**{k: x[k]}).vertices, model(**zeros | {k: x[k]}).vertices, atol=1e-6)
    assert torch.allclose(model().vertices[0], torch.tensor(model.head.v_template), atol=1e-6)


def test_one_identity_with_many_expressions():
    model, x = layer(), codes(4)
    one = model(shape=x["shape"][:1], exp=x["exp"]).vertices
    assert torch.equal(one, model(shape=x["shape"][:1].expand(4, -1), exp=x["exp"]).vertices)


@pytest.mark.parametrize("given, message", [
    (dict(shape=(2, 8)), r"shape: expected \(2, 7\), found \(2, 8\)"), (dict(exp=(2, 4)), r"exp: expected \(2, 5\), found \(2, 4\)"), (dict(pose=(2, 15)), "pose: expected"),
    (dict(pose=(6,)), "pose: expected"), (dict(shape=(2, 7), exp=(3, 5)), r"shape: expected \(3, 7\), found \(2, 7\)"), (dict(shape=(0, 7), exp=(3, 5)), "exp: expected"), (dict(eyelid=(2, 1)), "eyelid: expected")])
def test_wrong_inputs(given, message):
    with pytest.raises(ValueError, match=message): layer()(**{k: torch.zeros(s) for k, s in given.items()})


@pytest.mark.parametrize("arguments, message", [(dict(n_shape=8), "n_shape: expected 0..7, which ball has, found 8"), (dict(n_exp=-1), "n_exp"), (dict(yaw_convention="left"), "yaw_convention")])
def test_wrong_sizes(arguments, message):
    with pytest.raises(ValueError, match=message): layer(**arguments)


def test_landmarks_of_a_model_in_hand_are_not_replaced_silently():
    with pytest.raises(ValueError, match="landmarks: expected None"): FLAME.load(ball(), "landmark_embedding.npy", 7, 5)


def test_no_eyelids_is_said():
    with pytest.raises(ValueError, match="ball has no eyelid offsets"): layer(replace(ball(), eyelids=None))(eyelid=torch.zeros(1, 2))


def test_no_landmarks():
    out = layer(replace(ball(), landmarks=None, mediapipe=None))(**codes(2))
    assert out.landmarks2d is None and out.landmarks3d is None and out.landmarks_mp is None and out.vertices.shape == (2, 162, 3)
    only = layer(replace(ball(), landmarks=None))(**codes(2))
    assert torch.equal(only.landmarks_mp, layer()(**codes(2)).landmarks_mp)


def test_other_skeletons():
    three = layer(ball(parents=(-1, 0, 1)))
    assert three(pose=torch.randn(2, 6)).vertices.shape == (2, 162, 3)
    six = layer(ball(parents=(-1, 0, 1, 1, 1, 3)))
    assert six(eye_pose=torch.randn(2, 9)).vertices.shape == (2, 162, 3)
    with pytest.raises(ValueError, match="expected the joints global, neck, jaw"): layer(ball(parents=(-1, 0)))


def test_no_components_at_all():
    assert torch.allclose(layer(n_shape=0, n_exp=0)(shape=torch.zeros(2, 0)).vertices[1], torch.tensor(ball().v_template), atol=1e-6)


def test_checkpoints_carry_no_model():
    model = layer()
    assert not model.state_dict() and not list(model.parameters()) and model.faces.dtype == torch.int64
    assert model.bfloat16().faces.dtype == torch.int64


def test_autocast_keeps_the_precision():
    model, x = layer(), codes(2)
    with torch.autocast("cpu", torch.bfloat16): out = model(**x)
    assert torch.equal(out.vertices, model(**x).vertices)


def test_traces_as_one_graph():
    model, x = layer(), codes(2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(**x).landmarks2d, model(**x).landmarks2d, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    x, model = codes(4), layer()
    cpu, gpu = model(**x), layer().cuda()(**{k: v.cuda() for k, v in x.items()})
    for a, b in zip(cpu, gpu): assert b.is_cuda and torch.allclose(a, b.cpu(), atol=1e-5)


# ---------------------------------------------------------------- the contour
def reference_row(yaw):
    "The published rule, as the facts state it, for one yaw in degrees"
    yaw = int(np.round(min(yaw, 39)))
    return yaw if yaw >= 0 else 78 if yaw < -39 else 39 - yaw


def test_contour_rows():
    degrees = torch.linspace(-89.7, 89.7, 400).double()
    R = fl.rodrigues(torch.stack([degrees * 0, degrees.deg2rad(), degrees * 0], 1))
    assert fl.contour_rows(R).tolist() == [reference_row(d) for d in degrees.tolist()]
    assert fl.contour_rows(R, "flame_pytorch").tolist() == [reference_row(-d) for d in degrees.tolist()]
    assert fl.contour_rows(R, n_rows=21).max() == 20


def test_contour_counts_the_neck_too():
    model = layer()
    turn = torch.tensor([[0, np.radians(10), 0]], dtype=torch.float32)
    both = model(pose=torch.nn.functional.pad(turn, (0, 3)), neck_pose=turn)
    l = model.head.landmarks
    expected = fl.surface_points(both.vertices, torch.tensor(model.head.faces[l.dynamic_faces[20]]), torch.tensor(l.dynamic_bary[20]))
    assert torch.allclose(both.landmarks2d[:, :17], expected, atol=1e-6)


def test_landmarks_are_barycentric():
    model, x = layer(), codes(2)
    out, l, m = model(**x), model.head.landmarks, model.head.mediapipe
    at = lambda faces, bary: np.einsum("bncd,nc->bnd", out.vertices.numpy()[:, model.head.faces[faces]], bary)
    assert np.allclose(out.landmarks2d[:, 17:], at(l.static_faces, l.static_bary), atol=1e-6)
    assert np.allclose(out.landmarks3d, at(l.full_faces, l.full_bary), atol=1e-6) and np.allclose(out.landmarks_mp, at(m.faces, m.bary), atol=1e-6)


# ---------------------------------------------------------------- albedo
@pytest.mark.parametrize("side", [16, 256, 300])
@pytest.mark.parametrize("layout", ["BFM", "FLAME"])
def test_albedo_of_the_published_layouts(tmp_path, side, layout):
    rng = np.random.default_rng(0)
    mean, basis = rng.random(side * side * 3), rng.normal(size=(side * side * 3, 4)) * .1
    if layout == "BFM": np.savez(tmp_path / "a.npz", MU=mean, PC=basis)
    else: np.savez(tmp_path / "a.npz", mean=255 * mean.reshape(side, side, 3), tex_dir=255 * basis.reshape(side, side, 3, 4))
    space = AlbedoSpace(*(fl.read_albedo(tmp_path / "a.npz", n=3)[k][0] for k in ("albedo_mean", "albedo_basis", "albedo_scale")))
    code = torch.randn(2, 3)
    flat = torch.tensor(mean)[None] + code.double() @ torch.tensor(basis[:, :3]).T
    expected = torch.nn.functional.interpolate(flat.view(2, side, side, 3).permute(0, 3, 1, 2), 256)[:, [2, 1, 0]]
    assert torch.allclose(space.albedo(code), expected.float(), atol=1e-5)


def test_albedo_of_bytes():
    a, code = ball().albedo, torch.randn(2, 3)
    expected = a.mean / 255 + np.tensordot(code.numpy() * a.scale, a.basis.astype(float), 1)
    assert np.allclose(a.albedo(code).permute(0, 2, 3, 1), expected, atol=1e-5)
    assert gradcheck(lambda c: a.albedo(c)[..., :3, :3], torch.randn(1, 3).double().requires_grad_())
    with pytest.raises(ValueError, match="albedo code"): a.albedo(torch.zeros(2, 4))


# ---------------------------------------------------------------- files
def test_save_and_load(tmp_path):
    head = ball()
    head.save(tmp_path / "ball.npz")
    back = HeadModel.load(tmp_path / "ball.npz")
    same_arrays(head, back)
    back.save(tmp_path / "again.npz")
    same_arrays(head, HeadModel.load(tmp_path / "again.npz"))
    assert back.name == "ball" and back.expression_names == head.expression_names and back.credit == "made of noise"
    for a, b in zip(layer(head)(**codes(2)), layer(back)(**codes(2))): assert torch.equal(a, b)


def exported(head, folder, size=256):
    files = {p.name: p for p in head.export_flame_files(folder, size)}
    return files, HeadModel.load(files["generic_model.npz"], files["landmark_embedding.npy"], mediapipe=files["mediapipe_landmark_embedding.npz"],
                                 eyelids=(files["l_eyelid.npy"], files["r_eyelid.npy"]), regions=files["FLAME_masks.pkl"], template=files["head_template.obj"],
                                 uv_masks=(files["uv_face_mask.png"], files["uv_face_eye_mask.png"]), albedo=files["FLAME_texture.npz"])


@pytest.mark.parametrize("size", [256, 512])
def test_export_of_the_separate_files(tmp_path, size):
    head = ball()
    files, back = exported(head, tmp_path, size)
    a, b = head.to_arrays(), back.to_arrays()
    exact = a.keys() - {"shapedirs", "n_shape", "expression_names", "credit", "albedo_mean", "albedo_basis", "albedo_scale"}
    for k in exact: assert np.array_equal(a[k], b[k]), k
    assert b["shapedirs"].shape[2] == 400 and np.array_equal(back.shapedirs[..., :7], head.shapedirs) and np.array_equal(back.expdirs[..., :5], head.expdirs)
    assert not back.shapedirs[..., 7:].any() and not back.expdirs[..., 5:].any()
    code = torch.randn(2, 3)
    assert torch.allclose(back.albedo.albedo(code), head.albedo.albedo(code), atol=1e-5)
    x = codes(2)
    for u, v in zip(layer(head)(**x), layer(back)(**x)): assert torch.allclose(u, v, atol=1e-7)


def test_exported_files_look_like_the_publishers(tmp_path):
    files, _ = exported(ball(), tmp_path, 512)
    model = np.load(files["generic_model.npz"])
    assert set(model) == {"v_template", "f", "shapedirs", "posedirs", "J_regressor", "kintree_table", "weights", "J", "bs_style", "bs_type"}
    landmarks = np.load(files["landmark_embedding.npy"], allow_pickle=True)[()]
    assert landmarks["full_lmk_faces_idx"].shape == (1, 68) and isinstance(landmarks["dynamic_lmk_faces_idx"], torch.Tensor) and landmarks["static_lmk_bary_coords"].dtype == np.float64
    assert np.load(files["mediapipe_landmark_embedding.npz"])["lmk_face_idx"].dtype == np.uint32 and np.load(files["l_eyelid.npy"]).dtype == np.float64
    assert np.load(files["FLAME_texture.npz"])["tex_dir"].shape == (512, 512, 3, 3) and pickle.loads(files["FLAME_masks.pkl"].read_bytes())["lips"].tolist() == list(range(40, 60))
    mesh = trimesh.load(files["head_template.obj"], process=False, maintain_order=True)
    assert len(mesh.faces) == 320


def test_the_pair_of_flame_pytorch(tmp_path):
    head = ball()
    l = head.landmarks
    head.save(tmp_path / "ball.npz")
    static = dict(lmk_face_idx=l.static_faces.astype(np.uint32), lmk_b_coords=l.static_bary)
    (tmp_path / "flame_static_embedding.pkl").write_bytes(pickle.dumps(static, 2))
    np.save(tmp_path / "flame_dynamic_embedding.npy", dict(lmk_face_idx=list(l.dynamic_faces), lmk_b_coords=list(l.dynamic_bary)), allow_pickle=True)
    back = HeadModel.load(tmp_path / "ball.npz", tmp_path / "flame_static_embedding.pkl").landmarks
    assert np.array_equal(back.dynamic_faces, l.dynamic_faces) and np.array_equal(back.static_bary, l.static_bary)
    assert np.array_equal(back.full_faces, np.concatenate([l.dynamic_faces[0], l.static_faces]))


@pytest.mark.parametrize("kind", ["object", "csc", "csr", "float16 and unsigned"])
def test_dialects_of_npz(tmp_path, kind):
    head = ball()
    arrays = head.to_arrays()
    J = arrays.pop("J_regressor")
    if kind == "object": arrays["J_regressor"] = np.array(scipy.sparse.csc_matrix(J), dtype=object)
    elif kind in ("csc", "csr"):
        m = getattr(scipy.sparse, f"{kind}_matrix")(J)
        arrays |= {f"J_regressor_{k}": getattr(m, k) for k in ("data", "indices", "indptr", "shape")}
    else: arrays |= dict(J_regressor=J.astype(np.float64), f=head.faces.astype(np.uint16), kintree_table=arrays["kintree_table"].astype(np.uint64), shapedirs=arrays["shapedirs"].astype(np.float16))
    np.savez(tmp_path / "x.npz", **arrays)
    back = HeadModel.load(tmp_path / "x.npz")
    assert np.allclose(back.J_regressor, J) and back.parents.tolist() == [-1, 0, 1, 1, 1] and np.array_equal(back.faces, head.faces)


def test_obj_in_another_order(tmp_path):
    head = ball()
    order, roll = np.random.default_rng(1).permutation(len(head.faces)), np.arange(len(head.faces)) % 3
    shuffled = replace(head, faces=np.array([np.roll(head.faces[i], r) for i, r in zip(order, roll)]), uv_faces=np.array([np.roll(head.uv_faces[i], r) for i, r in zip(order, roll)]))
    shuffled.export_flame_files(tmp_path, 256)
    head.save(tmp_path / "ball.npz")
    assert np.array_equal(HeadModel.load(tmp_path / "ball.npz", template=tmp_path / "head_template.obj").uv_faces, head.uv_faces)


def test_files_of_the_register_go_only_to_flame_itself(tmp_path, monkeypatch):
    head = ball()
    head.export_flame_files(tmp_path / "register", 256)
    bare = replace(head, landmarks=None, mediapipe=None, eyelids=None, albedo=None, uv=None, uv_faces=None, regions={}, uv_masks={})
    bare.save(tmp_path / "bare.npz")
    files = dict(landmark_embedding="landmark_embedding.npy", mediapipe_embedding="mediapipe_landmark_embedding.npz", l_eyelid="l_eyelid.npy", r_eyelid="r_eyelid.npy",
                 flame_masks="FLAME_masks.pkl", head_template="head_template.obj", texture_space="FLAME_texture.npz")
    paths = {n: tmp_path / "register" / f for n, f in files.items()}
    there = lambda: type("S", (), dict(files={n: paths.get(n, tmp_path / "none") for c in fl.COMPANIONS.values() for names in c.assets for n in names}))
    monkeypatch.setattr(fl, "settings", there)
    monkeypatch.setattr(fl, "asset", paths.__getitem__)
    assert HeadModel.load(tmp_path / "bare.npz").landmarks is None
    monkeypatch.setattr(fl, "FLAME_SIZE", (162, 320))
    full = HeadModel.load(tmp_path / "bare.npz")
    assert np.array_equal(full.eyelids, head.eyelids) and np.array_equal(full.uv_faces, head.uv_faces) and full.albedo is not None and full.regions and not full.uv_masks
    assert np.array_equal(full.landmarks.full_faces, head.landmarks.full_faces) and full.mediapipe is not None


# ---------------------------------------------------------------- files that lie
@pytest.fixture(scope="module")
def good(): return ball().to_arrays()


def spoil(key, change): return lambda a: a | {key: change(np.array(a[key]))}


def put(i, value):
    def change(x):
        x = x.copy()
        x[i] = value
        return x
    return change


@pytest.mark.parametrize("change, message", [
    (lambda a: {k: v for k, v in a.items() if k != "posedirs"}, "an array named posedirs"),
    (lambda a: {k: v for k, v in a.items() if k != "n_shape"}, "n_shape in the file, or the argument n_identity"),
    (spoil("n_shape", lambda x: x * 0 + 13), "at least 13 columns in shapedirs"),
    (spoil("f", put((3, 1), 162)), r"f between 0 and 161 \(vertex ids\), found 0..162"),
    (spoil("f", put((3, 1), -1)), "f between 0 and 161"),
    (spoil("f", lambda x: x.astype(float)), "f .* whole"),
    (spoil("v_template", put((0, 0), np.nan)), "v_template.* not finite"),
    (spoil("v_template", lambda x: x[:-1]), "f between 0 and 160"),
    (spoil("shapedirs", lambda x: x[:-1]), r"shapedirs .*shape \(162, 3, any\)"),
    (spoil("posedirs", lambda x: x[..., :27]), r"posedirs .*shape \(162, 3, 36\)"),
    (spoil("J_regressor", lambda x: x.T), "J_regressor"),
    (spoil("weights", lambda x: x * 2), "weights .* summing to 1"),
    (spoil("weights", lambda x: x * [3, -1, 1, 1, 1]), "weights"),
    (spoil("kintree_table", put((0, 1), 3)), "each parent before its child"),
    (spoil("kintree_table", put((0, 3), -1)), "each parent before its child"),
    (spoil("kintree_table", lambda x: x[0]), "kintree_table .* whole"),
    (spoil("kintree_table", lambda x: np.array(["a", "b"])), "kintree_table .* whole"),
    (spoil("static_lmk_faces_idx", put(0, 320)), r"static_lmk_faces_idx between 0 and 319 \(triangle ids\)"),
    (spoil("static_lmk_faces_idx", lambda x: x[:50]), r"static_lmk_faces_idx.*shape \(51\)"),
    (spoil("dynamic_lmk_bary_coords", lambda x: x * 1.5), "barycentric weights"),
    (spoil("full_lmk_bary_coords", put((0, 0), (-1, 1, 1))), "barycentric weights"),
    (lambda a: a | dict(dynamic_lmk_faces_idx=a["dynamic_lmk_faces_idx"][:78], dynamic_lmk_bary_coords=a["dynamic_lmk_bary_coords"][:78]), "an odd number of rows"),
    (spoil("lmk_face_idx", put(2, 9999)), "lmk_face_idx between"),
    (spoil("landmark_indices", lambda x: x[:4]), "landmark_indices.*shape"),
    (spoil("l_eyelid", lambda x: x[1:]), r"l_eyelid .*shape \(162, 3\)"),
    (lambda a: {k: v for k, v in a.items() if k != "r_eyelid"}, "an array named r_eyelid"),
    (spoil("region/lips", put(0, 162)), "region/lips between 0 and 161"),
    (spoil("ft", put((0, 0), 167)), "ft between 0 and 166"),
    (spoil("uv_mask/face", lambda x: x.astype(float)), "uv_mask/face .* whole"),
    (spoil("albedo_basis", lambda x: x[:, :100]), "albedo_basis"),
    (spoil("albedo_scale", lambda x: x[:2]), "albedo_basis .*shape"),
])
def test_a_wrong_array_is_named(good, tmp_path, change, message):
    np.savez(tmp_path / "bad.npz", **change(good))
    with pytest.raises(BadFile, match=message) as e: HeadModel.load(tmp_path / "bad.npz")
    assert "bad.npz" in str(e.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04rubbish", b"\x80\x02}q\x00.", b"hello, this is no model", b"\x93NUMPY\x01\x00rubbish"])
def test_files_that_are_no_models(tmp_path, content):
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(BadFile, match="model.pkl"): HeadModel.load(tmp_path / "model.pkl")


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(BadFile, match="no such file"): HeadModel.load(tmp_path / "model.pkl")
    with pytest.raises(BadFile, match="a folder"): HeadModel.load(tmp_path)


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_refused(good, tmp_path):
    canary = tmp_path / "was_here"
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(dict(v_template=Evil(canary)), 2))
    with pytest.raises(UnsafeFile): HeadModel.load(tmp_path / "model.pkl")
    assert not canary.exists()


@pytest.mark.parametrize("kind, name, content", [
    ("landmarks", "l.npy", dict(static_lmk_faces_idx=np.arange(51))), ("mediapipe", "m.npz", dict(lmk_face_idx=np.arange(3))), ("albedo", "a.npz", dict(mean=np.zeros(3))),
    ("albedo", "a.npz", dict(MU=np.zeros(48), PC=np.zeros((50, 4)))), ("albedo", "a.npz", dict(MU=np.zeros(15), PC=np.zeros((15, 4))))])
def test_a_wrong_companion_is_named(tmp_path, kind, name, content):
    ball().save(tmp_path / "ball.npz")
    if name.endswith("npz"): np.savez(tmp_path / name, **content)
    else: np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(BadFile, match=name): HeadModel.load(tmp_path / "ball.npz", **{kind: tmp_path / name})


@pytest.mark.parametrize("text", ["", "v 0 0 0\n", "vt 0 0\nf 1/1 2/1 3/1\n", "vt 0 0\nf 1 2 3\n", "vt 0 0\nf 1//1 2//1 3//1\n", "vt 0 zero\nf 1/1 2/1 3/1\n", "vt 0 0\nf 1/1 2/1 3/1 4/1\n"])
def test_wrong_objs(tmp_path, text):
    ball().save(tmp_path / "ball.npz")
    (tmp_path / "t.obj").write_text(text)
    with pytest.raises(BadFile, match="t.obj"): HeadModel.load(tmp_path / "ball.npz", template=tmp_path / "t.obj")


def test_wrong_mask_picture(tmp_path):
    ball().save(tmp_path / "ball.npz")
    (tmp_path / "uv_face_mask.png").write_text("no picture")
    with pytest.raises(BadFile, match="uv_face_mask.png"): HeadModel.load(tmp_path / "ball.npz", uv_masks=tmp_path / "uv_face_mask.png")


def test_too_many_components_for_flames_layout(tmp_path):
    with pytest.raises(ValueError, match="room for 300 columns, found 301"): ball(S=301).export_flame_files(tmp_path)


def test_a_failed_export_leaves_no_half_file(tmp_path, monkeypatch):
    def broken(*a, **k): raise OSError("disk full")
    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(OSError): ball().save(tmp_path / "ball.npz")
    assert not list(tmp_path.iterdir())


def test_no_open_head_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(fl.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(EmocaError, match="open_head.npz"): FLAME.load()


def test_codes_that_are_not_numbers_show_in_the_vertices():
    out = FLAME.load()(pose=torch.full((1, 6), float("nan")))
    assert out.vertices.isnan().all() and out.landmarks2d.isnan().any()
