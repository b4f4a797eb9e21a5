"""The coarse stage: its table against the publications, what trains and what does not, and runs that die."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from emoca_nb.core import AssetMissing, BadFile, EmocaError
from emoca_nb.data import Augment, Batch, Recipe, collate, image_folder, loader
from emoca_nb.emotion_net import emotion_net, save_emotion_net
from emoca_nb.encoders import Codes, Encoders, load_encoders, neutral_codes
from emoca_nb.fitting import landmark_error
from emoca_nb.flame import rodrigues
from emoca_nb.losses import PAIRS, LossWeights, relative_loss
from emoca_nb.renderer import shade_sh
from emoca_nb.train_coarse import (STAGES, CoarseConfig, CoarseTask, Decoder, Frozen, Truth, batches, compose, datasets, encoders_for, make_task, of_fit, of_world,
                                   read_config, remember, stage_of, train_coarse, unscale_rows, use_own_units, world)

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(pictures=16, size=32, batch=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data folder of its own, with a world of four people, an untrained E_c and an untrained emotion network."""
    data, before = tmp_path_factory.mktemp("data"), os.environ.get("EMOCA_NB_DATA")
    os.environ["EMOCA_NB_DATA"] = str(data)
    torch.manual_seed(0)
    Encoders("efficientnet_lite0", weights="imagenet").start(neutral_codes(Decoder(size=32).flame)).save(data / "coarse.pt")
    save_emotion_net(emotion_net("efficientnet_lite0", size=32), data / "emotion.pt")
    yield data
    if before is None: del os.environ["EMOCA_NB_DATA"]
    else: os.environ["EMOCA_NB_DATA"] = before


@pytest.fixture(scope="module")
def config(place):
    return CoarseConfig("emoca", coarse=str(place / "coarse.pt"), emotion_net="efficientnet_lite0", emotion_file=str(place / "emotion.pt"), augment="none", **SMALL)


@pytest.fixture(scope="module")
def batch(config):
    return next(iter(loader(datasets(config)[0], 4)))


# The stages, against the numbers that were published.

def given(stage): return {k: v for k, v in asdict(stage.losses).items() if isinstance(v, float | int) and v}


def test_deca_is_as_released():
    pretrain, coarse = STAGES["deca_pretrain"], STAGES["deca_coarse"]
    assert given(pretrain) == dict(landmarks=1, eye=1, mouth=0.5, shape=1e-4, exp=1e-4)
    assert given(coarse) == dict(landmarks=1, eye=1, mouth=0.5, photometric=2, identity=0.2, shape=1e-4, exp=1e-4, tex=1e-4, light=1)
    assert [(s.batch, s.each, s.max_steps, s.lr, s.trains) for s in (pretrain, coarse)] == [(64, 1, 100_000, 1e-4, "coarse"), (8, 2, 200_000, 1e-4, "coarse")]
    assert coarse.scale == (1.4, 1.8) and not coarse.margin and coarse.mask == "skin" and coarse.exchange and not pretrain.exchange


def test_emoca_is_as_released():
    s = STAGES["emoca"]
    assert given(s) == dict(emotion=1, photometric=2, eye=0.5, mouth=0.5, corner=0.5, exp=1e-4, shape=1e-4, tex=1e-5, light=12)
    assert (s.losses.emotion_metric, s.losses.photometric_norm, s.losses.relative_form, s.losses.code_form) == ("mse", "pixels", "distance", "sum")
    assert (s.trains, s.lr, s.batch, s.each, s.max_epochs, s.val_every, s.patience) == ("expression", 5e-5, 32, 1, 30, 0.2, 15)
    assert (s.order, s.augment, s.mask, s.background, s.emotion_net, s.outputs, s.start) == ("expression", "emoca", "rendered", "black", "resnet50", ("exp",), "backbone")


