"""What an Auto measures before it chooses, and exchanges without a network."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hvd_accordion import BF16, FP16, QSGD, Dense, PowerSGD, RandomK, TopK, cluster
from hvd_accordion.collectives import AllToAll
from hvd_accordion.compression import Context, exchange
from hvd_accordion.compression.positions import Shuffle
from hvd_accordion.compression.two_step import slice_size
from hvd_accordion.ops import numpy as ops
from hvd_accordion.plan import Layer
from hvd_accordion.rehearsal import REPEATS, SIZES, measure, rehearse

SHAPES = {"a": (24, 36), "b": (40, 3, 3, 5)}
SPECS = [
    Dense(),
    FP16(),
    BF16(),
    RandomK(0.1),
    TopK(0.05),
    TopK(0.05, algorithm="allgather", values="bfloat16"),
    TopK(0.05, algorithm="two_step"),
    TopK(0.05, algorithm="two_step", values="float16"),
    QSGD(1),
    QSGD(127, norm="l2"),
    PowerSGD(1),
    PowerSGD(4, iterations=2),
    PowerSGD(2, error_feedback=False, warm_start=False),
]


def exchange_of(spec, rank: int, size: int, dtype: str = "float32", scale: float = 1.0):
    """An exchange of the same values on each rank."""
    rng = np.random.default_rng(1)
    grads = [(scale * rng.standard_normal(shape)).astype(dtype) for shape in SHAPES.values()]
    residual = [(scale * rng.standard_normal(shape)).astype(dtype) for shape in SHAPES.values()]
    ctx = Context(tuple(SHAPES), dtype, 3, 0, rank, size)
    return exchange(spec, ops, grads, residual, [{} for _ in SHAPES], ctx)


def has_slices(spec, size: int) -> bool:
    return any(kind is AllToAll for kind, _ in spec.messages((64, 64), "float32", size))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_spec_is_rehearsed_as_on_a_cluster_of_equal_ranks(spec, size, dtype):
    alone = rehearse(exchange_of(spec, 0, size, dtype), ops, size)
    (real, *_), _ = cluster.run([exchange_of(spec, rank, size, dtype) for rank in range(size)])
    assert bool(alone.ok) and bool(real.ok)
    assert [x.shape for x in alone.mean] == [x.shape for x in real.mean] == list(SHAPES.values())
    assert [x.dtype for x in alone.mean] == [x.dtype for x in real.mean]
    assert [m.keys() for m in alone.memory] == [m.keys() for m in real.memory]
    if has_slices(spec, size):
        return
    for mine, theirs in zip(alone.mean + alone.residual, real.mean + real.residual, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(alone.memory, real.memory, strict=True):
        for name in mine:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "size"),
    # QSGD's ranks round equal values at random, each in its own way
    [(s, n) for s in SPECS for n in (2, 3, 5) if has_slices(s, n) and not isinstance(s, QSGD)],
    ids=str,
)
def test_after_an_alltoall_rank_0s_slice_is_the_right_one(spec, size):
    alone = rehearse(exchange_of(spec, 0, size), ops, size)
    (real, *_), _ = cluster.run([exchange_of(spec, rank, size) for rank in range(size)])
    mine, theirs = (np.concatenate([x.reshape(-1) for x in step.mean]) for step in (alone, real))
    count, at = mine.size, np.arange(mine.size)
    if isinstance(spec, TopK):
        at = Shuffle.of(Context(tuple(SHAPES), "float32", 3, 0, 0, size), count).there(ops, at)
    owned = at < slice_size(count, size)
    assert np.any(theirs[owned])
    np.testing.assert_allclose(mine[owned], theirs[owned], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_overflow_shows(spec):
    step = rehearse(exchange_of(spec, 0, 2, scale=math.inf), ops, 2)
    assert not bool(step.ok)


# measure

A, B, TWIN, OTHER = (
    Layer("a", (64, 64), "float32"),
    Layer("b", (32, 32), "float32"),
    Layer("twin", (64, 64), "float32"),
    Layer("other", (64, 64), "float64"),
)
LOW, TOP = PowerSGD(2), TopK(0.1)


class Bench:
    """Clocks that show what they are told to; remembers what it was asked for."""

    def __init__(self, bandwidth: float, overhead: float, factor: float = 1.0):
        self.bandwidth, self.overhead, self.factor = bandwidth, overhead, factor
        self.sizes, self.exchanges, self.told = [], [], None

    def allreduce(self, size: int) -> float:
        self.sizes.append(size)
        warm_up = 10.0 if self.sizes.count(size) == 1 else 0.0
        return self.factor * (warm_up + self.overhead + size / self.bandwidth)  # 2 ranks send each byte once

    def exchange(self, layer, spec) -> float:
        self.exchanges.append((layer.name, spec))
        return self.factor * layer.numel * (1e-9 if spec == LOW else 2e-9)

    def measure(self, layers, choices, shared=None, backward=0.25):
        return measure(layers, choices, 2, backward, self.allreduce, self.exchange, shared or self._mine)

    def _mine(self, numbers):
        self.told = list(numbers)
        return self.told


def test_the_link_and_each_kind_of_exchange_are_measured():
    bench = Bench(1e8, 1e-3)
    m = bench.measure([A, B, TWIN, OTHER], {"a": (LOW, TOP), "b": (TOP,), "twin": (LOW, TOP), "other": (LOW,)})
    assert bench.sizes == [size for size in SIZES for _ in range(REPEATS + 1)]
    assert (m.link.bandwidth, m.link.overhead, m.link.latency) == (pytest.approx(1e8), pytest.approx(1e-3), 0.0)
    assert (m.world_size, m.backward) == (2, 0.25)
    # layers of the same kind share a measurement
    assert bench.exchanges == [("a", LOW), ("a", TOP), ("b", TOP), ("other", LOW)]
    assert m.compression == {
        ("a", LOW): 4096 * 1e-9,
        ("a", TOP): 4096 * 2e-9,
        ("b", TOP): 1024 * 2e-9,
        ("twin", LOW): 4096 * 1e-9,
        ("twin", TOP): 4096 * 2e-9,
        ("other", LOW): 4096 * 1e-9,
    }


def test_every_rank_ends_up_with_rank_0s_numbers():
    choices = {"a": (LOW, TOP), "b": (TOP,)}
    first, second = Bench(1e8, 1e-3), Bench(1e6, 1.0, factor=3.0)
    mine = first.measure([A, B], choices)
    theirs = second.measure([A, B], choices, lambda numbers: first.told, backward=9.0)
    assert theirs == mine and second.sizes == first.sizes


def test_the_link_is_measured_even_where_there_is_nothing_to_choose():
    m = Bench(1e8, 1e-3).measure([A], {"gone": (LOW,)})
    assert m.link.bandwidth == pytest.approx(1e8) and m.compression == {}
