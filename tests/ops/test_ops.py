"""Each primitive of the protocol: torch and TensorFlow against numpy, numpy against its definition."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion.ops import numpy as numpy_ops
from hvd_accordion.ops import protocol
from hvd_accordion.ops import tensorflow as tensorflow_ops
from hvd_accordion.ops import torch as torch_ops
from hvd_accordion.utils import seeds
from tests.ops.backends import BACKENDS, FRAMEWORKS

every_framework = pytest.mark.parametrize(("ops", "to"), FRAMEWORKS.values(), ids=FRAMEWORKS)
both_ways = pytest.mark.parametrize("backend", ["torch", "torch-gpu"])

PRIMITIVES = [name for name in vars(protocol.Ops) if not name.startswith("_")]
FLOATS = [np.float32, np.float64]
floats = pytest.mark.parametrize("dtype", FLOATS)


def numbers(*shape: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def each(how, x):
    """Applies `how` to arrays, also in lists, and returns other values unchanged."""
    if isinstance(x, list | tuple):
        return type(x)(each(how, y) for y in x)
    return how(x) if isinstance(x, np.ndarray) else x


def n(x):
    """Converts any framework's tensors, also in lists, to numpy."""
    if isinstance(x, list | tuple):
        return [n(y) for y in x]
    return x.numpy() if tf.is_tensor(x) or isinstance(x, torch.Tensor) else x


def same(name: str, *args, exact: bool = True):
    """Returns numpy's result after checking that each framework gives the same, with equal dtypes and shapes."""
    ours = getattr(numpy_ops, name)(*args)
    for ops, to in FRAMEWORKS.values():
        assert_same(ours, n(getattr(ops, name)(*each(to, args))), f"{name} of {ops.__name__}", exact)
    return ours