def test_emoca_paper_is_section_5_1():
    s = STAGES["emoca_paper"]
    assert given(s) == dict(emotion=1, photometric=2, eye=0.5, mouth=0.5, corner=0.5, exp=1e-4)
    assert (s.lr, s.max_epochs, s.losses.emotion_metric, s.losses.relative_form, s.losses.code_form) == (5e-5, 20, "l2", "offset", "norm")


def test_second_version_carries_its_names():
    assert STAGES["emoca_v2_lr_mse_20"].losses.lips == 20 and STAGES["emoca_v2_lr_cos_1.5"].losses.lips == 1.5
    assert STAGES["emoca_v2_lr_cos_1.5"].losses.lips_metric == "cosine" and not STAGES["emoca_v2_mp"].losses.landmarks


def test_paper_profile_changes_nothing_of_the_paper():
    c = read_config([ROOT / "nbs/profiles/05_train_coarse/paper.yaml"])
    assert stage_of(c) == STAGES["emoca_paper"]
    assert (c.coarse, c.data, c.head, c.backbone, c.expression, c.size, c.own_units, c.accumulate) == ("deca", "affectnet", "flame2020", "resnet50", "clone", 224, False, 1)


def test_none_of_the_parameters_is_without_effect():
    changed = dict(emotion_net="emonet_8", emotion_weight=0.3, emotion_metric="cosine", photometric_weight=0.3, relative_weight=0.3, identity_weight=0.3, exp_weight=0.3,
                   augment="flip", batch=3, each=3, lr=0.3, steps=3, epochs=3.0, val_every=0.3, patience=3, outputs="exp jaw", start="coarse")
    for name, value in changed.items(): assert stage_of(CoarseConfig(**{name: value})) != STAGES["emoca"], name
    

# What the losses see.

@pytest.fixture(scope="module")
def scene():
    """Heads, and the faces of their own renderings as photographs."""
    torch.manual_seed(1)
    decoder = Decoder(size=64)
    neutral = neutral_codes(decoder.flame, 3)
    codes = neutral.replace(exp=0.4 * torch.rand(3, 50), shape=0.5 * torch.randn(3, 100))
    with torch.no_grad(): drawn = decoder(codes)
    none = torch.full((3,), -1)
    return decoder, codes, Batch(compose(drawn.rendering, drawn.rendering.image)[0], drawn.landmarks, none, none.float(), none.float(), none, torch.arange(3), ["a", "b", "c"])


def terms_of(stage, decoder, codes, batch, **networks):
    task = CoarseTask(stage, Encoders("efficientnet_lite0"), decoder, **networks)
    frozen = Frozen(emotion=networks["emotion"].features(compose(decoder(codes).rendering, batch.image)[0]).detach() if "emotion" in networks else None)
    from emoca_nb.losses import compare
    return compare(task.beside(batch, codes, frozen), stage.losses)


@pytest.mark.parametrize("name", ["emoca", "emoca_paper"])
def test_a_perfect_reconstruction_costs_only_its_priors(scene, name):
    decoder, codes, batch = scene
    net = emotion_net("efficientnet_lite0", size=64).eval()
    terms = terms_of(replace(STAGES[name], trains="coarse"), decoder, codes, batch, emotion=net)
    for term in ("emotion", "photometric", "eye", "mouth", "corner"): assert terms[term] < 1e-6, term
    assert terms["exp"] > 0.1


def test_worse_heads_cost_more(scene):
    decoder, codes, batch = scene
    stage = replace(STAGES["deca_coarse"], losses=replace(STAGES["deca_coarse"].losses, identity=0))
    good = terms_of(stage, decoder, codes, batch)
    bad = terms_of(stage, decoder, codes.replace(exp=0 * codes.exp, tex=codes.tex + 1, cam=codes.cam * torch.tensor([1.05, 1, 1])), batch)
    assert good["landmarks"] < 1e-6 < 0.005 < bad["landmarks"] and bad["photometric"] > good["photometric"] and bad["eye"] > good["eye"] and bad["mouth"] > good["mouth"]


