"""ECLK and its siblings on real ranks: numpy's trajectory, equal on all ranks, resumed bit for bit, errors on all alike."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hvd_accordion.torch as hvd
from hvd_accordion import TopK
from tests.parallel import convex
from tests.parallel.workers.torch.common import assert_ranks_equal


def everywhere_equal(params):
    for p in params:
        assert_ranks_equal(p.detach())


def mine():
    """This rank's rows and labels."""
    return [torch.from_numpy(v) for v in convex.data(hvd.rank())]


class Problem:
    def __init__(self, case, **more):
        name, compression, arguments, self.sampled = convex.CASES[case]
        given = {} if compression is None else {"compression": compression}
        self.x, self.labels = mine()
        self.params = [torch.nn.Parameter(torch.from_numpy(v)) for v in convex.start()]
        self.optimizer = getattr(hvd, name)(self.params, **given, **{**arguments, **more})

    def loss(self, rows=slice(None)):
        weight, bias = self.params
        loss = F.cross_entropy(self.x[rows] @ weight + bias, self.labels[rows])
        loss = loss + convex.RIDGE / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss.detach()

    def step(self, step):
        rows = convex.sample(hvd.rank(), step)
        return self.optimizer.step((lambda: self.loss(rows)) if self.sampled else self.loss, self.loss)

    def values(self):
        return [p.detach().numpy().copy() for p in self.params]


@pytest.mark.parametrize("case", convex.CASES)
def test_the_trajectory_is_that_of_simulated_ranks(case):
    problem = Problem(case)
    for step in range(convex.STEPS):
        problem.step(step)
    expected = convex.simulated(case, hvd.size())
    assert convex.distance(problem.values(), expected.x) < 1e-8
    with problem.optimizer.solution():
        assert convex.distance(problem.values(), expected.solution) < 1e-8
        everywhere_equal(problem.params)
    everywhere_equal(problem.params)
    assert problem.optimizer.stats.sent_bytes == expected.sent_bytes
    regimes = {row.regime for row in problem.optimizer.compression_report()}
    assert ("relaxed" in regimes) == (case == "eclk-accordion")


@pytest.mark.parametrize("case", ["eclk-topk", "eclk-topk-learnt", "eclk-powersgd", "eclk-accordion", "ef21"])
def test_resumed_bit_for_bit(case, tmp_path):
    through = Problem(case)
    for step in range(12):
        through.step(step)
        if step == 6:
            torch.save(through.optimizer.state_dict(), tmp_path / "optimizer.pt")
            values = [p.detach().clone() for p in through.params]
    resumed = Problem(case)
    with torch.no_grad():
        for p, value in zip(resumed.params, values, strict=True):
            p.copy_(value)
    hvd.broadcast_optimizer_state(resumed.optimizer, root_rank=0)  # sends nothing
    resumed.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for step in range(7, 12):
        resumed.step(step)
    for p, other in zip(through.params, resumed.params, strict=True):
        assert torch.equal(p, other)
    assert resumed.optimizer.stats.sent_bytes == through.optimizer.stats.sent_bytes


def test_smoothness_is_the_hessians_largest_eigenvalue():
    problem = Problem("eclk-topk")

    def value(flat):
        weight, bias = flat[: problem.params[0].numel()].view_as(problem.params[0]), flat[problem.params[0].numel() :]
        return F.cross_entropy(problem.x @ weight + bias, problem.labels) + convex.RIDGE / 2 * flat.square().sum()

    flat = torch.zeros(sum(p.numel() for p in problem.params), dtype=torch.float64)
    hessian = hvd.allreduce(torch.autograd.functional.hessian(value, flat), name="hessian")
    found = hvd.estimate_smoothness(problem.loss, problem.params, iterations=200)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.02)
    assert all((p == 0).all() for p in problem.params)


def test_ranks_that_start_apart_raise_the_same_error():
    problem = Problem("eclk-topk")
    with torch.no_grad():
        problem.params[1][0] = hvd.rank()
    with pytest.raises(ValueError, match=r"Ranks are configured differently: .*broadcast_parameters"):
        problem.step(0)


def test_ranks_with_other_shapes_raise_the_same_error():
    params = [torch.nn.Parameter(torch.zeros(3 + hvd.rank(), dtype=torch.float64))]
    optimizer = hvd.ECLK(params, TopK(0.4), smoothness=1.0)
    with pytest.raises(ValueError, match=r"Ranks are configured differently: .*parameter 0"):
        optimizer.step(lambda: params[0].sum(), lambda: params[0].sum())


def test_only_members_of_a_process_set_make_one(first):
    if hvd.rank() == 0:
        problem = Problem("eclk-topk", process_set=first)
        for step in range(3):
            problem.step(step)
        assert convex.distance(problem.values(), convex.simulated("eclk-topk", 1, steps=3).x) < 1e-8
    else:
        with pytest.raises(ValueError, match="process_set must include this rank"):
            Problem("eclk-topk", process_set=first)
    hvd.barrier()  # who is done must not end Horovod under the others


def test_missing_closures():
    problem = Problem("eclk-topk")
    with pytest.raises(TypeError, match="full_closure must be a function"):
        problem.optimizer.step(problem.loss)
    with pytest.raises(TypeError, match="closure must be a function"):
        problem.optimizer.step()
    Problem("ec-sgd").optimizer.step(problem.loss)


def test_an_error_in_a_closure_leaves_x_where_it_was():
    problem = Problem("eclk-topk-learnt")
    for step in range(5):
        problem.step(step)
    before, calls = problem.values(), []

    def fails():
        calls.append(None)
        if len(calls) == 2:  # at w
            raise RuntimeError("no more data")
        return problem.loss()

    with pytest.raises(RuntimeError, match="no more data"):
        problem.optimizer.step(fails, problem.loss)
    assert all(np.array_equal(a, b) for a, b in zip(before, problem.values(), strict=True))
    problem.step(5)
    everywhere_equal(problem.params)


def test_dropout_and_batch_normalisation_see_the_sample_once():
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 5)
    )
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    optimizer = hvd.ECLK(net.named_parameters(), {"*weight": TopK(0.2)}, lr=0.05, theta1=0.3, p=0.2)
    masks, (x, labels) = [], mine()
    x, few = x.float(), convex.SAMPLE
    net[2].register_forward_hook(lambda module, given, out: masks.append((out == 0).clone()))

    def closure():
        loss = F.cross_entropy(net(x[:few]), labels[:few])
        loss.backward()
        return loss.detach()

    def full():
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        return loss.detach()

    for step in range(4):
        masks.clear()
        before = int(net[1].num_batches_tracked)
        optimizer.step(closure, full)
        assert int(net[1].num_batches_tracked) == before + 1
        first, second = [m for m in masks if len(m) == few]
        assert torch.equal(first, second) and first.any()
        assert step or len(masks) == 3
    everywhere_equal(net.parameters())
