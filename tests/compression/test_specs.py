"""Specs as values: arguments, representation, cost, contraction and seeds."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import BF16, FP16, QSGD, Dense, EFSignSGD, PowerSGD, RandomK, TopK
from hvd_accordion.comm.collectives import AllGather, AllReduce, AllToAll
from hvd_accordion.compression.base import dense_bytes, dtype_name
from hvd_accordion.compression.quantised import DitherCode
from hvd_accordion.compression.sparse import multipliers, num_selected
from hvd_accordion.ops import numpy as ops
from hvd_accordion.utils.seeds import PRIME, at, stable_hash

SPECS = [Dense(), FP16(), BF16(), TopK(), RandomK(), QSGD(), PowerSGD(), EFSignSGD()]

# invalid arguments


@pytest.mark.parametrize(
    ("spec", "argument", "value", "error", "allowed"),
    [
        *[(spec, "ratio", 0, ValueError, "(0, 1]") for spec in (TopK, RandomK)],
        *[(spec, "ratio", -0.1, ValueError, "(0, 1]") for spec in (TopK, RandomK)],
        *[(spec, "ratio", 1.01, ValueError, "(0, 1]") for spec in (TopK, RandomK)],
        *[(spec, "ratio", math.nan, ValueError, "(0, 1]") for spec in (TopK, RandomK)],
        *[(spec, "ratio", "1%", TypeError, "(0, 1]") for spec in (TopK, RandomK)],
        *[(spec, "ratio", True, TypeError, "(0, 1]") for spec in (TopK, RandomK)],
        (QSGD, "levels", 0, ValueError, "[1, 127]"),
        (QSGD, "levels", 128, ValueError, "[1, 127]"),
        (QSGD, "levels", 7.0, TypeError, "[1, 127]"),
        (QSGD, "levels", True, TypeError, "[1, 127]"),
        (QSGD, "bucket_size", 0, ValueError, ">= 8"),
        (QSGD, "bucket_size", 4, ValueError, ">= 8"),
        (QSGD, "bucket_size", 100, ValueError, "multiple of 8"),
        (QSGD, "bucket_size", 64.0, TypeError, ">= 8"),
        (QSGD, "norm", "l1", ValueError, "'max', 'l2'"),
        (QSGD, "norm", 2, ValueError, "'max', 'l2'"),
        (PowerSGD, "rank", 0, ValueError, ">= 1"),
        (PowerSGD, "rank", -1, ValueError, ">= 1"),
        (PowerSGD, "rank", 1.5, TypeError, ">= 1"),
        (PowerSGD, "rank", 2.0, TypeError, ">= 1"),
        (PowerSGD, "rank", None, TypeError, ">= 1"),
        (PowerSGD, "rank", True, TypeError, ">= 1"),
        (PowerSGD, "start_after", -1, ValueError, ">= 0"),
        (PowerSGD, "start_after", 0.5, TypeError, ">= 0"),
        (PowerSGD, "min_compression_rate", 0, ValueError, "(0, inf)"),
        (PowerSGD, "min_compression_rate", math.inf, ValueError, "(0, inf)"),
        (PowerSGD, "min_compression_rate", "2", TypeError, "(0, inf)"),
        (PowerSGD, "iterations", 0, ValueError, ">= 1"),
        (PowerSGD, "iterations", 1.0, TypeError, ">= 1"),
        (PowerSGD, "warm_start", 1, TypeError, "True or False"),
        *[(type(spec), "error_feedback", 0, TypeError, "True or False") for spec in SPECS],
        *[(type(spec), "error_feedback", "yes", TypeError, "True or False") for spec in SPECS],
    ],
)
def test_errors_name_argument_value_and_allowed_range(spec, argument, value, error, allowed):
    with pytest.raises(error) as raised:
        spec(**{argument: value})
    message = str(raised.value)
    assert message.startswith(argument) and repr(value) in message and allowed in message


@pytest.mark.parametrize(
    "edge", [TopK(1), RandomK(1.0), TopK(1e-9), QSGD(1), QSGD(127), QSGD(bucket_size=8), PowerSGD(1)], ids=str
)
def test_limits_are_allowed(edge):
    assert edge == replace(edge)


def test_error_feedback_is_keyword_only():
    with pytest.raises(TypeError):
        Dense(False)
    with pytest.raises(TypeError):
        TopK(0.1, False)


# values


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (Dense(), "Dense()"),
        (FP16(), "FP16()"),
        (BF16(error_feedback=False), "BF16(error_feedback=False)"),
        (TopK(0.01), "TopK(ratio=0.01)"),
        (RandomK(0.1, error_feedback=False), "RandomK(ratio=0.1, error_feedback=False)"),
        (EFSignSGD(), "EFSignSGD()"),
        (QSGD(), "QSGD(levels=7)"),
        (QSGD(3, norm="l2"), "QSGD(levels=3, norm='l2')"),
        (PowerSGD(4), "PowerSGD(rank=4)"),
        (PowerSGD(2, start_after=10, warm_start=False), "PowerSGD(rank=2, start_after=10, warm_start=False)"),
    ],
)
def test_str_shows_non_default_arguments(spec, text):
    assert str(spec) == text


@pytest.mark.parametrize(
    "spec", [*SPECS, TopK(0.3), QSGD(1, norm="l2", error_feedback=False), PowerSGD(3, iterations=2)], ids=str
)
def test_repr_and_str_make_the_spec_again(spec):
    assert eval(repr(spec)) == spec and eval(str(spec)) == spec


def test_equality_and_hash_are_of_the_values():
    assert TopK(0.1) == TopK(ratio=0.1) and hash(TopK(0.1)) == hash(TopK(0.1))
    different = [
        *SPECS,
        TopK(0.1),
        RandomK(0.1),
        TopK(0.1, error_feedback=False),
        PowerSGD(4, iterations=2),
        PowerSGD(5),
    ]
    assert len(set(different)) == len(different)
    assert FP16() != BF16() and TopK(0.1) != RandomK(0.1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_is_frozen(spec):
    with pytest.raises(FrozenInstanceError):
        spec.error_feedback = False


def test_tags_are_short_and_different():
    assert [spec.tag for spec in SPECS] == ["dense", "fp16", "bf16", "topk", "randomk", "qsgd", "powersgd", "efsignsgd"]


def test_only_dense_loses_nothing():
    assert [spec for spec in SPECS if not spec.lossy] == [Dense()]


def test_power_sgd_alone_waits():
    assert all(spec.active(0) for spec in SPECS)
    assert [PowerSGD(start_after=2).active(step) for step in range(4)] == [False, False, True, True]


# dtypes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_dtype_names(dtype):
    assert dtype_name(dtype) == dtype_name(getattr(torch, dtype)) == dtype_name(getattr(tf, dtype)) == dtype
    if dtype != "bfloat16":
        assert dtype_name(getattr(np, dtype)) == dtype_name(np.dtype(dtype)) == dtype


@pytest.mark.parametrize("dtype", ["int32", np.int64, np.dtype("uint8"), "complex64", float, None])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64, got"):
        dtype_name(dtype)


# cost: hand-computed bytes that one rank sends


@pytest.mark.parametrize(
    ("spec", "shape", "dtype", "ranks", "nbytes"),
    [
        (Dense(), (100, 50), "float32", 2, 20_000),  # 2 (n-1)/n 4 d
        (Dense(), (100, 50), "float64", 2, 40_000),
        (Dense(), (100, 50), "float16", 2, 10_000),
        (Dense(), (100, 50), "bfloat16", 4, 15_000),
        (Dense(), (), "float32", 2, 4),
        (Dense(), (100, 50), "float32", 1, 0),
        (FP16(), (100, 50), "float32", 2, 10_000),
        (FP16(), (100, 50), "float64", 4, 15_000),
        (BF16(), (5,), "float32", 2, 3 * 2 + 3 * 2),  # slices of 3 values: one out, one back
        (TopK(0.01), (100, 50), "float32", 2, 50 * 6 + 4),  # value and place, one block, to each other rank
        (TopK(0.01, algorithm="allgather"), (100, 50), "float32", 8, 7 * (50 * 6 + 4)),
        (TopK(0.01), (100, 50), "float32", 8, 2 * 7 * (8 * 6 + 4)),  # rows of 1.25 * 50 / 8, there and back
        (TopK(0.01), (100, 50), "float64", 2, 50 * 10 + 4),
        (TopK(0.01), (100, 50), "float16", 2, 50 * 6 + 4),  # in fp32
        (TopK(0.01, values="bfloat16"), (100, 50), "float64", 2, 50 * 4 + 4),
        (TopK(0.0101), (100, 50), "float32", 2, 51 * 6 + 4),  # rounded up
        (TopK(1e-6), (100, 50), "float32", 2, 10),  # at least one
        (RandomK(0.01), (100, 50), "float32", 2, 50 * 4),  # values alone
        (RandomK(0.01), (100, 50), "float64", 4, 1.5 * 50 * 8),
        (RandomK(0.01), (100, 50), "bfloat16", 2, 50 * 4),
        # two slices of 5 buckets of 512: each 5 scales and 2560 values of 4 bits, sent once and gathered once
        (QSGD(7), (100, 50), "float32", 2, 2 * (5 * 4 + 1280)),
        (QSGD(7), (100, 50), "float64", 2, 2 * (5 * 4 + 1280)),
        (QSGD(1), (100, 50), "float32", 2, 2 * (5 * 4 + 640)),
        (QSGD(127), (100, 50), "float32", 2, 2 * (5 * 4 + 2560)),
        (QSGD(3, bucket_size=8), (4, 8), "float32", 4, 2 * 3 * (4 + 3)),
        (EFSignSGD(), (100, 50), "float64", 2, 4 + 625),  # a scale and 5,000 bits
        (EFSignSGD(), (100, 50), "float32", 4, 2 * 3 * (4 + 157)),  # slices of 1,256 values
        (PowerSGD(4), (100, 50), "float32", 2, 4 * 150 * 4),
        (PowerSGD(4), (100, 50), "float64", 2, 4 * 150 * 8),
        (PowerSGD(4), (100, 50), "float16", 2, 4 * 150 * 4),  # factors in fp32
        (PowerSGD(4), (100, 50), "float32", 4, 1.5 * 4 * 150 * 4),
        (PowerSGD(4, iterations=3), (100, 50), "float32", 2, 3 * 4 * 150 * 4),
        (PowerSGD(4), (64, 32, 3, 3), "float32", 2, 4 * (64 + 288) * 4),  # shape[0] by the rest
        (PowerSGD(4), (2, 50), "float32", 2, 2 * 52 * 4),  # min(n, m, r)
    ],
)
def test_bytes_per_step(spec, shape, dtype, ranks, nbytes):
    assert spec.bytes_per_step(shape, dtype, ranks) == pytest.approx(nbytes)


@pytest.mark.parametrize(
    ("spec", "dtype", "messages"),
    [
        (Dense(), "float32", [(AllReduce, 20_000)]),
        (Dense(), "float64", [(AllReduce, 40_000)]),
        (Dense(), "float16", [(AllToAll, 10_000), (AllGather, 5_000)]),  # all slices out, one back
        (Dense(), "bfloat16", [(AllToAll, 10_000), (AllGather, 5_000)]),
        (FP16(), "float32", [(AllToAll, 10_000), (AllGather, 5_000)]),
        (BF16(), "float64", [(AllToAll, 10_000), (AllGather, 5_000)]),
        (QSGD(7), "float32", [(AllToAll, 2 * 1300), (AllGather, 1300)]),
        (TopK(0.01), "float32", [(AllGather, 304)]),
        (EFSignSGD(), "float32", [(AllGather, 629)]),
        (TopK(0.01), "float64", [(AllGather, 504)]),
        (RandomK(0.01), "float16", [(AllReduce, 200)]),
        (PowerSGD(4), "float32", [(AllReduce, 1600), (AllReduce, 800)]),  # P of 100 rows, then Q of 50
        (PowerSGD(4), "float64", [(AllReduce, 3200), (AllReduce, 1600)]),
        (PowerSGD(1, iterations=3), "float16", [(AllReduce, 400), (AllReduce, 200)] * 3),
        (PowerSGD(4, warm_start=False), "float32", [(AllReduce, 1600), (AllReduce, 800)]),
    ],
)
def test_messages_of_two_ranks_in_their_order(spec, dtype, messages):
    assert spec.messages((100, 50), dtype, 2) == messages


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_rank_sends_nothing(spec):
    assert spec.bytes_per_step((100, 50), "float32", 1) == 0


def test_the_cost_of_two_hops_does_not_depend_on_the_number_of_ranks():
    sent = [QSGD(7).bytes_per_step((1024, 1024), "float32", n) / (2 * (n - 1) / n) for n in (2, 4, 8, 16)]
    assert sent == pytest.approx([1024 * 1024 * (0.5 + 4 / 512)] * 4)


@pytest.mark.parametrize(
    ("levels", "bits"), [(1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (15, 5), (31, 6), (63, 7), (127, 8)]
)
def test_levels_are_packed_in_as_few_bits_as_they_need(levels, bits):
    assert QSGD(levels).code.bits == bits


def test_shrinks_compares_with_dense_bytes():
    assert TopK(0.66).shrinks((100, 50), "float32", 2) and not TopK(0.67).shrinks((100, 50), "float32", 2)
    assert not Dense().shrinks((100, 50), "float32", 2)
    assert dense_bytes((100, 50), "float32", 2) == 20_000


@pytest.mark.parametrize(("ratio", "count", "k"), [(0.01, 5000, 50), (0.5, 3, 2), (1.0, 7, 7), (1e-9, 7, 1)])
def test_k_is_rounded_up(ratio, count, k):
    assert num_selected(ratio, count) == k


# contraction


@pytest.mark.parametrize(
    ("spec", "shape", "delta"),
    [
        (Dense(), (100, 50), 1.0),
        (FP16(), (100, 50), 1 - 2**-22),
        (BF16(), (100, 50), 1 - 2**-16),
        (TopK(0.1), (10, 10), 0.1),
        (TopK(0.1), (5, 5), 3 / 25),  # rounded up
        (RandomK(0.1), (10, 10), 0.1),
        (EFSignSGD(), (10, 10), 1 / 100),
        (PowerSGD(4), (100, 50), 4 / 50),
        (PowerSGD(4), (20, 3, 3), 4 / 9),
        (PowerSGD(4), (2, 50), 1.0),
        (QSGD(1, bucket_size=16, norm="l2"), (10, 10), 1 / 5),  # omega = min(16, 4)
        (QSGD(8, bucket_size=16, norm="l2"), (10, 10), 1 / 1.25),  # min(1/4, 1/2)
        (QSGD(1, bucket_size=16), (10, 10), 1 / (1 + 1.5)),  # (sqrt(1 + 15) - 1) / 2
    ],
)
def test_delta(spec, shape, delta):
    assert spec.delta(shape) == pytest.approx(delta)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_delta_is_in_its_range(spec):
    assert all(0 < spec.delta(shape) <= 1 for shape in [(100, 50), (3,), (), (64, 32, 3, 3)])


def variance(spec: QSGD, x: np.ndarray) -> float:
    """The exact E ||C(x) - x||^2 / ||x||^2 of the unscaled code: f (1 - f) for each value a fraction f above a level."""
    scale = np.abs(x).max() if spec.norm == "max" else np.linalg.norm(x)
    level = np.abs(x) / scale * spec.levels
    share = level - np.floor(level)
    return float(np.sum(share * (1 - share)) * (scale / spec.levels) ** 2 / np.sum(x**2))


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("levels", [1, 3, 7, 127])
@pytest.mark.parametrize("bucket", [8, 512])
def test_omega_bounds_the_variance_of_every_vector(norm, levels, bucket):
    spec = QSGD(levels, bucket_size=bucket, norm=norm)
    rng = np.random.default_rng(0)
    tried = [rng.standard_normal(bucket) ** power for power in (1, 3, 5)] + [rng.random(bucket), np.ones(bucket)]
    for small in np.linspace(0.001, 1.5, 400):  # one large value, the others a fraction of a level
        x = np.full(bucket, small / levels)
        x[0] = 1.0
        tried.append(x)
    worst = max(variance(spec, x) for x in tried)
    assert worst <= spec.omega * (1 + 1e-12)
    if norm == "max":
        assert worst >= 0.99 * spec.omega  # the bound is tight


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("levels", [1, 7])
def test_the_code_has_that_variance_and_is_unbiased(norm, levels):
    spec = QSGD(levels, bucket_size=64, norm=norm)
    code = DitherCode(levels, 64, norm, 1.0)
    x = np.random.default_rng(0).standard_normal((1, 64))
    decoded = np.array([code.decode(ops, code.encode(ops, x, stable_hash(seed)), x)[0] for seed in range(4000)])
    assert np.mean(np.sum((decoded - x) ** 2, axis=1)) / np.sum(x**2) == pytest.approx(variance(spec, x[0]), rel=0.03)
    assert np.abs(decoded.mean(axis=0) - x[0]).max() < 5 * decoded.std(axis=0).max() / 4000**0.5


def test_the_code_is_scaled_under_error_feedback_only():
    assert QSGD(1).code.gain == pytest.approx(1 / (1 + QSGD(1).omega))
    assert QSGD(1, error_feedback=False).code.gain == 1.0


# seeds


def test_the_stable_hash_has_fixed_values():
    assert stable_hash(0, "layer", 1) == stable_hash("0", "layer", "1")
    assert [stable_hash(0, "a", 0), stable_hash(0, "a", 1), stable_hash("ab", "c")] == [
        1935989204,
        1769382778,
        1574823749,
    ]
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    assert all(0 <= stable_hash(i) < 2**31 for i in range(1000))
    assert len({stable_hash(i) for i in range(1000)}) == 1000


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 3000))
def test_seeds_of_steps_are_different_and_spread_out(key, step):
    seeds = [at(key, step + i) for i in range(2000)]
    assert len(set(seeds)) == 2000 and all(0 <= seed < PRIME for seed in seeds)
    assert 0.4 < np.mean(seeds) / PRIME < 0.6


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_random_k_selects_different_entries(count):
    factors = multipliers(count)
    assert all(math.gcd(a, count) == 1 and 1 <= a <= max(1, count - 1) for a in factors)
    assert len(set(ops.affine(factors, 5, 7, count, count, np.zeros(1)).tolist())) == count


def test_random_k_selects_every_entry_equally_often():
    hits = np.zeros(60)
    for step in range(6000):
        hits[ops.affine(multipliers(60), at(stable_hash("a"), step), at(stable_hash("b"), step), 6, 60, hits)] += 1
    assert np.abs(hits / 6000 - 0.1).max() < 0.02


def test_equal_arguments_of_other_types_are_the_same_spec():
    assert repr(PowerSGD(np.int64(4))) == repr(PowerSGD(4))
    assert repr(TopK(np.float64(0.5))) == repr(TopK(0.5))
    assert repr(QSGD(levels=np.int32(7))) == repr(QSGD(7))
