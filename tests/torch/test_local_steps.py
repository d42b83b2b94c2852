"""Local steps in torch on simulated ranks: against numpy, bit-equal among ranks, resumed, refused."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import hvd_accordion.torch as hvd
from hvd_accordion import (
    QSGD,
    Accordion,
    AccordionBatchSize,
    AccordionSteps,
    Auto,
    AutoSteps,
    Dense,
    EFSignSGD,
    LocalSteps,
    PowerSGD,
    TopK,
)
from hvd_accordion.torch.local_steps.clock import Clock
from tests.torch.simulated_ranks import HostileTransport, SimulatedRanks

LR = 0.1
SHAPES = {"a": (30, 40), "b": (40,), "c": (40, 30)}
NESTEROV = functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


def on_ranks(function, size=2, **options):
    with pytest.MonkeyPatch.context() as patch:
        cluster = SimulatedRanks(size, patch, **options)
        return cluster.run(lambda rank: function(rank, cluster.process_sets[rank]))


def start():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def target(rank, step, name):
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1000 * step + 10 * rank + ord(name[0])))


def gradients(params, rank, step):
    """Of 1/2 ||p - target||^2."""
    for name, p in params.items():
        p.grad = p.detach() - target(rank, step, name)


def wrapped(params, process_set, local_steps, base=torch.optim.SGD, rate=LR, **options):
    options = {"compression": Dense(), **options}
    optimizer = base(params.values(), rate)
    return hvd.DistributedOptimizer(
        optimizer, params.items(), process_set=process_set, local_steps=local_steps, **options
    )


def trained(rank, process_set, local_steps, steps=12, ends=True, **options):
    params = start()
    optimizer = wrapped(params, process_set, local_steps, **options)
    for step in range(steps):
        gradients(params, rank, step)
        optimizer.step()
    if ends:
        optimizer.end_round()
    return params, optimizer


def numpy_ranks(size, steps, follow):
    """SGD of each rank by itself; `follow(step, x)` changes the ranks' parameters after a step."""
    x = [{name: p.detach().numpy().copy() for name, p in start().items()} for _ in range(size)]
    for step in range(steps):
        for rank, mine in enumerate(x):
            for name in mine:
                mine[name] = mine[name] - np.float32(LR) * (mine[name] - target(rank, step, name).numpy())
        follow(step + 1, x)
    return x


def outer_step(anchor, mean, momentum, outer):
    """Of one layer: DiLoCo's Nesterov step, or the plain mean."""
    if not outer:
        return anchor - mean
    momentum[:] = 0.9 * momentum + mean
    return anchor - 0.7 * (mean + 0.9 * momentum)


@pytest.mark.parametrize("outer", [None, NESTEROV], ids=["mean", "nesterov"])
@pytest.mark.parametrize(("every", "fragments"), [(1, 1), (3, 1), (4, 2), (4, 3), (4, 4)])
def test_numpy(every, fragments, outer):
    part = {1: (0, 0, 0), 2: (0, 1, 1), 3: (0, 1, 2), 4: (0, 2, 3)}[fragments]  # by the middles of layers
    part = dict(zip(SHAPES, part, strict=True))
    anchor = {name: p.detach().numpy().copy() for name, p in start().items()}
    momentum = {name: np.zeros_like(x) for name, x in anchor.items()}

    def follow(step, x):
        for name in SHAPES:
            offset = part[name] * every // fragments
            if (step - offset) % every == 0 or step == 10:
                mean = np.mean([anchor[name] - mine[name] for mine in x], axis=0)
                anchor[name] = outer_step(anchor[name], mean, momentum[name], outer)
                for mine in x:
                    mine[name] = anchor[name].copy()

    expected = numpy_ranks(2, 10, follow)[0]
    for params, optimizer in on_ranks(lambda r, p: trained(r, p, LocalSteps(every, outer, fragments), 10)):
        found = {name: fragment.number for fragment in optimizer._hvd.fragments for name in fragment.params}
        assert found == part and optimizer.stats.updates > 0
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), expected[name], atol=2e-6)


