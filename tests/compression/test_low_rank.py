"""PowerSGD: exactness, agreement with a plain numpy version, orthonormalisation, warm start."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_accordion import PowerSGD
from hvd_accordion.compression import Context
from hvd_accordion.compression.low_rank import matrix_shape, orthonormalise
from tests.ops.backends import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_rank = pytest.mark.parametrize("rank", [1, 2, 4])


def exchange(backend, spec, grads, memory=None, step=0):
    """Returns means, remainders and memory of every rank as numpy arrays. `grads`, `memory`: [rank][layer]."""
    size, names = len(grads), tuple(f"l{i}" for i in range(len(grads[0])))
    ops, to = BACKENDS[backend]
    memory = memory or [[{} for _ in names] for _ in grads]
    rounds = [
        spec.exchange(
            ops,
            [to(x) for x in values],
            [{key: to(x) for key, x in kept.items()} for kept in own],
            Context(names, grads[0][0].dtype.name, step, 0, rank, size),
        )
        for rank, (values, own) in enumerate(zip(grads, memory, strict=True))
    ]
    answers = [None] * size
    while True:
        done, requests = [], []
        for rank in range(size):
            try:
                requests.append(rounds[rank].send(answers[rank]))
            except StopIteration as stop:
                done.append(stop.value)
        if done:
            assert all(d.is_finite() for d in done)
            memory = [
                [{key: np.asarray(x) for key, x in kept.items()} for kept in d.memory(d.is_finite())] for d in done
            ]
            finished = [d.finish(None, True) for d in done]
            return *([[np.asarray(x) for x in part] for part in parts] for parts in zip(*finished, strict=True)), memory
        # all requests are AllReduce, whose mean Python can compute
        columns = zip(*(request.tensors for request in requests), strict=True)
        answers = [[sum(column) / size for column in columns]] * size


def of_rank(rank, n, m, seed=0, ranks=1, dtype=np.float32):
    """Returns gradients of several ranks whose mean has this matrix rank."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((n, rank))
    return [(left @ rng.standard_normal((rank, m))).astype(dtype) for _ in range(ranks)]


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


# exact on rank-r gradients

EXACT = 1e-4  # fp32 rounding times the condition number of a random start; the fp64 test excludes other errors


@every_backend
@every_rank
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (64, 64), (8, 3, 3, 3)])
def test_exact_on_a_gradient_of_equal_rank(backend, rank, shape):
    (gradient,) = of_rank(rank, *matrix_shape(shape))
    ((mean,),), ((left,),), _ = exchange(backend, PowerSGD(rank), [[gradient.reshape(shape)]])
    assert mean.shape == shape
    assert distance(mean, gradient.reshape(shape)) < EXACT
    assert np.linalg.norm(left) < EXACT * np.linalg.norm(gradient)


@every_backend
@every_rank
def test_exact_in_a_batch_of_different_matrices_of_one_shape(backend, rank):
    gradients = [of_rank(rank, 30, 20, seed)[0] * 10.0**seed for seed in range(5)]  # of very different magnitudes
    (means,), _, _ = exchange(backend, PowerSGD(rank), [gradients])
    for mean, gradient in zip(means, gradients, strict=True):
        assert distance(mean, gradient) < EXACT


@every_backend
@every_rank
def test_exact_in_a_mix_of_shapes(backend, rank):
    shapes = [(30, 20), (12, 50), (30, 20), (20, 30), (12, 50)]
    gradients = [of_rank(rank, *shape, seed)[0] for seed, shape in enumerate(shapes)]
    (means,), _, _ = exchange(backend, PowerSGD(rank), [gradients])
    for mean, gradient in zip(means, gradients, strict=True):
        assert distance(mean, gradient) < EXACT


@every_backend
@every_rank
def test_exact_over_four_ranks(backend, rank):
    gradients = of_rank(rank, 30, 20, ranks=4)
    means, _, _ = exchange(backend, PowerSGD(rank), [[g] for g in gradients])
    for (mean,) in means:
        assert distance(mean, np.mean(gradients, axis=0)) < EXACT


