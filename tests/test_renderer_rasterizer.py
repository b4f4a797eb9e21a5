"The rasterizer: backends against each other and against float64, gradients, and input that should not break it."
import multiprocessing
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import trimesh

from emoca_nb import rasterizer
from emoca_nb.rasterizer import interpolate, rasterize, to_pixels

KINDS = ["numba", "torch"]
SIZES = [16, 97, (40, 64), (64, 40)]


@pytest.fixture(scope="module")
def mesh():
    "Two dented balls, 642 vertices, 1280 faces."
    ball = trimesh.creation.icosphere(subdivisions=3)
    v = torch.tensor(ball.vertices, dtype=torch.float32)
    v = v @ torch.tensor(trimesh.transformations.rotation_matrix(0.4, [1, 2, 3])[:3, :3], dtype=torch.float32)
    v = torch.stack([v * (1 + 0.1 * torch.sin(k * v[:, :1] + v[:, 1:2])) for k in (5, 7)]) * 0.8
    return v, torch.tensor(ball.faces)


def inner(fragments, least=1e-3):
    "Pixels that are not on an edge."
    return fragments.mask & (fragments.bary > least).all(-1)


def run(code, **env):
    "Run code in a fresh interpreter."
    env = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("size", SIZES)
def test_torch_sees_what_numba_sees(mesh, size):
    a, b = (rasterize(*mesh, size, kind) for kind in KINDS)
    assert torch.equal(a.pix_to_face, b.pix_to_face)
    assert (a.bary - b.bary).abs().max() < 1e-6 and (a.depth - b.depth).abs().max() < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_pytorch3d_sees_what_native_sees(mesh, size):
    pytest.importorskip("pytorch3d", reason="the pytorch3d extra is not installed")
    a, b = (rasterize(*mesh, size, kind) for kind in ("native", "pytorch3d"))
    core = inner(a)
    assert (a.pix_to_face == b.pix_to_face)[core].float().mean() > 0.999
    assert (a.mask == b.mask).float().mean() > 0.998
    core &= a.pix_to_face == b.pix_to_face
    assert (interpolate(a, mesh[0], mesh[1]) - interpolate(b, mesh[0], mesh[1])).abs().amax(1)[core].quantile(0.999) < 1e-4
    assert (a.depth - b.depth).abs()[core].quantile(0.999) < 1e-4
    assert b.bary[~b.mask].abs().sum() == 0 and b.depth[~b.mask].abs().sum() == 0


def test_pytorch3d_gradients_agree(mesh):
    pytest.importorskip("pytorch3d", reason="the pytorch3d extra is not installed")
    v, f = mesh
    a, b = (rasterize(v, f, (48, 64), kind) for kind in ("native", "pytorch3d"))
    slope = (interpolate(a, rasterizer.weight_slopes(to_pixels(v[0], 48, 64)[f]).abs().flatten(1).amax(1)[:, None, None].expand(-1, 3, 1)) < 2)[:, 0]
    asked = (inner(a) & (a.pix_to_face == b.pix_to_face) & slope)[..., None]
    g_bary, g_depth = torch.randn(*a.bary.shape) * asked, torch.randn(*a.depth.shape) * asked[..., 0]
    gradients = []
    for kind in ("native", "pytorch3d"):
        seen = rasterize(leaf := v.clone().requires_grad_(), f, (48, 64), kind)
        gradients.append(torch.autograd.grad((seen.bary, seen.depth), leaf, (g_bary, g_depth))[0])
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-3


def test_ties_and_edges_as_pytorch3d():
    "At equal depth the first face wins; a centre exactly on an edge is nobody's."
    pytest.importorskip("pytorch3d", reason="the pytorch3d extra is not installed")
    quad = torch.tensor([[[-1.0, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]]])
    halves = torch.tensor([[0, 1, 2], [1, 3, 2]])
    for faces in (halves, halves.flip(0), torch.cat([halves, halves]), torch.tensor([[0, 1, 3], [0, 1, 2], [0, 3, 2]])):
        a, b = (rasterize(quad, faces, 16, kind).pix_to_face for kind in ("native", "pytorch3d"))
        assert torch.equal(a, b)
    assert (rasterize(quad, halves, 16).pix_to_face[0].fliplr().diagonal() == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [12, (9, 14)])
