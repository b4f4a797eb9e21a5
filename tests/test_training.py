"""The training engine: killed runs continue to the same bits, damaged files are passed over, bad batches stop a run, processes share the work."""
import multiprocessing, os, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl, numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import training_toy
from emoca_nb import training
from emoca_nb.core import BadFile, EmocaError
from emoca_nb.data import EpochSampler, GroupSampler
from emoca_nb.training import (Plan, Result, RunConfig, Stream, curves, fit, history, newest_checkpoint, order_of, plan, read_checkpoint,
                               save_checkpoint, seed_for)

TOY = Path(__file__).with_name("training_toy.py")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["emoca_nb.training"])


def toy(out, die="never", **how):
    """Run the toy in a process of its own; its exit code."""
    p = FORKS.Process(target=training_toy.main, args=(str(out), die), kwargs={k: str(v) for k, v in how.items()})
    p.start()
    p.join(120)
    if p.is_alive(): p.kill()
    return p.exitcode


def everything(run):
    """All that a run ended with: weights, optimiser, schedule, early stopping, best weights, log."""
    last = newest_checkpoint(run)[1]
    parts = [last["state_dict"], last["optimizer_states"], last["lr_schedulers"], last["callbacks"], read_checkpoint(run / "best.ckpt")]
    return parts, (run / "log.csv").read_text(), (run / "result.json").read_text()


def same(a, b):
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------- killed
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert toy(run) == 0
    return everything(run)


@pytest.mark.parametrize("deaths", [["batch 0"], ["batch 11"], ["batch 7", "validation 14"], ["writing"]], ids=str)
def test_killed_run_ends_the_same(tmp_path, whole, deaths):
    run = tmp_path / "run"
    for die in deaths:
        assert toy(run, die) == -signal.SIGKILL
        assert not (run / "result.json").exists()
    assert toy(run) == 0
    assert all(map(same, everything(run), whole))


def test_workers_draw_what_one_process_draws(tmp_path, whole):
    run = tmp_path / "run"
    assert toy(run, "batch 10", workers=2) == -signal.SIGKILL
    assert toy(run, workers=2) == 0
    assert all(map(same, everything(run), whole))


def test_killed_between_accumulated_batches(tmp_path):
    assert toy(tmp_path / "whole", accumulate=3, batch=4) == 0
    assert toy(tmp_path / "run", "batch 31", accumulate=3, batch=4) == -signal.SIGKILL
    assert toy(tmp_path / "run", accumulate=3, batch=4) == 0
    assert all(map(same, everything(tmp_path / "run"), everything(tmp_path / "whole")))


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    assert toy(tmp_path / "one", batch=16, plain="plain") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOY), str(tmp_path / "two"), "never", "0", "1", "8", "plain"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (a, *_), (b, *_) = (everything(tmp_path / n) for n in ("one", "two"))
    for k in a[0]: torch.testing.assert_close(a[0][k], b[0][k], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*(history(tmp_path / n).val_loss.dropna() for n in ("one", "two")), rtol=1e-4)


# ---------------------------------------------------------------- within one process
class Line(pl.LightningModule):
    """A line through points."""
    def __init__(self, lr=0.05, interval="step"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(3, 1)
    def training_step(self, batch, i): return F.mse_loss(self.net(batch[0]), batch[1])
    def validation_step(self, batch, i): self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]), batch_size=len(batch[0]))
    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), self.hparams.lr)
        return [sgd], [{"scheduler": torch.optim.lr_scheduler.ConstantLR(sgd), "interval": self.hparams.interval}]