@every_backend
@pytest.mark.parametrize("true_rank", [1, 2, 3])
def test_exact_on_smaller_ranks_over_several_steps(backend, true_rank):
    memory = None
    for step in range(4):
        gradients = [of_rank(true_rank, 30, 20, seed=10 * step + s)[0] for s in range(3)]
        (means,), _, memory = exchange(backend, PowerSGD(4), [gradients], memory, step)
        for mean, gradient in zip(means, gradients, strict=True):
            assert distance(mean, gradient) < EXACT


@every_backend
@every_rank
def test_exact_in_fp64(backend, rank):
    gradients = [of_rank(rank, 30, 20, seed, dtype=np.float64)[0] for seed in range(5)]
    (means,), _, _ = exchange(backend, PowerSGD(rank), [gradients])
    for mean, gradient in zip(means, gradients, strict=True):
        assert mean.dtype == np.float64 and distance(mean, gradient) < 1e-12


@every_backend
def test_rank_is_capped_at_the_smaller_side(backend):
    gradient = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    ((mean,),), _, ((kept,),) = exchange(backend, PowerSGD(10), [[gradient]])
    assert kept["q"].shape == (3, 40) and distance(mean, gradient) < EXACT


@every_backend
@every_rank
def test_exact_on_a_large_matrix(backend, rank):
    """Larger than the blocks that torch processes on the CPU."""
    (gradient,), (small,) = of_rank(rank, 700, 500), of_rank(rank, 30, 20)
    ((mean, other),), ((left, _),), _ = exchange(backend, PowerSGD(rank), [[gradient, small]])
    assert distance(mean, gradient) < EXACT and distance(other, small) < EXACT
    np.testing.assert_array_equal(left, gradient - mean)


# agreement with a plain implementation


def plain_power_sgd(gradients, q, errors, iterations=1):
    """Algorithm 1 of the paper with error feedback, on one matrix of each rank. Returns result, errors and Q."""
    given = [g + e for g, e in zip(gradients, errors, strict=True)]
    for _ in range(iterations):
        p, _ = np.linalg.qr(np.mean([m @ q for m in given], axis=0))
        q = np.mean([m.T @ p for m in given], axis=0)
    result = p @ q.T
    return result, [m - result for m in given], q


@every_backend
@every_rank
@pytest.mark.parametrize(
    ("dtype", "iterations", "tolerance"),
    [(np.float32, 1, 1e-5), (np.float32, 2, 3e-5), (np.float64, 1, 1e-12), (np.float64, 2, 1e-12)],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_agrees_with_plain_numpy(backend, rank, dtype, iterations, tolerance, ranks):
    rng, shapes = np.random.default_rng(rank), [(30, 20), (24, 36), (30, 20)]
    starts = [rng.standard_normal((m, rank)) for _, m in shapes]
    plain = [(q, [np.zeros(shape) for _ in range(ranks)]) for q, shape in zip(starts, shapes, strict=True)]
    memory = [[{"q": q.T.astype(dtype)} for q in starts] for _ in range(ranks)]
    residual = [[np.zeros(shape, dtype) for shape in shapes] for _ in range(ranks)]
    for step in range(6):
        grads = [[rng.standard_normal(shape).astype(dtype) for shape in shapes] for _ in range(ranks)]
        given = [[g + e for g, e in zip(*own, strict=True)] for own in zip(grads, residual, strict=True)]
        means, residual, memory = exchange(backend, PowerSGD(rank, iterations=iterations), given, memory, step)
        for i, (q, errors) in enumerate(plain):
            expected, errors, q = plain_power_sgd([g[i] for g in grads], q, errors, iterations)
            plain[i] = q, errors
            assert all(distance(mean[i], expected) < tolerance for mean in means)
            assert all(distance(own[i], e) < tolerance for own, e in zip(residual, errors, strict=True))


# orthonormalise


def orthonormal(backend, *batches):
    ops, to = BACKENDS[backend]
    done = [np.asarray(p) for p in orthonormalise(ops, [to(batch) for batch in batches])]
    return done if len(batches) > 1 else done[0]


def assert_orthonormal(p, tolerance):
    for rows in p:
        np.testing.assert_allclose(rows @ rows.T, np.eye(p.shape[1]), atol=tolerance)


def assert_spans(p, given, tolerance=1e-5):
    """Checks that the basis p reproduces each given row."""
    for basis, rows in zip(p, given, strict=True):
        rows = rows / np.abs(rows).max()
        np.testing.assert_allclose((rows @ basis.T) @ basis, rows, atol=tolerance)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


TOLERANCE = {np.float32: 1e-6, np.float64: 1e-14}
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@every_backend
@every_dtype
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("shape", [(1, 1, 30), (5, 1, 30), (3, 4, 50), (1, 8, 8), (2, 16, 300)])
def test_orthonormal_at_any_scale(backend, dtype, scale, shape):
    given = normal(*shape, dtype=dtype) * dtype(scale)
    p = orthonormal(backend, given)
    assert p.shape == shape and p.dtype == dtype
    assert_orthonormal(p, TOLERANCE[dtype])
    assert_spans(p, given)


@every_backend
@every_dtype
def test_matrices_of_a_batch_are_independent(backend, dtype):
    batch = normal(5, 4, 30, dtype=dtype) * np.array([1, 1e-20, 0, 1e20, 3], dtype)[:, None, None]
    together = orthonormal(backend, batch)
    assert_orthonormal(together, TOLERANCE[dtype])
    for i in range(5):
        np.testing.assert_allclose(together[i], orthonormal(backend, batch[i : i + 1])[0], atol=TOLERANCE[dtype])


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 30), (1, 2, 30), (2, 4, 30), (1, 4, 8), (1, 32, 64), (1, 4, 4), (1, 1, 1)])
def test_zero_matrices_get_an_arbitrary_orthonormal_basis(backend, dtype, shape):
    assert_orthonormal(orthonormal(backend, np.zeros(shape, dtype)), TOLERANCE[dtype])


