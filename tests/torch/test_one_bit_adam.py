"""1-bit Adam and 0/1 Adam on simulated ranks: the papers' formulas, equal ranks, resumption, what they refuse."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Dense, TopK
from hvd_accordion.torch.optim.one_bit_adam import SIGNS
from tests.optim import adam_oracle
from tests.torch.simulated_ranks import SimulatedRanks

TOP = TopK(adam_oracle.RATIO, algorithm="allgather")
NUMBERS = {"betas": (0.9, 0.99), "weight_decay": 0.1}
STEPS = 30
INTERVALS = {"warmup_steps": 9, "kappa": 3, "double_every": 4, "max_interval": 3}  # of a 0/1 Adam
DENSE, LOCAL = {0, 1, 2, 3, 5, 7}, {13, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29}


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


def on_ranks(function, size=2):
    with pytest.MonkeyPatch.context() as patch:
        cluster = SimulatedRanks(size, patch)
        return cluster.run(lambda rank: function(rank, cluster.process_sets[rank]))


class Problem:
    """The oracle's, in torch."""

    def __init__(self, kind, rank, process_set, dtype=torch.float64, **arguments):
        self.rank = rank
        self.params = {k: torch.nn.Parameter(torch.from_numpy(x).to(dtype)) for k, x in adam_oracle.start().items()}
        arguments = {"lr": 1.0, "compression": TOP, **NUMBERS, **arguments}
        self.optimizer = getattr(hvd, kind)(self.params.items(), process_set=process_set, **arguments)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, adam_oracle.rate)

    def step(self, step):
        for name, grad in adam_oracle.gradient(self.values(), self.rank, step).items():
            self.params[name].grad = torch.from_numpy(grad).to(self.params[name].dtype)
        self.optimizer.step()
        self.schedule.step()

    def values(self):
        return {name: p.detach().double().numpy().copy() for name, p in self.params.items()}

    def run(self, steps):
        found = []
        for step in steps:
            self.step(step)
            found.append(self.values())
        return found


def largest_difference(ours, expected):
    return max(np.abs(ours[name] - expected[name]).max() for name in expected)


def equal(ours, other):
    return all(np.array_equal(x, other[name]) for name, x in ours.items())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("compressed", [True, False])
def test_one_bit_adam_is_the_papers(size, compressed):
    arguments = {"warmup_steps": 10, "compression": TOP if compressed else Dense()}
    found = on_ranks(lambda *place: Problem("OneBitAdam", *place, **arguments).run(range(STEPS)), size)
    oracle = adam_oracle.Oracle(size, set(range(10)), set(range(10, STEPS)), compressed=compressed and size > 1)
    for step, expected in enumerate(oracle.run(STEPS)):
        for rank in range(size):
            assert largest_difference(found[rank][step], expected[rank]) < 1e-10, step
            assert equal(found[0][step], found[rank][step])


def test_zero_one_adam_is_the_papers():
    found = on_ranks(lambda *place: Problem("ZeroOneAdam", *place, **INTERVALS).run(range(STEPS)), 3)
    oracle = adam_oracle.Oracle(3, DENSE, set(range(STEPS)) - DENSE - LOCAL)
    for step, expected in enumerate(oracle.run(STEPS)):
        for rank in range(3):
            assert largest_difference(found[rank][step], expected[rank]) < 1e-10, step
            assert equal(found[0][step], found[rank][step]) == (rank == 0 or step not in LOCAL - {29}), (
                step
            )  # whose rate is 0


