"""A convex problem with unlike data on each rank, in numpy, and the methods that are run on it everywhere alike."""

from __future__ import annotations

from functools import partial

import numpy as np

from hvd_accordion import Accordion, Dense, PowerSGD, RandomK, TopK
from hvd_accordion.optim import methods
from hvd_accordion.optim.simulated import Simulated

FEATURES, CLASSES, ROWS, SAMPLE, RIDGE = 12, 5, 40, 8, 1e-2
STEPS = 60


def data(rank):
    """Rows and labels of a rank; each has labels of its own kind."""
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((ROWS, FEATURES)) + 0.5 * np.sin(np.arange(FEATURES) + rank)
    labels = (x[:, :CLASSES].argmax(1) + rank) % CLASSES
    return x, labels


def start():
    return [np.zeros((FEATURES, CLASSES)), np.zeros(CLASSES)]


def sample(rank, step):
    """The rows of a step."""
    return np.random.default_rng((rank, step)).choice(ROWS, SAMPLE, replace=False)


def gradient(point, x, labels):
    """Of the mean cross entropy of softmax(x W + b), and the ridge of both."""
    weight, bias = point
    scores = x @ weight + bias
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    shares[np.arange(len(x)), labels] -= 1
    return [x.T @ shares / len(x) + RIDGE * weight, shares.mean(0) + RIDGE * bias]


KATYUSHA = {"smoothness": 4.0, "strong_convexity": RIDGE}
ADAPTIVE = Accordion(TopK(0.5), TopK(0.1), interval=10, unit="steps", eta=0.3)
CASES = {  # name: class, compression (None: takes none), arguments, whether gradients are of samples
    "eclk-topk": ("ECLK", TopK(0.1), KATYUSHA, False),
    "eclk-topk-learnt": ("ECLK", TopK(0.1), {**KATYUSHA, "shift": "learnt"}, True),
    "eclk-randomk": ("ECLK", RandomK(0.2), KATYUSHA, True),
    "eclk-powersgd": ("ECLK", PowerSGD(1), {**KATYUSHA, "p": 0.3, "l1": 1e-3}, True),
    "eclk-accordion": ("ECLK", ADAPTIVE, {**KATYUSHA, "p": 0.2}, False),
    "eclk-dense": ("ECLK", Dense(), KATYUSHA, True),
    "l-katyusha": ("LKatyusha", None, KATYUSHA, True),
    "ec-lsvrg": ("ECLSVRG", TopK(0.1), {"lr": 0.1, "l2": 1e-3}, True),
    "l-svrg": ("LSVRG", None, {"lr": 0.1, "p": 0.2}, True),
    "ec-sgd": ("ECSGD", TopK(0.1), {"lr": 0.1}, True),
    "ef21": ("EF21", TopK(0.1), {"smoothness": 4.0}, False),
}


class Asked:
    """What a family's class asks its shell for."""

    def __init__(self, params, compression, make, seed, **options):
        self.asked = {"make": make, "compression": compression, "seed": seed}


def simulated(case, ranks, steps=STEPS):
    """The cluster after so many steps."""
    name, compression, arguments, _ = CASES[case]
    given = {} if compression is None else {"compression": compression}
    asked = type(name, (getattr(methods, name), Asked), {})([], **given, **arguments).asked
    found = Simulated(x=start(), size=ranks, **asked)
    for step in range(steps):
        advance(found, case, step)
    return found


def advance(cluster, case, step):
    everyone = [data(rank) for rank in range(len(cluster.workers))]
    full = [partial(gradient, x=x, labels=labels) for x, labels in everyone]
    sampled = full
    if CASES[case][3]:
        rows = [sample(rank, step) for rank in range(len(everyone))]
        sampled = [partial(gradient, x=x[r], labels=y[r]) for (x, y), r in zip(everyone, rows, strict=True)]
    cluster.step(sampled, full)


def distance(found, expected):
    """Relative, of lists of arrays."""
    found, expected = (np.concatenate([np.ravel(v) for v in vs]) for vs in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
