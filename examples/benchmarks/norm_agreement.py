"""Tests on real trainings whether Accordion decides equally from sampled and from exact gradient norms.

python examples/benchmarks/norm_agreement.py [--seeds 3] [--steps 400] [--windows 10 25 50] [--json PATH]

Four networks learn (digits of MNIST and of scikit-learn, the text of Python's own help), with momentum and two drops of the
learning rate. At the end of each window the norm of every layer's summed gradient is taken exactly and from samples of
several sizes; `Accordion.observe` gets the exact norms and, separately, those of every sample size. A pair is one layer at
one check. Writes a table in Markdown: the share of pairs with the same regime.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import models
import torch
from torch import nn
from torch.nn import functional as F

from hvd_accordion import Accordion
from hvd_accordion.ops import torch as ops
from hvd_accordion.policy import norm_sampling
from hvd_accordion.policy.assignment import adaptive
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.window import NORM_SAMPLES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pytorch"))

Batch = tuple[torch.Tensor, torch.Tensor]
Norms = dict[str, float]


class Training(NamedTuple):
    network: nn.Module
    batch: Callable[[torch.Generator, int], Batch]  # about this many images
    lr: float


class Check(NamedTuple):
    """The norms of all layers at the end of a window, exact and by sample size."""

    lr: float
    exact: Norms
    sampled: dict[int, Norms]


class Pair(NamedTuple):
    """One layer at one check: the decisions from the exact norm and from the sampled norm."""

    network: str
    window: int
    larger: bool  # whether the layer is larger than the sample
    critical: bool
    same: bool
    distance: float  # of the exact relative change from eta


# trainings


def drawn(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator, size: int) -> Batch:
    picked = torch.randint(len(x), (size,), generator=generator)
    return x[picked], y[picked]


def cnn() -> Training:
    from pytorch_mnist import Net, datasets

    images, labels = datasets()[0].tensors
    return Training(Net(), lambda g, size: drawn(images, labels, g, size), 0.02)


def resnet() -> Training:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    for inputs, outputs, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2)):
        layers += [models.Block(inputs, outputs, stride), models.Block(outputs, outputs, 1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return Training(network, lambda g, size: drawn(images, labels, g, size), 0.05)


@cache
def text(vocabulary: int) -> torch.Tensor:
    """Python's help as word indices: the most frequent words, 0 for all others."""
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)))
    known = [word for word, _ in Counter(words).most_common(vocabulary - 1)]
    numbers = {word: i for i, word in enumerate(known, 1)}
    return torch.tensor([numbers.get(word, 0) for word in words])


