"""One rank of a method: its state, the messages of a round, and the update from their means."""

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
from hvd_accordion.training.controller import Controller, Due
from hvd_accordion.training.norm_window import NormWindow
from hvd_accordion.training.vectors import Vectors, each

Gradient = Callable[[Vectors], Vectors]  # the gradient of this rank's data at a point
Share = Callable[[Sequence[float]], list[float]]  # broadcasts rank 0's numbers
CHECK_INTERVAL = 32  # steps between checks for divergence
DIVERGED = 1e4  # length of a step relative to the first; transients stay below


class Worker:
    """A rank of a method. It holds the state except x, which the caller holds.

    The state has tensors of the size of x: w and, for Katyusha, y and z; the residual; unless the shift is "none" its mean h;
    if the method is `reduced` grad f^tau(w); with shift "learnt" h_tau.

    Args:
        method: the method.
        ops: the framework's primitives.
        controller: the layers and their levels.
        seed: of random compression.
        rank: this rank.
        size: number of ranks.
        share: broadcasts rank 0's numbers.
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
        self.shift: Vectors | None = None  # h_tau, with shift "learnt"
        self.h: Vectors | None = None
        self.moved = True  # whether w has moved since grad f^tau(w) was computed
        self.first_length = 0.0
        self.warned = False
        self.window, self.share = NormWindow(ops, controller.levels.sample_size, seed), share
        modes = {"fed": "error_feedback", "learnt": "plain", "dense": "dense"}
        self.channels = {kind: Messages(kind, mode, ops, controller, seed, rank, size) for kind, mode in modes.items()}
        self._target: Vectors = []

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.controller.step

    def gradients(self, x: Vectors, sampled: Gradient, full: Gradient) -> tuple[Vectors, Vectors | None]:
        """Computes the gradients of a round at x.

        Args:
            x: the parameters.
            sampled: returns grad f_i at a point. It is called at x, and at w with the same sample i.
            full: returns grad f^tau at a point. It is called at w if w has moved. If it is the same function as `sampled`,
                the estimate uses full gradients, and `sampled` is not called at w.

        Returns:
            grad f_i(x), and grad f_i(w) or None if it is not needed.
        """
        if not self.points:
            self.points = self.method.iterates.begin(each(lambda v: v * 1, x))
        reduced = self.method.reduced
        if reduced and self.moved:
            self.full = full(self.points["w"])
        gx = sampled(x)
        return gx, sampled(self.points["w"]) if reduced and sampled is not full else None

    def messages(self, gx: Vectors, gw: Vectors | None) -> dict[str, Rounds[ExchangeResult]]:
        """Returns the exchanges of a round by name, equal on all ranks, to be run concurrently."""
        method = self.method
        exchanges: dict[str, Rounds[ExchangeResult]] = {}
        self._target = target = self.full if self.full is not None else gx
        if method.has_residual:
            estimate = method.estimate(gx, gw, self.full, self.shift)
            if method.shift == "learnt" and self.shift is None:  # the initial h_tau is the target
                estimate = each(lambda g, f: g - f, estimate, target)
            exchanges |= self.channels["fed"].exchanges(each(lambda g: method.iterates.step * g, estimate))
        if method.shift == "learnt" and self.shift is not None:
            exchanges |= self.channels["learnt"].exchanges(each(lambda f, h: f - h, target, self.shift))
        elif method.shift == "learnt" or (method.shift == "refresh" and self.moved):
            exchanges |= self.channels["dense"].exchanges(target)
        return exchanges

    def receive(
        self, x: Vectors, results: Mapping[str, ExchangeResult], nbytes: float = 0.0, seconds: float = 0.0
    ) -> Vectors:
        """Returns x after the round.

        Args:
            x: the parameters.
            results: what the exchanges returned.
            nbytes: bytes that the exchanges sent.
            seconds: duration of the exchanges.
        """
        method, h = self.method, self.h
        sent, _ = self._receive("fed", results)
        learnt, unsent = self._receive("learnt", results)
        dense, _ = self._receive("dense", results)
        if dense is not None:
            h = self.h = dense
            if method.shift == "learnt":
                self.shift = self._target
        elif learnt is not None:
            self.h = each(lambda h, c: h + c, self.h or [], learnt)
            # h_tau + c = h_tau + (target - h_tau) - unsent
            self.shift = each(lambda f, rest: f - rest, self._target, unsent)
            h = h if method.has_residual else self.h  # EF21 uses the new shift
        d = method.direction(sent, h)
        if self.controller.levels.measured:
            estimate = dict(zip(self.controller.layers, each(lambda v: v / method.iterates.step, d), strict=True))
            self.window.add({name: estimate[name] for name in self.controller.levels.measured})
        if self.step % CHECK_INTERVAL == 0 and not self.warned:
            self._check_divergence(d)
        refresh = method.reduced and method.coin(self.step)
        x, self.points = method.iterates.advance(self.ops, x, self.points, d, refresh)
        self.moved = refresh
        self.decide(self.controller.after_update(nbytes, seconds))
        return x

    def decide(self, due: Due) -> None:
        """Updates the levels from the norms that are due. Called between steps."""
        norms = self.share(self.window.norms(due.layers)) if due.layers else []
        self.controller.decide(due, norms=dict(zip(due.layers, norms, strict=True)))

    def _receive(self, kind: str, results: Mapping[str, ExchangeResult]) -> tuple[Any, Any]:
        own = {name: result for name, result in results.items() if name.startswith(f"{kind}.")}
        return self.channels[kind].receive(own) if own else (None, None)

    def _check_divergence(self, d: Vectors) -> None:
        """Warns once if steps have become too long. All ranks have the same steps."""
        squares = [float(self.ops.sum(self.ops.reshape(v * v, (-1,)), 0, keepdims=False)) for v in d]
        length = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
        self.first_length = self.first_length or length
        if length > DIVERGED * self.first_length or math.isinf(length):
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
        """The point that converges: y for Katyusha, None if it is x."""
        return self.points.get(self.method.iterates.solution)

    # state

    def shared(self) -> Vectors:
        """Returns the tensors that must be equal on all ranks, except x."""
        return [v for vectors in (*self.points.values(), self.h or []) for v in vectors]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state except x: lists of tensors, numbers, and the controller's state."""
        compressed = {kind: c for kind, c in self.channels.items() if kind != "dense"}
        return {
            "rank": self.rank,
            "points": {name: list(vectors) for name, vectors in self.points.items()},
            "h": self.h,
            "own": {"full": self.full, "shift": self.shift, "residual": dict(self.channels["fed"].residual)},
            "memory": {kind: {n: dict(m) for n, m in c.memory.items() if m} for kind, c in compressed.items()},
            "summed": dict(self.window.summed),
            "moved": self.moved,
            "first_length": self.first_length,
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], copy: Callable[[Tensor], Tensor]) -> None:
        """Restores saved state.

        Args:
            state: of `state_dict`.
            copy: copies a tensor to this rank's device.

        Raises:
            ValueError: another rank saved it. Residual, shift and grad f^tau(w) depend on the rank's own data.
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
