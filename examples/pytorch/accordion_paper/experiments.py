"""The experiments: the rows of the Accordion paper's tables, at full scale and smaller.

Models, levels and figures are those of the authors' logs (Agarwal et al., MLSys 2021, arXiv 2010.16248); schedules are those
of their published code. The module holds only numbers and strings.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from hvd_accordion import Accordion, CompressionSpec, Dense, PowerSGD, TopK
from hvd_accordion.utils import validation

MODES = ("relaxed", "critical", "accordion")
SCALES = ("full", "smoke", "tiny")


@dataclass(frozen=True)
class Recipe:
    """A schedule. The rate grows over `warmup` epochs from `lr` to `lr * scale`, and drops tenfold at each milestone."""

    epochs: int
    milestones: tuple[int, ...]  # epochs, counted from 0, at whose start the rate drops
    warmup: int  # epochs
    interval: int  # Accordion's interval, epochs
    batch: int  # batch of a rank: images, or streams of text
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: float = 0.0  # largest norm of the averaged gradient; 0: none

    def rate(self, epoch: int, scale: float = 1.0) -> float:
        """lr (1 + (scale - 1) min(epoch / warmup, 1)) / 10^(number of milestones passed)."""
        grown = min(epoch / self.warmup, 1.0) if self.warmup else 1.0
        drops = sum(epoch >= milestone for milestone in self.milestones)
        return self.lr * (1 + (scale - 1) * grown) / 10**drops

    def shortened(self, epochs: int) -> Recipe:
        """Scales the schedule to `epochs` epochs: milestones, warm-up and interval are rounded, at least one epoch."""
        share = validation.integer("epochs", epochs, 1) / self.epochs
        return replace(
            self,
            epochs=epochs,
            milestones=tuple(round(share * milestone) for milestone in self.milestones),
            warmup=math.ceil(share * self.warmup),
            interval=max(1, round(share * self.interval)),
        )


@dataclass(frozen=True)
class Experiment:
    """One row of the table: trainings with the relaxed level, the critical level, and Accordion.

    Levels are ranks (family "powersgd"), ratios ("topk") or global batch sizes ("batch"). `reference` has the final
    results of the authors' logs by mode: accuracy in per cent, or perplexity. `floats` has the millions of floats sent.
    """

    name: str
    data: str
    model: str
    family: str
    relaxed: float
    critical: float
    recipe: Recipe
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # options of model and data
    reference: dict[str, float] = field(default_factory=dict, hash=False)
    floats: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def metric(self) -> str:
        return "perplexity" if self.model == "lstm" else "accuracy"

    @property
    def factor(self) -> int:
        """Small batches per large batch; 1 if the batch does not change."""
        return int(self.relaxed // self.critical) if self.family == "batch" else 1

    def level(self, mode: str) -> CompressionSpec:
        """Returns the level of a mode other than Accordion."""
        if mode == "dense" or self.family == "batch":
            return Dense()
        value = self.relaxed if mode == "relaxed" else self.critical
        return PowerSGD(rank=int(value)) if self.family == "powersgd" else TopK(ratio=value)

    def compression(self, mode: str) -> CompressionSpec | Accordion:
        if mode != "accordion" or self.family == "batch":
            return self.level(mode)
        return Accordion(self.level("critical"), self.level("relaxed"), eta=0.5, interval=self.recipe.interval)

    def levels(self) -> str:
        if self.family == "batch":
            return f"batch {self.relaxed:g} / {self.critical:g}"
        if self.family == "topk":
            return f"TopK {100 * self.relaxed:g} % / {100 * self.critical:g} %"
        return f"PowerSGD {self.relaxed:g} / {self.critical:g}"


@dataclass(frozen=True)
class Run:
    """One training."""

    experiment: Experiment
    mode: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.experiment.name}/{self.mode}/{self.seed}"

    @property
    def stem(self) -> str:
        return self.name.replace("/", "-")

    @property
    def batch(self) -> int:
        """Examples of a rank per call of step()."""
        recipe, large = self.experiment.recipe, self.experiment.family == "batch" and self.mode == "relaxed"
        return recipe.batch * (self.experiment.factor if large else 1)

    def scale(self, ranks: int) -> float:
        """Growth of the rate in the warm-up: with the ranks, like the authors', or with the batch.

        With Accordion over the batch size, `AccordionBatchSize` scales the rate.
        """
        if self.experiment.family != "batch":
            return float(ranks)
        return float(self.experiment.factor) if self.mode == "relaxed" else 1.0

    def settings(self, ranks: int) -> dict[str, Any]:
        """All settings that the result depends on, as in its JSON."""
        row = {key: value for key, value in asdict(self.experiment).items() if key not in ("reference", "floats")}
        row["recipe"]["milestones"] = list(self.experiment.recipe.milestones)
        return {"experiment": row, "mode": self.mode, "seed": self.seed, "ranks": ranks}


CNN = Recipe(300, (150, 250), warmup=5, interval=10, batch=128, lr=0.1, weight_decay=1e-4)
# the authors' momentum adds g + m, torch's nesterov g + 0.9 m; they clip before compression, this code after it
LSTM = Recipe(90, (60, 80), warmup=5, interval=5, batch=128, lr=2.5, nesterov=True, clip=0.4)


def _row(name: str, levels: tuple[float, float], reference: tuple[float, ...], **more: Any) -> Experiment:
    """A row at full scale. `name` is data-model-family; `reference` has results by MODES, then two numbers of floats."""
    data, model, family = name.split("-")
    row = Experiment(name, data, model, family, *levels, more.pop("recipe", CNN), **more)
    known = dict(zip(MODES, reference[:3], strict=True))
    return replace(row, reference=known, floats=dict(zip(MODES, reference[3:], strict=False)))


FULL = (
    _row("cifar10-resnet18-powersgd", (1, 2), (94.25, 94.49, 94.72, 1350.5, 2418.4)),
    _row("cifar10-vgg19bn-powersgd", (1, 4), (67.01, 93.47, 92.35, 2074.9, 6752.1)),
    _row("cifar10-senet-powersgd", (1, 4), (94.37, 94.54, 94.37)),
    _row("cifar100-resnet18-powersgd", (1, 2), (69.55, 71.77, 71.30, 1355.8, 2426.4)),
    _row("cifar100-senet-powersgd", (1, 2), (71.29, 72.50, 72.23)),
    _row("cifar10-resnet18-topk", (0.1, 0.99), (93.08, 94.09, 93.78)),
    _row("cifar10-senet-topk", (0.1, 0.99), (93.97, 94.77, 94.38)),
    _row("cifar100-resnet18-topk", (0.25, 0.99), (71.34, 72.18, 72.23)),
    _row("cifar100-senet-topk", (0.25, 0.99), (71.80, 72.82, 72.33)),
    _row("wikitext2-lstm-topk", (0.02, 0.99), (105.26, 97.62, 97.15), recipe=LSTM),
    _row("cifar10-resnet18-batch", (4096, 512), (93.21, 94.49, 94.34, 41.1e3, 327.7e3, 60.2e3)),
    _row("cifar100-resnet18-batch", (4096, 512), (69.94, 74.06, 74.38)),
)

# Smaller versions of the paper's: a tenth of the epochs (the LSTM: a fifth), an eighth of the width, batch and rate. An
# epoch has about as many steps (125 and 118) as theirs, because residuals depend on steps and windows on epochs.
_SMALL_BATCH = replace(CNN.shortened(30), batch=32, lr=0.1 * 64 / 512)
# The demo's network loses accuracy with the relaxed level alone, as VGG-19bn does in the paper.
_SMALL_VGG = Recipe(24, (12, 20), warmup=1, interval=2, batch=32, lr=0.025, weight_decay=1e-4)
_SMALL_LSTM = replace(LSTM.shortened(18), batch=16, lr=2.5 * 16 / 128)
_DIGITS = {"examples": 1000, "size": 28, "shift": 0}
_NARROW = {"width": 8, "channels": 1}
_TEXT = {"width": 64, "layers": 2, "dropout": 0.2, "vocabulary": 2000}

SMOKE = (
    Experiment("digits-vgg8-powersgd", "digits", "vgg8", "powersgd", 1, 4, _SMALL_VGG, _DIGITS),
    Experiment("topics-lstm-topk", "topics", "lstm", "topk", 0.02, 0.99, _SMALL_LSTM, _TEXT),
    Experiment("digits-vgg8-topk", "digits", "vgg8", "topk", 0.001, 0.1, _SMALL_VGG, _DIGITS),
    Experiment("digits-resnet18-batch", "digits", "resnet18", "batch", 512, 64, _SMALL_BATCH, _NARROW),
)


def _tiny(row: Experiment) -> Experiment:
    few = {"examples": 512} if row.data == "digits" else {"examples": 6000, "vocabulary": 500, "width": 32}
    return replace(row, recipe=row.recipe.shortened(2), options={**row.options, **few})


TABLES = {"full": FULL, "smoke": SMOKE, "tiny": tuple(map(_tiny, SMOKE))}
SEEDS = {"full": (1, 2, 3), "smoke": (1, 2, 3), "tiny": (1,)}
RANKS = {"full": 4, "smoke": 2, "tiny": 2}


def runs(
    scale: str, seeds: tuple[int, ...] = (), only: str = "*", epochs: int | None = None, dense: bool = False
) -> list[Run]:
    """Returns the trainings of a scale whose names ("experiment/mode/seed") match the glob `only`.

    `epochs` scales every schedule; `dense` adds uncompressed training if the experiment has it.
    """
    table = TABLES[validation.choice("scale", scale, SCALES)]
    if epochs is not None:
        table = tuple(replace(row, recipe=row.recipe.shortened(epochs)) for row in table)
    found = []
    for row in table:
        modes = (*MODES, "dense") if dense and row.family != "batch" else MODES
        found += [Run(row, mode, seed) for mode in modes for seed in seeds or SEEDS[scale]]
    return [run for run in found if fnmatchcase(run.name, only)]
