"""Random sequences of what a user may do to an optimizer, over simulated ranks: they stay equal, nothing is lost."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hvd_accordion.torch as hvd
from hvd_accordion import QSGD, Accordion, AccordionBatchSize, Dense, PowerSGD, RandomK, TopK
from tests.differential.torch_ledger import Ledger, install
from tests.torch.simulated_ranks import SimulatedRanks

EXAMPLES = int(os.environ.get("HVD_ACCORDION_TEST_EXAMPLES", "15"))  # 50 and more: others in each run

COMPRESSIONS = {
    "dense": lambda: Dense(),
    "powersgd": lambda: PowerSGD(2),
    "topk": lambda: TopK(0.1),
    "topk-two-step": lambda: TopK(0.1, algorithm="two_step"),
    "randomk": lambda: RandomK(0.2),
    "qsgd": lambda: QSGD(7),
    "accordion": lambda: Accordion(PowerSGD(4), TopK(0.1), interval=2, unit="steps"),
    "accordion-epochs": lambda: Accordion(Dense(), PowerSGD(1), interval=1),
    "globs": lambda: {"0.*": TopK(0.1), "*.weight": Accordion(QSGD(7), PowerSGD(1), interval=1), "*": None},
}
ANOTHER = st.one_of(st.none(), st.integers(0, 2))  # a rank that does otherwise, if it is there


@dataclass(frozen=True)
class Act:
    """What all ranks do next; `bad`: the rank whose gradient is NaN, `idle`: the one that has no gradient."""

    name: str
    bad: int | None = None
    idle: int | None = None
    layer: int = 0


LIKELY = ["backward", "step", "clip", "zero_grad"] * 3
RARE = ["synchronize", "freeze", "unfreeze", "save", "load", "end_epoch", "broadcast", "rate"]
ACTS = st.builds(Act, st.sampled_from(LIKELY + RARE), ANOTHER, ANOTHER, st.integers(0, 2))
TURN = st.tuples(st.builds(Act, st.just("turn"), ANOTHER, ANOTHER))
PLAYS = st.lists(st.one_of(TURN, st.lists(ACTS, min_size=1, max_size=4)), min_size=2, max_size=10)


torch.manual_seed(5)
NETWORK = torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.Linear(40, 36), torch.nn.Linear(36, 3))


class User:
    """One rank's script."""

    def __init__(self, rank: int, process_set: Any, compression: Any, batch_size: Any) -> None:
        self.rank, self.ledger, self.net = rank, Ledger(), copy.deepcopy(NETWORK)
        inner = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.5)
        self.optimizer = hvd.DistributedOptimizer(
            inner, self.net.named_parameters(), compression, process_set=process_set, batch_size=batch_size
        )
        self.saved: Any = None
        self.conserves = True
        self.steps = 0
        # since the last exchange: whether there was a backward pass, and whether a rank left it out; then what is an error
        # on the other ranks (a pass too many, zero_grad() before step()) is none on that one, here as under Horovod
        self.pending = self.uneven = False
        self.poisoned = False  # the batch that is made has met NaN

    def play(self, acts: list[Act]) -> list[str]:
        """What came of each act: its error, if one was raised."""
        outcomes = []
        for act in [*acts, Act("clip")]:
            try:
                getattr(self, act.name)(act)
                outcomes.append("")
            except (ValueError, AssertionError, RuntimeError) as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        return outcomes

    def backward(self, act: Act) -> None:
        if self.uneven:
            return
        idle, self.uneven = (None, False) if self.pending else (act.idle, act.idle is not None)
        self.pending, self.poisoned = True, self.poisoned or act.bad is not None
        self.steps += 1
        g = torch.Generator().manual_seed(100 * self.steps + self.rank)
        x = torch.randn(4, 12, generator=g)
        if act.bad == self.rank:
            x[0, 0] = float("nan")
        if idle != self.rank:
            out = self.net(x)
            if out.requires_grad:
                out.square().mean().backward()

    def finite(self) -> bool:
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        return all(bool(torch.isfinite(g).all()) for g in grads)

    def synchronize(self, act: Act) -> None:
        self.pending = self.uneven = False
        self.optimizer.synchronize()

    def clip(self, act: Act) -> None:
        """Clips what is whole; a step that met NaN is left out."""
        self.pending, self.uneven, complete = False, False, self.optimizer.completes_batch
        self.optimizer.synchronize()
        with self.optimizer.skip_synchronize():
            if not complete or self.finite():
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.1)
                self.optimizer.step()
            else:
                self.optimizer.zero_grad()
            self.poisoned &= not complete

    step = clip  # a plain step would take NaN into the parameters, as it must

    def zero_grad(self, act: Act) -> None:
        if not self.uneven:
            self.optimizer.zero_grad(set_to_none=act.layer != 1)

    def turn(self, act: Act) -> None:
        """An ordinary step."""
        self.backward(act)
        self.clip(act)
        self.optimizer.zero_grad()

    def freeze(self, act: Act) -> None:
        self.net[act.layer].requires_grad_(False)

    def unfreeze(self, act: Act) -> None:
        self.net[act.layer].requires_grad_(True)

    def save(self, act: Act) -> None:
        net = {name: x.clone() for name, x in self.net.state_dict().items()}
        self.saved = net, copy.deepcopy(self.optimizer.state_dict()), self.ledger.snapshot()

    def load(self, act: Act) -> None:
        if self.saved is not None and not self.uneven:
            self.conserves &= not self.pending  # what is on its way is applied, and the residual then left
            net, optimizer, ledger = self.saved
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))
            self.net.load_state_dict(net)
            self.ledger.restore(ledger)

    def end_epoch(self, act: Act) -> None:
        if not self.uneven and (self.pending or not self.poisoned):
            self.optimizer.end_epoch()

    def broadcast(self, act: Act) -> None:
        hvd.broadcast_optimizer_state(self.optimizer, root_rank=0)

    def rate(self, act: Act) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.5