def test_gradcheck(kind, size):
    v = torch.tensor([[[-0.8, -0.9, 0.1], [0.9, -0.7, 0.4], [-0.1, 0.8, 0.7], [0.95, 0.9, 0.2]]]).double().requires_grad_()
    f, values = torch.tensor([[0, 1, 2], [1, 3, 2]]), torch.rand(1, 4, 2).double().requires_grad_()
    core = inner(rasterize(v, f, size), 0.02)

    def seen(v, values):
        seen = rasterize(v, f, size, kind)
        return seen.depth[core], seen.bary[core], interpolate(seen, values, f)[:, :, core[0]]

    assert core.sum() > 20 and torch.autograd.gradcheck(seen, (v, values))


@pytest.mark.parametrize("shared", [False, True])
def test_interpolation_is_a_gather(mesh, shared):
    "Values, and both gradients, against plain indexing, with the values shared by the batch or not; more bands than pictures."
    v, f = mesh
    seen = rasterize(v, f, 40)
    values = torch.randn(*((1,) if shared else (2,)), v.shape[1], 5)
    corners = lambda t: torch.stack([t.expand(2, -1, -1)[b][f[seen.pix_to_face[b].clamp(min=0)]] for b in range(2)])
    g = torch.randn(2, 5, 40, 40)
    results = []
    for function in (lambda t, w: interpolate(seen._replace(bary=w), t, f), lambda t, w: (corners(t) * w[..., None]).sum(-2).movedim(-1, 1)):
        t, w = values.clone().requires_grad_(), seen.bary.clone().requires_grad_()
        results.append((out := function(t, w), *torch.autograd.grad(out, (t, w), g)))
    (out, gt, gw), (out_, gt_, gw_) = results
    assert torch.allclose(out, out_, atol=1e-5) and torch.allclose(gt, gt_, atol=1e-4)
    assert torch.allclose(gw[seen.mask], gw_[seen.mask], atol=1e-4) and (gw[~seen.mask] == 0).all()


def test_threads_do_not_matter(mesh):
    "One thread, several, bands or whole pictures, several callers at once: one result."
    v, f = mesh
    threads = torch.get_num_threads()
    pictures = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            pictures += [rasterize(v, f, 50), *[rasterize(v[i : i + 1], f, 50) for i in range(2)]]
    finally:
        torch.set_num_threads(threads)
    for batch, *single in (pictures[:3], pictures[3:6], pictures[6:]):
        assert torch.equal(batch.bary, pictures[0].bary) and torch.equal(batch.bary, torch.cat([s.bary for s in single]))
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(s.bary, pictures[0].bary) for s in pool.map(lambda _: rasterize(v, f, 50), range(8)))


def _child(queue, v, f):
    queue.put(rasterize(torch.from_numpy(v), torch.from_numpy(f), 32).mask.sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_survives_a_fork(mesh):
    v, f = mesh
    expected = rasterize(v, f, 32).mask.sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, v.numpy(), f.numpy()))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(10)


TRITON = """
    import torch, trimesh
    from emoca_nb.rasterizer import _triton_visible, rasterize, to_pixels
    ball = trimesh.creation.icosphere(subdivisions=1)
    giant = torch.tensor([[-0.45, -0.45, 2.0], [0.45, -0.4, 2], [0, 0.45, -2], [0.5, 0.5, 9], [0.5, 0.5, 9]])
    v = torch.cat([torch.tensor(ball.vertices).float() * 0.8, giant])[None] * torch.tensor([1.0, -0.7])[:, None, None]
    f = torch.cat([torch.tensor(ball.faces), torch.tensor([[42, 43, 44], [45, 46, 0]])])
    expected = rasterize(v, f, (16, 40), "numba")
    assert (expected.pix_to_face == len(f) - 2).any(), "the giant triangle is not in the picture"
    for limit in (32, 1 << 20):  # nearly all faces by tiles; all faces by lanes
        assert torch.equal(_triton_visible(to_pixels(v, 16, 40), f, 16, 40, limit), expected.pix_to_face), limit
    seen = rasterize(v.requires_grad_(), f, (16, 40), "triton")
    assert (seen.bary - expected.bary).abs().max() < 1e-5
    gradient, = torch.autograd.grad((seen.bary * torch.linspace(0, 1, 3)).sum() + seen.depth.sum(), v)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    print("agrees")
"""


