"""Every compression on real ranks: bit-equal, conserving, equal to the simulated cluster."""

import numpy as np
import pytest
import torch
from common import SPECS, assert_ranks_equal, flat, model, sgd, train

import hvd_accordion.torch as hvd
from hvd_accordion import PowerSGD, TopK, cluster
from hvd_accordion.compression import Context, exchange
from hvd_accordion.ops import numpy as ops


@pytest.mark.parametrize("name", SPECS)
def test_ranks_stay_bit_equal(name):
    net = model()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters(), compression=SPECS[name], steps_per_epoch=6)
    train(net, optimizer, range(50))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert_ranks_equal(flat(net), name)
    assert optimizer.stats.steps == 50
    assert optimizer.stats.sent_bytes <= optimizer.stats.dense_bytes
    for key in ("step", "epoch"):
        assert_ranks_equal(torch.tensor([getattr(optimizer._hvd.controller, key)]), key)


def test_a_gradient_is_conserved():
    """What was applied and what the residuals still hold is what was given, on every rank, across level changes."""
    shape = (96, 64)
    levels = [PowerSGD(4), PowerSGD(1), TopK(0.02), None, PowerSGD(2)]
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, [("w", weight)], compression=levels[0])
    controller = optimizer._hvd.controller
    given = torch.zeros(shape, dtype=torch.float64)
    for step in range(50):
        from hvd_accordion import Dense

        controller.adopt({"w": levels[step // 10] or Dense()})
        controller.set_layers(list(controller.layers.values()))
        optimizer._hvd._check()
        g = torch.randn(shape, generator=torch.Generator().manual_seed(31 * step + hvd.rank()))
        given += hvd.allreduce(g.double())
        optimizer.zero_grad()
        (weight * g).sum().backward()
        optimizer.step()
        held = hvd.allreduce(optimizer._hvd.residual["w"].double())
        error = (-weight.detach().double() + held - given).norm() / given.norm()
        assert error < 1e-6, (step, error)
    assert_ranks_equal(weight.detach())


@pytest.mark.parametrize("name", [n for n in SPECS if "accordion" not in n and n not in ("globs", "dense")])
def test_equals_the_simulated_cluster(name):
    """Same gradients, seeds and steps: torch over Horovod gives what numpy gives in one process."""
    spec, n = SPECS[name], hvd.size()
    shapes = {"a": (40, 36), "b": (64, 3, 3, 5), "c": (40, 36)}
    params = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in shapes.items()}
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, params.items(), compression=spec)
    names = tuple(reversed(shapes))
    residual = [[np.zeros(shapes[k], np.float32) for k in names] for _ in range(n)]
    memory = [[{} for _ in names] for _ in range(n)]
    for step in range(6):
        rng = np.random.default_rng(step)
        spectrum = {k: np.geomspace(1, 1e-2, min(s[0], int(np.prod(s[1:])))) for k, s in shapes.items()}
        grads = []
        for _ in range(n):
            one = {}
            for k, s in shapes.items():  # a falling spectrum, as gradients have: noise alone has no leading directions
                m = rng.standard_normal((s[0], int(np.prod(s[1:]))))
                u, _, v = np.linalg.svd(m, full_matrices=False)
                one[k] = ((u * spectrum[k]) @ v).reshape(s).astype(np.float32)
            grads.append(one)
        if spec.active(step):
            contexts = [Context(names, "float32", step, 0, r, n) for r in range(n)]
            rounds = [
                exchange(
                    spec,
                    ops,
                    [grads[r][k] for k in names],
                    residual[r] if spec.error_feedback else None,
                    memory[r],
                    contexts[r],
                )
                for r in range(n)
            ]
            done, _ = cluster.run(rounds)
            expected = dict(zip(names, done[0].mean, strict=True))
            residual, memory = [d.residual for d in done], [d.memory for d in done]
        else:
            expected = {k: np.mean([g[k] for g in grads], axis=0) for k in names}
        optimizer.zero_grad()
        sum((params[k] * torch.from_numpy(grads[hvd.rank()][k])).sum() for k in names).backward()
        optimizer.synchronize()
        for k in names:
            got = params[k].grad.numpy()
            scale = np.abs(expected[k]).max()
            assert np.abs(got - expected[k]).max() <= 1e-5 * scale, (name, step, k)
        with optimizer.skip_synchronize():
            optimizer.step()