@every_backend
@every_dtype
@pytest.mark.parametrize("true_rank", [1, 2, 3])
def test_rank_deficient_matrices_keep_their_span(backend, dtype, true_rank):
    given = normal(3, 4, true_rank, dtype=dtype, seed=1) @ normal(3, true_rank, 40, dtype=dtype)
    p = orthonormal(backend, given)
    assert_orthonormal(p, TOLERANCE[dtype])
    assert_spans(p, given)


@every_backend
@every_dtype
@pytest.mark.parametrize("dead", [0, 1, 3])
def test_a_zero_row_among_others(backend, dtype, dead):
    given = normal(2, 4, 40, dtype=dtype)
    given[:, dead] = 0
    p = orthonormal(backend, given)
    assert_orthonormal(p, TOLERANCE[dtype])
    assert_spans(p, given)


@every_backend
@every_dtype
def test_equal_and_nearly_equal_rows(backend, dtype):
    given = np.repeat(normal(1, 1, 40, dtype=dtype), 4, axis=1)
    assert_orthonormal(orthonormal(backend, given), TOLERANCE[dtype])
    for nearly in (1e-3, 1e-5, 1e-7, 1e-9):
        p = orthonormal(backend, given + dtype(nearly) * normal(1, 4, 40, dtype=dtype, seed=1))
        assert_orthonormal(p, TOLERANCE[dtype])


@every_backend
@every_dtype
def test_rows_of_very_different_lengths(backend, dtype):
    given = normal(1, 4, 40, dtype=dtype) * np.array([1e-18, 1e18, 1.0, 1e-9], dtype)[:, None]
    assert_orthonormal(orthonormal(backend, given), TOLERANCE[dtype])


@every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_give_nan_in_their_own_matrix_only(backend, bad):
    given = normal(2, 4, 30)
    given[0, 1, 3] = bad
    with np.errstate(invalid="ignore"):
        alone = orthonormal(backend, given)
        p, other, same_width = orthonormal(backend, given, normal(2, 4, 50), normal(1, 4, 30))
    assert np.isnan(alone[0]).any() and np.isnan(p[0]).any()
    assert_orthonormal(alone[1:], 1e-6)
    for finite in (p[1:], other, same_width):
        assert_orthonormal(finite, 1e-6)


@every_backend
@every_dtype
def test_batches_of_different_shapes_equal_each_alone(backend, dtype):
    shapes = [(2, 4, 30), (1, 1, 50), (3, 2, 7), (1, 4, 4), (2, 4, 300), (1, 2, 300), (1, 1, 1)]
    given = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    given[0][1] = 0  # a zero matrix, whose rows are replaced
    given[4][0, 2] = given[4][0, 1]
    for i, (p, shape) in enumerate(zip(orthonormal(backend, *given), shapes, strict=True)):
        assert p.shape == shape and p.dtype == dtype
        assert_orthonormal(p, TOLERANCE[dtype])
        np.testing.assert_allclose(p, orthonormal(backend, given[i]), atol=10 * TOLERANCE[dtype])