def assert_same(ours, theirs, what: str, exact: bool = True):
    for a, b in zip(*(tf.nest.flatten(x) for x in (ours, theirs)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
        if exact:
            np.testing.assert_array_equal(a, b, what)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=what)


def test_each_framework_has_every_primitive_with_the_protocols_arguments():
    assert len(PRIMITIVES) > 30
    for name in PRIMITIVES:
        wanted = list(inspect.signature(getattr(protocol.Ops, name)).parameters)[1:]
        for ops, _ in BACKENDS.values():
            primitive = getattr(ops, name)
            if getattr(primitive, "__module__", "") == ops.__name__:
                assert list(inspect.signature(primitive).parameters) == wanted, (ops.__name__, name)


# lists of tensors


@pytest.mark.parametrize(
    ("given_dtype", "wide"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_upcast(given_dtype, wide):
    (x, y) = same("upcast", [numbers(3, 4).astype(given_dtype), numbers(5).astype(given_dtype)])
    assert x.dtype == y.dtype == wide


def test_upcast_bfloat16_and_strided():
    (x,) = torch_ops.upcast([torch.tensor([[1.5, 2.0], [3.0, 4.0]], dtype=torch.bfloat16).t()])
    assert x.dtype == torch.float32 and x.is_contiguous() and x.tolist() == [[1.5, 3.0], [2.0, 4.0]]
    (x,) = tensorflow_ops.upcast([tf.constant([[1.5, 2.0], [3.0, 4.0]], tf.bfloat16)])
    assert x.dtype == tf.float32 and x.numpy().tolist() == [[1.5, 2.0], [3.0, 4.0]]
    (x,) = numpy_ops.upcast([numbers(3, 4).T])
    assert x.shape == (4, 3)
    assert x.flags.c_contiguous


def test_upcast_keeps_a_scalar_a_scalar():
    assert same("upcast", [np.array(2.5, np.float32)])[0].shape == ()


@floats
def test_add_and_zeros(dtype):
    xs, ys = ([numbers(3, 4, dtype=dtype, seed=s), numbers(7, dtype=dtype, seed=s)] for s in (0, 1))
    np.testing.assert_array_equal(same("add", xs, ys)[1], xs[1] + ys[1])
    assert not any(z.any() for z in same("zeros_like", xs))


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_add_reuses_memory_unless_the_sum_is_not_finite(bad):
    x, y = torch.from_numpy(numbers(3, 4)), torch.from_numpy(numbers(3, 4, seed=1))
    was, given = y.clone(), x.clone()
    if bad is not None:
        x[-1, -1] = given[-1, -1] = bad
    (value,) = torch_ops.add([x], [y])
    np.testing.assert_array_equal(value, given + was)
    np.testing.assert_array_equal(x, given)
    assert (value.data_ptr() == y.data_ptr()) is (bad is None)
    if bad is not None:
        np.testing.assert_array_equal(y, was)
    np.testing.assert_allclose(torch_ops.undo_add(y, x), was, rtol=0, atol=1e-6)


@floats
def test_accumulate_adds_unless_the_step_met_nan(dtype):
    sums, xs = ([numbers(3, 4, dtype=dtype, seed=s), numbers(7, dtype=dtype, seed=s)] for s in (0, 1))
    np.testing.assert_allclose(same("accumulate", sums, xs, 2, None, exact=False)[1], sums[1] + 2 * xs[1], rtol=1e-6)
    same("accumulate", sums, xs, 0.5, np.array(True), exact=False)
    xs[0][0, 0] = np.nan
    np.testing.assert_array_equal(same("accumulate", sums, xs, 2, np.array(False))[0], sums[0])


# commit_residual: averages and the new residual


def halves(values):
    """Returns a `finish` whose averages are half of the values. The other half is the remainder."""

    def finish(want_remainder):
        mean = [x * 0.5 for x in values]
        return mean, [x - half for x, half in zip(values, mean, strict=True)] if want_remainder else None

    return finish


@floats
@pytest.mark.parametrize("backend", BACKENDS)
def test_commit_residual_takes_the_remainder_only_if_finite(dtype, backend):
    ops, to = BACKENDS[backend]
    values = [numbers(3, dtype=dtype), numbers(2, 2, dtype=dtype)]
    old = [numbers(3, dtype=dtype, seed=1), np.zeros((2, 2), dtype)]
    for is_finite, wanted in ((True, [x / 2 for x in values]), (False, old)):
        mine = each(to, values)
        mean, left = n(ops.commit_residual(to(np.array(is_finite)), halves(mine), mine, each(to, old), mine))
        assert_same([x / 2 for x in values], mean, backend)
        assert_same(wanted, left, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_commit_residual_keeps_nan_out_of_the_residual(backend):
    ops, to = BACKENDS[backend]
    old = [numbers(3)]
    grads, residual = each(to, [np.full(3, np.nan, np.float32)]), each(to, old)
    values = ops.add(grads, residual)
    mean, left = n(ops.commit_residual(to(np.array(False)), halves(values), values, residual, grads))
    assert np.isnan(mean[0]).all(), "the optimizer must see it"
    np.testing.assert_array_equal(left[0], old[0])


def factors(*shapes, r=2, dtype=np.float32):
    """Returns matrices, and factors (r, n), (r, m) that approximate them."""
    made = [
        (numbers(r, n, dtype=dtype, seed=i), numbers(r, m, dtype=dtype, seed=50 + i)) for i, (n, m) in enumerate(shapes)
    ]
    return [p.T @ q + numbers(*s, dtype=dtype, seed=99) for (p, q), s in zip(made, shapes, strict=True)], made


def low_rank_committed(backend, is_finite):
    """Commits two matrices in torch. Returns averages, residual, and the given buffers and old residual."""
    ops, to = BACKENDS[backend]
    matrices, made = factors((6, 5), (4, 7))
    old = each(to, [numbers(6, 5, seed=3), numbers(4, 7, seed=4)])
    was = [x.clone() for x in old]
    grads = [to(m) - e for m, e in zip(matrices, old, strict=True)]
    buffers = [torch.empty_like(g) for g in grads]
    values = ops.add(grads, old)

    def finish(want_remainder):
        results = [
            ops.low_rank(v, to(p), to(q), buffer, want_remainder)
            for v, (p, q), buffer in zip(values, made, buffers, strict=True)
        ]
        return [mean for mean, _ in results], [left for _, left in results] if want_remainder else None

    mean, left = ops.commit_residual(torch.tensor(is_finite), finish, values, old, grads)
    for x, e, before, matrix, (p, q) in zip(mean, left, was, matrices, made, strict=True):
        np.testing.assert_allclose(x, p.T @ q, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(e, matrix - x.numpy() if is_finite else before, rtol=0, atol=1e-6)
    return mean, left, buffers, old


def pointers(xs):
    return [x.data_ptr() for x in xs]


@pytest.mark.parametrize("is_finite", [True, False])
def test_committing_residuals_on_cpu_and_gpu_agrees(is_finite):
    (mean, left, *_), (means, lefts, *_) = (
        low_rank_committed(backend, is_finite) for backend in ("torch", "torch-gpu")
    )
    assert_same(n(mean + left), n(means + lefts), "on the CPU or not", exact=False)


@both_ways
@pytest.mark.parametrize("is_finite", [True, False])
def test_commit_residual_writes_to_the_buffers_and_the_old_residual(backend, is_finite):
    mean, left, buffers, old = low_rank_committed(backend, is_finite)
    assert pointers(mean) == pointers(buffers) and pointers(left) == pointers(old)


def test_commit_residual_on_the_cpu_needs_no_remainder_of_a_non_finite_step():
    wanted = []

    def finish(want_remainder):
        wanted.append(want_remainder)
        return [torch.zeros(2)], [torch.zeros(2)] if want_remainder else None

    torch_ops.commit_residual(torch.tensor(False), finish, [torch.ones(2)], [torch.ones(2)], [torch.ones(2)])
    assert wanted == [False]


@floats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(dtype, bad):
    xs = [numbers(3, 4, dtype=dtype), numbers(70, dtype=dtype)]
    assert same("all_finite", xs)
    assert same("all_finite", [np.full(9, np.finfo(dtype).max)])  # large is not infinite
    xs[1][69] = bad
    assert not same("all_finite", xs)


def test_all_finite_of_an_empty_tensor():
    assert same("all_finite", [np.zeros((3, 0), np.float32), numbers(2)])


def test_flatten_and_unflatten():
    xs = [numbers(3, 4), numbers(5), numbers(2, 2, 2)]
    flat = same("flatten", xs)
    assert flat.shape == (25,)
    padded = same("pad", flat, 32, (4, 8))
    assert not padded.reshape(-1)[25:].any()
    for x, y in zip(xs, same("unflatten", padded.reshape(-1), xs), strict=True):
        np.testing.assert_array_equal(x, y)


@floats
@pytest.mark.parametrize("width", [4, 5, 9])
def test_pad_rows(dtype, width):
    x = numbers(2, 3, 4, dtype=dtype)
    wide = same("pad_rows", x, width)
    assert wide.shape == (2, 3, width) and not wide[:, :, 4:].any()
    np.testing.assert_array_equal(wide[:, :, :4], x)


# shapes and types


@floats
def test_shapes(dtype):
    x, y = numbers(4, 6, dtype=dtype), numbers(4, 6, dtype=dtype, seed=1)
    assert same("reshape", x, (2, 12)).shape == (2, 12)
    assert same("reshape", x, (-1,)).shape == (24,)
    batch = same("stack", [x, y])
    assert batch.shape == (2, 4, 6)
    np.testing.assert_array_equal(same("transpose", batch)[1], y.T)
    assert same("concat", [x, y], 0).shape == (8, 6)
    assert same("concat", [x, y], -1).shape == (4, 12)
    assert same("concat", [batch, batch], -1).shape == (2, 4, 12)
    assert not same("zeros", 5, x).any()
    assert same("dtype", x) == np.dtype(dtype).name


@pytest.mark.parametrize("to", ["float16", "float32", "float64", "uint8", "int32"])
def test_cast(to):
    assert same("cast", np.array([0, 1, 2.5, 100], np.float32), to).dtype == to


@floats
def test_cast_like(dtype):
    assert same("cast_like", numbers(3), np.zeros(1, dtype)).dtype == dtype
    assert same("cast_like", np.arange(250, 256, dtype=np.uint8), np.zeros(1, dtype)).tolist() == [*range(250, 256)]


# rounded to nearest, ties to even, like the frameworks
HARD = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    65504.0,
    65519.99,
    65520.0,
    1e5,
    3.3895314e38,
    3.4e38,
    -3.4e38,
    1e-7,
    2**-24,
    2**-25,
    1e-40,
    1e-45,
]
HARD += [np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-11, 1 + 3 * 2**-11]


def bits_of(ops, x, dtype: str) -> np.ndarray:
    return n(ops.to_bytes(ops.cast(x, dtype))).view(np.uint16)


@every_framework
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_equals_the_frameworks(dtype, ops, to):
    def assert_same_bits(x):  # all NaN count as equal
        ours, theirs = bits_of(numpy_ops, x, dtype), bits_of(ops, to(x), dtype)
        np.testing.assert_array_equal(*(np.where(np.isnan(x), 0, bits) for bits in (ours, theirs)))

    every_pattern = np.arange(2**16, dtype=np.uint32)
    with np.errstate(all="ignore"):
        near = np.concatenate(
            [(every_pattern << 16 | low).view(np.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        )
        for x in (
            np.array(HARD, np.float32),
            near,
            numbers(10_000) * np.float32(1e3),
            numbers(10_000, dtype=np.float64),
        ):
            assert_same_bits(x)
    # fp64 is rounded first to fp32, so some values are rounded twice
    assert_same_bits(np.array([1 + 2.0**-e + 2.0**-40 for e in (8, 9, 11, 12)]))


@floats
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_bytes_of_16_bit_floats_are_the_same_in_all(dtype, half):
    hard = np.array([h for h in HARD if not np.isnan(h)], dtype)
    for ops, to in BACKENDS.values():
        x = hard
        if ops is tensorflow_ops and dtype == np.float64:  # its kernels flush subnormal fp32 numbers to zero
            x = np.where(np.abs(hard) < np.finfo(np.float32).tiny, np.copysign(0, hard), hard)
        code = numpy_ops.to_bytes(numpy_ops.cast(x, half))
        assert code.dtype == np.uint8 and code.shape == (2 * x.size,)
        back = numpy_ops.cast_like(numpy_ops.from_bytes(code, half), x)
        assert back[HARD.index(1.0)] == 1.0 and np.isinf(back[HARD.index(np.inf)])
        assert_same(code, n(ops.to_bytes(ops.cast(to(x), half))), ops.__name__)
        assert_same(back, n(ops.cast_like(ops.from_bytes(to(code), half), to(x))), ops.__name__)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_nan_survives_16_bits(half):
    # quiet, signalling, all bits set: rounding must not turn NaN into Inf or zero
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    x = np.stack([nans, np.ones(5, np.float32)], axis=-1)
    for ops, to in BACKENDS.values():
        code = ops.to_bytes(ops.cast(to(x), half))
        back = n(ops.cast_like(ops.from_bytes(code, half), to(x)))
        np.testing.assert_array_equal(back, [[np.nan, 1]] * 5, ops.__name__)


@pytest.mark.parametrize("kind", ["float32", "float64", "int32"])
def test_bytes_round_trip(kind):
    x = (1000 * numbers(3, 4)).astype(kind)
    code = same("to_bytes", x)
    assert code.dtype == np.uint8 and code.shape == (3, 4 * x.itemsize)
    np.testing.assert_array_equal(same("from_bytes", code, kind), x)


@pytest.mark.parametrize("kind", ["float32", "float64", "int32"])
@pytest.mark.parametrize("shift", range(9))
def test_from_bytes_of_a_misaligned_slice(kind, shift):
    x = (1000 * numbers(6)).astype(kind)
    message = np.concatenate([np.zeros(shift, np.uint8), x.view(np.uint8), np.ones(3, np.uint8)])
    end = shift + x.nbytes
    for ops, to in BACKENDS.values():
        np.testing.assert_array_equal(n(ops.from_bytes(to(message)[shift:end], kind)), x, ops.__name__)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("width", [21, 24])  # of the whole row, also no multiple of an item
def test_from_bytes_of_the_first_columns(rows, width):
    x = numbers(rows, 4)
    code = np.concatenate([x.view(np.uint8), np.zeros((rows, width - 16), np.uint8)], -1)
    for ops, to in BACKENDS.values():
        np.testing.assert_array_equal(n(ops.from_bytes(to(code)[:, :16], "float32")), x, ops.__name__)


# elementwise and reductions


@floats
def test_elementwise(dtype):
    x = 3 * numbers(4, 5, dtype=dtype)
    assert same("where", x > 0, 1.0, x).dtype == dtype
    same("where", np.array(False), x, -x)
    same("floor", x)
    assert same("clip", x, -2, 2).dtype == dtype
    assert same("clip", np.array([9.0, np.inf, -np.inf], dtype), -2, 2).tolist() == [2, 2, -2]


@floats
def test_reductions(dtype):
    x = numbers(3, 4, 5, dtype=dtype)
    for axis in (0, -1, -2):
        for keepdims in (True, False):
            same("max", x, axis, keepdims)
            same("sum", x, axis, keepdims, exact=False)
    np.testing.assert_allclose(same("norm", x.ravel(), exact=False), np.linalg.norm(x), rtol=1e-6)


@floats
@pytest.mark.parametrize("size", [1, 3, 8, 37])
@pytest.mark.parametrize("axis", [-1, -2])
def test_max_finds_a_nan_at_any_position(dtype, size, axis):
    for place in range(size):
        x = np.moveaxis(numbers(2, 5, size, dtype=dtype), -1, axis).copy()
        np.moveaxis(x, axis, -1)[1, 2, place] = np.nan
        assert np.flatnonzero(np.isnan(same("max", x, axis, False))).tolist() == [7]


# entries of vectors


@floats
@settings(deadline=None)
@given(seed=st.integers(0, 100), count=st.integers(1, 60), share=st.floats(0, 1))
def test_top_k(dtype, seed, count, share):
    x, k = numbers(count, dtype=dtype, seed=seed), max(1, int(share * count))
    expected = set(np.argsort(-np.abs(x))[:k].tolist())
    for picked in (n(ops.top_k(to(x), k)) for ops, to in BACKENDS.values()):
        assert picked.dtype == np.int32 and picked.shape == (k,)
        assert set(picked.tolist()) == expected


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_selects_nan_first_then_infinity(k):
    x = numbers(50)
    x[[7, 31, 40]] = [-np.inf, np.nan, 1e30]
    for picked in (n(ops.top_k(to(x), k)) for ops, to in BACKENDS.values()):
        assert set(picked.tolist()) == set([31, 7, 40][:k])


def test_top_k_of_equal_entries_selects_k_different_ones():
    x = np.ones(20, np.float32)
    for picked in (n(ops.top_k(to(x), 7)) for ops, to in BACKENDS.values()):
        assert len(set(picked.tolist())) == 7


@settings(deadline=None)
@given(st.integers(1, 2**31 - 1), st.data())
def test_affine(count, data):
    factors = tuple(data.draw(st.lists(st.integers(0, count), min_size=1, max_size=3)))
    pick, b = data.draw(st.integers(0, 2**31 - 1)), data.draw(st.integers(0, 2**31 - 1))
    a, k = factors[pick % len(factors)], min(count, 50)
    got = same("affine", factors, pick, b, k, count, np.zeros(1, np.float32))
    assert got.dtype == np.int32 and got.tolist() == [(a * j + b) % count for j in range(k)]


@floats
def test_take_put_and_add(dtype):
    x, index = numbers(10, dtype=dtype), np.array([7, 0, 3], np.int32)
    np.testing.assert_array_equal(same("take", x, index), x[[7, 0, 3]])
    assert not same("put", x, index, 0.0)[[7, 0, 3]].any()
    added = same("scatter_add", x, index, np.array([1.0, 2.0, 3.0], dtype))
    np.testing.assert_array_equal(added[[7, 0, 3]], x[[7, 0, 3]] + np.array([1, 2, 3], dtype))
    rows = numbers(3, 4, dtype=dtype)
    np.testing.assert_array_equal(same("add_row", rows, 1, np.ones(4, dtype))[1], rows[1] + 1)


def test_put_of_zero_removes_a_nan():
    assert same("put", np.array([1, np.nan, 3], np.float32), np.array([1], np.int32), 0.0).tolist() == [1, 0, 3]


# pseudo-random numbers


def mixed(i: int, seed: int) -> int:
    """The counter hash with Python integers."""
    x = (i * 0x9E3779B1 + seed) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@floats
@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_uniform_is_bit_equal_and_as_documented(dtype, seed):
    u = same("uniform", seed, 300, np.zeros(1, dtype))
    assert u.dtype == dtype
    assert u.tolist() == [(mixed(i, seed) >> 8) * 2.0**-24 for i in range(300)]


def test_uniform_looks_uniform():
    u = same("uniform", 42, 200_000, np.zeros(1, np.float32))
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert np.histogram(u, 20, (0, 1))[0].min() > 9_500
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.01
    other = numpy_ops.uniform(43, 200_000, u)
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.01


@floats
def test_filler_basis(dtype):
    got = same("filler_basis", np.zeros((2, 4, 50), dtype), exact=False)
    assert got.shape == (2, 4, 50)
    for row in range(4):
        np.testing.assert_allclose(got[1, row], np.sin((row + 1.0) * np.arange(1, 51)), atol=1e-6)


# packed codes


@pytest.mark.parametrize("bits", range(1, 9))
@settings(deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), words=st.integers(1, 5))
def test_pack_round_trip(bits, data, rows, words):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8 * rows * words, max_size=8 * rows * words))
    x = np.array(values, np.uint8).reshape(rows, 8 * words)
    packed = same("pack_bits", x, bits)
    assert packed.dtype == np.uint8 and packed.shape == (rows, words * bits)
    np.testing.assert_array_equal(same("unpack_bits", packed, bits), x)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bits_have_the_documented_positions(bits):
    x = np.random.default_rng(bits).integers(0, 2**bits, 8).astype(np.uint8)
    word = sum(int(value) << (bits * i) for i, value in enumerate(x))
    assert bytes(numpy_ops.pack_bits(x, bits)) == word.to_bytes(bits, "little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_a_slice(bits):
    x = np.random.default_rng(bits).integers(0, 2**bits, (2, 16)).astype(np.uint8)
    code = np.concatenate([np.zeros((2, 3), np.uint8), numpy_ops.pack_bits(x, bits)], -1)
    for ops, to in BACKENDS.values():
        np.testing.assert_array_equal(n(ops.unpack_bits(to(code)[:, 3:], bits)), x, ops.__name__)


# matrices


@floats
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("r", [1, 2])
def test_products_of_matrices(dtype, batch, r):
    matrices = [numbers(6, 5, dtype=dtype, seed=s) for s in range(batch)]
    p, q = numbers(batch, r, 6, dtype=dtype), numbers(batch, r, 5, dtype=dtype)
    for i, m in enumerate(matrices):
        np.testing.assert_allclose(same("project", matrices, q, exact=False)[i], (m @ q[i].T).T, rtol=1e-5)
        np.testing.assert_allclose(same("project_t", matrices, p, exact=False)[i], (m.T @ p[i].T).T, rtol=1e-5)


@floats
@pytest.mark.parametrize("remainder", [True, False])
@pytest.mark.parametrize(
    "shape", [(6, 5), (1, 9), (700, 500), (3, 2**17 + 9), (2**17 + 9, 1)]
)  # also of several chunks
def test_low_rank(dtype, shape, remainder):
    (matrix,), ((p, q),) = factors(shape, dtype=dtype)
    assert shape[0] < 700 or matrix.size > torch_ops.CACHED
    for backend, (ops, to) in BACKENDS.items():
        for into in (None, to(np.full_like(matrix, np.nan))):  # old contents must not matter
            mean, left = n(ops.low_rank(to(matrix), to(p), to(q), into, remainder))
            assert mean.dtype == dtype and mean.shape == shape, backend
            np.testing.assert_allclose(mean, p.T @ q, rtol=1e-5, atol=1e-5, err_msg=backend)
            if remainder:
                np.testing.assert_array_equal(left, matrix - mean, backend)
            else:
                assert left is None


@both_ways
@pytest.mark.parametrize("shape", [(6, 5), (700, 500)])
def test_low_rank_writes_to_its_buffer(backend, shape):
    ops, to = BACKENDS[backend]
    (matrix,), ((p, q),) = factors(shape)
    given, into = to(matrix), torch.empty(shape)
    mean, left = ops.low_rank(given, to(p), to(q), into, True)
    assert pointers([mean, left]) == pointers([into, given])
    given = to(matrix)
    mean, _ = ops.low_rank(given, to(p), to(q), None, False)
    np.testing.assert_array_equal(given, matrix)
    assert mean.data_ptr() != given.data_ptr()


def test_primitives_do_not_use_the_global_generators():
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    tensorflows = tf.random.get_global_generator().state.numpy()
    same("uniform", 1, 10, np.zeros(1, np.float32))
    same("filler_basis", np.zeros((1, 2, 3), np.float32), exact=False)
    same("affine", (3,), 0, 1, 5, 10, np.zeros(1, np.float32))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    np.testing.assert_array_equal(tf.random.get_global_generator().state.numpy(), tensorflows)


# traced into a graph


def in_a_graph(function):
    return tf.function(function, autograph=False)


# arguments of every primitive that returns tensors
CALLS = {
    "upcast": ([numbers(3, 4).astype(np.float16), numbers(5)],),
    "add": ([numbers(3, 4), numbers(5)], [numbers(3, 4), numbers(5)]),
    "undo_add": (numbers(3, 4), numbers(3, 4)),
    "accumulate": ([numbers(3, 4), numbers(5)], [numbers(3, 4), numbers(5)], 2.0, np.array(True)),
    "cleared": (numbers(3, 4),),
    "zeros_like": ([numbers(3, 4), numbers(5)],),
    "commit_residual": (
        np.array(True),
        halves([tf.constant(numbers(3, 4))]),
        *[[numbers(3, 4, seed=i)] for i in range(3)],
    ),
    "all_finite": ([numbers(3, 4), numbers(5)],),
    "flatten": ([numbers(3, 4), numbers(5), numbers()],),
    "unflatten": (numbers(30), [numbers(3, 4), numbers(5), numbers()]),
    "reshape": (numbers(3, 4), (-1,)),
    "transpose": (numbers(2, 3, 4),),
    "concat": ([numbers(3, 4), numbers(3, 2)], -1),
    "stack": ([numbers(3, 4), numbers(3, 4)],),
    "pad": (numbers(5), 8, (2, 4)),
    "pad_rows": (numbers(2, 3, 4), 6),
    "zeros": (5, numbers(2)),
    "full": (5, numbers()),
    "constant": ((3, 70000), numbers(2)),
    "arange": (5, numbers(2)),
    "cast": (numbers(3, 4), "float16"),
    "cast_like": (np.arange(3, dtype=np.uint8), numbers(2)),
    "to_bytes": (numbers(3, 4),),
    "from_bytes": (numbers(3, 4).view(np.uint8), "float32"),
    "where": (numbers(3, 1) > 0, 1.0, numbers(3, 4)),
    "floor": (numbers(3, 4),),
    "clip": (numbers(3, 4), -1, 1),
    "max": (numbers(3, 4), -1, True),
    "sum": (numbers(3, 4), 0, False),
    "norm": (numbers(20),),
    "top_k": (numbers(20), 4),
    "argsort": (np.array([3, 1, 7], np.int32),),
    "searchsorted": (np.array([1, 3, 3, 7], np.int32), np.array([3, 0, 9], np.int32)),
    "affine": ((3, 7), 1, 5, 4, 20, numbers(2)),
    "take": (numbers(20), np.array([3, 1], np.int32)),
    "put": (numbers(20), np.array([3, 1], np.int32), 0.0),
    "scatter_add": (numbers(20), np.array([3, 1], np.int32), numbers(2)),
    "add_row": (numbers(3, 4), 1, numbers(4)),
    "uniform": (5, 20, numbers(2)),
    "filler_basis": (numbers(2, 3, 5),),
    "pack_bits": (np.arange(16, dtype=np.uint8).reshape(1, 16), 5),
    "unpack_bits": (np.arange(10, dtype=np.uint8).reshape(1, 10), 5),
    "project": ([numbers(6, 5), numbers(6, 5)], numbers(2, 3, 5)),
    "project_t": ([numbers(6, 5), numbers(6, 5)], numbers(2, 3, 6)),
    "low_rank": (numbers(6, 5), numbers(3, 6), numbers(3, 5), None, True),
}


def test_the_calls_cover_every_primitive():
    assert {*CALLS, "dtype"} == set(PRIMITIVES)


@pytest.mark.parametrize("name", CALLS)
def test_traced_primitives_equal_eager_ones_and_have_static_shapes(name):
    primitive, args = getattr(tensorflow_ops, name), CALLS[name]
    traced = in_a_graph(primitive)  # arrays become tensors, all other arguments are constants of the graph
    given = traced.get_concrete_function(*args).structured_outputs
    assert all(x.shape.is_fully_defined() for x in tf.nest.flatten(given))
    assert_same(n(primitive(*each(tf.constant, args))), n(traced(*args)), name, exact=False)


def test_decisions_while_tracing_add_no_operation():
    x, y = tf.constant([1.0]), tf.constant([2.0])
    assert tensorflow_ops.where(True, x, y) is x
    mean, left = tensorflow_ops.commit_residual(True, lambda remainder: ([x], [y]), [y], [x], [y])
    assert mean[0] is x and left[0] is y


LARGE = [2**k + i for k in (15, 16, 30) for i in (-1, 0, 1)] + [2**31 - 3, 2**31 - 2]


@pytest.mark.parametrize("key", [0, 1, seeds.stable_hash("key"), 2**31 - 1])
def test_a_seed_of_a_step_that_is_a_tensor(key):
    traced = in_a_graph(lambda step: seeds.at(key, step))
    for step in [*range(101), *LARGE]:
        seed = traced(tf.constant(step, tf.int64))
        assert seed.dtype == tf.int64 and seed.shape == () and int(seed) == seeds.at(key, step)


@floats
def test_uniform_of_a_seed_that_is_a_tensor(dtype):
    like = np.zeros(1, dtype)
    traced = in_a_graph(lambda seed: tensorflow_ops.uniform(seed, 300, tf.constant(like)))
    for seed in [*range(10), *LARGE, 2**31 - 1]:
        assert_same(numpy_ops.uniform(seed, 300, like), n(traced(tf.constant(seed, tf.int64))), str(seed))


@pytest.mark.parametrize("count", [1, 12, 50_000, 2**31 - 1])
def test_affine_of_a_pick_and_a_shift_that_are_tensors(count):
    factors = tuple(a % count for a in (1, 5, 2**31 - 2))
    k, like = min(count, 50), np.zeros(1, np.float32)
    traced = in_a_graph(lambda *at: tensorflow_ops.affine(factors, *at, k, count, tf.constant(like)))
    for pick, shift in zip([*range(10), *LARGE], [*LARGE, *range(10)], strict=False):
        got = traced(tf.constant(pick, tf.int64), tf.constant(shift, tf.int64))
        assert_same(numpy_ops.affine(factors, pick, shift, k, count, like), n(got), f"{pick} {shift}")
