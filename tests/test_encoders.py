"Codes, encoders and the published files: against torchvision, by value, and against files that do not fit."
import copyreg
import math
import sys
import types
from dataclasses import fields

import numpy as np
import pytest
import torch
import torchvision
import yaml
from torch import nn

from emoca_nb import encoders as E
from emoca_nb.core import AssetMissing, BadFile, EmocaError, UnsafeFile
from emoca_nb.encoders import Codes, Encoders, load_encoders, load_released

torch.manual_seed(0)
COARSE = {"exp_deca_jaw_pose": False, "exp_deca_global_pose": False, "expression_backbone": "deca_clone"}


# ---------------------------------------------------------------- files as they were published, of the published shapes
def resnet50_shapes():
    "Names and shapes of a ResNet-50 without its classifier, written out from its plan."
    def norm(name, n): return {f"{name}.{k}": (n,) for k in ("weight", "bias", "running_mean", "running_var")} | {f"{name}.num_batches_tracked": ()}
    shapes, before = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64), 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), 1):
        for block in range(blocks):
            name, n = f"layer{stage}.{block}", 4 * width
            for i, shape in enumerate([(width, before, 1, 1), (width, width, 3, 3), (n, width, 1, 1)], 1):
                shapes |= {f"{name}.conv{i}.weight": shape} | norm(f"{name}.bn{i}", shape[0])
            if block == 0: shapes |= {f"{name}.downsample.0.weight": (n, before, 1, 1)} | norm(f"{name}.downsample.1", n)
            before = n
    return shapes


def encoder_shapes(n, backbone="encoder."):
    shapes = {backbone + k: v for k, v in resnet50_shapes().items()}
    return shapes | {"layers.0.weight": (1024, 2048), "layers.0.bias": (1024,), "layers.2.weight": (n, 1024), "layers.2.bias": (n,)}


def decoder_shapes():
    shapes = {"l1.0.weight": (8192, 181), "l1.0.bias": (8192,)}
    convolutions = {2: (128, 128), 6: (64, 128), 10: (64, 64), 14: (32, 64), 18: (16, 32), 21: (1, 16)}
    for i, (after, before) in convolutions.items(): shapes |= {f"conv_blocks.{i}.weight": (after, before, 3, 3), f"conv_blocks.{i}.bias": (after,)}
    for i, n in {0: 128, 3: 128, 7: 64, 11: 64, 15: 32, 19: 16}.items():
        shapes |= {f"conv_blocks.{i}.{k}": (n,) for k in ("weight", "bias", "running_mean", "running_var")} | {f"conv_blocks.{i}.num_batches_tracked": ()}
    return shapes