# warm start


@every_backend
def test_a_smaller_rank_uses_the_leading_rows_and_keeps_the_others(backend):
    q = normal(4, 20)
    gradient = normal(30, 20, seed=1)
    cut, _, [[kept]] = exchange(backend, PowerSGD(1), [[gradient]], [[{"q": q}]])
    expected, _, _ = plain_power_sgd([gradient], q[:1].T, [0])
    assert distance(cut[0][0], expected) < 1e-5
    assert kept["q"].shape == (4, 20) and not np.array_equal(kept["q"][0], q[0])
    np.testing.assert_array_equal(kept["q"][1:], q[1:])


@every_backend
def test_a_larger_rank_keeps_the_rows_and_adds_random_ones(backend):
    q, gradient = normal(1, 20), normal(30, 20, seed=1)
    spec, context = PowerSGD(4), Context(("l",), "float32", 3, 0, 0, 1)
    ops, to = BACKENDS[backend]
    start = np.asarray(spec.start(ops, to(gradient), {"q": to(q)}, "l", context))
    assert start.shape == (4, 20)
    np.testing.assert_array_equal(start[:1], q)
    assert np.linalg.matrix_rank(start) == 4
    other = np.asarray(spec.start(ops, to(gradient), {"q": to(q)}, "m", context))
    assert not np.array_equal(start[1:], other[1:])
    initial = np.asarray(spec.initial_memory(ops, to(gradient), "l", 0)["q"])
    np.testing.assert_array_equal(start[1:], initial[1:])
    np.testing.assert_array_equal(initial, np.asarray(spec.start(ops, to(gradient), {}, "l", context)))
    risen, _, _ = exchange(backend, spec, [[of_rank(4, 30, 20)[0]]], [[{"q": q}]])
    assert distance(risen[0][0], of_rank(4, 30, 20)[0]) < EXACT


@every_backend
def test_memory_has_as_many_rows_as_the_rank_or_is_empty_without_warm_start(backend):
    gradient = [[normal(30, 20), normal(8, 3, 3)]]
    _, _, ((first, second),) = exchange(backend, PowerSGD(4), gradient)
    assert first["q"].shape == (4, 20) and second["q"].shape == (4, 9)
    _, _, ((first, second),) = exchange(backend, PowerSGD(4, warm_start=False), gradient, [[first, second]])
    assert first == second == {}


def repeated(spec, matrix, steps, backend="numpy"):
    memory = None
    for step in range(steps):
        means, _, memory = exchange(backend, spec, [[matrix]], memory, step)
    return means[0][0]


@every_backend
@every_rank
def test_a_warm_start_converges_to_the_best_matrix_of_its_rank(backend, rank):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((30, 20)))
    v, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    values = 0.7 ** np.arange(20)
    matrix = ((u * values) @ v.T).astype(np.float32)
    best = (u[:, :rank] * values[:rank]) @ v[:, :rank].T
    assert distance(repeated(PowerSGD(rank), matrix, 40, backend), best) < 1e-5
    assert distance(repeated(PowerSGD(rank), matrix, 1, backend), best) > 1e-2  # one iteration does not
    assert distance(repeated(PowerSGD(rank, warm_start=False), matrix, 40, backend), best) > 1e-2


def test_iterations_in_one_step_are_as_good_as_steps():
    matrix, q = normal(30, 20), normal(2, 20, seed=1)
    (once,), _, _ = exchange("numpy", PowerSGD(2, iterations=3), [[matrix]], [[{"q": q}]])
    memory = [[{"q": q}]]
    for _ in range(3):
        (thrice,), _, memory = exchange("numpy", PowerSGD(2), [[matrix]], memory)
    assert distance(once[0], thrice[0]) < 1e-5


@every_rank
@pytest.mark.parametrize("shape", [(30, 20), (12, 40)])
def test_a_converged_warm_start_keeps_delta(rank, shape):
    matrix = normal(*shape)
    left = np.sum((matrix - repeated(PowerSGD(rank), matrix, 30)) ** 2)
    assert left <= (1 - PowerSGD(rank).delta(shape)) * np.sum(matrix**2)