@pytest.mark.parametrize("transport", [None, HostileTransport])
def test_delay_adds_what_was_done_meanwhile(transport):
    every, delay = 4, 2
    anchor = {name: p.detach().numpy().copy() for name, p in start().items()}
    waiting = {}

    def follow(step, x):
        if step % every == 0:
            waiting["sent"] = copy.deepcopy(x)
        if step % every == delay and step > every:
            for name in SHAPES:
                mean = np.mean([mine[name] for mine in waiting["sent"]], axis=0)
                anchor[name] = mean
                for mine, sent in zip(x, waiting["sent"], strict=True):
                    mine[name] = mine[name] + (mean - sent[name])

    expected = numpy_ranks(2, 11, follow)
    options = {} if transport is None else {"kind": transport}
    found = on_ranks(lambda r, p: trained(r, p, LocalSteps(every, delay=delay), 11, ends=False), **options)
    for (params, _), mine in zip(found, expected, strict=True):
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), mine[name], atol=2e-6)


SPECS = {
    "powersgd": PowerSGD(2),
    "topk": TopK(0.05),
    "qsgd": QSGD(1),
    "signs": EFSignSGD(),
    "accordion": Accordion(PowerSGD(4), PowerSGD(1), interval=2, unit="steps"),
    "each": {"a": TopK(0.1), "*": Dense()},
}


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("name", SPECS)
def test_ranks_are_bit_equal_and_nothing_is_lost(name, fragments):
    """What the ranks changed is what was applied, and what waits in the residuals."""
    size, steps = 3, 8

    def script(rank, process_set):
        params = start()
        optimizer = wrapped(params, process_set, LocalSteps(3, fragments=fragments), compression=SPECS[name])
        changed = {n: torch.zeros_like(p) for n, p in params.items()}
        for step in range(steps):
            gradients(params, rank, step)
            for n, p in params.items():
                changed[n] += LR * p.grad
            optimizer.step()
        optimizer.end_round()
        residual = {n: x for part in optimizer._hvd.fragments for n, x in part.engine.residual.items()}
        return params, changed, residual

    results = on_ranks(script, size)
    for n, initial in start().items():
        assert all(torch.equal(params[n], results[0][0][n]) for params, _, _ in results)
        given = sum(changed[n] for _, changed, _ in results) / size
        waits = sum(residual.get(n, torch.zeros(())) for _, _, residual in results) / size
        applied = initial.detach() - results[0][0][n].detach()
        torch.testing.assert_close(applied + waits, given, atol=3e-5, rtol=0)


def test_residual_decays():
    """v = d + beta e, from numpy: what one rank does not send of one layer."""
    beta, size = 0.5, 2

    def script(rank, process_set):
        params = {"a": start()["a"]}
        optimizer = wrapped(params, process_set, LocalSteps(1, residual_decay=beta), compression=TopK(0.1))
        sent = []
        for step in range(4):
            before = params["a"].detach().clone()
            params["a"].grad = before - target(rank, step, "a")
            optimizer.step()
            sent.append((before - params["a"].detach()).numpy())
        return sent

    sent = on_ranks(script)[0]
    x, residual = start()["a"].detach().numpy(), [0.0] * size
    for step in range(4):
        mean = 0.0
        for rank in range(size):
            v = np.float32(LR) * (x - target(rank, step, "a").numpy()) + beta * residual[rank]
            keep = np.abs(v) >= np.sort(np.abs(v), axis=None)[-round(0.1 * v.size)]
            residual[rank] = np.where(keep, 0, v)
            mean = mean + np.where(keep, v, 0) / size
        np.testing.assert_allclose(sent[step], mean, atol=1e-6)
        x = x - mean


def test_two_optimizers_exchange_in_one_round():
    """Also where one of them is not stepped: its part is exchanged when the other goes on."""

    def script(rank, process_set):
        params, local = start(), LocalSteps(3)
        ones, others = {"a": params["a"], "b": params["b"]}, {"c": params["c"]}
        first, second = wrapped(ones, process_set, local), wrapped(others, process_set, local)
        assert first._hvd.training is second._hvd.training
        for step in range(7):
            gradients(params, rank, step)
            first.step()
            if step != 2:
                second.step()
            rounds = first._hvd.training.rounds
            assert rounds.step == (step if step == 2 else step + 1)
        first.end_epoch()
        second.end_epoch()
        assert rounds.epoch == 1 and first.stats.updates == second.stats.updates == 3
        assert wrapped(others, process_set, local)._hvd.training is not first._hvd.training
        return params

    first, second = on_ranks(script)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


