"""What an Auto measures before it chooses, and exchanges without a network."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hvd_accordion import BF16, FP16, QSGD, Dense, EFSignSGD, PowerSGD, RandomK, TopK
from hvd_accordion.comm import simulation
from hvd_accordion.comm.collectives import AllToAll
from hvd_accordion.compression import Context, exchange
from hvd_accordion.compression.positions import Shuffle
from hvd_accordion.compression.sharded_sparse_allreduce import slice_size
from hvd_accordion.ops import numpy as ops
from hvd_accordion.policy.layers import Layer
from hvd_accordion.training.calibration import QUICK, REPEATS, SIZES, TINY, USUAL, as_hidden, dry_run, measure

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
    EFSignSGD(),
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
    alone = dry_run(exchange_of(spec, 0, size, dtype), ops, size)
    (real, *_), _ = simulation.run([exchange_of(spec, rank, size, dtype) for rank in range(size)])
    assert bool(alone.is_finite) and bool(real.is_finite)
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
    alone = dry_run(exchange_of(spec, 0, size), ops, size)
    (real, *_), _ = simulation.run([exchange_of(spec, rank, size) for rank in range(size)])
    if spec.cuts_layers:  # as if each layer were alone
        for x, y in zip(alone.mean, real.mean, strict=True):
            owned = -(-x.size // (8 * size)) * 8
            np.testing.assert_allclose(x.reshape(-1)[:owned], y.reshape(-1)[:owned], rtol=1e-4)
        return
    mine, theirs = (np.concatenate([x.reshape(-1) for x in step.mean]) for step in (alone, real))
    count, at = mine.size, np.arange(mine.size)
    if isinstance(spec, TopK):
        at = Shuffle.of(Context(tuple(SHAPES), "float32", 3, 0, 0, size), count).forward(ops, at)
    owned = at < slice_size(count, size)
    assert np.any(theirs[owned])
    np.testing.assert_allclose(mine[owned], theirs[owned], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_overflow_shows(spec):
    step = dry_run(exchange_of(spec, 0, 2, scale=math.inf), ops, 2)
    assert not bool(step.is_finite)


# measure

A, B, TWIN, OTHER = (
    Layer("a", (64, 64), "float32"),
    Layer("b", (128, 64), "float32"),
    Layer("twin", (64, 64), "float32"),
    Layer("other", (64, 64), "float64"),
)
LOW, TOP = PowerSGD(2), TopK(0.1)
READY = {"a": 0.5, "b": 0.25, "twin": 0.125, "other": 0.0}


class Bench:
    """Clocks that show what they are told to; remembers what it was asked for."""

    def __init__(self, bandwidth: float, overhead: float = 1e-3, factor: float = 1.0):
        self.bandwidth, self.overhead, self.factor = bandwidth, overhead, factor
        self.sizes, self.exchanges, self.told = [], [], []

    def allreduce(self, size: int) -> float:
        self.sizes.append(size)
        warm_up = 10.0 if self.sizes.count(size) == 1 else 0.0
        return self.factor * (warm_up + self.overhead + size / self.bandwidth)  # 2 ranks send each byte once

    def exchange(self, layer, spec) -> float:
        self.exchanges.append((layer.shape, layer.dtype, spec))
        return self.factor * (1e-4 + (layer.numel - 1024) * (1e-6 if spec == LOW else 1e-9))

    def measure(self, layers, choices, shared=None, waited=None):
        ready = {x.name: self.factor * READY[x.name] for x in layers}
        return measure(layers, choices, 2, ready, waited, self.allreduce, self.exchange, shared or self._mine)

    def _mine(self, numbers):
        self.told.append(list(numbers))
        return self.told[-1]


def test_each_kind_of_exchange_is_measured_once():
    bench = Bench(1e8)
    m = bench.measure([A, B, TWIN, OTHER], {"a": (LOW, TOP), "b": (TOP,), "twin": (LOW, TOP), "other": (LOW,)})
    assert (m.link.bandwidth, m.link.overhead, m.link.latency) == (pytest.approx(1e8), pytest.approx(1e-3), 0.0)
    assert m.world_size == 2 and m.ready == READY
    kinds = [("float32", LOW), ("float32", TOP), ("float64", LOW)]
    shapes = [((64, 64), *kinds[0]), ((64, 64), *kinds[1]), ((128, 64), *kinds[1]), ((64, 64), *kinds[2])]
    assert bench.exchanges == shapes + [(TINY, *kind) for kind in kinds]
    # a layer's own part is what it takes longer than a tiny one, and a tenth of the whole at least
    low, top = 3072 * 1e-6, 0.1 * (1e-4 + 3072 * 1e-9)
    assert m.compression == {
        ("a", LOW): pytest.approx(low),
        ("a", TOP): pytest.approx(top),
        ("b", TOP): pytest.approx(0.1 * (1e-4 + 7168 * 1e-9)),
        ("twin", LOW): pytest.approx(low),
        ("twin", TOP): pytest.approx(top),
        ("other", LOW): pytest.approx(low),
    }


@pytest.mark.parametrize(
    ("bandwidth", "numel", "largest"),
    [
        (USUAL / (2 * QUICK), 2**26, USUAL),  # long enough to tell
        (2**24 / (2 * QUICK), 2**26, 2**24),
        (2**26 / (2 * QUICK), 2**26, 2**26),
        (2**26 / (2 * QUICK), 2**22, 2**24),  # there are but 16 MiB of gradients
        (2**26 / (2 * QUICK), 2**10, USUAL),
    ],
)
def test_a_quick_link_is_measured_with_larger_messages(bandwidth, numel, largest):
    bench = Bench(bandwidth)
    m = bench.measure([Layer("a", (numel,), "float32")], {}, waited=0.0)
    assert bench.sizes == [size for size in SIZES if size <= largest for _ in range(REPEATS + 1)]
    assert m.link.bandwidth == pytest.approx(bandwidth, rel=1e-3) and m.compression == {}


@pytest.mark.parametrize(("waited", "others"), [(None, None), (1e-4, 5.0)])
def test_every_rank_ends_up_with_rank_0s_numbers(waited, others):
    choices = {"a": (LOW, TOP), "b": (TOP,)}
    first, second = Bench(1e8), Bench(1e6, 1.0, factor=3.0)
    mine = first.measure([A, B], choices, waited=waited)
    told = iter(first.told)
    theirs = second.measure([A, B], choices, lambda numbers: next(told), waited=others)
    assert theirs == mine and second.sizes == first.sizes and not list(told)


def test_ready_times_move_to_the_end_by_what_was_not_hidden():
    ready = {"a": 4.0, "b": 2.0, "c": 0.0}
    assert as_hidden(ready, wire=3.0, waited=0.0) == ready  # all was hidden
    assert as_hidden(ready, wire=9.0, waited=5.0) == ready  # as much as 4 s of backward can hide
    assert as_hidden(ready, wire=2.0, waited=2.0) == as_hidden(ready, wire=2.0, waited=3.0) == dict.fromkeys(ready, 4.0)
    assert as_hidden(ready, wire=2.0, waited=1.0) == {"a": 4.0, "b": 3.0, "c": 2.0}
    assert as_hidden(ready, wire=8.0, waited=6.0) == {"a": 4.0, "b": 3.0, "c": 2.0}
    assert as_hidden({}, 1.0, 1.0) == {} and as_hidden({"a": 0.0}, 0.0, 0.0) == {"a": 0.0}


def test_what_was_seen_of_the_dense_exchange_counts():
    wire = (A.nbytes + B.nbytes) / 1e5
    m = Bench(1e5).measure([A, B], {}, waited=wire - 0.125)
    assert m.ready == {"a": 0.5, "b": pytest.approx(0.5 - 0.25 * 0.125 / min(wire, 0.5))}
    assert Bench(1e5).measure([A, B], {}, waited=0.0).ready == {"a": 0.5, "b": 0.25}


def test_the_link_is_measured_even_where_there_is_nothing_to_choose():
    m = Bench(1e8).measure([A], {"gone": (LOW,)})
    assert m.link.bandwidth == pytest.approx(1e8) and m.compression == {}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", [*SPECS, PowerSGD(40), TopK(1e-6), RandomK(1e-6)], ids=str)
def test_a_tiny_layer_can_be_rehearsed_under_every_spec(spec, dtype):
    ctx = Context(("",), dtype, 0, 0, 0, 3)
    step = dry_run(exchange(spec, ops, [np.ones(TINY, np.float32)], [np.zeros(TINY, np.float32)], [{}], ctx), ops, 3)
    assert step.mean[0].shape == TINY and bool(step.is_finite)


def test_a_link_that_is_slower_beside_a_training_counts_as_that():
    dense = 4.0 * (64 * 64 + 256 * 256)  # of two ranks, each sends as many bytes as the tensors have
    layers = [Layer("a", (64, 64), "float32"), Layer("b", (256, 256), "float32")]
    alone = Bench(1e9).measure(layers, {}, waited=None).link.bandwidth
    assert alone == pytest.approx(1e9, rel=0.01)
    assert Bench(1e9).measure(layers, {}, waited=dense / 2e9).link.bandwidth == alone
    assert Bench(1e9).measure(layers, {}, waited=dense / 1e8).link.bandwidth == pytest.approx(1e8)
