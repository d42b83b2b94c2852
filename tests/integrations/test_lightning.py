"""Lightning on two real ranks: the pytest files of workers/ run on both, in one start of each transport."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.launcher import PYTEST, started

pytest.importorskip("lightning")
pytestmark = [pytest.mark.parallel, pytest.mark.integrations]

WORKERS = Path(__file__).parent / "workers"
FILES = [str(WORKERS / f"lightning_{name}.py") for name in ("training", "trainer", "checkpoints")]


@pytest.mark.parametrize(("transport", "only"), [("mpi", ""), ("gloo", "accumulate or callback or collectives")])
def test_on_two_ranks(transport, only):
    started([*PYTEST, *FILES, *(["-k", only] * bool(only))], 2, transport, timeout=400)


def test_the_other_package():
    """A script that imports pytorch_lightning gets a strategy of that."""
    code = """
import pytorch_lightning as pl, torch
from hvd_accordion.integrations.lightning import HorovodCallback, HorovodStrategy
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
strategy = HorovodStrategy()
assert isinstance(strategy, pl.strategies.ParallelStrategy) and issubclass(HorovodCallback, pl.Callback)
trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 2)))
print(trainer.optimizers[0].stats.steps, "steps")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "8 steps", done.stderr
