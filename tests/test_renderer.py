"Camera, light, texture, baking, detail: against independent computation, and by finite differences."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from torch.autograd import gradcheck

from emoca_nb import renderer as R
from emoca_nb.flame import FLAME
from emoca_nb.rasterizer import interpolate, rasterize

torch.manual_seed(0)


@pytest.fixture(scope="module")
def head():
    "A small ball with texture coordinates cut along a meridian, and masks."
    ball = trimesh.creation.icosphere(subdivisions=2)
    corners = ball.vertices[ball.faces].reshape(-1, 3)
    u = (np.arctan2(corners[:, 0], corners[:, 2]) / (2 * np.pi) + 0.5).reshape(-1, 3)
    u = np.where((u.max(1) - u.min(1) > 0.5)[:, None] & (u < 0.5), u + 1, u) * 0.9
    uv = np.stack([u.ravel(), np.arccos(-corners[:, 1]) / np.pi], 1).astype("f4")
    mask = np.zeros((64, 64), "u1")
    mask[20:40, 20:40] = 255
    return SimpleNamespace(vertices=torch.tensor(ball.vertices).float()[None] * 0.1, faces=ball.faces, uv=uv,
                           uv_faces=np.arange(len(uv)).reshape(-1, 3), uv_masks=dict(face=mask, face_eye=mask))


@pytest.fixture(scope="module")
def open_head():
    return FLAME.load()


def doubles(*shapes):
    return tuple(torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes)


def test_camera_is_a_scaled_half_turn():
    points, cam = torch.randn(3, 7, 3), torch.randn(3, 3)
    turn = torch.tensor(trimesh.transformations.rotation_matrix(np.pi, [1, 0, 0])[:3, :3]).float()
    moved = points.clone()
    moved[..., :2] += cam[:, None, 1:]
    assert torch.allclose(R.project(points, cam), cam[:, None, :1] * moved @ turn.T, atol=1e-5)
    assert gradcheck(R.project, doubles((2, 3, 3), (2, 3)))


def test_vertex_normals():
    random = torch.Generator().manual_seed(0)
    v = torch.randn(2, 20, 3, dtype=torch.double, generator=random)
    f = torch.stack([torch.randperm(20, generator=random)[:3] for _ in range(30)])
    expected = torch.zeros(2, 20, 3, dtype=torch.double)
    for a, b, c in f.tolist():
        for i in (a, b, c): expected[:, i] += torch.linalg.cross(v[:, b] - v[:, a], v[:, c] - v[:, a])
    expected = expected / expected.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    assert torch.allclose(R.vertex_normals(v, f), expected)
    assert gradcheck(lambda v: R.vertex_normals(v, f), v.requires_grad_())


def test_shading_is_the_light_that_arrives():
    "The integral over the sphere of a light Y_k times the clamped cosine is B_k; the published constant term lacks its factor pi."
    direction = torch.nn.functional.normalize(torch.randn(400_000, 3, generator=torch.Generator().manual_seed(1)), dim=-1).double()
    n = torch.nn.functional.normalize(torch.tensor([[0.3, -0.5, 0.8], [0.0, 1, 0], [-0.6, 0.1, -0.3]]).double(), dim=-1)
    lobe = torch.tensor([1, *[2 * math.pi / 3] * 3, *[math.pi / 4] * 5]).double()
    radiance = R.sh_basis(direction.T[None, :, None])[0, :, 0] / lobe[:, None]  # orthonormal Y_k
    arrives = radiance @ (direction @ n.T).clamp(min=0) / len(direction) * 4 * math.pi
    expected = R.sh_basis(n.T[None, :, None])[0, :, 0]
    expected[0] *= math.pi
    assert torch.allclose(arrives, expected, atol=0.02)
    assert gradcheck(R.shade_sh, doubles((2, 3, 2, 3), (2, 9, 3)))


def test_shading_by_hand():
    n = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.8]), dim=0)
    x, y, z = n.tolist()
    b = [0.28209, 1.02333 * x, 1.02333 * y, 1.02333 * z, 0.85809 * x * y, 0.85809 * x * z, 0.85809 * y * z, 0.42904 * (x * x - y * y), 0.24771 * (3 * z * z - 1)]
    light = torch.randn(1, 9, 3)
    assert torch.allclose(R.shade_sh(n[None, :, None, None], light)[0, :, 0, 0], torch.tensor(b) @ light[0], atol=1e-4)