def test_without_compression_and_freezing_it_is_adamw_on_the_mean():
    """Two groups of their own numbers, a schedule, fp32."""
    groups = [{"betas": (0.8, 0.95), "weight_decay": 0.0}, {"eps": 1e-3}]

    def script(rank, process_set):
        params = [torch.nn.Parameter(torch.from_numpy(x).float()) for x in adam_oracle.start().values()]
        others = copy.deepcopy(params)
        given = lambda ps: [{"params": [p], **group} for p, group in zip(ps, groups, strict=True)]  # noqa: E731
        ours = hvd.OneBitAdam(given(params), 0.05, compression=Dense(), warmup_steps=10**6, process_set=process_set)
        adamw = torch.optim.AdamW(given(others), 0.05, weight_decay=0.0)
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, 20) for one in (ours, adamw)]
        for step in range(20):
            point = dict(zip(adam_oracle.SHAPES, (p.detach().numpy() for p in others), strict=True))
            grads = [adam_oracle.gradient(point, r, step) for r in range(2)]
            for name, p, other in zip(adam_oracle.SHAPES, params, others, strict=True):
                p.grad = torch.from_numpy(grads[rank][name]).float()
                other.grad = torch.from_numpy((grads[0][name] + grads[1][name]) / 2).float()
            for one in (ours, adamw, *schedules):
                one.step()
            for p, other in zip(params, others, strict=True):
                torch.testing.assert_close(p, other, rtol=0, atol=1e-6)

    on_ranks(script)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("OneBitAdam", {"warmup_steps": 4}), ("ZeroOneAdam", INTERVALS)],
    ids=["one-bit", "zero-one"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_bit_for_bit(kind, arguments, dtype, tmp_path):
    """Within an interval of 0/1 Adam."""

    def script(rank, process_set):
        problem, file = Problem(kind, rank, process_set, dtype, **arguments), tmp_path / f"{rank}.pt"
        problem.run(range(19))
        parts = {"optimizer": problem.optimizer, "schedule": problem.schedule}
        torch.save({"params": problem.params, **{k: part.state_dict() for k, part in parts.items()}}, file)
        through = problem.run(range(19, STEPS))

        resumed, saved = Problem(kind, rank, process_set, dtype, **arguments), torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, p in resumed.params.items():
                p.copy_(saved["params"][name])
        resumed.optimizer.load_state_dict(saved["optimizer"])
        resumed.schedule.load_state_dict(saved["schedule"])
        again = resumed.run(range(19, STEPS))
        assert all(equal(x, other) for x, other in zip(through, again, strict=True))
        assert vars(resumed.optimizer.stats) | {"exchange_seconds": 0} == vars(problem.optimizer.stats) | {
            "exchange_seconds": 0
        }

    on_ranks(script)


def test_a_broadcast_gives_everyone_the_roots_state():
    def script(rank, process_set):
        problem = Problem("ZeroOneAdam", rank, process_set, **INTERVALS)
        problem.run(range(19))
        fresh = Problem("ZeroOneAdam", rank, process_set, **INTERVALS)
        if rank == 1:
            fresh.optimizer.load_state_dict(problem.optimizer.state_dict())
        hvd.broadcast_optimizer_state(fresh.optimizer, root_rank=1)
        return fresh.optimizer.state_dict()

    mine, root = on_ranks(script)
    assert (
        mine["hvd_accordion"]["counts"] == root["hvd_accordion"]["counts"]
        and root["hvd_accordion"]["counts"]["step"] == 19
    )
    assert mine["param_groups"] == root["param_groups"]
    for i, kept in root["state"].items():
        assert set(kept) == {"exp_avg", "exp_avg_sq", "mean", "anchor"}
        assert all(torch.equal(x, mine["state"][i][key]) for key, x in kept.items())
    ours, theirs = (state["hvd_accordion"]["momentum"]["residual"] for state in (mine, root))
    assert ours.keys() == theirs.keys() == {"weight"}
    assert theirs["weight"].any() and not ours["weight"].any()


def test_state_takes_the_published_memory():
    """1-bit Adam: two moments and a residual. 0/1 Adam: a mean and an anchor besides, between exchanges."""

    def floats(optimizer):
        state = optimizer.state_dict()
        tensors = [*(x for kept in state["state"].values() for x in kept.values())]
        tensors += [x for key in ("dense", "momentum") for x in state["hvd_accordion"][key]["residual"].values()]
        return sum(x.numel() for x in tensors)

    def script(rank, process_set):
        found = {}
        for kind, arguments in (("OneBitAdam", {"warmup_steps": 4}), ("ZeroOneAdam", INTERVALS)):
            problem = Problem(kind, rank, process_set, **arguments)
            for step in range(STEPS):
                problem.step(step)
                found[kind, step] = floats(problem.optimizer)
        return found

    found, _ = on_ranks(script)
    matrix, vector = (int(np.prod(shape)) for shape in adam_oracle.SHAPES.values())
    moments = 2 * (matrix + vector)
    assert found["OneBitAdam", 3] == moments
    assert all(found["OneBitAdam", step] == moments + matrix for step in range(4, STEPS))
    more = {step: 2 * (matrix + vector) * (step in LOCAL) for step in range(9, STEPS)}
    assert all(found["ZeroOneAdam", step] == moments + matrix + more[step] for step in range(9, STEPS))


def test_weights_without_gradients_stay():
    def script(rank, process_set):
        problem = Problem("OneBitAdam", rank, process_set, warmup_steps=5, compression=SIGNS, weight_decay=0.0)
        before = problem.values()["weight"][:, -1]
        problem.run(range(STEPS))
        assert np.array_equal(problem.values()["weight"][:, -1], before)
        p = problem.params["weight"]
        p.grad = torch.ones_like(p)  # too late: its second moment is frozen
        problem.optimizer.step()
        assert np.array_equal(problem.values()["weight"][:, -1], before)

    on_ranks(script)


@pytest.mark.parametrize("kind", ["OneBitAdam", "ZeroOneAdam"])
def test_the_warmup_ends_by_measurement_on_all_ranks_alike(kind):
    def script(rank, process_set):
        problem = Problem(kind, rank, process_set, betas=(0.9, 0.95))
        ends = []
        for step in range(120):
            for p in problem.params.values():  # of a size that becomes steady
                p.grad = torch.full_like(p, 1 + 2 * 0.5**step)
            problem.optimizer.step()
            ends += [step + 1] if not problem.optimizer.warming_up else []
        return ends[0]

    first, second = on_ranks(script)
    assert first == second and 30 < first < 110 and first % 2 == 0


def test_steps_and_bytes_are_counted():
    def script(rank, process_set):
        problem = Problem("ZeroOneAdam", rank, process_set, torch.float32, **INTERVALS)
        optimizer, sent = problem.optimizer, []
        assert {row.spec for row in optimizer.compression_report()} == {"Dense()"}
        for step in range(STEPS):
            before = optimizer.stats.sent_bytes
            problem.step(step)
            sent.append(optimizer.stats.sent_bytes - before)
        return sent, optimizer.stats, optimizer.compression_report()

    (sent, stats, report), _ = on_ranks(script)
    dense = 4 * sum(int(np.prod(shape)) for shape in adam_oracle.SHAPES.values())
    momentum = next(sent[step] for step in range(STEPS) if step not in DENSE | LOCAL)
    assert momentum < dense / 5
    assert sent == [dense if t in DENSE else 0 if t in LOCAL else momentum for t in range(STEPS)]
    assert stats.steps == STEPS and stats.updates == STEPS - len(LOCAL) and stats.dense_bytes == STEPS * dense
    assert report.sent_bytes == pytest.approx(momentum / 3) and "each 3 steps" in str(report)


class Log:
    def __init__(self):
        self.params, self.epochs = {}, {}

    def start(self, params):
        self.params = dict(params)

    def log_epoch(self, epoch, metrics):
        self.epochs[epoch] = dict(metrics)

    def log_window(self, window, layers):
        raise AssertionError("nothing adapts")


def test_the_logger_hears_of_each_epoch_on_rank_0():
    def script(rank, process_set):
        log = Log()
        problem = Problem("OneBitAdam", rank, process_set, warmup_steps=2, logger=log)
        for epoch in range(2):
            problem.run(range(2 * epoch, 2 * epoch + 2))
            problem.optimizer.end_epoch()
        return log

    log, other = on_ranks(script)
    assert log.params["optimizer"] == "OneBitAdam" and log.params["compression"] == str(TOP)
    assert log.epochs[0]["compression_ratio"] == 1.0 and log.epochs[1]["compression_ratio"] > 5
    assert not other.params and not other.epochs


def test_common_parameters_are_those_of_the_last_exchange():
    def script(rank, process_set):
        problem = Problem("ZeroOneAdam", rank, process_set, **INTERVALS)
        history = problem.run(range(19))  # the last two are local
        with problem.optimizer.common_parameters():
            assert equal(problem.values(), history[16])
        assert equal(problem.values(), history[18]) and not equal(history[18], history[16])

    on_ranks(script)


@pytest.mark.parametrize("unscales", [True, False])
def test_under_a_grad_scaler_all_ranks_skip_alike(unscales):
    def script(rank, process_set):
        scaled, plain = (Problem("OneBitAdam", rank, process_set, torch.float32, warmup_steps=4) for _ in range(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
        x = torch.zeros(1, requires_grad=True)
        done = 0
        for step in range(14):
            grads = adam_oracle.gradient(scaled.values(), rank, step)
            for name, grad in grads.items():
                scaled.params[name].grad = torch.from_numpy(grad).float() * scaler.get_scale()
                plain.params[name].grad = torch.from_numpy(grad).float()
            overflows = step in (2, 9)
            if overflows and rank == 1:
                scaled.params["bias"].grad[0] = float("inf")
            scaler.scale(x)  # a scaler makes its scale when it first scales
            if unscales:
                scaler.unscale_(scaled.optimizer)
            before = scaled.values()
            scaler.step(scaled.optimizer)
            scaler.update()
            if overflows:
                assert equal(before, scaled.values())
                continue
            plain.optimizer.step()
            done += 1
            assert equal(plain.values(), scaled.values())
        assert scaled.optimizer.stats.steps == done == 12
        return scaler.get_scale()

    scales = on_ranks(script)
    assert scales[0] > scales[1]  # each rank's own


def test_what_cannot_work_is_refused():
    def script(rank, process_set):
        problem = Problem("OneBitAdam", rank, process_set, warmup_steps=2)
        with pytest.raises(ValueError, match="must not average by itself, as OneBitAdam does"):
            hvd.DistributedOptimizer(problem.optimizer)
        with pytest.raises(RuntimeError, match="takes no more parameters"):
            problem.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        with pytest.raises(ValueError, match="state_dict must be that of a OneBitAdam"):
            problem.optimizer.load_state_dict(torch.optim.AdamW(problem.params.values()).state_dict())
        embedding = torch.nn.Embedding(4, 3, sparse=True)
        optimizer = hvd.OneBitAdam(embedding.parameters(), process_set=process_set)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match="must be dense, got a sparse one"):
            optimizer.step()
        with pytest.raises(ValueError, match="Ranks are configured differently"):
            Problem("OneBitAdam", rank, process_set, compression=TopK(0.1 * (1 + rank)))

    on_ranks(script)


def test_ranks_with_other_schedules_are_refused():
    def script(rank, process_set):
        with pytest.raises(ValueError, match=r"Ranks are configured differently: .*warmup_steps"):
            Problem("OneBitAdam", rank, process_set, warmup_steps=2 + rank)

    on_ranks(script)


def test_closures_frozen_parameters_and_missing_gradients():
    def script(rank, process_set):
        problem = Problem("OneBitAdam", rank, process_set, warmup_steps=2)
        weight, bias = problem.params["weight"], problem.params["bias"]

        def closure():
            problem.optimizer.zero_grad()
            loss = weight.sum() * (rank + 1)
            loss.backward()
            return loss.detach()

        before = problem.values()
        assert problem.optimizer.step(closure) == pytest.approx(before["weight"].sum() * (rank + 1))
        assert not equal(before, problem.values())  # without a gradient of bias
        weight.requires_grad_(False)
        before = problem.values()["weight"]
        for _ in range(3):
            bias.grad, weight.grad = torch.ones_like(bias), None
            problem.optimizer.step()
        assert np.array_equal(problem.values()["weight"], before)

    on_ranks(script)
