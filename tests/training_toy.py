"""A small training that can be told to kill itself, run by test_training.py in processes of their own."""
import os, signal, sys

import lightning.pytorch as pl, numpy as np, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emoca_nb.training import RunConfig, fit, gather

made = torch.Generator().manual_seed(0)
x = torch.randn(70, 6, generator=made)
y = x @ torch.randn(6, 2, generator=made)


class Noisy(TensorDataset):
    """Points with noise that is drawn when they are read."""
    def __getitem__(self, i):
        a, b = super().__getitem__(i)
        return a + 0.1 * torch.randn(6), b


class Task(pl.LightningModule):
    """Chance everywhere: in the step from torch and numpy, in dropout, in the data."""
    def __init__(self, die, plain):
        super().__init__()
        self.die, self.plain, self.seen = die, plain, []
        self.net = nn.Linear(6, 2) if plain else nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def die_at(self, point): os.kill(os.getpid(), signal.SIGKILL) if self.die == point else None

    def training_step(self, batch, i):
        self.die_at(f"batch {i}")
        if self.plain: return F.mse_loss(self.net(batch[0]), batch[1])
        shake = torch.rand(())
        self.log("shake", shake)
        return shake * F.mse_loss(self.net(batch[0] * (1 + 0.1 * np.random.rand())), batch[1])

    def validation_step(self, batch, i):
        self.die_at(f"validation {self.global_step}")
        self.seen.append(F.mse_loss(self.net(batch[0]), batch[1], reduction="none").mean(1))

    def on_validation_epoch_end(self):
        self.log("val_loss", gather(self, torch.cat(self.seen)).mean())
        self.seen.clear()

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.parameters(), 0.02)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20), "interval": "step"}}


def die_writing(nth):
    """Be killed in the middle of the nth file."""
    write, left = torch.save, [nth]

    def torn(what, path):
        left[0] -= 1
        if left[0] == 0:
            with open(path, "wb") as f: f.write(b"PK half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        write(what, path)
    torch.save = torn


def main(out, die="never", workers="0", accumulate="1", batch="8", plain=""):
    """Train into the folder `out`."""
    torch.set_num_threads(1)
    if die == "writing": die_writing(5)
    config = RunConfig(max_steps=20, val_every=7, checkpoint_every=4, log_every=1, accumulate=int(accumulate), patience=2, device="cpu")
    data = TensorDataset(x, y) if plain else Noisy(x, y)
    train = DataLoader(data, int(batch), shuffle=True, num_workers=int(workers), multiprocessing_context="fork" if workers != "0" else None)
    fit(lambda: Task(die, plain), train, DataLoader(TensorDataset(x[:21], y[:21]), 8), out, config)


if __name__ == "__main__": main(*sys.argv[1:])