@pytest.mark.parametrize("local", [LocalSteps(4, NESTEROV), LocalSteps(4, delay=3), LocalSteps(3, fragments=2)])
@pytest.mark.parametrize("when", [5, 6])
def test_resumes_exactly(local, when):
    options = {"compression": TopK(0.1), "base": torch.optim.AdamW, "rate": 0.01}

    def script(rank, process_set):
        params, optimizer = trained(rank, process_set, local, when, ends=False, **options)
        again = start()
        with torch.no_grad():
            for name, p in again.items():
                p.copy_(params[name])
        resumed = wrapped(again, process_set, LocalSteps(*vars(local).values()), **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for which, one in ((params, optimizer), (again, resumed)):
            for step in range(when, when + 9):
                gradients(which, rank, step)
                one.step()
            one.end_round()
        exact = local.delay == 0  # a residual that holds an exchange under way is restored up to rounding
        for name, p in params.items():
            assert torch.equal(p, again[name]) if exact else torch.allclose(p, again[name], atol=1e-5)
        assert resumed.stats.steps == optimizer.stats.steps

    on_ranks(script)


def test_broadcast_gives_the_common_parameters_of_the_root():
    def script(rank, process_set):
        params, optimizer = trained(rank, process_set, LocalSteps(3, NESTEROV), 7 if rank == 0 else 3, ends=False)
        return params, optimizer

    def joined(rank, process_set):
        params, optimizer = start(), None
        optimizer = wrapped(params, process_set, LocalSteps(3, NESTEROV), compression=TopK(0.1))
        for step in range(4):
            gradients(params, rank, step)
            optimizer.step()
        if rank == 1:  # comes anew, from a file without this package's state
            state = optimizer.state_dict()
            del state["hvd_accordion"]
            optimizer.load_state_dict(state)
        hvd.broadcast_optimizer_state(optimizer, 0)
        with optimizer.common_parameters():
            common = {name: p.detach().clone() for name, p in params.items()}
        for step in range(4, 9):
            gradients(params, rank, step)
            optimizer.step()
        optimizer.end_round()
        return common, params, optimizer._hvd.training.rounds.step

    (common, params, steps), (theirs, others, its) = on_ranks(joined)
    assert steps == its == 9
    assert all(torch.equal(common[name], theirs[name]) and torch.equal(params[name], others[name]) for name in SHAPES)


def test_common_parameters_between_exchanges():
    def script(rank, process_set):
        params, optimizer = trained(rank, process_set, LocalSteps(5), 7, ends=False)
        own = {name: p.detach().clone() for name, p in params.items()}
        with optimizer.common_parameters():
            common = {name: p.detach().clone() for name, p in params.items()}
        assert all(torch.equal(own[name], p) for name, p in params.items())
        return own, common

    (own, common), (others, theirs) = on_ranks(script)
    assert all(torch.equal(common[name], theirs[name]) for name in SHAPES)
    assert not any(torch.equal(own[name], others[name]) for name in SHAPES)


def test_grad_scaler_steps_on_all_ranks_where_one_overflows():
    def script(rank, process_set):
        params = start()
        optimizer = wrapped(params, process_set, LocalSteps(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = None
        for step in range(4):
            loss = sum(((p - target(rank, step, name)) ** 2).sum() / 2 for name, p in params.items())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step == 2 and rank == 1:
                params["a"].grad[0, 0] = torch.inf
                before = params["b"].detach().clone()
            scaler.step(optimizer)
            if before is not None and step == 2:
                assert torch.equal(before, params["b"])
            scaler.update()
        return params, scaler.get_scale()

    (params, scale), (others, smaller) = on_ranks(script)
    assert (scale, smaller) == (8.0, 4.0)
    assert all(torch.equal(params[name], others[name]) and params[name].isfinite().all() for name in SHAPES)
    reference = on_ranks(lambda r, p: trained(r, p, LocalSteps(2), 2))[0][0]
    assert not torch.equal(reference["a"], params["a"])


def test_buffers_are_averaged():
    def script(rank, process_set):
        params = start()
        buffers = [torch.full((3,), float(rank)), torch.tensor(rank), torch.full((2,), rank, dtype=torch.float16)]
        optimizer = wrapped(params, process_set, LocalSteps(2), buffers=buffers)
        for step in range(3):
            gradients(params, rank, step)
            optimizer.step()
        assert buffers[0].tolist() == [0.5] * 3 and buffers[1].item() == rank and buffers[2].tolist() == [0.5] * 2
        assert optimizer._hvd.buffer_bytes == 3 * 4 + 2 * 4

    on_ranks(script)


def test_parameters_that_come_later():
    """Unfrozen, or added: common from then on."""

    def script(rank, process_set):
        params = start()
        params["c"].requires_grad_(False)
        optimizer = wrapped({n: params[n] for n in ("a", "c")}, process_set, LocalSteps(2), compression=TopK(0.1))
        for step in range(8):
            if step == 3:
                params["c"].requires_grad_(True)
            if step == 4:
                optimizer.add_param_group({"params": [params["b"]]})
            gradients(params, rank, step)
            params["c"].grad = None if step < 3 else params["c"].grad
            optimizer.step()
        optimizer.end_round()
        assert not any(torch.equal(p, q) for p, q in zip(params.values(), start().values(), strict=True))
        return params

    first, second = on_ranks(script)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_half_precision_keeps_common_parameters_in_fp32():
    def script(rank, process_set):
        params = {name: torch.nn.Parameter(p.detach().bfloat16()) for name, p in start().items()}
        optimizer = wrapped(params, process_set, LocalSteps(2))
        for step in range(4):
            for name, p in params.items():
                p.grad = (p.detach() - target(rank, step, name)).bfloat16()
            optimizer.step()
        (fragment,) = optimizer._hvd.fragments
        assert all(x.dtype == torch.float32 for x in fragment.anchor.values())
        assert all(torch.equal(x.bfloat16(), params[name]) for name, x in fragment.anchor.items())
        return params

    first, second = on_ranks(script)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_keeps_one_anchor_and_one_residual():
    def script(rank, process_set):
        params, optimizer = trained(rank, process_set, LocalSteps(3), compression=TopK(0.1))
        (fragment,) = optimizer._hvd.fragments
        engine = fragment.engine
        assert all(p.grad is None and p.untyped_storage().nbytes() == 4 for p in engine.params.values())
        assert engine.exchange.groups.kept == [] and fragment.pending is None
        assert sum(x.nbytes for x in fragment.anchor.values()) == sum(p.nbytes for p in params.values())
        assert set(engine.residual) == {"a", "c"}  # 1-D travels dense

    on_ranks(script)


class Log:
    def __init__(self):
        self.epochs, self.windows, self.params = [], [], {}

    def start(self, params):
        self.params = params

    def log_epoch(self, epoch, metrics):
        self.epochs.append((epoch, metrics))

    def log_window(self, window, layers):
        self.windows.append((window, layers))


def test_accordion_decides_how_often():
    """Critical till the first comparison and after a drop of the rate; windows end rounds."""

    def script(rank, process_set):
        params, log = start(), Log()
        local = LocalSteps(AccordionSteps(1, 5, interval=10, unit="steps", eta=0.9))
        optimizer = wrapped(params, process_set, local, rate=0.01, logger=log, steps_per_epoch=20)
        intervals = []
        for step in range(60):
            if step == 45:
                optimizer.param_groups[0]["lr"] = 0.001
            gradients(params, rank, step)
            optimizer.step()
            intervals.append(optimizer._hvd.training.rounds.every)
        assert optimizer.stats.steps == 60 and "local steps" in str(optimizer.compression_report())
        return intervals, log, optimizer.stats.updates

    (intervals, log, updates), (theirs, empty, _) = on_ranks(script)
    assert intervals == theirs and not empty.epochs
    assert intervals[:19] == [1] * 19 and intervals[25:44] == [5] * 19 and intervals[46:49] == [1] * 3
    assert updates < 60 and [epoch for epoch, _ in log.epochs] == [0, 1, 2]
    assert log.epochs[1][1]["local_steps"] == 5 and log.params["local_steps"].startswith("LocalSteps(every=Accordion")
    window, layers = log.windows[2]
    assert window == 2 and layers["whole model"].regime == "relaxed" and layers["whole model"].ratio < 0.9


def test_the_link_decides_how_often(monkeypatch):
    """By rank 0's seconds; after three exchanges of each fragment."""

    def script(rank, process_set):
        params = start()
        optimizer = wrapped(params, process_set, LocalSteps(AutoSteps(least=2, most=9), fragments=2))
        training = optimizer._hvd.training
        monkeypatch.setattr(training.clock, "seconds", lambda: [1.0, 0.35 if rank == 0 else 5.0])
        intervals = []
        for step in range(24):
            gradients(params, rank, step)
            optimizer.step()
            intervals.append(training.rounds.every)
        assert len(training.clock.exchanges) == 6 and all(seconds > 0 for seconds in training.clock.steps)
        again = wrapped(start(), process_set, LocalSteps(AutoSteps(least=2, most=9), fragments=2))
        again.load_state_dict(optimizer.state_dict())
        assert again._hvd.training.rounds.every == 7
        optimizer.end_round()
        return intervals, params

    (intervals, params), (theirs, others) = on_ranks(script)
    assert intervals == theirs == [2] * 5 + [7] * 19
    assert all(torch.equal(params[name], others[name]) for name in SHAPES)


def test_an_epoch_may_end_within_a_window():
    """The norm is that of the whole window's movement: here of SGD's, over the sum of its rates."""

    def script(rank, process_set):
        params, log = start(), Log()
        local = LocalSteps(AccordionSteps(2, 7, interval=8, unit="steps"))
        optimizer = wrapped(params, process_set, local, logger=log, steps_per_epoch=5)
        for step in range(8):
            gradients(params, rank, step)
            optimizer.step()
        moved = sum(
            (p.detach() - q.detach()).square().sum() for p, q in zip(params.values(), start().values(), strict=True)
        )
        return log.windows, float(moved.sqrt()) / (8 * LR)

    windows, norm = on_ranks(script)[0]
    ((_, layers),) = windows
    assert layers["whole model"].norm == pytest.approx(norm, rel=1e-5)


def test_what_waits_for_a_delayed_exchange_counts_as_its_time(monkeypatch):
    """And nothing is timed any more when the choice is made."""
    now = iter(range(10_000))
    monkeypatch.setattr("hvd_accordion.torch.local_steps.clock.time.perf_counter", lambda: float(next(now)))
    clock = Clock(fragments=1)
    for exchanged in (0, 1, 0, 1, 0, 1):  # each second step begins an exchange, which is waited for after the next
        clock.step_ends()
        clock.step_begins(exchanged)
    assert clock.exchanges == [2.0] * 3 and clock.steps == [1.0] * 5 and clock.seconds() == [1.0, 2.0]

    def script(rank, process_set):
        _, optimizer = trained(rank, process_set, LocalSteps(AutoSteps(least=2, most=4)), 30)
        return optimizer._hvd.training

    for training in on_ranks(script):
        assert training.rounds.chosen and len(training.clock.steps) < 10


def test_a_training_lives_as_long_as_its_optimizers():
    def ended():
        local = LocalSteps(2)
        return [weakref.ref(local), *on_ranks(lambda r, p: weakref.ref(trained(r, p, local)[1]._hvd.training))]

    references = ended()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_states_of_another_kind_start_anew():
    def script(rank, process_set):
        params, mine = trained(rank, process_set, LocalSteps(2), 3)
        sgd = torch.optim.SGD(params.values(), LR)
        theirs = hvd.DistributedOptimizer(sgd, params.items(), compression=TopK(0.1), process_set=process_set)
        with pytest.warns(UserWarning, match="what local steps kept"):
            theirs.load_state_dict(mine.state_dict())
        again = wrapped(start(), process_set, LocalSteps(2))
        with pytest.warns(UserWarning, match="anchors and residuals of local steps"):
            again.load_state_dict(theirs.state_dict())
        parts = wrapped(start(), process_set, LocalSteps(2, fragments=2))
        with pytest.warns(UserWarning, match="not of these fragments"):
            parts.load_state_dict(mine.state_dict())
        gradients(params, rank, 3)
        theirs.step()

    on_ranks(script, 1)


def test_epochs_end_rounds():
    def script(rank, process_set):
        params, log = start(), Log()
        local = LocalSteps(AccordionSteps(2, 7, interval=1))
        optimizer = wrapped(params, process_set, local, logger=log)
        seen = []
        for step in range(15):
            gradients(params, rank, step)
            optimizer.step()
            if step % 5 == 4:
                optimizer.end_epoch()
                optimizer.end_epoch()  # the same end again
                seen.append({name: p.detach().clone() for name, p in params.items()})
        assert optimizer._hvd.training.rounds.epoch == 3
        return seen, len(log.windows)

    (seen, windows), (theirs, _) = on_ranks(script)
    assert windows == 3
    assert all(torch.equal(a[name], b[name]) for a, b in zip(seen, theirs, strict=True) for name in SHAPES)


def test_different_starts_are_refused():
    def script(rank, process_set):
        params = start()
        with torch.no_grad():
            params["b"][3] += rank
        optimizer = wrapped(params, process_set, LocalSteps(2))
        gradients(params, rank, 0)
        with pytest.raises(ValueError, match=r"must start from equal parameters on all ranks.*b = a checksum"):
            optimizer.step()

    on_ranks(script)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": hvd.Sum}, "op must be hvd.Average"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor must be 1.0 with local_steps, got 2.0"),
        ({"uneven_inputs": True}, "uneven_inputs must be False with local_steps"),
        ({"batch_size": AccordionBatchSize(4, 8)}, "batch_size must be None with local_steps"),
        ({"compression": Auto()}, "compression must not be an Auto with local_steps"),
        ({"local_steps": None, "buffers": []}, "buffers must be None without local_steps"),
    ],
)
def test_refuses(options, message):
    def script(rank, process_set):
        del rank
        given = {"local_steps": LocalSteps(2), **options}
        with pytest.raises(ValueError, match=message):
            wrapped(start(), process_set, **given)

    on_ranks(script)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda rank: LocalSteps(2 + rank), r"every = 2.*every = 3"),
        (
            lambda rank: LocalSteps(2, functools.partial(torch.optim.SGD, lr=0.5 + rank)),
            r"SGD\(lr=0.5\).*SGD\(lr=1.5\)",
        ),
        (lambda rank: LocalSteps(AccordionSteps(lr_drop=0.5 + rank / 4)), r"lr_drop=0.5.*lr_drop=0.75"),
    ],
)
def test_ranks_with_other_settings_are_refused(settings, message):
    def script(rank, process_set):
        with pytest.raises(ValueError, match=f"configured differently.*{message}"):
            wrapped(start(), process_set, settings(rank))

    on_ranks(script)