def test_triton_kernels_interpreted():
    "The CUDA kernels, run by Triton's interpreter on the CPU, draw the same picture."
    pytest.importorskip("triton", reason="no Triton on this system")
    done = run(TRITON, TRITON_INTERPRET="1")
    assert "agrees" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile(capability):
    "The CUDA kernels compile to machine code; no GPU is needed for that."
    triton = pytest.importorskip("triton", reason="no Triton on this system")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    common = dict(p="*fp32", faces="*i64", boxes="*i32", keys="*i64", **dict.fromkeys(("V", "F", "H", "W"), "i32"))
    kernels = [(rasterizer._paint_small, dict(limit="i32"), dict(BLOCK=128)), (rasterizer._paint_large, dict(large="*i64"), dict(TILE=32))]
    for kernel, more, constants in kernels:
        signature = common | more | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature={name: signature[name] for name in kernel.arg_names}, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "min.s64" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 1000


@pytest.mark.parametrize("missing", ["numba", "triton"])
def test_works_without(missing):
    code = f"""
        import sys
        sys.modules["{missing}"] = None
        import torch
        from emoca_nb.rasterizer import interpolate, native_kind, rasterize
        v = torch.tensor([[[-1.0, -1, 0], [1, -1, 0], [-1, 1, 1]]], requires_grad=True)
        seen = rasterize(v, torch.tensor([[0, 1, 2]]), 8)
        interpolate(seen, v, torch.tensor([[0, 1, 2]])).sum().backward()
        print(native_kind(v), seen.mask.sum().item(), bool(v.grad.abs().sum() > 0))
    """
    done = run(code)
    assert done.stdout.split() == [dict(numba="torch", triton="numba")[missing], "28", "True"], done.stderr[-2000:]


def test_compiles_where_nothing_can_be_cached(monkeypatch):
    numba = pytest.importorskip("numba", reason="numba is not installed")
    njit = numba.njit

    def read_only(*args, cache=False, **options):
        if cache: raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(rasterizer.numba, "njit", read_only)
    assert rasterizer._jit(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_triangles_change_nothing(mesh, kind):
    v, f = mesh
    more = torch.tensor([[9.0, 9, 0], [9.5, 9, 0], [9, 9.5, 0], [1e30, 0, 0], [-1e30, 2e30, 1], [0.1, 0.1, -5]])
    n = v.shape[1]
    flat = torch.tensor([[0, 0, 1], [5, 5, 5], [n, n + 1, n + 2], [n + 5, n + 5, n + 5], [n + 3, n + 3, n + 4]])
    a, b = rasterize(v, f, 64, kind), rasterize(torch.cat([v, more.expand(2, -1, -1)], 1).requires_grad_(), torch.cat([f, flat]), 64, kind)
    assert torch.equal(a.pix_to_face, b.pix_to_face) and torch.equal(a.bary, b.bary)
    assert b.bary.grad_fn is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_face_larger_than_the_picture(kind):
    v = torch.tensor([[[-1e4, -1e4, 3], [3e4, -1e4, 3], [-1e4, 3e4, 3]], [[-1e30, -1e30, 3], [3e30, -1e30, 3], [-1e30, 3e30, 3]]])
    seen = rasterize(v, torch.tensor([[0, 1, 2]]), 64, kind)
    assert seen.mask.all() and seen.depth.isfinite().all() and (seen.depth - 3).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["native", "torch", "pytorch3d"])
def test_behind_before_and_far(kind):
    "Depth has no origin: negative, large, shifted."
    if kind == "pytorch3d": pytest.importorskip("pytorch3d", reason="the pytorch3d extra is not installed")
    flat = torch.tensor([[-0.9, -0.9, 0], [0.9, -0.9, 0], [-0.9, 0.9, 0]])
    for z in (-100.0, -1e-3, 0.0, 1e4):
        v = torch.cat([flat + torch.tensor([0, 0, z + 1]), flat + torch.tensor([0, 0, z])])[None]
        seen = rasterize(v, torch.arange(6).view(2, 3), 20, kind)
        assert seen.pix_to_face.unique().tolist() == [-1, 1]
        assert (seen.depth[seen.mask] - z).abs().max() <= 1e-6 * max(1, abs(z))