def test_sampling_is_bilinear_between_texel_centres():
    texture = torch.rand(1, 3, 4, 4)
    grid = torch.tensor([[-0.25, -0.75], [0.0, 0.25]]).T.reshape(1, 2, 1, 2)
    out = R.sample_uv(texture, grid)
    assert torch.allclose(out[0, :, 0, 0], texture[0, :, 0, 1], atol=1e-6)
    assert torch.allclose(out[0, :, 0, 1], texture[0, :, 2, 1:3].mean(-1), atol=1e-6)
    assert gradcheck(R.sample_uv, (torch.rand(1, 2, 5, 5).double().requires_grad_(), (torch.rand(1, 2, 3, 3).double() - 0.5).requires_grad_()))


def test_preview_by_hand():
    n = torch.nn.functional.normalize(torch.randn(1, 3, 4, 4), dim=1)
    lights = [torch.nn.functional.normalize(torch.tensor(v, dtype=torch.float32), dim=0) for v in ([1, 1, 1], [-1, 1, 1], [1, -1, 1], [-1, -1, 1], [0, 0, 1])]
    shade = sum(1.7 * (n[0] * v[:, None, None]).sum(0).clamp(0, 1) for v in lights) / 5
    towards = torch.zeros(1, 3, 4, 4)
    towards[:, 2, :, 2:] = 0.151
    grey, shown = R.shape_preview(n, towards, torch.ones(1, 1, 4, 4))
    assert torch.allclose(grey[0, 1, :, :2], 180 / 255 * shade[:, :2], atol=1e-6) and (shown[..., 2:] == 0).all() and (grey[..., 2:] == 0).all()
    smooth = lambda n: R.shape_preview(n, -torch.ones_like(n), torch.ones_like(n[:, :1]))[0]
    assert gradcheck(smooth, torch.nn.functional.normalize(torch.rand(1, 3, 2, 2).double() + 0.2, dim=1).requires_grad_())


def test_overlay():
    photo, picture, mask = torch.rand(3, 1, 3, 4, 4)
    assert torch.allclose(R.overlay(photo, picture, mask[:, :1]), picture * mask[:, :1] + photo * (1 - mask[:, :1]), atol=1e-6)


def test_baking(head):
    fragments = R.uv_fragments(torch.tensor(head.uv).double(), torch.tensor(head.uv_faces), 48)
    faces = torch.tensor(head.faces)
    v = head.vertices.double().repeat(2, 1, 1)
    v[1] += 1
    baked = R.bake_uv(fragments, v, faces)
    assert baked.shape == (2, 3, 48, 48) and torch.allclose((baked[1] - baked[0])[:, fragments.mask[0]], torch.ones(()).double())
    for b, y, x in ((0, 10, 20), (1, 30, 11)):
        face, w = fragments.pix_to_face[0, y, x], fragments.bary[0, y, x]
        place = torch.tensor([(2 * x + 1) / 48 - 1, (2 * y + 1) / 48 - 1]).double()
        assert torch.allclose(w @ R.uv_to_grid(torch.tensor(head.uv).double())[head.uv_faces[face]], place, atol=1e-6)
        assert torch.allclose(baked[b, :, y, x], w @ v[b, faces[face]])
    small = R.uv_fragments(torch.tensor(head.uv).double(), torch.tensor(head.uv_faces), 6)
    assert gradcheck(lambda a: R.bake_uv(small, a, faces), doubles((1, v.shape[1], 2)))


