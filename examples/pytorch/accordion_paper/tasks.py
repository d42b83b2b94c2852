"""Tasks: a network, the losses of an epoch on this rank, and the score on the test data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DistributedSampler

from accordion_paper import images, models, text
from accordion_paper.experiments import Run
from hvd_accordion.utils.seeds import stable_hash

TEST_BATCH = 500  # images
DIGITS = ("examples", "size", "shift")  # options of the digits


class Task(Protocol):
    network: nn.Module
    steps: int  # losses per epoch, equal on all ranks

    def losses(self, epoch: int) -> Iterator[torch.Tensor]:
        """Yields one loss per step."""

    def score(self) -> tuple[float, int]:
        """Returns this rank's sum over the test data (of correct answers, or of log-likelihoods), and the count."""


class Classify:
    """Images in batches, shuffled each epoch equally on all ranks. Each rank takes its share."""

    def __init__(self, run: Run, data: images.Images, rank: int, size: int, device: torch.device) -> None:
        options = {key: value for key, value in run.experiment.options.items() if key not in ("examples", "shift")}
        self.network = models.MODELS[run.experiment.model](data.classes, **options).to(device)
        self.data, self.rank, self.size, self.device, self.seed = data, rank, size, device, run.seed
        self.train = [x.to(device) for x in data.train]
        self.sampler = DistributedSampler(range(len(data.train[1])), size, rank, seed=run.seed)  # type: ignore[arg-type]
        self.batches = BatchSampler(self.sampler, run.batch, drop_last=False)
        self.steps = len(self.batches)

    def losses(self, epoch: int) -> Iterator[torch.Tensor]:
        self.network.train()
        self.sampler.set_epoch(epoch)
        generator = torch.Generator().manual_seed(stable_hash("augment", self.seed, self.rank, epoch))
        for picked in self.batches:
            x, y = (part[picked] for part in self.train)
            x = images.augmented(x, self.data, generator)
            yield F.cross_entropy(self.network(self.data.normalised(x)), y)

    def score(self) -> tuple[float, int]:
        self.network.eval()
        mine = [part[self.rank :: self.size].split(TEST_BATCH) for part in self.data.test]
        right, count = 0.0, 0
        with torch.no_grad():
            for x, y in zip(*mine, strict=True):
                answers = self.network(self.data.normalised(x.to(self.device))).argmax(1)
                right += float((answers == y.to(self.device)).sum())
                count += len(y)
        return right, count


class Predict:
    """Text in streams, different on each rank. The state is carried from window to window."""

    def __init__(self, run: Run, data: text.Text, rank: int, size: int, device: torch.device) -> None:
        options = {key: value for key, value in run.experiment.options.items() if key not in ("vocabulary", "examples")}
        self.network = models.LSTM(data.words, **options).to(device)
        mine = run.batch * size, run.batch * rank, run.batch * (rank + 1)
        self.train, self.test = (text.streams(part, *mine).to(device) for part in (data.train, data.test))
        self.steps = len([*text.windows(self.train)])

    def losses(self, epoch: int) -> Iterator[torch.Tensor]:
        self.network.train()
        yield from self._losses(self.train)

    def score(self) -> tuple[float, int]:
        self.network.eval()
        with torch.no_grad():
            total = sum(
                float(loss) * y.numel()
                for loss, (_, y) in zip(self._losses(self.test), text.windows(self.test), strict=True)
            )
        return total, self.test[1:].numel()

    def _losses(self, columns: torch.Tensor) -> Iterator[torch.Tensor]:
        state = None
        for x, y in text.windows(columns):
            scores, state = self.network(x, state)
            state = state[0].detach(), state[1].detach()
            yield F.cross_entropy(scores.flatten(0, 1), y.flatten())


def require_data(run: Run, path: Path | None) -> None:
    """Raises FileNotFoundError, naming what is missing, if the run's data is not below `path`."""
    name = run.experiment.data
    if name in ("digits", "topics"):  # data of installed packages
        return
    if path is None:
        raise FileNotFoundError(f"{name} needs --data PATH, the folder that holds its files")
    if name == "wikitext2":
        text.located(path)
    else:
        images.located(name, path)


def task(run: Run, path: Path | None, rank: int, size: int, device: torch.device) -> Task:
    """Returns the task of a run. Raises FileNotFoundError if its data is not below `path`, ValueError if it is invalid."""
    require_data(run, path)
    options, name = run.experiment.options, run.experiment.data
    if name == "digits":
        return Classify(
            run, images.digits(**{key: options[key] for key in DIGITS if key in options}), rank, size, device
        )
    if name == "topics":
        return Predict(run, text.topics(options["vocabulary"], options.get("examples")), rank, size, device)
    assert path is not None
    if name == "wikitext2":
        return Predict(run, text.wikitext2(path), rank, size, device)
    return Classify(run, images.cifar(name, path), rank, size, device)