@pytest.mark.parametrize("kind", ["native", "torch", "pytorch3d"])
@pytest.mark.parametrize("batch, count", [(0, 5), (2, 0), (0, 0)])
def test_empty(kind, batch, count):
    v, f = torch.zeros(batch, 4, 3, requires_grad=True), torch.zeros(count, 3, dtype=torch.long)
    seen = rasterize(v, f, (3, 5), kind)
    assert seen.pix_to_face.shape == (batch, 3, 5) and seen.bary.shape == (batch, 3, 5, 3) and not seen.mask.any()
    picture = interpolate(seen, torch.zeros(batch, 4, 2), f)
    assert picture.shape == (batch, 2, 3, 5)
    (picture.sum() + seen.depth.sum()).backward()
    assert v.grad.abs().sum() == 0


@pytest.mark.parametrize("size", [1, 16, 333, 1024, (16, 1024)])
def test_sizes(mesh, size):
    v, f = mesh
    seen = rasterize(v[:1], f, size)
    assert seen.bary.isfinite().all() and seen.bary.min() >= -1e-6
    if size != 1: assert abs(seen.mask.float().mean() - rasterize(v[:1], f, 333).mask.float().mean()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(mesh, dtype):
    seen = rasterize(mesh[0].to(dtype), mesh[1].int(), 32)
    assert seen.bary.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (seen.mask == rasterize(*mesh, 32).mask).float().mean() > 0.97


def test_layout_does_not_matter(mesh):
    v, f = mesh
    apart = torch.stack([v, v + 1], -1)[..., 0], torch.stack([f, f], -1)[..., 0]
    assert not apart[0].is_contiguous() and torch.equal(rasterize(*apart, 32).bary, rasterize(v, f, 32).bary)
    seen = rasterize(v.requires_grad_(), f, 32)
    a = torch.autograd.grad(seen.bary, v, torch.ones(2, 32, 3, 32).transpose(2, 3).mul(torch.arange(3)), retain_graph=True)[0]
    b = torch.autograd.grad(seen.bary, v, torch.ones(2, 32, 32, 3).mul(torch.arange(3)))[0]
    v.requires_grad_(False)
    assert torch.equal(a, b)


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_item(mesh, spoil):
    v = torch.cat([mesh[0], mesh[0]])
    v[1, 3, 2] = v[3, 0, 0] = spoil
    with pytest.raises(ValueError, match=r"batch item\(s\) \[1, 3\] are not finite"): rasterize(v, mesh[1], 16)


@pytest.mark.parametrize("change, error, message", [
    (dict(faces=lambda f: f + 1), ValueError, "but there are 642"),
    (dict(faces=lambda f: f - 1), ValueError, "index vertices -1"),
    (dict(faces=lambda f: f.float()), TypeError, "int32 or int64"),
    (dict(faces=lambda f: f[:, :2]), ValueError, r"faces must be \(F,3\)"),
    (dict(faces=lambda f: f.to("meta")), ValueError, "faces on meta"),
    (dict(vertices=lambda v: v[0]), ValueError, r"vertices must be \(B,V,3\)"),
    (dict(vertices=lambda v: v.long()), TypeError, "floating point"),
    (dict(size=0), ValueError, "at least one pixel"),
    (dict(backend="opengl"), ValueError, "choose auto"),
])
def test_refused(mesh, change, error, message):
    given = dict(vertices=mesh[0], faces=mesh[1], size=16)
    given |= {name: value(given[name]) if callable(value) else value for name, value in change.items()}
    with pytest.raises(error, match=message): rasterize(**given)


def test_interpolation_refuses(mesh):
    seen = rasterize(*mesh, 16)
    with pytest.raises(ValueError, match="batch of 2"): interpolate(seen, torch.zeros(3, 642, 2), mesh[1])
    with pytest.raises(ValueError, match="attributes have 10"): interpolate(seen, torch.zeros(10, 3, 2))
    with pytest.raises(ValueError, match="rows"): interpolate(seen, torch.zeros(2, 100, 2), mesh[1])