def mean(transport: Any, x: torch.Tensor, name: str) -> torch.Tensor:
    return transport.wait(transport.allreduce([x], name, scales=(1.0, 1 / transport.size)))[0]


def played(ranks: int, compression: Any, batch_size: Any, acts: list[Act]) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a step without a synchronisation, of half a state
        cluster = SimulatedRanks(ranks, patch)
        users: dict[int, User] = {}
        install(patch, lambda: users[cluster.rank()].ledger)

        def script(rank: int) -> Any:
            # a user is made in two steps: its ledger must be known before its first exchange
            users[rank] = User.__new__(User)
            users[rank].__init__(rank, cluster.process_sets[rank], compression(), batch_size)  # type: ignore[misc]
            outcomes = users[rank].play(acts)
            ledger = users[rank].ledger
            lost = ledger.lost(lambda x, name: mean(cluster.transport, x, name))
            lost = lost if users[rank].conserves else {}
            return outcomes, [p.detach().clone() for p in users[rank].net.parameters()], lost

        results = cluster.run(script)
    outcomes, params, lost = results[0]
    for others, theirs, _ in results[1:]:
        assert others == outcomes, "ranks met different errors"
        assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True)), "ranks differ"
    assert all(bool(torch.isfinite(p).all()) for p in params)
    assert max(lost.values(), default=0.0) <= 1e-4, lost


@pytest.mark.parametrize("name", COMPRESSIONS)
@settings(max_examples=EXAMPLES, derandomize=EXAMPLES < 50, deadline=None, suppress_health_check=list(HealthCheck))
@given(ranks=st.sampled_from([2, 2, 3]), plays=PLAYS)
def test_ranks_stay_equal_and_nothing_is_lost(name, ranks, plays):
    played(ranks, COMPRESSIONS[name], None, [act for play in plays for act in play])


@settings(max_examples=EXAMPLES, derandomize=EXAMPLES < 50, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(list(COMPRESSIONS)), plays=PLAYS)
def test_the_same_with_an_adaptive_batch(name, plays):
    batch_size = AccordionBatchSize(6, 12, interval=2, unit="steps", warmup=0)
    played(2, COMPRESSIONS[name], batch_size, [act for play in plays for act in play])