def sentences(generator: torch.Generator, size: int, length: int = 24) -> Batch:
    tokens = text(2000)
    starts = torch.randint(len(tokens) - length, (max(1, size // 4), 1), generator=generator)
    return tokens[starts + torch.arange(length)], tokens[starts + torch.arange(1, length + 1)]


def transformer() -> Training:
    return Training(models.Transformer(vocabulary=2000, width=128, layers=2, heads=4, length=24), sentences, 0.1)


def lstm() -> Training:
    return Training(models.LSTM(vocabulary=2000, width=128, layers=1), sentences, 1.0)


TRAININGS: dict[str, Callable[[], Training]] = {
    "CNN, MNIST": cnn,
    "ResNet, digits": resnet,
    "transformer, text": transformer,
    "LSTM, text": lstm,
}


# records


def record(
    make: Callable[[], Training], seed: int, steps: int, size: int, windows: list[int], sizes: list[int]
) -> dict[int, list[Check]]:
    """Returns the checks of one training, by window length."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, batch, lr = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], 0.1)
    watched = {name: p for name, p in network.named_parameters() if adapts(name, p)}
    entries = {(n, m): picked(n, p, min(m, p.numel()), seed) for n, p in watched.items() for m in sizes}
    sums = {(w, n): torch.zeros(p.numel()) for w in windows for n, p in watched.items()}
    found: dict[int, list[Check]] = {w: [] for w in windows}
    for step in range(1, steps + 1):
        x, y = batch(generator, size)
        optimizer.zero_grad()
        F.cross_entropy(network(x).flatten(0, -2), y.flatten()).backward()
        for (_, name), into in sums.items():
            into += watched[name].grad.reshape(-1)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        for w in (w for w in windows if step % w == 0):
            now = {name: sums[w, name] for name in watched}
            estimates = {m: {n: estimate(s, entries[n, m]) for n, s in now.items()} for m in sizes}
            found[w].append(Check(rate, {n: norm(s) for n, s in now.items()}, estimates))
            for s in now.values():
                s.zero_()
    return found


def adapts(name: str, p: nn.Parameter) -> bool:
    return adaptive(Layer(name, tuple(p.shape), "float32"), Accordion(), world_size=2)


def picked(name: str, p: nn.Parameter, size: int, seed: int) -> torch.Tensor:
    return norm_sampling.entries(ops, name, p.numel(), size, seed, p)


def norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def estimate(summed: torch.Tensor, entries: torch.Tensor) -> float:
    return norm_sampling.scale(len(summed), len(entries)) * norm(ops.take(summed, entries))


# decisions


def decided(checks: list[Check], norms: Callable[[Check], Norms], eta: float) -> Iterator[tuple[str, str, float]]:
    """Yields layer, regime and relative change at each check from the first comparison on."""
    accordion = Accordion(eta=eta, unit="steps")
    for i, check in enumerate(checks):
        regimes = accordion.observe(norms(check), check.lr)
        if i:
            yield from ((layer, str(regime), accordion.ratios[layer]) for layer, regime in regimes.items())


def compared(
    network: str, window: int, counts: dict[str, int], checks: list[Check], size: int, eta: float
) -> list[Pair]:
    exact = decided(checks, lambda check: check.exact, eta)
    ours = decided(checks, lambda check: check.sampled[size], eta)
    return [
        Pair(network, window, counts[layer] > size, one == "critical", one == other, abs(ratio - eta))
        for (layer, one, ratio), (_, other, _) in zip(exact, ours, strict=True)
    ]


# report


def share(pairs: list[Pair]) -> float:
    return sum(pair.same for pair in pairs) / len(pairs) if pairs else 1.0


def row(size: int, pairs: list[Pair], windows: list[int]) -> dict[str, object]:
    larger = [pair for pair in pairs if pair.larger]
    apart = [pair.distance for pair in pairs if not pair.same]
    return {
        "m": size,
        "all": share(pairs),
        "larger": share(larger),
        "pairs of larger layers": len(larger),
        **{f"windows of {w} steps": share([pair for pair in pairs if pair.window == w]) for w in windows},
        **{name: share([pair for pair in pairs if pair.network == name]) for name in TRAININGS},
        "distance": statistics.median(apart) if apart else 0.0,
    }


def markdown(rows: list[dict[str, object]], pairs: int, critical: float, eta: float) -> str:
    titles = {"larger": "layers of more than m entries", "distance": "median distance from eta where they differ"}
    columns = [key for key in rows[0] if key != "pairs of larger layers"]
    lines = [
        f"{pairs:,} pairs of layer and check, eta = {eta:g}, {critical:.0%} critical; pairs of the same regime:",
        "",
        "| " + " | ".join(titles.get(key, key) for key in columns) + " |",
        "|" + "--:|" * len(columns),
    ]
    for r in rows:
        default = f"**{r['m']:,}**" if r["m"] == NORM_SAMPLES else f"{r['m']:,}"
        shares = [f"{r[key]:.2%}" for key in columns[1:-1]]
        lines.append("| " + " | ".join([default, *shares, f"{r['distance']:.3f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3, help="trainings of each network")
    options.add_argument("--steps", type=int, default=400, help="steps of a training")
    options.add_argument("--batch-size", type=int, default=32, help="images; a quarter as many pieces of text")
    options.add_argument("--windows", type=int, nargs="+", default=[10, 25, 50], help="lengths of a window in steps")
    options.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="sample sizes m")
    options.add_argument("--eta", type=float, nargs="+", default=[0.5], help="Accordion's threshold")
    options.add_argument("--json", type=Path, help="write the rows to this file too")
    args = options.parse_args()
    torch.set_num_threads(1)
    recorded = []
    for name, make in TRAININGS.items():
        counts = {n: p.numel() for n, p in make().network.named_parameters()}
        for seed in range(args.seeds):
            sys.stderr.write(f"{name}, seed {seed}\n")
            found = record(make, seed, args.steps, args.batch_size, args.windows, args.sizes)
            recorded += [(name, window, counts, checks) for window, checks in found.items()]
    tables = {}
    for eta in args.eta:
        by_size = {m: [p for known in recorded for p in compared(*known, m, eta)] for m in args.sizes}
        rows = tables[eta] = [row(m, pairs, args.windows) for m, pairs in by_size.items()]
        first = next(iter(by_size.values()))
        critical = sum(pair.critical for pair in first) / len(first)
        sys.stdout.write(markdown(rows, len(first), critical, eta) + "\n\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