def tensors(shapes, seed):
    random = np.random.default_rng(seed)
    def make(name, shape):
        if not shape: return torch.tensor(int(random.integers(1000)))
        value = torch.from_numpy(random.standard_normal(shape, np.float32)) * (2 / max(1, math.prod(shape[1:]))) ** 0.5
        return value.abs() + 0.5 if name.endswith("running_var") else value
    return {name: make(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def parts():
    "The networks, each number its own."
    return dict(E_flame=tensors(encoder_shapes(236), 1), E_detail=tensors(encoder_shapes(128), 2), D_detail=tensors(decoder_shapes(), 3),
                E_expression=tensors(encoder_shapes(50), 4))


@pytest.fixture(scope="module")
def deca_file(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("deca") / "deca_model.tar"
    leftovers = dict(opt=dict(state={0: dict(step=3, exp_avg=torch.ones(2))}, param_groups=[dict(lr=1e-4, params=[0])]), global_step=42, batch_size=6)
    torch.save({k: parts[k] for k in ("E_flame", "E_detail", "D_detail")} | leftovers, path)
    return path


LOSS_NETWORKS = ["deca.flame.v_template", "deca.flame.shapedirs", "deca.render.faces", "deca.id_loss.reg_model.conv1.weight", "deca.perceptual_loss.vgg.0.weight",
                 "emonet_loss.backbone.conv1.weight", "lipread_loss.model.encoder.weight"]


def lightning(state, **more):
    extra = {name: torch.ones(3, 2) for name in LOSS_NETWORKS}
    return dict(epoch=7, global_step=900, state_dict=state | extra, optimizer_states=[], **{"pytorch-lightning_version": "1.4.9"}) | more


def package(folder, state, config=COARSE, **more):
    "An EMOCA folder: checkpoints in nested folders, a worse one and a last one beside the best."
    checkpoints = folder / "detail/checkpoints"
    names = {"deca-epoch=07-val_loss/dataloader_idx_0=3.25.ckpt": lightning(state, **more), "deca-epoch=09-val_loss/dataloader_idx_0=3.5.ckpt": "worse",
             "last.ckpt": "last", "deca-epoch=10-val_loss/dataloader_idx_0=3.250000001-v1.ckpt": "later"}
    for name, content in names.items():
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, checkpoints / name)
    full = {stage: dict(data={}, model=config, learning={}, inout=dict(name="EMOCA")) for stage in ("coarse", "detail")}
    (folder / "cfg.yaml").write_text(yaml.safe_dump(full))
    return folder


def as_emoca(parts, *names): return {f"deca.{part}.{key}": value for part in names for key, value in parts[part].items()}


def same(net, parts):
    "Every tensor where it belongs, nothing else there."
    for name, expected in parts.items():
        found = getattr(net, name).state_dict()
        assert sorted(found) == sorted(expected)
        assert not [key for key, value in expected.items() if not torch.equal(found[key], value)]


# ---------------------------------------------------------------- released files
def test_deca_file_lands_where_it_should(parts, deca_file):
    net = load_released(deca_file)
    same(net, {k: parts[k] for k in ("E_flame", "E_detail", "D_detail")})
    assert net.E_expression is None and not net.training


def test_emoca_package_lands_where_it_should(parts, tmp_path):
    net = load_released(package(tmp_path / "EMOCA", as_emoca(parts, *parts)))
    same(net, parts)
    assert (net.expression, net.outputs) == ("clone", ("exp",))


def test_loaded_networks_compute_what_torchvision_computes(parts, deca_file):
    net, images = load_encoders(deca_file), torch.rand(1, 3, 224, 224)
    reference = torchvision.models.resnet50(weights=None)
    reference.fc = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 236))
    renamed = {k.removeprefix("encoder.").replace("layers.", "fc."): v for k, v in parts["E_flame"].items()}
    reference.load_state_dict(renamed)
    with torch.no_grad(): expected, found = reference.eval()(images), net(images)
    assert (found.flat() - expected).abs().max() <= 1e-6 * expected.abs().max()
    slices = dict(shape=slice(0, 100), tex=slice(100, 150), exp=slice(150, 200), pose=slice(200, 206), cam=slice(206, 209), light=slice(209, 236))
    for name, part in slices.items(): assert torch.allclose(getattr(found, name).flatten(1), expected[:, part], rtol=1e-5, atol=1e-6)
    assert found.detail.shape == (1, 128)


