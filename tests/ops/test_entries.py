"""The primitives on entries of vectors: selection, sorting, positions."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion.ops import selection
from hvd_accordion.ops import tensorflow as tensorflow_ops
from hvd_accordion.ops import torch as torch_ops
from tests.ops.backends import BACKENDS

every_backend = pytest.mark.parametrize(("ops", "to"), BACKENDS.values(), ids=BACKENDS)
LARGE = 3 * selection.SMALL  # entries for which the sampled threshold is used


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """The reference, by a stable sort: of equal entries the first."""
    magnitude = np.where(np.isnan(x), np.inf, np.abs(x))
    order = np.lexsort((np.arange(x.size), -magnitude, ~np.isnan(x)))
    return np.sort(order[:k])


def assert_largest(selected, x: np.ndarray, k: int):
    """Checks k ascending indices of the largest entries; among equal entries any may be selected."""
    selected = np.asarray(selected)
    assert selected.dtype == np.int32 and selected.shape == (k,) and np.all(np.diff(selected) > 0)
    ours, best = (np.sort(np.abs(x[index])) for index in (selected, largest(x, k)))
    np.testing.assert_array_equal(ours, best)


hard = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, 3e38, np.inf, -np.inf, np.nan])


@every_backend
@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(hard | st.floats(-10, 10, width=32), min_size=1, max_size=60),
    dtype=st.sampled_from([np.float32, np.float64]),
    share=st.floats(0, 1),
)
def test_top_k(ops, to, values, dtype, share):
    x = np.array(values, dtype)
    k = max(1, int(share * x.size))
    selected = np.asarray(ops.top_k(to(x), k))
    assert_largest(selected, x, k)
    if ops is not BACKENDS["torch-gpu"][0]:
        np.testing.assert_array_equal(selected, largest(x, k))


def shapes_of_large_vectors(rng: np.random.Generator, d: int) -> dict[str, np.ndarray]:
    normal = rng.standard_normal(d)
    spikes = np.where(rng.random(d) < 0.001, 1e3 * normal, normal)
    vectors = {
        "normal": normal,
        "heavy tails": rng.standard_cauchy(d),
        "ascending": np.sort(normal),
        "rising magnitude": np.arange(d) - 5.0,
        "falling magnitude": np.arange(d)[::-1] + 1.0,
        "zeros": np.zeros(d),
        "all equal": np.full(d, -2.5),
        "two values": rng.choice([1.0, -2.0], d),
        "few values": rng.integers(-4, 5, d).astype(float),
        "sparse": np.where(rng.random(d) < 0.004, normal, 0),
        "sparse and equal": np.where(rng.random(d) < 0.004, 1.0, 0),
        "nan": np.full(d, np.nan),
        "some not finite": np.where(rng.random(d) < 1e-4, rng.choice([np.nan, np.inf, -np.inf], d), normal),
        "spikes": spikes,
        "subnormal": 1e-42 * normal,
    }
    stride = d // selection.SAMPLE | 1
    for name, seen, unseen in [
        ("only the sample large", 1e3, 1),
        ("only the sample small", 1e-3, 1),
        ("sample zero", 0, 1),
    ]:
        vectors[name] = unseen * normal
        vectors[name][::stride] *= seen
    return vectors


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ratio", [1e-6, 0.001, 0.01, 0.1, 0.24, 0.6, 1.0])
def test_the_fast_selection_is_exact(dtype, ratio):
    d = LARGE + 17
    for name, x in shapes_of_large_vectors(np.random.default_rng(0), d).items():
        x, k = x.astype(dtype), max(1, int(ratio * d))
        np.testing.assert_array_equal(selection.fast(x, k), selection.exact(x, k), name)
        assert_largest(selection.fast(x, k), x, k)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_fast_selection_is_exact_for_any_chunk_and_sample_size(data):
    d = data.draw(st.integers(1, 400))
    x = np.array(data.draw(st.lists(hard | st.floats(-2, 2, width=16), min_size=d, max_size=d)), np.float32)
    k = data.draw(st.integers(1, d))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SMALL", 0)
        patch.setattr(selection, "CHUNK", data.draw(st.integers(1, 500)))
        patch.setattr(selection, "SAMPLE", data.draw(st.integers(1, 400)))
        np.testing.assert_array_equal(selection.fast(x, k), largest(x, k))


def test_few_candidates_are_partitioned(monkeypatch):
    """The reason for its speed: all but a few times k entries are only compared with a threshold, once."""
    sizes = []
    exact = selection.exact
    monkeypatch.setattr(selection, "exact", lambda x, k: (sizes.append(x.size), exact(x, k))[1])
    d = 40 * selection.SMALL
    k = d // 100
    selection.fast(np.random.default_rng(0).standard_normal(d).astype(np.float32), k)
    assert len(sizes) == 1 and k <= sizes[0] <= 1.8 * k


def test_torch_on_the_cpu_selects_from_views():
    x = np.random.default_rng(0).standard_normal(2 * LARGE).astype(np.float32)
    to = BACKENDS["torch"][1]
    assert_largest(torch_ops.top_k(to(x)[LARGE:], 1000), x[LARGE:], 1000)
    assert_largest(torch_ops.top_k(to(x)[::2], 1000), x[::2], 1000)


@every_backend
def test_argsort(ops, to):
    x = np.random.default_rng(0).permutation(1000).astype(np.int32)
    order = np.asarray(ops.argsort(to(x)))
    assert order.dtype == np.int32 and np.array_equal(x[order], np.arange(1000))


@every_backend
def test_searchsorted_counts_entries_that_are_not_larger(ops, to):
    ascending, values = np.array([3, 5, 5, 9], np.int32), np.array([[10, 5], [2, 3], [8, 9]], np.int32).reshape(-1)
    counts = np.asarray(ops.searchsorted(to(ascending), to(values)))
    assert counts.dtype == np.int32 and counts.tolist() == [4, 3, 0, 1, 3, 4]
    assert np.asarray(ops.searchsorted(to(ascending[:0]), to(values))).tolist() == [0] * 6


@every_backend
def test_arange_constant_and_full(ops, to):
    like = to(np.zeros(3, np.float64))
    for got, wanted in [(ops.arange(4, like), [0, 1, 2, 3]), (ops.constant((7, 0, 70000), like), [7, 0, 70000])]:
        assert np.asarray(got).dtype == np.int32 and np.asarray(got).tolist() == wanted
    for value in (1.5, np.nan):
        full = np.asarray(ops.full(3, to(np.array(value, np.float64))))
        assert full.dtype == np.float64
        np.testing.assert_array_equal(full, [value] * 3)


@every_backend
def test_an_index_may_repeat_with_one_non_zero_value(ops, to):
    index, values = np.array([2, 0, 2, 2], np.int32), np.array([0, 1, 5, 0], np.float32)
    assert np.asarray(ops.scatter_add(to(np.ones(4, np.float32)), to(index), to(values))).tolist() == [2, 1, 6, 1]


@every_backend
def test_int16_keeps_the_low_bits(ops, to):
    x = np.array([0, 1, 32767, 32768, 65535], np.int32)
    code = ops.to_bytes(ops.cast(to(x), "int16"))
    back = ops.cast(ops.from_bytes(code, "int16"), "int32") & 0xFFFF
    assert np.asarray(code).shape == (10,) and np.asarray(back).tolist() == x.tolist()


def test_traced_shapes_are_static():
    @tf.function(autograph=False)
    def traced(x):
        index = tensorflow_ops.top_k(x, 5)
        return (
            index,
            tensorflow_ops.argsort(index),
            tensorflow_ops.searchsorted(index, index),
            tensorflow_ops.full(3, x[0]),
        )

    shapes = [x.shape.as_list() for x in traced.get_concrete_function(tf.zeros(20)).structured_outputs]
    assert shapes == [[5], [5], [5], [3]]
