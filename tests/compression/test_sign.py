"""EFSignSGD against the formulas, and its bytes on the wire."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_accordion import EFSignSGD
from hvd_accordion.comm import simulation
from hvd_accordion.compression import Context, exchange
from hvd_accordion.compression.sign import sign_code
from hvd_accordion.ops import numpy as ops

SHAPES = [(5, 7), (1, 3), (), (16, 4), (2, 3, 11)]


def signs(x: np.ndarray) -> np.ndarray:
    """||x||_1 / d sign(x), with sign(0) = 1."""
    return np.where(x >= 0, 1.0, -1.0) * np.float32(np.mean(np.abs(x)))


def values(ranks: int, seed: int = 0, shapes=SHAPES) -> list[list[np.ndarray]]:
    """Of each rank; each layer is a hundred times as large as the one before it."""
    rng = np.random.default_rng(seed)
    return [[100.0**i * rng.standard_normal(shape) for i, shape in enumerate(shapes)] for _ in range(ranks)]


def exchanged(grads, residual, step=0):
    names = tuple(map(str, range(len(grads[0]))))
    contexts = [Context(names, "float64", step, 0, rank, len(grads)) for rank in range(len(grads))]
    rounds = zip(grads, residual, contexts, strict=True)
    return simulation.run([exchange(EFSignSGD(), ops, g, e, [{} for _ in g], ctx) for g, e, ctx in rounds])[0]


def test_two_ranks_apply_the_mean_of_their_signs():
    residual = values(2, seed=9)
    for step in range(5):
        grads = values(2, step)
        v = [[g + e for g, e in zip(*own, strict=True)] for own in zip(grads, residual, strict=True)]
        done = exchanged(grads, residual, step)
        for rank, own in enumerate(done):
            for i, x in enumerate(v[rank]):
                np.testing.assert_allclose(own.mean[i], (signs(v[0][i]) + signs(v[1][i])) / 2, rtol=1e-12)
                np.testing.assert_allclose(own.residual[i], x - signs(x), rtol=0, atol=1e-12 * np.abs(x).max())
        residual = [own.residual for own in done]


@pytest.mark.parametrize("ranks", [3, 5, 16])
def test_more_ranks_code_each_slice_of_each_layer_by_itself(ranks):
    """The residual holds what the first coding leaves; that of a slice's owner also the second's error, n times."""
    grads = values(ranks)
    done = exchanged(grads, [[np.zeros(shape) for shape in SHAPES] for _ in range(ranks)])
    for i, shape in enumerate(SHAPES):
        flat = [own[i].reshape(-1) for own in grads]
        width = -(-flat[0].size // (8 * ranks)) * 8
        for owner, start in enumerate(range(0, flat[0].size, width)):
            cut = slice(start, start + width)
            sent = [signs(x[cut]) for x in flat]
            mean = signs(np.mean(sent, axis=0))
            for rank, own in enumerate(done):
                left = flat[rank][cut] - sent[rank] + (rank == owner) * ranks * (np.mean(sent, axis=0) - mean)
                np.testing.assert_allclose(own.mean[i].reshape(-1)[cut], mean, rtol=1e-6)
                np.testing.assert_allclose(own.residual[i].reshape(-1)[cut], left, rtol=0, atol=1e-6 * ranks * 100.0**i)
        assert done[0].mean[i].shape == shape


@pytest.mark.parametrize(
    ("x", "delta"),
    [
        (np.array([3.0, 0.0, 0.0, 0.0]), 1 / 4),  # the bound
        (np.array([-2.0, 2.0, 2.0, -2.0, 2.0]), 1.0),
        (np.random.default_rng(0).standard_normal(100_000), 2 / np.pi),
    ],
)
def test_the_contraction_is_the_ratio_of_norms(x, delta):
    ratio = np.sum(np.abs(x)) ** 2 / (x.size * np.sum(x**2))
    (done,) = exchanged([[x]], [[np.zeros_like(x)]])
    left = np.sum(done.residual[0] ** 2) / np.sum(x**2)
    assert 1 - left == pytest.approx(ratio, abs=1e-6) == pytest.approx(delta, abs=5e-3)
    assert ratio >= EFSignSGD().delta(x.shape) * (1 - 1e-12)


def test_the_bytes_are_scales_then_one_bit_a_value():
    code = sign_code([3, 9], 1)
    x = np.array([[1.0, -2.0, 3.0, *[0.0] * 5, *[-0.5] * 8, 0.5, *[0.0] * 7]])
    encoded = code.encode(ops, x, 0)
    assert encoded[0, :8].view("<f4").tolist() == [2.0, 0.5]
    assert encoded[0, 8:].tolist() == [0b11111101, 0b00000000, 0b11111111]  # padding is 0, which counts as positive
    np.testing.assert_array_equal(code.decode(ops, encoded, x)[0, [0, 1, 2, 8, 16]], [2, -2, 2, -0.5, 0.5])


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_layer_of_zeros_stays_zero(ranks):
    grads = [[np.zeros(9), np.ones(9)] for _ in range(ranks)]
    for own in exchanged(grads, [[np.zeros(9), np.zeros(9)] for _ in range(ranks)]):
        assert not own.mean[0].any() and not own.residual[0].any()
        np.testing.assert_array_equal(own.mean[1], 1.0)


def test_residuals_are_no_larger_for_the_second_coding():
    """Also where one scale fits few values: delta is 0.24 here, and the owner's residual holds its errors n times."""
    factors = np.exp(np.random.default_rng(1).standard_normal(200))
    average = {}
    for ranks in (2, 8):
        norms, residual = [], [[np.zeros(200)] for _ in range(ranks)]
        for step in range(400):
            done = exchanged([[factors * x for x in own] for own in values(ranks, step, [(200,)])], residual, step)
            residual = [own.residual for own in done]
            norms.append(max(np.linalg.norm(own.residual[0]) for own in done))
        average[ranks] = np.mean(norms[100:])
    assert average[8] <= 1.5 * average[2]