ACTS = st.lists(
    st.sampled_from(["step"] * 8 + ["end_round", "end_epoch", "common", "reload", "broadcast", "freeze", "rate"]),
    min_size=3,
    max_size=20,
)
SETTINGS = {
    "mean": lambda: LocalSteps(3),
    "nesterov": lambda: LocalSteps(4, NESTEROV, fragments=2),
    "delay": lambda: LocalSteps(4, fragments=2, delay=3),
    "accordion": lambda: LocalSteps(AccordionSteps(1, 3, interval=4, unit="steps")),
    "epochs": lambda: LocalSteps(AccordionSteps(2, 5, interval=1), residual_decay=0.9),
}


def act(name, params, optimizer):
    """What a user may do between two steps."""
    if name in ("end_round", "end_epoch"):
        getattr(optimizer, name)()
    elif name == "common":
        with optimizer.common_parameters():
            pass
    elif name == "reload":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif name == "broadcast":
        hvd.broadcast_optimizer_state(optimizer, 1)
    elif name == "freeze":
        params["c"].requires_grad_(not params["c"].requires_grad)
    else:
        optimizer.param_groups[0]["lr"] *= 0.4


@given(ACTS, st.sampled_from(sorted(SETTINGS)), st.sampled_from(["dense", "topk", "signs"]))
@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
def test_whatever_a_user_does_ranks_end_equal(acts, name, spec):
    compression = {"dense": Dense(), **SPECS}[spec]

    def script(rank, process_set):
        params = start()
        optimizer = wrapped(params, process_set, SETTINGS[name](), compression=compression)
        for step, what in enumerate(acts):
            if what == "step":
                gradients(params, rank, step)
                params["c"].grad = params["c"].grad if params["c"].requires_grad else None
                optimizer.step()
            else:
                act(what, params, optimizer)
        own = {n: p.detach().clone() for n, p in params.items()}
        optimizer.end_round()
        return own, params, optimizer.stats.steps

    (own, params, steps), (theirs, others, its) = on_ranks(script)
    assert steps == its == acts.count("step")
    assert all(torch.equal(params[n], others[n]) and params[n].isfinite().all() for n in SHAPES)
    if name in ("mean", "accordion") and spec == "dense":  # the mean of the ranks' parameters, and nothing else
        for n in SHAPES:
            torch.testing.assert_close(params[n].detach(), (own[n] + theirs[n]) / 2, atol=1e-5, rtol=0)
