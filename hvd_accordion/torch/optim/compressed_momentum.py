"""An Adam over two exchanges, one of gradients and one of first moments: what 1-bit Adam and 0/1 Adam share in torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression import Dense
from hvd_accordion.ops import torch as ops
from hvd_accordion.optim import adam
from hvd_accordion.optim.adam import Adam, Interval
from hvd_accordion.optim.momentum_reports import MomentumReports
from hvd_accordion.optim.momentum_schedule import Counts, Kind, Schedule, mark_interval
from hvd_accordion.policy.assignment import MIN_NUMEL, Compression, assign
from hvd_accordion.torch import transport
from hvd_accordion.torch.broadcasting import broadcast_tree
from hvd_accordion.torch.common_parameters import showing
from hvd_accordion.torch.configuration import named
from hvd_accordion.torch.exchange.agreement import any_rank, from_rank_0, require_equal
from hvd_accordion.torch.exchange.micro_batches import wide
from hvd_accordion.torch.gradient_exchange import GradientExchange
from hvd_accordion.torch.learning_rate import largest_rate
from hvd_accordion.torch.reports import STATE
from hvd_accordion.torch.transport import ProcessSet, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.reports import Logger, Stats
from hvd_accordion.training.settings import check_logger

Named = Iterable[tuple[str, torch.nn.Parameter]]
MOMENTS = ("exp_avg", "exp_avg_sq")


class CompressedMomentum(MomentumReports, torch.optim.Optimizer):
    """An Adam that averages over the ranks by itself, as its schedule says."""

    _dense: GradientExchange
    _momentum: GradientExchange
    _step_supports_amp_scaling = True  # a GradScaler leaves it to `step` to unscale, and to skip on all ranks alike

    def __init__(
        self,
        params: Any,
        lr: Any,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        schedule: Schedule,
        compression: Compression,
        *,
        named_parameters: Named | None = None,
        process_set: ProcessSet = global_process_set,
        seed: int = 0,
        min_compress_numel: int = MIN_NUMEL,
        logger: Logger | None = None,
    ) -> None:
        elastic.refuse(type(self).__name__, "its ranks hold parts of one sum, which a rank that leaves takes along")
        check_logger(logger)
        if not process_set.included():
            raise ValueError(
                f"process_set must include this rank, got {process_set}: only its members make the optimizer"
            )
        super().__init__(params, adam.checked(lr, betas, eps, weight_decay))
        self._names = {p: name for name, p in named(named_parameters, self.param_groups).items() if p.requires_grad}
        self._prefix, self._transport = Prefix(process_set), transport.connect(process_set)
        self._schedule, self._counts = schedule, Counts()
        self._intervals = [Interval() for _ in self.param_groups]  # since the last exchange, of each group
        self._logger = logger if self._transport.rank == 0 else None
        self._logged, self._epoch = Stats(), 0
        options: Any = {"process_set": process_set, "seed": seed, "min_compress_numel": min_compress_numel}
        itself = weakref.ref(self)
        self._dense = GradientExchange(Dense(), **options)
        self._momentum = GradientExchange(compression, learning_rate=lambda: largest_rate(itself()), **options)
        self._begin()

    def _begin(self) -> None:
        """Moments of 0; exchanges, which compare the ranks, once these are known to have the same schedule and numbers."""
        numbers = {f"group {i}": str(numbers) for i, numbers, _ in self._groups()}
        require_equal(
            {"optimizer": type(self).__name__, **vars(self._schedule), **numbers}, str(self._prefix), self._transport
        )
        for p in self._names:
            self.state[p] = {key: torch.zeros(p.shape, dtype=wide(p), device=p.device) for key in MOMENTS}
        self._dense.build({name: p.detach() for p, name in self._names.items()})
        self._momentum.build({name: self.state[p]["exp_avg"] for p, name in self._names.items()})
        if self._logger is not None:
            compression, settings = self._momentum.compression, self._momentum.settings
            policy = assign(compression, list(self._names.values()))
            run = type(self).__name__, compression, policy, self._transport.size
            self._logger.start(settings.logged(*run, "torch", torch.__version__))

    # a step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Exchanges what this step is to exchange, then moves the parameters. `.grad` stays this rank's own.

        Returns the closure's loss. ValueError for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._overflown():
            return loss
        kind, grads = self._counts.kind(self._schedule), self._gradients()
        if kind is Kind.DENSE:
            self._step_dense(grads)
        else:
            self._step_by_momentum(grads, kind)
        self._counts.advance(self._schedule, kind)
        self._measure()
        return loss

    def _overflown(self) -> bool:
        """Whether a GradScaler has found NaN or Inf on any rank: then none steps."""
        found = getattr(self, "found_inf", None)
        return found is not None and any_rank(bool(found), f"{self._prefix}.found_inf", self._transport)

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Name -> this rank's gradient, unscaled; zeros where it has none."""
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for p, name in self._names.items()}
        for name, grad in grads.items():
            if grad.is_sparse:
                raise ValueError(f"the gradient of {name} must be dense, got a sparse one")
        scale = getattr(self, "grad_scale", None)
        return grads if scale is None else {name: grad / scale.to(grad.device) for name, grad in grads.items()}

    def _groups(self) -> Iterator[tuple[int, Adam, list[torch.nn.Parameter]]]:
        """Number, constants and parameters of each group, without those that are frozen now."""
        for i, group in enumerate(self.param_groups):
            beta1, beta2 = group["betas"]
            numbers = Adam(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
            yield i, numbers, [p for p in group["params"] if p in self._names and p.requires_grad]

    def _step_dense(self, grads: Mapping[str, torch.Tensor]) -> None:
        means, counts = self._dense(grads), self._counts
        for _, numbers, params in self._groups():
            interval = Interval(numbers.rate(counts.step + 1), numbers.decay)
            for p in params:
                state, mean = self.state[p], means[self._names[p]].to(wide(p))
                state["exp_avg"] = numbers.first_moment(state["exp_avg"], mean)
                state["exp_avg_sq"] = numbers.second_moment(state["exp_avg_sq"], mean)
                p.copy_(moved(numbers, p, state, numbers.correction(counts.updates + 1), interval))

    def _step_by_momentum(self, grads: Mapping[str, torch.Tensor], kind: Kind) -> None:
        """A step of the interval that the last exchange began; its end, unless the kind is local."""
        counts, moments = self._counts, {}
        for i, numbers, params in self._groups():
            rate = numbers.rate(counts.step + 1)
            interval = self._intervals[i] = self._intervals[i].extended(rate, numbers.decay)
            alone, share, correction = (
                Interval(rate, numbers.decay),
                interval.share(rate),
                numbers.correction(counts.updates),
            )
            for p in params:
                state, grad = self.state[p], grads[self._names[p]].to(wide(p))
                m = adam.masked(ops, numbers.first_moment(state["exp_avg"], grad), state["exp_avg_sq"])
                moments[self._names[p]] = adam.blended(state["mean"], m, share) if "mean" in state else m
                if kind is Kind.LOCAL:
                    state["exp_avg"], state["mean"] = m, moments[self._names[p]]
                    state.setdefault("anchor", p.clone())
                    p.copy_(moved(numbers, p, state, correction, alone))
        if kind is Kind.MOMENTUM:
            self._end_interval(moments)

    def _end_interval(self, moments: dict[str, torch.Tensor]) -> None:
        """All ranks go from where the interval began by the mean of their mean moments."""
        frozen = {name: self.state[p]["exp_avg"] for p, name in self._names.items() if name not in moments}
        means = self._momentum({**moments, **frozen})
        for i, numbers, params in self._groups():
            correction = numbers.correction(self._counts.updates)
            for p in params:
                state = self.state[p]
                state["exp_avg"] = adam.masked(ops, means[self._names[p]], state["exp_avg_sq"])
                state.pop("mean", None)
                p.copy_(moved(numbers, state.pop("anchor", p), state, correction, self._intervals[i]))
            self._intervals[i] = Interval()

    def _measure(self) -> None:
        """Measures the second moment, if that is due: from it follows the end of the warm-up."""
        betas = [numbers.beta2 for _, numbers, _ in self._groups()]
        if not self._counts.is_mark(self._schedule, mark_interval(max(betas))):
            return
        norm = 0.0
        for _, numbers, params in self._groups():
            v = sum(float(self.state[p]["exp_avg_sq"].sum(dtype=torch.float64)) for p in params)
            norm += v / numbers.correction(self._counts.updates)
        self._counts.measured(*from_rank_0([norm], f"{self._prefix}.norm", self._transport))

    def _now(self) -> Counts:
        return self._counts

    # state

    def common_parameters(self) -> AbstractContextManager[None]:
        """Within this context the parameters are those of the last exchange, equal on all ranks."""
        params = [p for p in self._names if "anchor" in self.state[p]]
        return showing(params, [self.state[p]["anchor"] for p in params])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """RuntimeError after construction: the ranks have agreed on its parameters."""
        if hasattr(self, "_names"):
            raise RuntimeError(f"{type(self).__name__} takes no more parameters: make a new one of all of them")
        super().add_param_group(param_group)

    def _shared(self) -> dict[str, Any]:
        """What other ranks can take up: all but residuals."""
        intervals = [asdict(interval) for interval in self._intervals]
        ours = {"counts": asdict(self._counts), "intervals": intervals, "epoch": self._epoch}
        return {**super().state_dict(), STATE: ours}

    def _take(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up what `_shared` gave."""
        state_dict = dict(state_dict)
        ours = state_dict.pop(STATE)
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, kept in state_dict["state"].items():  # torch has rounded moments to the parameters' dtype
            p = params[i]
            self.state[p] = {key: x.detach().to(p.device, copy=True) for key, x in kept.items()}
        self._counts = Counts(**{**ours["counts"], "norms": list(ours["counts"]["norms"])})
        self._intervals = [Interval(**interval) for interval in ours["intervals"]]
        self._epoch = ours["epoch"]

    def state_dict(self) -> dict[str, Any]:
        """Moments and counts, and this rank's residuals and the counts of its exchanges under "hvd_accordion"."""
        found = self._shared()
        found[STATE] |= {"dense": self._dense.state_dict(), "momentum": self._momentum.state_dict()}
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Residuals are a rank's own: save and load one file per rank to resume exactly.

        ValueError for the state of another kind of optimizer.
        """
        ours = dict(state_dict.get(STATE, {}))
        if "counts" not in ours:
            raise ValueError(f"state_dict must be that of a {type(self).__name__}, got keys {sorted(state_dict)}")
        exchanges = ours.pop("dense"), ours.pop("momentum")
        self._take({**state_dict, STATE: ours})
        self._dense.load_state_dict(exchanges[0])
        self._momentum.load_state_dict(exchanges[1])
        self._logged = self.stats

    def broadcast(self, root_rank: int) -> None:
        """Gives every rank the state of `root_rank`, but for residuals. The same on every rank."""
        root = list(self._transport.ranks).index(root_rank)
        self._take(broadcast_tree(self._shared(), root, f"{self._prefix}.state", self._transport))
        self._dense.broadcast(root_rank)
        self._momentum.broadcast(root_rank)


def moved(
    numbers: Adam, x: torch.Tensor, state: Mapping[str, torch.Tensor], correction: float, interval: Interval
) -> torch.Tensor:
    """See `Adam.moved`; in fp32 at least."""
    return numbers.moved(x.to(wide(x)), state["exp_avg"], state["exp_avg_sq"], correction, interval)
