"""The sample of a layer's entries that its gradient's norm is estimated from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hvd_accordion import Accordion
from hvd_accordion.ops import numpy as ops
from hvd_accordion.policy import norm_sampling
from hvd_accordion.policy.window import NORM_SAMPLES

LIKE = np.zeros(1, np.float32)


def entries(count: int, size: int, seed: int = 0, name: str = "w") -> np.ndarray:
    return norm_sampling.entries(ops, name, count, size, seed, LIKE)


def estimate(x: np.ndarray, size: int, seed: int = 0) -> float:
    return norm_sampling.scale(x.size, size) * np.linalg.norm(x[entries(x.size, size, seed)])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 64, 97, 1000, 4096, 8193, 65536, 401408, 2**24])
def test_entries_are_distinct_and_within_the_layer(count):
    size = min(count, 5000)
    found = entries(count, size)
    assert found.dtype == np.int32 and found.shape == (size,)
    assert len(set(found.tolist())) == size
    assert found.min() >= 0 and found.max() < count


def test_an_empty_layer_has_none():
    assert entries(0, 0).shape == (0,) and norm_sampling.scale(0, 0) == 1.0


@pytest.mark.parametrize("count", [10_000, 401_408, 2**24])
def test_entries_are_spread_evenly(count):
    """No stretch of the layer is left out: the largest gap is below three times the mean one."""
    found = np.sort(entries(count, 4096, seed=3))
    gaps = np.diff(np.append(found, found[0] + count))
    assert gaps.max() <= 3 * count / 4096 + 1


def test_seed_and_name_choose_the_entries():
    first = entries(100_000, 4096, 0, "a").tolist()
    assert entries(100_000, 4096, 0, "a").tolist() == first
    assert entries(100_000, 4096, 1, "a").tolist() != first
    assert entries(100_000, 4096, 0, "b").tolist() != first


def test_the_square_is_unbiased_over_the_seeds():
    """Also for a vector of few large entries; 8,000 seeds leave an error of a few standard errors at most."""
    x = np.random.default_rng(0).standard_t(3, size=997)
    squares = np.array([estimate(x, 50, seed) ** 2 for seed in range(8000)])
    error = squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - x @ x) < 4 * error


def test_every_entry_is_equally_likely():
    """Over all shifts each stands in the sample equally often: that makes the square unbiased exactly."""
    count, size = 60, 7
    a = norm_sampling.multiplier(count)
    seen = [sorted((a * j + b) % count for j in range(size)) for b in range(count)]
    assert all(sum(i in sample for sample in seen) == size for i in range(count))


@pytest.mark.parametrize("degrees", [5, 10, None])
def test_the_standard_error_is_that_of_the_docstring(degrees):
    rng, count, size = np.random.default_rng(1), 10_000, 500
    expected, found = [], []
    for seed in range(500):
        x = rng.standard_normal(count) if degrees is None else rng.standard_t(degrees, count)
        kurtosis = count * np.sum(x**4) / np.sum(x**2) ** 2
        expected.append(math.sqrt((kurtosis - 1) * (1 - size / count) / (4 * size)))
        found.append(estimate(x, size, seed) / np.linalg.norm(x) - 1)
    assert np.std(found) == pytest.approx(np.sqrt(np.mean(np.square(expected))), rel=0.15)


@pytest.mark.parametrize("count", [0, 1, 1000, NORM_SAMPLES])
def test_small_layers_are_measured_exactly(count):
    assert Accordion().window.sample_size(count) == count
    x = np.random.default_rng(0).standard_normal(count)
    assert estimate(x, count) == pytest.approx(np.linalg.norm(x), rel=1e-12)


def test_large_ones_only_where_asked():
    assert Accordion().window.sample_size(10 * NORM_SAMPLES) == NORM_SAMPLES
    assert Accordion(norm="exact").window.sample_size(10 * NORM_SAMPLES) == 10 * NORM_SAMPLES


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize(("count", "size"), [(5, 5), (10_000, 4096), (401_408, 8192), (2**31 - 1, 8192)])
def test_every_framework_has_the_same_entries(framework, count, size):
    module = pytest.importorskip(framework)
    from importlib import import_module

    other = import_module(f"hvd_accordion.ops.{framework}")
    found = norm_sampling.entries(other, "layer.weight", count, size, 7, module.zeros(1))
    assert np.array_equal(found.numpy(), entries(count, size, 7, "layer.weight"))