def test_skin_is_the_label_where_there_is_one(scene):
    decoder, _, batch = scene
    task = CoarseTask(replace(STAGES["deca_pretrain"]), Encoders("efficientnet_lite0"), decoder)
    hull = task.skin(batch)
    labelled = torch.zeros(3, 1, 64, 64)
    labelled[1] = torch.nan
    both = task.skin(replace(batch, mask=labelled))
    assert 0.1 < hull.mean() < 0.6 and not both[[0, 2]].any() and torch.equal(both[1], hull[1])


class Eye(torch.nn.Module):
    """Stands for a network that knows people: mean colours of a coarse grid."""
    def features(self, x): return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
    def freeze(self): return self


def test_identity_shapes_but_does_not_paint(scene):
    decoder, codes, batch = scene
    stage = replace(STAGES["deca_coarse"], losses=LossWeights(identity=1))
    codes = Codes(**{n: (x + 0.05 * torch.randn_like(x)).requires_grad_() for n, x in codes.items()})
    task = CoarseTask(stage, Encoders("efficientnet_lite0"), decoder, identity=Eye())
    a, b = task.recognise(codes, batch.image)
    (a - b).square().sum().backward()
    assert codes.shape.grad.abs().sum() > 0 and codes.tex.grad is None and codes.light.grad is None and not b.requires_grad


def test_what_is_missing_is_said_before_the_run(scene):
    for name, needs in (("emoca", "an emotion network"), ("deca_coarse", "VGGFace2"), ("emoca_v2_lr_mse_20", "lip-reading"), ("synthetic", "known codes")):
        with pytest.raises(EmocaError, match=needs): CoarseTask(STAGES[name], Encoders("efficientnet_lite0"), scene[0])


# What trains.

@pytest.mark.parametrize("expression", ["clone", "shared"])
def test_only_the_expression_encoder_moves(config, batch, expression):
    task = make_task(replace(config, expression=expression, outputs="exp jaw", start="coarse")).train()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    optimiser = task.configure_optimizers()
    task.step(batch, "train")[0].backward()
    assert all(p.grad is None for n, p in task.named_parameters() if not n.startswith("encoders.E_expression"))
    optimiser.step()
    moved = {k.split(".")[1] for k, v in task.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"E_expression"}


def test_no_graph_is_built_through_what_is_frozen(config, batch):
    task = make_task(config).train()
    calls = []
    task.encoders.E_flame.register_forward_hook(lambda m, a, out: calls.append(out.requires_grad or torch.is_grad_enabled()))
    task.encoders.E_flame.encoder.register_forward_hook(lambda m, a, out: calls.append(out.requires_grad or torch.is_grad_enabled()))
    frozen = task.ask(batch.image)
    assert calls and not any(calls) and not frozen.emotion.requires_grad and not frozen.codes.shape.requires_grad
    assert not task.encoders.E_flame.training and not task.emotion.training


def test_the_table_says_what_the_networks_say(config, tmp_path):
    task, data = make_task(replace(config, expression="shared")), datasets(config)[0]
    task.tables["train"] = remember(task, data, tmp_path / "table.npz")
    task.train()
    for b in loader(data, 3):
        asked, recalled = task.ask(b.image), task.recall(b, "train")
        for x, y in ((asked.codes.flat(), recalled.codes.flat()), (asked.features, recalled.features), (asked.emotion, recalled.emotion)):
            assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def test_a_batch_has_the_same_loss_twice(config, batch):
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        loss, terms = make_task(config).train().step(batch, "train")
        values.append([loss.item(), *(v.item() for v in terms.values())])
    assert values[0] == values[1] and np.isfinite(values[0]).all()


def test_own_units_compute_the_same(config, batch):
    torch.manual_seed(0)
    net = encoders_for(replace(config, start="coarse"), Decoder(size=32).flame).eval()
    with torch.no_grad():
        before = net(batch.image).flat()
        use_own_units(net, "coarse"), use_own_units(net, "expression")
        assert torch.allclose(net(batch.image).flat(), before, atol=1e-5)
        for part in (net.E_flame, net.E_expression): unscale_rows(part.layers[2])
        assert torch.allclose(net(batch.image).flat(), before, atol=1e-5)
    unscale_rows(net.E_flame.layers[2])