def points(n=64, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loaders(batch=8): return DataLoader(points(), batch, shuffle=True), DataLoader(points(16, 1), 16)


CONFIG = RunConfig(max_steps=12, val_every=4, checkpoint_every=5, device="cpu")


def test_accumulation_is_the_big_batch(tmp_path):
    big = fit(Line, DataLoader(points(), 16, shuffle=True), None, tmp_path / "big", CONFIG)
    small = fit(Line, DataLoader(points(), 4, shuffle=True), None, tmp_path / "small", replace(CONFIG, accumulate=4))
    torch.testing.assert_close(big.task.state_dict(), small.task.state_dict(), rtol=1e-5, atol=1e-6)
    assert (big.task.net.weight - 1).abs().max() < 0.5


def test_finished_run_is_read(tmp_path, monkeypatch):
    first = fit(Line, *loaders(), tmp_path / "run", CONFIG)
    monkeypatch.setattr(training, "_train", lambda *a: pytest.fail("trained again"))
    again = fit(Line, *loaders(), tmp_path / "run", CONFIG)
    assert same(first.task.state_dict(), again.task.state_dict()) and again.best == first.best and again.steps == 12 and not again.task.training


def test_finished_without_its_result_is_not_trained_on(tmp_path):
    "Killed after the last checkpoint and before result.json."
    first = fit(Line, *loaders(), tmp_path / "run", CONFIG)
    said = (tmp_path / "run/result.json").read_text()
    (tmp_path / "run/result.json").unlink()
    again = fit(Line, *loaders(), tmp_path / "run", CONFIG)
    assert (tmp_path / "run/result.json").read_text() == said and same(first.task.state_dict(), again.task.state_dict())


@pytest.mark.parametrize("change, said", [
    (dict(config=replace(CONFIG, max_steps=13)), "run: max_steps is 12 there and 13 here"),
    (dict(task=lambda: Line(0.1)), "task: lr is 0.05 there and 0.1 here"),
    (dict(about={"data": "other"}), "about: data is None there and 'other' here"),
    (dict(train=DataLoader(points(), 4, shuffle=True)), "data: batch size is 8 there and 4 here"),
])
def test_another_configuration_is_refused(tmp_path, change, said):
    train, val = loaders()
    fit(Line, train, val, tmp_path / "run", CONFIG)
    with pytest.raises(EmocaError, match=said) as e: fit(**dict(task=Line, train=train, val=val, run_dir=tmp_path / "run", config=CONFIG) | change)
    assert str(tmp_path / "run") in str(e.value)


def test_what_does_not_change_the_result_may_change(tmp_path):
    fit(Line, *loaders(), tmp_path / "run", CONFIG)
    fit(Line, *loaders(), tmp_path / "run", replace(CONFIG, checkpoint_every=1, log_every=1))


def test_damaged_checkpoints_are_passed_over(tmp_path, capsys):
    fit(Line, *loaders(), tmp_path / "run", CONFIG)
    (tmp_path / "run/result.json").unlink()
    last = max((tmp_path / "run/checkpoints").glob("*.ckpt"))
    last.write_bytes(last.read_bytes()[:-100])
    fit(Line, *loaders(), tmp_path / "run", CONFIG)
    out = capsys.readouterr().out
    assert last.name in out and "passed over" in out and "continues at step 10 of 12" in out


def test_flipped_bit_is_seen(tmp_path):
    save_checkpoint({"weights": torch.ones(5000)}, tmp_path / "a.ckpt")
    raw = bytearray((tmp_path / "a.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 4
    (tmp_path / "a.ckpt").write_bytes(raw)
    with pytest.raises(BadFile, match="damage"): read_checkpoint(tmp_path / "a.ckpt")


def test_checkpoints_hold_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return (os.system, ("true",))
    torch.save({"state_dict": {}, "callbacks": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(EmocaError, match="system"): read_checkpoint(tmp_path / "a.ckpt")


def test_failed_write_keeps_the_former_file(tmp_path, monkeypatch):
    save_checkpoint({"a": torch.ones(3)}, tmp_path / "a.ckpt")
    def full(what, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(EmocaError, match="No space left"): save_checkpoint({"a": torch.zeros(3)}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["a"].sum() == 3 and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- stops
@pytest.mark.parametrize("bad, said", [(float("nan"), "the loss is nan"), (float("inf"), "the loss is inf"), (1e4, "after at most")])
def test_bad_batch_stops_with_its_paths(tmp_path, bad, said):
    x = points(320)
    where = order_of(DataLoader(x, 8, shuffle=True), 0)[0](0)[250]
    x.tensors[0][where] = bad
    items = DataLoader([dict(x=a, y=b, path=f"face-{i}.jpg") for i, (a, b) in enumerate(x)], 8, shuffle=True)

    class Named(Line):
        def training_step(self, batch, i): return super().training_step((batch["x"], batch["y"]), i)
    with pytest.raises(EmocaError, match=said) as e: fit(Named, items, None, tmp_path, replace(CONFIG, max_steps=60))
    assert "step 32" in str(e.value) and f"face-{where}.jpg" in (tmp_path / "stopped_by.txt").read_text().splitlines()
    assert "step-00000030.ckpt" in str(e.value) and newest_checkpoint(tmp_path)[0].name == "step-00000030.ckpt"


def test_gradient_that_is_not_finite_stops_before_the_optimiser(tmp_path):
    class Root(Line):
        def training_step(self, batch, i): return super().training_step(batch, i) + (self.net.weight.sum() * 0).abs().sqrt()
    task = Root()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    with pytest.raises(EmocaError, match="step 1: the gradient's norm is nan"): fit(task, *loaders(), tmp_path, CONFIG)
    assert same(task.state_dict(), before)


def test_validation_that_is_not_finite(tmp_path):
    class Odd(Line):
        def validation_step(self, batch, i): self.log("val_loss", torch.tensor(float("nan")), batch_size=1)
    with pytest.raises(EmocaError, match="validation after step 4 gave val_loss = nan"): fit(Odd, *loaders(), tmp_path, CONFIG)


def test_monitor_that_nobody_logs(tmp_path):
    with pytest.raises(EmocaError, match="monitor = 'val_F1', but the validation gave val_loss"): fit(Line, *loaders(), tmp_path, replace(CONFIG, monitor="val_F1"))


def test_scheduler_by_epochs_is_refused(tmp_path):
    with pytest.raises(EmocaError, match="scheduled by steps"): fit(lambda: Line(interval="epoch"), *loaders(), tmp_path, CONFIG)


def test_early_stop_and_best(tmp_path):
    class Worse(Line):
        def validation_step(self, batch, i): self.log("val_score", float(min(self.global_step, 16 - self.global_step)), batch_size=1)
    done = fit(Worse, *loaders(), tmp_path, replace(CONFIG, max_steps=100, monitor="val_score", mode="max", patience=2))
    assert done.early and done.steps == 16 and done.best["step"] == 8 and done.best["value"] == 8
    assert same(read_checkpoint(tmp_path / "best.ckpt")["state_dict"], done.task.state_dict())


def test_batch_without_a_move(tmp_path):
    class Skips(Line):
        def training_step(self, batch, i): return None if i in (3, 11) else super().training_step(batch, i)
    done = fit(Skips, *loaders(), tmp_path, CONFIG)
    assert done.steps == 12 and list(history(tmp_path).val_loss.dropna().index) == [4, 8, 12]


def test_unsaved_parts_stay_out_of_the_files(tmp_path):
    class Frozen(Line):
        unsaved = ("judge",)
        def __init__(self):
            super().__init__()
            self.judge = nn.Linear(3, 300).requires_grad_(False)
    done = fit(Frozen, *loaders(), tmp_path, CONFIG)
    assert set(read_checkpoint(tmp_path / "best.ckpt")["state_dict"]) == set(newest_checkpoint(tmp_path)[1]["state_dict"]) == {"net.weight", "net.bias"}
    assert done.task.judge.weight.shape == (300, 3)


def test_run_is_quiet(tmp_path, capfd):
    fit(Line, *loaders(), tmp_path, CONFIG)
    out, err = capfd.readouterr()
    assert not out and not [line for line in err.splitlines() if line.strip()]


# ---------------------------------------------------------------- order, plan, log
def test_stream_is_cut_from_whole_epochs():
    order, n, _ = order_of(DataLoader(points(7), 3, shuffle=True), seed=5)
    stream = Stream(order, n, 3, stop=14)
    seen = [i for batch in stream for i in batch[1:]]
    assert [sorted(seen[a:a + 7]) for a in range(0, 42, 7)] == [list(range(7))] * 6 and len(stream) == 14
    assert [batch[0] for batch in Stream(order, n, 3, stop=14, start=9, rank=1, world=2)] == [(j, 1) for j in range(9, 14)]


def test_order_belongs_to_seed_and_epoch():
    shuffled = DataLoader(points(50), 5, shuffle=True)
    orders = [order_of(shuffled, seed)[0](epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4 and orders[1] == order_of(shuffled, 0)[0](1)


def test_samplers_of_the_data_room():
    own = EpochSampler(50, seed=3)
    order, n, size = order_of(DataLoader(points(50), 5, sampler=own))
    own.set_epoch(2)
    assert (order(2), n, size) == (list(own), 50, 5)
    groups = GroupSampler(np.repeat(np.arange(5), 4), 2)
    order, n, size = order_of(DataLoader(points(20), 4, sampler=groups))
    rows = np.array(order(0)).reshape(-1, 2) // 4
    assert n == 20 and (rows[:, 0] == rows[:, 1]).all()


def test_weights_without_replacement():
    order, n, _ = order_of(DataLoader(points(9), 3, sampler=WeightedRandomSampler([1] * 8 + [0], 8, replacement=False)))
    assert n == 8 and sorted(order(0)) == list(range(8))


def test_batches_of_a_batch_sampler():
    class Pairs:
        def set_epoch(self, epoch): self.epoch = epoch
        def __iter__(self): return iter([[0, 1], [2, 3]] if getattr(self, "epoch", 0) % 2 == 0 else [[2, 3], [0, 1]])
        def __len__(self): return 2
    order, n, size = order_of(DataLoader(points(4), batch_sampler=Pairs()))
    assert (order(0), order(1), n, size) == ([0, 1, 2, 3], [2, 3, 0, 1], 4, 2)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(EmocaError, match="nothing to train on"): Stream(lambda epoch: [], 0, 4, 5)
    with pytest.raises(EmocaError, match="batch size"): order_of(DataLoader(points(), batch_size=None))


def test_plan():
    assert plan(RunConfig(max_epochs=1.5), 100, 8) == Plan(19, 12, 1)
    assert plan(RunConfig(max_steps=5, val_every=200), 100, 8).validates(5)
    assert plan(RunConfig(max_epochs=1, val_every=0.001), 10, 5).val_steps == 1


@pytest.mark.parametrize("fields", [dict(), dict(max_steps=1, max_epochs=1), dict(max_steps=0), dict(max_steps=3, mode="best"), dict(max_steps=3, precision="16"),
                                    dict(max_steps=3, patience=0), dict(max_steps=3, clip=-1.0)], ids=str)
def test_configurations_that_make_no_sense(fields):
    with pytest.raises(EmocaError): RunConfig(**fields)


def test_seeds_do_not_repeat():
    seeds = {seed_for(s, k, n, r) for s in range(3) for k in range(4) for n in range(100) for r in range(2)}
    assert len(seeds) == 3 * 4 * 100 * 2 and all(0 <= s < 2**32 for s in seeds)


def test_history_of_nothing(tmp_path):
    with pytest.raises(EmocaError, match="no log.csv"): history(tmp_path)


def test_curves_show_what_was_validated(tmp_path):
    fit(Line, *loaders(), tmp_path, CONFIG)
    figure = curves(tmp_path)
    assert [ax.get_title() for ax in figure.axes] == ["loss", "val_loss"]
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), history(tmp_path).val_loss.dropna())


def test_channels_last_and_clipping(tmp_path):
    class Conv(Line):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 1))
        def training_step(self, batch, i):
            assert self.net[0].weight.is_contiguous(memory_format=torch.channels_last)
            return 1e3 * F.mse_loss(self.net(batch[0][:, :, None, None].expand(-1, -1, 3, 3)), batch[1])
        def validation_step(self, batch, i): self.log("val_loss", 1.0)
    done = fit(Conv, *loaders(), tmp_path, replace(CONFIG, channels_last=True, clip=1e-3, log_every=1))
    start = torch.manual_seed(0) and Conv()
    moved = sum((a - b).square().sum() for a, b in zip(done.task.parameters(), start.parameters()))
    assert history(tmp_path).grad_norm.min() > 1 and moved.sqrt() < 12 * 0.05 * 1e-3


def test_interrupted_run_continues(tmp_path):
    class Stopped(Line):
        def training_step(self, batch, i):
            if i == 7 and not (tmp_path / "once").exists():
                (tmp_path / "once").touch()
                raise KeyboardInterrupt
            return super().training_step(batch, i)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt, match="the same call continues from the last checkpoint"): fit(Stopped, *loaders(), tmp_path / "run", CONFIG)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopped = fit(Stopped, *loaders(), tmp_path / "run", CONFIG)
    straight = fit(Stopped, *loaders(), tmp_path / "straight", CONFIG)
    assert same(stopped.task.state_dict(), straight.task.state_dict())


def test_bf16(tmp_path):
    class Half(Line):
        def training_step(self, batch, i):
            assert torch.is_autocast_enabled("cpu") and self.net(batch[0]).dtype == torch.bfloat16
            return super().training_step(batch, i)
    done = fit(Half, *loaders(), tmp_path, replace(CONFIG, precision="bf16-mixed"))
    assert done.task.net.weight.dtype == torch.float32 and done.best["value"] < 3
