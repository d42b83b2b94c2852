"""TopK: the wire format of entries, and the sharded sparse allreduce."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import TopK
from hvd_accordion.compression import Context
from hvd_accordion.compression.base import ITEMSIZE
from hvd_accordion.compression.positions import BLOCK, LARGEST_FINITE, Code, Shuffle, block_edges, nbytes
from hvd_accordion.compression.sharded_sparse_allreduce import row_length, slice_size
from hvd_accordion.ops import numpy as numpy_ops
from tests.compression.test_contract import assert_nothing_lost, fresh, gradients, kept, same_bits, step
from tests.ops.backends import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(70, 50), (8, 3, 3, 3), (70, 50), (33,)]
NAMES = ("a", "b", "c", "d")


def exchanged(spec, grads, backend="numpy", number=0, state=None):
    """Runs one step of a cluster, by default without residuals. Returns results and the bytes of one rank."""
    shapes = [g.shape for g in grads[0]]
    state = state or fresh(len(grads), grads[0][0].dtype.name, shapes)
    return step(backend, spec, grads, *state, number, names=NAMES)


def ranks_agree(results):
    assert all(r.is_finite and same_bits(r.mean, results[0].mean) for r in results)


# wire format

sizes = st.lists(st.integers(1, 70_000) | st.sampled_from([BLOCK, BLOCK + 1, 2 * BLOCK]), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), sizes=sizes, dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]))
def test_entries_round_trip(data, sizes, dtype):
    rows = data.draw(st.integers(1, 3))
    entries = data.draw(st.integers(1, min(50, sum(sizes))))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    # at block ends, at random, and the last one repeated, as in unused slots
    edges = block_edges(tuple(sizes))
    likely = [p for e in edges for p in (e - 1, e) if 0 <= p < sum(sizes)]
    pool = np.unique([*likely, *rng.integers(0, sum(sizes), 100)])
    positions = np.sort([rng.choice(pool, entries) for _ in range(rows)]).astype(np.int32)
    values = rng.integers(-64, 64, (rows, entries)).astype("float64" if dtype == "float64" else "float32")
    code, sent = Code(dtype, edges), []
    for ops, to in BACKENDS.values():
        message = code.encode(ops, to(values), to(positions))
        got, where = code.decode(ops, message, entries, to(values))
        np.testing.assert_array_equal(np.asarray(got), values)
        np.testing.assert_array_equal(np.asarray(where), positions)
        assert np.asarray(where).dtype == np.int32 and np.asarray(got).dtype == values.dtype
        sent.append(np.asarray(message))
    assert all(np.array_equal(message, sent[0]) for message in sent)
    assert sent[0].dtype == np.uint8
    assert sent[0].shape == (rows, entries * (ITEMSIZE[dtype] + 2) + 4 * sum(-(-s // BLOCK) for s in sizes))


def test_a_code_takes_six_bytes_per_entry_and_four_per_block():
    assert nbytes(1000, 10 * BLOCK, "float32") == 6000 + 40
    assert nbytes(1000, 10 * BLOCK + 1, "float16") == 4000 + 44
    assert block_edges((2 * BLOCK + 5, 3)) == (0, BLOCK, 2 * BLOCK, 2 * BLOCK + 5, 2 * BLOCK + 8)


@every_backend
@pytest.mark.parametrize("dtype", LARGEST_FINITE)
def test_sixteen_bits_saturate_and_keep_nan_and_inf(dtype, backend):
    ops, to = BACKENDS[backend]
    x = np.array([[1.0, -3e38, 3.4e38, 65519.0, 65520.0, np.inf, -np.inf, np.nan]], np.float32)
    got = np.asarray(Code(dtype, (0, 100)).round_trip(ops, to(x)))[0]
    assert got[0] == 1 and np.isfinite(got[:5]).all() and got[5] == np.inf and got[6] == -np.inf and np.isnan(got[7])
    if dtype == "float16":
        assert got[1:5].tolist() == [-65504, 65504, 65504, 65504]
    assert np.isfinite(np.asarray(Code(dtype, (0, 100)).round_trip(ops, to(np.full((1, 2), -1e300))))).all()


@settings(deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 99), number=st.integers(0, 9))
def test_a_shuffle_is_a_bijection(count, seed, number):
    shuffle = Shuffle.of(Context(("x",), "float32", number, seed, 0, 4), count)
    index = np.arange(count, dtype=np.int32)
    places = shuffle.forward(numpy_ops, index)
    assert sorted(places) == index.tolist() and np.array_equal(shuffle.inverse(numpy_ops, places), index)


def test_a_shuffle_of_many_entries_does_not_overflow():
    count = 2**31 - 1
    shuffle = Shuffle(count - 2, count - 1, count)
    index = np.array([0, 1, count // 2, count - 1], np.int32)
    for ops, to in BACKENDS.values():
        places = ops.cast(shuffle.forward(ops, to(index)), "int32")
        assert np.asarray(places).tolist() == [((count - 2) * int(i) + count - 1) % count for i in index]
        assert np.asarray(shuffle.inverse(ops, places)).tolist() == index.tolist()


@pytest.mark.parametrize("n", [4, 8, 64])
def test_large_rows_and_columns_are_spread_over_the_owners(n):
    height, width = 512, 2048
    count, k = height * width, height * width // 100
    rng, fine = np.random.default_rng(0), 0
    for number in range(20):
        hot = rng.choice(width, 10, replace=False) + width * np.arange(height)[:, None]
        run = rng.integers(count - k) + np.arange(k)
        for index in (hot.reshape(-1), run):
            fine += fits(index, count, n, number)
    assert fine >= 38


# the two algorithms


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_backend
def test_two_step_equals_allgather_bit_for_bit_if_nothing_is_dropped(backend, dtype, ranks):
    """All ranks select the same entries, at a step whose shuffle spreads them evenly."""
    count, start, hot = sum(map(math.prod, SHAPES)), 0, []
    grads = [gradients(1, dtype, seed=rank, shapes=SHAPES)[0] for rank in range(ranks)]
    for layer, shape in enumerate(SHAPES):
        size = math.prod(shape)
        own = np.random.default_rng(layer).choice(size, math.ceil(0.04 * size), replace=False)
        hot.append(own + start)
        start += size
        for one in grads:
            one[layer].reshape(-1)[own] += 100
    number = next(number for number in range(50) if fits(np.concatenate(hot), count, ranks, number))
    one, _ = exchanged(TopK(0.04, algorithm="allgather"), grads, backend, number)
    two, _ = exchanged(TopK(0.04, algorithm="two_step"), grads, backend, number)
    for x, y in zip(two, one, strict=True):
        assert x.is_finite and same_bits(x.mean, y.mean)
        assert all(map(np.array_equal, x.residual, y.residual))


def fits(index: np.ndarray, count: int, ranks: int, number: int) -> bool:
    """Returns whether no owner's row overflows."""
    places = Shuffle.of(Context(NAMES, "float32", number, 0, 0, ranks), count).forward(numpy_ops, index)
    owned = np.bincount(places // slice_size(count, ranks), minlength=ranks)
    return owned.max() <= row_length(index.size, count, ranks)


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("algorithm", ["allgather", "two_step"])
def test_nothing_is_lost_and_ranks_agree(algorithm, ranks, dtype, values):
    spec, state = TopK(0.03, values=values, algorithm=algorithm), fresh(ranks, dtype, SHAPES)
    given, applied = ([np.zeros(s) for s in SHAPES] for _ in range(2))
    for number in range(30):
        grads = gradients(ranks, dtype, seed=number, shapes=SHAPES)
        results, _ = exchanged(spec, grads, number=number, state=state)
        ranks_agree(results)
        state = kept(results)
        for i, mean in enumerate(results[0].mean):
            given[i] += np.mean([g[i] for g in grads], axis=0, dtype=np.float64)
            applied[i] += mean
    assert_nothing_lost(given, applied, state[0], 2e-6 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("spec", [TopK(0.05), TopK(0.05, values="float16"), TopK(0.05, values="bfloat16")], ids=str)
def test_every_framework_does_what_numpy_does_on_four_ranks(spec):
    grads = gradients(4, seed=3, shapes=SHAPES)
    wanted, sent = exchanged(spec, grads)
    for backend in BACKENDS:
        if backend == "torch-gpu" and spec.values != "float32":
            continue  # rounded values may be equal, and a GPU selects any of them
        results, nbytes = exchanged(spec, grads, backend)
        assert nbytes == sent
        for ours, theirs in zip(results, wanted, strict=True):
            for a, b in zip(ours.mean + ours.residual, theirs.mean + theirs.residual, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=backend)


@every_backend
def test_entries_beyond_a_row_stay_in_the_residual(backend):
    """All large entries of a rank belong to one owner."""
    n, count, k = 4, 4000, 40
    spec = TopK(k / count, algorithm="two_step")
    shuffle = Shuffle.of(Context(NAMES[:1], "float32", 0, 0, 0, n), count)
    owned = shuffle.inverse(numpy_ops, np.arange(1000, 1000 + k, dtype=np.int32))  # positions owned by rank 1
    grads = [[np.zeros((40, 100), np.float32)] for _ in range(n)]
    grads[2][0].reshape(-1)[owned] = np.arange(1, k + 1)
    results, _ = exchanged(spec, grads, backend)
    ranks_agree(results)
    c = row_length(k, count, n)
    sent = results[0].mean[0].reshape(-1)
    assert np.array_equal(np.flatnonzero(sent), np.sort(owned[:c])) and c == math.ceil(1.25 * k / n)
    np.testing.assert_array_equal(sent * n + results[2].residual[0].reshape(-1), grads[2][0].reshape(-1))
    assert not any(r.residual[0].any() for i, r in enumerate(results) if i != 2)


def test_every_entry_is_sent_eventually():
    """The same large entries at every step, more than fit in the rows."""
    n, shape = 8, (40, 30)
    spec = TopK(12 / 1200, algorithm="two_step")
    hot = np.random.default_rng(1).choice(1200, 12, replace=False)
    grads = [[np.zeros(shape, np.float32)] for _ in range(n)]
    for own in grads:
        own[0].reshape(-1)[hot] = 1
    state, largest = fresh(n, shapes=[shape]), []
    for number in range(200):
        results, _ = exchanged(spec, grads, number=number, state=state)
        state = kept(results)
        largest.append(max(np.abs(x).max() for own in state[0] for x in own) / n)
    assert max(largest) < 20 and max(largest[100:]) < 1.5 * max(largest[:100])


def test_what_the_second_hop_drops_enters_the_owners_residual():
    """Two ranks select an entry that the owner does not send on: it is kept once."""
    n, count = 4, 400
    spec = TopK(0.01, algorithm="two_step")  # 4 entries, rows of 2
    shuffle = Shuffle.of(Context(NAMES[:1], "float32", 0, 0, 0, n), count)
    at = shuffle.inverse(numpy_ops, np.arange(200, 206, dtype=np.int32))  # all owned by rank 2
    grads = [[np.zeros((20, 20), np.float32)] for _ in range(n)]
    for rank, entries in enumerate([{0: 3, 1: 8}, {0: 2, 2: 16}, {0: 1, 3: 4}, {4: 32, 5: 2}]):
        for i, value in entries.items():
            grads[rank][0].reshape(-1)[at[i]] = value
    results, _ = exchanged(spec, grads)
    ranks_agree(results)
    assert {int(i): float(results[0].mean[0].reshape(-1)[i]) for i in at[[2, 4]]} == {int(at[2]): 4.0, int(at[4]): 8.0}
    left = results[2].residual[0].reshape(-1)
    assert left[at].tolist() == [6, 8, 0, 4, 0, 2]
    assert not any(r.residual[0].any() for i, r in enumerate(results) if i != 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("values", ["float32", "float16"])
@every_backend
def test_nan_and_inf_arrive_even_if_their_row_overflows(backend, values, bad):
    n, count = 4, 400
    shuffle = Shuffle.of(Context(NAMES[:1], "float32", 0, 0, 0, n), count)
    at = shuffle.inverse(numpy_ops, np.arange(200, 204, dtype=np.int32))
    grads = [[np.zeros((20, 20), np.float32)] for _ in range(n)]
    grads[1][0].reshape(-1)[at] = [1, 2, 3, bad]  # two fit, the last does not
    state = fresh(n, shapes=[(20, 20)])
    with np.errstate(invalid="ignore"):
        results, _ = exchanged(TopK(0.01, values=values, algorithm="two_step"), grads, backend, state=state)
    for result in results:
        assert not result.is_finite and not np.isfinite(result.mean[0]).all()
    assert same_bits(kept(results)[0], state[0])


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (5,), (7, 9)])
@pytest.mark.parametrize("ranks", [4, 7])
def test_fewer_entries_than_ranks(shape, ranks):
    grads = gradients(ranks, shapes=[shape])
    results, _ = exchanged(TopK(0.3), grads)
    ranks_agree(results)
    left = np.mean([r.residual[0] for r in results], axis=0)
    np.testing.assert_allclose(results[0].mean[0] + left, np.mean([g[0] for g in grads], axis=0), atol=1e-6)


# 16-bit values


@pytest.mark.parametrize("algorithm", ["allgather", "two_step"])
def test_rounding_errors_and_saturation_stay_in_the_residual(algorithm):
    grads = [[np.zeros((20, 50), np.float32)] for _ in range(2)]
    for own in grads:
        own[0][3, 4], own[0][7, 7] = 1e5, 1 + 2.0**-13
    results, _ = exchanged(TopK(0.01, values="float16", algorithm=algorithm), grads)
    ranks_agree(results)
    assert results[0].mean[0][3, 4] == 65504 and results[0].mean[0][7, 7] == 1
    left = np.mean([r.residual[0] for r in results], axis=0)
    assert left[3, 4] == pytest.approx(1e5 - 65504) and left[7, 7] == 2.0**-13


def test_fp64_is_sent_as_fp64_unless_16_bits_are_requested():
    grads = gradients(2, "float64", shapes=[(30, 40)])
    for values, exact in [("float32", True), ("float16", False)]:
        results, _ = exchanged(TopK(0.1, values=values), grads)
        sent = [g[0] - r.residual[0] for g, r in zip(grads, results, strict=True)]
        assert all(np.isin(x[x != 0], g[0]).all() for x, g in zip(sent, grads, strict=True)) == exact


# bytes


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [8, 64])
def test_two_step_sends_at_most_two_and_a_half_times_k(ranks, values):
    shape, spec = (600, 500), TopK(0.05, values=values)
    k, entry = 15_000, 2 + (4 if values == "float32" else 2)
    results, sent = exchanged(spec, gradients(ranks, shapes=[shape]))
    ranks_agree(results)
    assert sent == pytest.approx(spec.bytes_per_step(shape, "float32", ranks), rel=1e-12)
    ends = 2 * (ranks - 1) * 4
    assert (sent - ends) / entry <= 2.5 * k
    assert TopK(0.05, values=values, algorithm="allgather").bytes_per_step(shape, "float32", ranks) > 2.7 * sent


@pytest.mark.parametrize("algorithm", ["allgather", "two_step"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_group_sends_about_as_much_as_its_layers_alone(ranks, algorithm):
    shapes, spec = [(300, 257), (256, 256), (40, 50)], TopK(0.1, algorithm=algorithm)
    _, sent = exchanged(spec, gradients(ranks, shapes=shapes))
    alone = sum(spec.bytes_per_step(shape, "float32", ranks) for shape in shapes)
    assert sent == alone if algorithm == "allgather" else 0 <= alone - sent <= 0.01 * alone


def test_auto_selects_two_step_from_four_ranks_on():
    for n in (1, 2, 3, 4, 5, 64):
        same = TopK(0.01, algorithm="two_step" if n >= 4 else "allgather")
        assert TopK(0.01).messages((300, 200), "float32", n) == same.messages((300, 200), "float32", n)
        if n >= 4:
            other = TopK(0.01, algorithm="allgather")
            assert same.bytes_per_step((32, 32), "float32", n) < other.bytes_per_step((32, 32), "float32", n)


@pytest.mark.parametrize(("argument", "value"), [("values", "float64"), ("algorithm", "three_step"), ("values", 16)])
def test_other_choices_raise(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be one of"):
        TopK(0.1, **{argument: value})