def test_decoder_is_the_plan_of_the_paper(parts, deca_file):
    net, w = load_released(deca_file), parts["D_detail"]
    codes = Codes(exp=torch.randn(2, 50), pose=torch.randn(2, 6), detail=torch.randn(2, 128))
    x = torch.cat([codes.pose[:, 3:], codes.exp, codes.detail], 1) @ w["l1.0.weight"].T + w["l1.0.bias"]
    norm = lambda x, i, eps: nn.functional.batch_norm(x, *(w[f"conv_blocks.{i}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=eps)
    conv = lambda x, i: nn.functional.conv2d(x, w[f"conv_blocks.{i}.weight"], w[f"conv_blocks.{i}.bias"], padding=1)
    x = norm(x.view(2, 128, 8, 8), 0, 1e-5)
    for i in (2, 6, 10, 14, 18):
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = nn.functional.leaky_relu(norm(conv(x, i), i + 1, 0.8), 0.2)
    expected = torch.tanh(conv(x, 21)) * 0.01
    with torch.no_grad(): found = net.D_detail(codes)
    assert found.shape == (2, 1, 256, 256) and torch.allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("rows, config, outputs", [
    (53, {}, ("exp", "jaw")), (56, {}, ("exp", "rotation", "jaw")), (53, dict(exp_deca_global_pose=True, exp_deca_jaw_pose=False), ("exp", "rotation"))])
def test_width_of_the_last_layer_tells_the_variant(parts, tmp_path, rows, config, outputs):
    head = {"layers.2.weight": torch.randn(rows, 1024), "layers.2.bias": torch.randn(rows)}
    shared = {f"deca.E_expression.resnet.{k}": v for k, v in parts["E_flame"].items()}
    own = {f"deca.E_expression.{k}": v for k, v in (parts["E_expression"] | head).items() if k.startswith("layers.")}
    net = load_released(package(tmp_path, as_emoca(parts, "E_flame") | shared | own, COARSE | config))
    assert (net.expression, net.outputs, net.E_detail) == ("shared", outputs, None)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        codes, features = net.coarse(images)
        found = net.E_expression(features)
        both = net(images)
    assert torch.equal(both.exp, found[:, :50]) and torch.equal(both.shape, codes.shape)
    assert torch.equal(both.jaw, found[:, -3:] if "jaw" in outputs else codes.jaw)
    assert torch.equal(both.rotation, found[:, 50:53] if "rotation" in outputs else codes.rotation)


def test_shared_backbone_may_be_stored_bare(parts, tmp_path):
    bare = {f"deca.E_expression.resnet.{k.removeprefix('encoder.')}": v for k, v in parts["E_flame"].items() if k.startswith("encoder.")}
    own = {f"deca.E_expression.{k}": v for k, v in parts["E_expression"].items() if k.startswith("layers.")}
    state = as_emoca(parts, "E_flame") | bare | own
    assert load_released(package(tmp_path / "a", state)).expression == "shared"
    key = "deca.E_expression.resnet.conv1.weight"
    with pytest.raises(BadFile, match="resnet.conv1.weight: expected a copy of E_flame's, found another"):
        load_released(package(tmp_path / "b", state | {key: state[key] + 1}))


def test_hyper_parameters_are_optional_and_may_be_configurations(parts, tmp_path):
    "Lightning checkpoints may hold omegaconf nodes; a stand-in module writes the same pickle."
    class DictConfig:
        def __init__(self, content): self.__dict__.update(_content=content, _metadata=None, _parent=None)
        def __reduce__(self): return copyreg.__newobj__, (DictConfig,), self.__dict__
    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    fake = {"omegaconf": types.ModuleType("omegaconf"), "omegaconf.dictconfig": types.ModuleType("omegaconf.dictconfig")}
    fake["omegaconf.dictconfig"].DictConfig = DictConfig
    sys.modules |= fake
    try: folder = package(tmp_path, as_emoca(parts, "E_flame"), hyper_parameters=DictConfig(dict(model_params=DictConfig(dict(n_exp=50)))))
    finally:
        for name in fake: del sys.modules[name]
    same(load_released(folder), dict(E_flame=parts["E_flame"]))


def test_register_names_a_place(parts, deca_file, monkeypatch, tmp_path):
    monkeypatch.setenv("EMOCA_NB_DECA", str(deca_file))
    same(load_released("deca"), {k: parts[k] for k in ("E_flame", "E_detail", "D_detail")})
    monkeypatch.setenv("EMOCA_NB_EMOCA_V1", str(tmp_path / "absent"))
    with pytest.raises(AssetMissing, match="emoca_v1"): load_released("emoca_v1")


# ---------------------------------------------------------------- files that do not fit
def spoiled(path, state, **changes):
    torch.save(lightning({k: v for k, v in (state | changes).items() if v is not None}), path)
    return path


def test_missing_surplus_and_misshapen_are_listed(parts, tmp_path):
    state, path = as_emoca(parts, "E_flame"), tmp_path / "x=1.0.ckpt"
    first, bias = "deca.E_flame.encoder.conv1.weight", "deca.E_flame.layers.2.bias"
    with pytest.raises(BadFile, match=rf"2 missing \({first}, {bias}\)"): load_released(spoiled(path, state, **{first: None, bias: None}))
    with pytest.raises(BadFile, match=r"2 surplus \(deca.E_flame.encoder.conv2.weight, deca.E_new.bias\)"):
        load_released(spoiled(path, state, **{"deca.E_flame.encoder.conv2.weight": torch.ones(1), "deca.E_new.bias": torch.ones(1)}))
    with pytest.raises(BadFile, match=r"1 misshapen \(deca.E_flame.layers.2.bias \(235,\) in place of \(236,\)\)"): load_released(spoiled(path, state, **{bias: torch.ones(235)}))
    with pytest.raises(BadFile, match="not finite"): load_released(spoiled(path, state, **{bias: torch.full((236,), torch.nan)}))
    with pytest.raises(BadFile, match="outputs, found 51"): load_released(spoiled(path, state, **{"deca.E_expression.layers.2.weight": torch.ones(51, 1024)}))
    counters = {k: None for k in state if k.endswith("num_batches_tracked")}
    assert load_released(spoiled(path, state, **counters)).E_expression is None


def test_half_a_detail_model_is_missing_the_other_half(parts, tmp_path):
    with pytest.raises(BadFile, match="missing .deca.D_detail"): load_released(spoiled(tmp_path / "x=1.ckpt", as_emoca(parts, "E_flame", "E_detail")))


def test_a_file_with_a_network_too_many(parts, tmp_path):
    torch.save(dict(E_flame=parts["E_flame"], E_other=dict(weight=torch.ones(2))), tmp_path / "a.tar")
    with pytest.raises(BadFile, match="surplus .deca.E_other.weight"): load_released(tmp_path / "a.tar")


@pytest.mark.parametrize("content, found", [(dict(weights=1), "the entries weights"), ([1, 2], "a list"), (dict(E_flame=3), "the entries E_flame")])
def test_other_checkpoints_are_named(tmp_path, content, found):
    torch.save(content, tmp_path / "a.tar")
    with pytest.raises(BadFile, match=found): load_released(tmp_path / "a.tar")


def test_hostile_and_broken_files(tmp_path, deca_file):
    class Evil:
        def __reduce__(self): return (print, ("run!",))
    torch.save(dict(E_flame=Evil()), tmp_path / "evil.tar")
    with pytest.raises(UnsafeFile): load_released(tmp_path / "evil.tar")
    (tmp_path / "cut.tar").write_bytes(deca_file.read_bytes()[:100_000])
    (tmp_path / "empty.tar").touch()
    for name in ("cut", "empty", "absent"):
        with pytest.raises(BadFile, match=f"{name}.tar"): load_released(tmp_path / f"{name}.tar")
    (tmp_path / "EMOCA/detail/checkpoints").mkdir(parents=True)
    (tmp_path / "EMOCA/detail/checkpoints/last.ckpt").touch()
    with pytest.raises(BadFile, match="none"): load_released(tmp_path / "EMOCA")


@pytest.mark.parametrize("text", ["detail: [1", "- a", "detail: {data: 1}", "!!python/object/apply:os.system ['true']", "\x00", ""])
def test_configurations_that_are_none(tmp_path, text):
    (tmp_path / "cfg.yaml").write_text(text)
    with pytest.raises(BadFile, match="cfg.yaml"): E.read_config(tmp_path)


# ---------------------------------------------------------------- codes
def random_codes(n):
    widths = dict(shape=100, tex=50, exp=50, pose=6, cam=3, detail=128, eyelid=2, eye_pose=6, neck_pose=3)
    return Codes(**{k: torch.randn(n, w) for k, w in widths.items()}, light=torch.randn(n, 9, 3))


def test_codes_go_through_flat_vectors_and_files(tmp_path):
    codes = random_codes(4)
    assert torch.equal(Codes.split(codes.flat()).flat(), codes.flat()) and codes.flat().shape == (4, 236)
    assert torch.equal(codes.flat()[:, 209:].reshape(4, 9, 3), codes.light)
    codes.save(tmp_path / "a.npz")
    again = Codes.load(tmp_path / "a.npz")
    assert [n for n, _ in again.items()] == [f.name for f in fields(Codes)]
    for name, value in codes.items(): assert torch.equal(getattr(again, name), value)
    with np.load(tmp_path / "a.npz") as arrays: assert arrays["light"].shape == (4, 9, 3)


def test_codes_behave_like_a_batch():
    codes = random_codes(4)
    assert len(codes) == 4 and len(codes[0]) == 1 and torch.equal(codes[-1].exp, codes.exp[3:])
    assert torch.equal(Codes.cat([codes[:1], codes[[1, 2]], codes[torch.tensor([False, False, False, True])]]).flat(), codes.flat())
    codes.exp.requires_grad_()
    assert not codes.detach().exp.requires_grad and codes.to(torch.double).light.dtype == torch.double
    assert len(Codes()) == 0


@pytest.mark.parametrize("arrays, found", [
    (dict(exp=np.zeros((2, 50)), cam=np.zeros((3, 3))), "different batches"), (dict(other=np.zeros((1, 2))), "other"), (dict(), "none"),
    (dict(exp=np.full((1, 50), np.nan)), "not finite"), (dict(light=np.zeros((1, 27))), r"\(1, 27\)"), (dict(exp=np.array(["a"])), "exp")])
def test_codes_refuse_files_that_hold_none(tmp_path, arrays, found):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadFile, match=found): Codes.load(tmp_path / "a.npz")


def test_flat_vectors_of_another_width_are_refused():
    with pytest.raises(ValueError, match="expected .B, 236., found .2, 235."): Codes.split(torch.zeros(2, 235))


# ---------------------------------------------------------------- small networks
def small(**options): return Encoders("mobilenet_v3", **options)


def test_frozen_parts_stay_as_they_are():
    net = small(expression="clone").freeze("E_flame").train()
    before = {k: v.clone() for k, v in net.E_flame.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    codes, _ = net.coarse(images := torch.rand(2, 3, 64, 64))
    assert not codes.flat().requires_grad
    net.express(images, codes).exp.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, net.E_flame.state_dict()[k]) for k, v in before.items())
    assert net.E_expression.layers[2].weight.grad.abs().sum() > 0
    assert net.freeze().E_flame.training and all(p.requires_grad for p in net.parameters())
    with pytest.raises(EmocaError, match="E_light"): net.freeze("E_light")


def test_shared_head_costs_one_backbone():
    net = small(expression="shared", outputs=("exp", "jaw")).eval()
    calls = []
    net.E_flame.encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(): net(torch.rand(2, 3, 64, 64))
    assert len(calls) == 1


def test_start_is_the_face_it_was_given():
    codes = random_codes(1)
    net = small(expression="clone", outputs=("exp", "rotation", "jaw")).start(codes, 0).eval()
    with torch.no_grad(): found = net(torch.rand(3, 3, 64, 64))
    assert torch.allclose(found.flat(), codes.flat().expand(3, -1))


@pytest.mark.parametrize("half", [False, True])
def test_own_files_come_back(tmp_path, half):
    net = small(expression="shared", outputs=("exp", "jaw"), layout=E.LAYOUT | dict(exp=30)).eval()
    net.save(tmp_path / "a.pt", half)
    again = load_encoders(tmp_path / "a.pt")
    for key, value in net.state_dict().items(): assert torch.allclose(again.state_dict()[key], value, rtol=1e-3, atol=1e-6), key
    assert (again.layout, again.outputs, again.expression) == (net.layout, net.outputs, net.expression)


def test_own_files_that_lie(tmp_path):
    good = dict(format="emoca_nb encoders 1", build=dict(backbone="mobilenet_v3"), state_dict={})
    for change, found in [(dict(build=dict(backbone="vgg")), "no backbone 'vgg'"), (dict(build=dict(colour=1)), "colour"), (dict(build=None), "can be built"), ({}, "missing")]:
        torch.save(good | change, tmp_path / "a.pt")
        with pytest.raises(BadFile, match=found): load_encoders(tmp_path / "a.pt")


def test_choices_are_named():
    with pytest.raises(EmocaError, match="choose one of resnet50"): E.Encoder(3, "vgg")
    with pytest.raises(EmocaError, match="'clone', 'shared' or None"): Encoders("mobilenet_v3", expression="twin")


def test_small_backbones_are_normalised_as_imagenet_weights_want():
    net = E.Encoder(5, "efficientnet_lite0", "imagenet").eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad(): assert torch.equal(net.features(images), net.encoder((images - net.mean) / net.std))
    assert net.mean.max() > 0.4 and net.features(images).std() > 0.01


def test_loading_draws_no_random_numbers(tmp_path):
    small().save(tmp_path / "a.pt")
    before = torch.get_rng_state()
    load_encoders(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), before)