def test_texture_of_a_picture_of_itself(head):
    "What is painted by position is unwrapped by position; the far side is masked."
    faces, cam = torch.tensor(head.faces), torch.tensor([[8.0, 0, 0]])
    projected = R.project(head.vertices, cam)
    seen = rasterize(projected, faces, 256)
    photo = interpolate(seen, projected / 2 + 0.5, faces)
    fragments = R.uv_fragments(torch.tensor(head.uv), torch.tensor(head.uv_faces), 64)
    texture, facing = R.extract_texture(photo, projected, fragments, faces)
    here, places = facing[0, 0] > 0, R.bake_uv(fragments, projected, faces)
    assert (texture - places / 2 - 0.5)[0, :2, here].abs().amax(0).quantile(0.9) < 0.01  # texels on the rim catch the background
    assert (places[0, 2, here] < 0).all() and here.float().mean() > 0.2


def grid_normals(points):
    "Normals of a texel grid, triangle by triangle."
    height, width, _ = points.shape
    total = np.zeros_like(points)
    for x in range(2, width - 4 + 1):
        for y in range(5, height - 7 + 1):
            for t in (((y, x), (y + 1, x), (y, x + 1)), ((y, x + 1), (y + 1, x), (y + 1, x + 1))):
                a, b, c = (points[i] for i in t)
                for i in t: total[i] += np.cross(b - a, c - a)
    return total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-6)


@pytest.mark.parametrize("blend", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_detail_normals(head, blend, fixed):
    size, faces = 24, torch.tensor(head.faces)
    fragments = R.uv_fragments(torch.tensor(head.uv).double(), torch.tensor(head.uv_faces), size)
    v = head.vertices.double()
    displacement, mask = 1e-3 * torch.randn(1, 1, size, size).double(), torch.rand(1, 1, size, size).double()
    constant = 1e-3 * torch.randn(size, size).double() if fixed else None
    found = R.detail_normals(displacement, v, faces, fragments, mask, constant, blend)
    surface, normals = (R.bake_uv(fragments, a, faces)[0].movedim(0, -1).numpy() for a in (v, R.vertex_normals(v, faces)))
    height = (displacement * mask)[0, 0].numpy() + (constant.numpy() if fixed else 0)
    fine = grid_normals(surface + height[..., None] * normals)
    m = mask[0, 0, ..., None].numpy() if blend else 1
    assert np.allclose(found[0].movedim(0, -1).numpy(), fine * m + normals * (1 - m), atol=1e-9)


def test_detail_normals_gradient(head):
    faces = torch.tensor(head.faces)
    fragments = R.uv_fragments(torch.tensor(head.uv).double(), torch.tensor(head.uv_faces), 14)
    v = head.vertices.double().requires_grad_()
    inside = slice(6, 9)
    function = lambda d: R.detail_normals(d, v, faces, fragments, blend=False)[..., inside, inside]
    d = (1e-3 * torch.randn(1, 1, 14, 14).double()).requires_grad_()
    assert gradcheck(function, d, eps=1e-7, atol=1e-3, rtol=1e-3)
    assert torch.autograd.grad(function(d).sum(), v, allow_unused=True)[0] is None


def test_rendering(head):
    renderer = R.HeadRenderer(head, size=(40, 56), uv_size=64)
    v, cam = head.vertices.repeat(2, 1, 1), torch.tensor([[7.0, 0, 0], [5, 0.02, -0.01]])
    albedo, light = torch.rand(2, 3, 64, 64), torch.randn(2, 9, 3)
    drawn = renderer(v, cam, albedo, light)
    assert drawn.image.shape == (2, 3, 40, 56) and torch.equal(drawn.alpha[:, 0] > 0, drawn.fragments.mask)
    assert torch.allclose(drawn.image, drawn.albedo * R.shade_sh(drawn.normals, light) * drawn.alpha, atol=1e-6)
    assert all((part[~drawn.alpha.bool().expand_as(part)] == 0).all() for part in (drawn.image, drawn.albedo, drawn.shading, drawn.normals, drawn.mask_face))
    assert 0 < drawn.mask_face.sum() < drawn.alpha.sum()
    one = renderer(v[1:], cam[1:], albedo[1:], light[1:])
    assert torch.allclose(one.image, drawn.image[1:], atol=1e-6)
    assert torch.equal(renderer(v, cam, albedo[:1]).image, renderer(v, cam, albedo[:1].repeat(2, 1, 1, 1)).image)


def test_every_input_gets_gradient(head):
    renderer = R.HeadRenderer(head, size=32, uv_size=64)
    inputs = [t.requires_grad_() for t in (head.vertices.clone(), torch.tensor([[8.0, 0, 0]]), torch.rand(1, 3, 64, 64), torch.randn(1, 9, 3))]
    weight = torch.linspace(0, 1, 32)
    for g in torch.autograd.grad((renderer(*inputs).image * weight).sum(), inputs): assert g.isfinite().all() and g.abs().sum() > 0


def test_gradient_of_the_whole_chain(head):
    "Finite differences from the camera to a picture, on pixels that keep their triangle."
    renderer = R.HeadRenderer(head, size=24, uv_size=64)
    v, albedo = head.vertices.double(), torch.nn.functional.interpolate(torch.rand(1, 3, 3, 3).double(), (512, 512), mode="bicubic")
    light = 0.3 * torch.randn(1, 9, 3).double()
    cam = torch.tensor([[8.0, 0.001, 0.002]]).double().requires_grad_()
    inner = (renderer(v, cam).fragments.bary > 0.02).all(-1)[0]
    assert inner.sum() > 50
    weights = torch.randn(3, 3, int(inner.sum())).double()
    assert gradcheck(lambda cam: (weights * renderer(v, cam, albedo, light).image[..., inner]).mean((1, 2)), cam, atol=1e-3, rtol=1e-2)


def test_head_without_texture_coordinates(head):
    bare = R.HeadRenderer(SimpleNamespace(faces=head.faces, uv=None), size=32)
    cam = torch.tensor([[8.0, 0, 0]])
    drawn = bare(head.vertices, cam)
    assert drawn.grid is None and torch.equal(drawn.mask_face, drawn.alpha) and bare.preview(head.vertices, cam).max() > 0.3
    for function in (lambda: bare(head.vertices, cam, torch.rand(1, 3, 8, 8)), lambda: bare.texture(torch.rand(1, 3, 32, 32), head.vertices, cam)):
        with pytest.raises(ValueError, match="no texture coordinates"): function()


def test_empty_batch_and_nan(head):
    renderer = R.HeadRenderer(head, size=32, uv_size=64)
    drawn = renderer(head.vertices[:0], torch.zeros(0, 3), torch.zeros(0, 3, 8, 8), torch.zeros(0, 9, 3))
    assert drawn.image.shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match=r"item\(s\) \[0\]"): renderer(head.vertices, torch.tensor([[math.nan, 0, 0]]))


