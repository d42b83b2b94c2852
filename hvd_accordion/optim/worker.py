"""One rank's part in a method: its state, the messages of a round, what it makes of the answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvd_accordion.comm.collectives import Rounds, Tensor
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.optim.iterates import Points
from hvd_accordion.optim.messages import Messages
from hvd_accordion.optim.method import Method
from hvd_accordion.training import resume
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.norm_window import NormWindow
from hvd_accordion.training.vectors import Vectors, each

Gradient = Callable[[Vectors], Vectors]  # of this rank's data, at a point
Share = Callable[[Sequence[float]], list[float]]  # the numbers as rank 0 has them
LOOK = 32  # steps from one look for divergence to the next
FAR = 1e4  # times the first step's length: no transient gets there


class Worker:
    """A rank of a method. Holds everything but x, which is its caller's.

    Beside x it keeps tensors of x's size: w and, under Katyusha, y and z; the residual; unless the shift is "none" its mean
    h; where the method is `reduced` grad f^tau(w); under "learnt" h_tau.

    Args:
        ops: the primitives of the tensors at hand.
        controller: knows the layers and their levels.
        seed: of everything random in compression.
        rank, size: its place among the ranks.
        share: gives numbers as rank 0 has them.
    """

    def __init__(
        self,
        method: Method,
        ops: Ops,
        controller: Controller,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        share: Share = list,
    ) -> None:
        self.method, self.ops, self.controller, self.rank = method, ops, controller, rank
        self.points: Points = {}
        self.full: Vectors | None = None  # grad f^tau(w)
        self.shift: Vectors | None = None  # h_tau, where it is learnt
        self.h: Vectors | None = None
        self.moved = True  # w, since its gradient was taken
        self.first_length = 0.0
        self.warned = False
        self.window, self.share = NormWindow(ops, controller.watched, seed), share
        modes = {"fed": "error_feedback", "learnt": "plain", "dense": "dense"}
        self.channels = {kind: Messages(kind, mode, ops, controller, seed, rank, size) for kind, mode in modes.items()}
        self._target: Vectors = []

    @property
    def step(self) -> int:
        return self.controller.step

    def gradients(self, x: Vectors, sampled: Gradient, full: Gradient) -> tuple[Vectors, Vectors | None]:
        """Of a round at x: grad f_i(x), and grad f_i(w), None where that is not needed.

        `full` is called at w where w has moved; then `sampled` at x, and at w with the same sample i. Where the two are the
        same function, the estimate is made of full gradients.
        """
        if not self.points:
            self.points = self.method.iterates.begin(each(lambda v: v * 1, x))
        reduced = self.method.reduced
        if reduced and self.moved:
            self.full = full(self.points["w"])
        gx = sampled(x)
        return gx, sampled(self.points["w"]) if reduced and sampled is not full else None

    def messages(self, gx: Vectors, gw: Vectors | None) -> dict[str, Rounds[ExchangeResult]]:
        """The exchanges of a round by their names, which are the same on every rank; to be run side by side."""
        method = self.method
        found: dict[str, Rounds[ExchangeResult]] = {}
        self._target = target = self.full if self.full is not None else gx
        if method.has_residual:
            estimate = method.estimate(gx, gw, self.full, self.shift)
            if method.shift == "learnt" and self.shift is None:  # it begins as the target
                estimate = each(lambda g, f: g - f, estimate, target)
            found |= self.channels["fed"].exchanges(each(lambda g: method.iterates.step * g, estimate))
        if method.shift == "learnt" and self.shift is not None:
            found |= self.channels["learnt"].exchanges(each(lambda f, h: f - h, target, self.shift))
        elif method.shift == "learnt" or (method.shift == "refresh" and self.moved):
            found |= self.channels["dense"].exchanges(target)
        return found

    def receive(
        self, x: Vectors, answers: Mapping[str, ExchangeResult], nbytes: float = 0.0, seconds: float = 0.0
    ) -> Vectors:
        """x after the round, from what its exchanges returned and sent."""
        method, h = self.method, self.h
        sent, _ = self._answer("fed", answers)
        learnt, left = self._answer("learnt", answers)
        dense, _ = self._answer("dense", answers)
        if dense is not None:
            h = self.h = dense
            if method.shift == "learnt":
                self.shift = self._target
        elif learnt is not None:
            self.h = each(lambda h, c: h + c, self.h or [], learnt)
            # h_tau + c = h_tau + (target - h_tau) - what was not sent
            self.shift = each(lambda f, rest: f - rest, self._target, left)
            h = h if method.has_residual else self.h  # EF21 moves by what it has just learnt
        d = method.direction(sent, h)
        if self.controller.measured:
            estimate = dict(zip(self.controller.layers, each(lambda v: v / method.iterates.step, d), strict=True))
            self.window.add({name: estimate[name] for name in self.controller.measured})
        if self.step % LOOK == 0 and not self.warned:
            self._look(d)
        refresh = method.reduced and method.coin(self.step)
        x, self.points = method.iterates.advance(self.ops, x, self.points, d, refresh)
        self.moved = refresh
        if self.controller.advance(nbytes, seconds):
            self.controller.end_epoch()
        self.decide()
        return x

    def decide(self) -> None:
        """Between steps: new regimes from the norms that are due."""
        names = self.controller.due()
        if names:
            norms = self.share(self.window.norms(names))
            self.controller.observe(dict(zip(names, norms, strict=True)), 1.0)

    def _answer(self, kind: str, answers: Mapping[str, ExchangeResult]) -> tuple[Any, Any]:
        mine = {name: step for name, step in answers.items() if name.startswith(f"{kind}.")}
        return self.channels[kind].received(mine) if mine else (None, None)

    def _look(self, d: Vectors) -> None:
        """Warns once where steps grow beyond all bounds. All ranks see the same."""
        squares = [float(self.ops.sum(self.ops.reshape(v * v, (-1,)), 0, keepdims=False)) for v in d]
        length = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
        self.first_length = self.first_length or length
        if length > FAR * self.first_length or math.isinf(length):
            self.warned = True
            grown = "is not finite" if math.isinf(length) else f"is {length / self.first_length:.1e} times the first"
            warnings.warn(
                f"{self.method.name} diverges: the length of step {self.step} {grown}; {self.method.iterates.remedy} "
                f"(now {self.method.iterates})",
                RuntimeWarning,
                stacklevel=4,
            )

    @property
    def solution(self) -> Vectors | None:
        """The point that the theory is about: y under Katyusha; None where that is x."""
        return self.points.get(self.method.iterates.solution)

    # state

    def shared(self) -> Vectors:
        """All that must be equal on all ranks, but for x."""
        return [v for vectors in (*self.points.values(), self.h or []) for v in vectors]

    def state_dict(self) -> dict[str, Any]:
        """Everything but x: lists of tensors, plain numbers, and what the levels depend on."""
        kept = {kind: c for kind, c in self.channels.items() if kind != "dense"}
        return {
            "rank": self.rank,
            "points": {name: list(vectors) for name, vectors in self.points.items()},
            "h": self.h,
            "own": {"full": self.full, "shift": self.shift, "residual": dict(self.channels["fed"].residual)},
            "memory": {kind: {n: dict(m) for n, m in c.memory.items() if m} for kind, c in kept.items()},
            "summed": dict(self.window.summed),
            "moved": self.moved,
            "first_length": self.first_length,
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], copy: Callable[[Tensor], Tensor]) -> None:
        """Takes up saved state; `copy` brings a tensor to where this rank computes.

        ValueError where it is another rank's: residual, shift and grad f^tau(w) belong to the rank's own data.
        """
        if state["rank"] != self.rank:
            raise ValueError(
                f"state_dict was saved by rank {state['rank']}, this is rank {self.rank}: save and load one file per rank"
            )

        def copied(vectors: Sequence[Tensor] | None) -> Vectors | None:
            return None if vectors is None else [copy(v) for v in vectors]

        self.points = {name: [copy(v) for v in vectors] for name, vectors in state["points"].items()}
        self.h = copied(state["h"])
        self.full, self.shift = copied(state["own"]["full"]), copied(state["own"]["shift"])
        residual = {name: copy(v) for name, v in state["own"]["residual"].items()}
        for kind, memory in state["memory"].items():
            own = {n: {key: copy(v) for key, v in m.items()} for n, m in memory.items()}
            self.channels[kind].load(residual if kind == "fed" else {}, own)
        self.window.summed = {name: copy(v) for name, v in state["summed"].items()}
        self.moved, self.first_length = bool(state["moved"]), float(state["first_length"])
        resume.warn_of(self.controller.load_state_dict(state["controller"]), stacklevel=4)