def test_accumulated_batches_make_one_step(config, place):
    """Two batches in a step: Adam sees the mean of their gradients."""
    c = replace(config, steps=1, accumulate=2, lr=1e-3, val_every=1, own_units=False, out=str(place / "accumulated"))
    done = train_coarse(c)
    torch.manual_seed(c.seed)
    task, data = make_task(c).train(), datasets(c)
    order = batches(data[0], c, True).sampler.order(0)
    optimiser = task.configure_optimizers()
    for number in range(2):
        rows = order[2 * number : 2 * number + 2]
        (task.step(collate([data[0][i] for i in rows]).to(), "train")[0] / 2).backward()
    optimiser.step()
    found, expected = (t.encoders.E_expression.layers[2].weight for t in (done.run.task, task))
    apart = ((found - expected).abs() > 2e-5).float().mean()  # Adam's first step is the sign of a gradient, which rounding turns where there is hardly any
    assert apart < .02 and (found - make_task(c).encoders.E_expression.layers[2].weight).abs().max() > 5e-4


# Runs that die, and files that are no good.

RUN = "import sys; from emoca_nb.train_coarse import train_coarse, CoarseConfig; train_coarse(CoarseConfig(**eval(sys.argv[1])))"


def test_a_killed_run_ends_where_an_unbroken_one_does(config, place):
    c = replace(config, steps=6, val_every=2, lr=1e-3, augment="emoca", start="coarse")
    killed, whole = (replace(c, out=str(place / name)) for name in ("killed", "whole"))
    process = subprocess.Popen([sys.executable, "-c", RUN, repr(asdict(killed))], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first, end = place / "killed/checkpoints/step-00000002.ckpt", time.time() + 300
    while not first.exists() and process.poll() is None and time.time() < end: time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.exists() and not (place / "killed/result.json").exists(), process.stderr.read().decode()[-2000:]
    again, unbroken = (train_coarse(x) for x in (killed, whole))
    assert again.run.best == unbroken.run.best and again.run.steps == 6
    for (k, a), (_, b) in zip(again.encoders.state_dict().items(), unbroken.encoders.state_dict().items()): assert torch.equal(a, b), k


def test_a_run_belongs_to_its_networks(config, place):
    c = replace(config, steps=1, val_every=1, out=str(place / "mine"))
    train_coarse(c)
    torch.manual_seed(5)
    Encoders("efficientnet_lite0").start(neutral_codes(Decoder(size=32).flame)).save(place / "other.pt")
    with pytest.raises(EmocaError, match="holds another run"): train_coarse(replace(c, coarse=str(place / "other.pt")))


def test_encoders_keep_their_size_and_refuse_others(place, tmp_path):
    made = Encoders("efficientnet_lite0", "shared", ("exp", "jaw"), size=96, about=dict(data="synthetic")).eval()
    made.save(tmp_path / "a.pt", half=True)
    read, images = load_encoders(tmp_path / "a.pt"), torch.rand(2, 3, 224, 224)
    assert (read.size, read.about, read.outputs) == (96, dict(data="synthetic"), ("exp", "jaw"))
    with torch.no_grad(): assert torch.allclose(read(images).flat(), made(images).flat(), atol=0.02)
    raw = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(raw | dict(build=raw["build"] | dict(size="large")), tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    for name in ("b.pt", "c.pt", "none.pt"):
        with pytest.raises((BadFile, AssetMissing), match=name[0]): load_encoders(tmp_path / name)


def test_stages_and_parameters_are_named(config, tmp_path):
    with pytest.raises(EmocaError, match="deca_coarse"): stage_of(CoarseConfig("deca"))
    with pytest.raises(EmocaError, match="E_c"): encoders_for(replace(config, coarse=None), Decoder(size=32).flame)
    (tmp_path / "a.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(BadFile, match="a.yaml"): read_config([tmp_path / "a.yaml"])
    with pytest.raises(EmocaError, match="stepz"): read_config([], [("stepz", "1")])


def test_pictures_of_other_worlds_have_no_truth(config, batch):
    truth = Truth(Decoder(size=32).flame, of_world(world(config)))
    with pytest.raises(EmocaError, match="no picture whose codes are known"): truth(replace(batch, path=["x/y.jpg"] * 4))


def test_what_is_known_moves_with_the_picture(config, batch):
    decoder = Decoder(size=32)
    truth = Truth(decoder.flame, of_world(world(config)))
    still, moved = batch, Augment(Recipe((.7, 1.3), rotate=60, shift=.2), 1)(batch, 0)
    assert (moved.landmarks - still.landmarks).norm(dim=-1).min(1).values.max() > .1
    a, b = (truth(here)[0] for here in (still, moved))
    for codes, here in (a, still), (b, moved): assert (decoder(codes, False).landmarks_mp - truth(here)[1]).norm(dim=-1).max() < .03
    for name in ("shape", "exp", "jaw", "tex", "eyelid"): torch.testing.assert_close(getattr(a, name), getattr(b, name))
    normals = F.normalize(torch.randn(len(batch), 3, 4, 4), dim=1)
    turn = rodrigues(b.rotation) @ rodrigues(a.rotation).mT
    torch.testing.assert_close(shade_sh(normals, a.light), shade_sh(torch.einsum("bij,bjhw->bihw", turn, normals), b.light), atol=1e-4, rtol=1e-4)


def test_lips_that_went_through_each_other_are_not_open():
    known = torch.randn(1, 68, 2)
    crossed = known.clone()
    for a, b in PAIRS["mouth"]: crossed[:, [a, b]] = known[:, [b, a]]
    for name in ("synthetic", "fitted", "photographs"): assert relative_loss(crossed, known, "mouth", STAGES[name].losses.relative_form) > .1
    assert relative_loss(crossed, known, "mouth", STAGES["emoca"].losses.relative_form) < 1e-6, "as released"


def test_photographs_are_told_by_the_fit(config):
    c = replace(config, stage="fitted", coarse=None, data=str(world(config)), steps=2)  # a folder: that it is a synthetic one is not looked at
    task = make_task(c)
    some = next(iter(loader(datasets(c)[0], 4)))
    told, known = task.truth(some)[0], Truth(Decoder(size=32).flame, of_world(world(config)))(some)[0]
    assert landmark_error(task.decoder(told, False).landmarks, some.landmarks).median() < .05
    assert .01 < (told.exp - known.exp).abs().mean() < .3 and not told.eyelid.any()
    assert train_coarse(c).run.steps == 2
    set_up = task.configure_optimizers()
    for _ in range(2): set_up["optimizer"].step(), set_up["lr_scheduler"]["scheduler"].step()
    assert set_up["optimizer"].param_groups[0]["lr"] < 1e-9
    with pytest.raises(EmocaError, match="steps, not epochs"): make_task(replace(c, steps=None, epochs=1))


def test_pictures_without_landmarks_are_not_fitted(config, tmp_path):
    for name in "ab": Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    flame = Decoder(size=32).flame
    with pytest.raises(EmocaError, match="name a detector"): of_fit(image_folder(tmp_path, size=32), flame)
    with pytest.raises(EmocaError, match="no picture with a face"): of_fit(image_folder(tmp_path, size=32, detector="dlib", max_bad=1), flame)


def test_every_profile_is_a_configuration():
    for path in (ROOT / "nbs/profiles/05_train_coarse").glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= {f.name for f in fields(CoarseConfig)} | {"coarse_stages", "coarse_steps", "coarse_batch", "emotion_epochs"}
        stage_of(read_config([path]))