@pytest.mark.parametrize("size", [16, 1024])
def test_sizes(head, size):
    drawn = R.HeadRenderer(head, size=size, uv_size=64)(head.vertices, torch.tensor([[8.0, 0, 0]]))
    assert abs(drawn.alpha.mean() - math.pi / 4 * 0.64) < 0.05


def test_backends_draw_one_picture(head):
    pytest.importorskip("pytorch3d", reason="the pytorch3d extra is not installed")
    cam, light = torch.tensor([[8.0, 0, 0]]), torch.zeros(1, 9, 3)
    light[:, 0] = 3
    albedo = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (64, 64), mode="bicubic")
    a, b = (R.HeadRenderer(head, 64, 64, backend)(head.vertices, cam, albedo, light).image for backend in ("native", "pytorch3d"))
    assert ((a - b).abs().amax(1) < 1e-3).float().mean() > 0.99


def test_moves_with_the_module(open_head):
    renderer = R.HeadRenderer(open_head.head, 32)
    assert all(b.device.type == "meta" for b in renderer.to("meta").buffers()) and not list(renderer.parameters())


def test_batches_must_agree(head):
    renderer, v, cam = R.HeadRenderer(head, 32, 32), head.vertices, torch.tensor([[7.0, 0, 0]])
    with pytest.raises(ValueError, match="light for 3 heads"): renderer(v, cam, light=torch.ones(3, 9, 3))
    with pytest.raises(ValueError, match="albedo for 2 heads"): renderer(v, cam, torch.ones(2, 3, 8, 8))
    assert renderer(v.repeat(3, 1, 1), cam, torch.ones(1, 3, 8, 8), torch.ones(1, 9, 3)).image.shape == (3, 3, 32, 32)
