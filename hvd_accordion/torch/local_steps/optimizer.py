"""An optimizer of the user's own class that steps by itself, and exchanges the change of its parameters now and then."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.policy.local_steps import LocalSteps
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.torch import transport
from hvd_accordion.torch.configuration import described, layer_of, placeholder
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.exchange.engine import Engine
from hvd_accordion.torch.exchange.micro_batches import wide
from hvd_accordion.torch.grad_scaler import scaled_back
from hvd_accordion.torch.learning_rate import largest_rate
from hvd_accordion.torch.local_steps import state
from hvd_accordion.torch.local_steps.engine import LocalEngine
from hvd_accordion.torch.local_steps.fragment import Fragment
from hvd_accordion.torch.local_steps.training import training_of
from hvd_accordion.torch.reports import STATE
from hvd_accordion.torch.wrapped import Wrapped, wrapped
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.reports import CompressionReport, LayerRecord, Logger, Stats
from hvd_accordion.training.rounds import fragments_of
from hvd_accordion.training.settings import Settings
from hvd_accordion.utils import validation


class Local(Wrapped):
    """What a DistributedOptimizer with local steps adds to the class of the user's optimizer, which comes after it."""

    _hvd: LocalEngine

    # then GradScaler calls step() also where this rank's gradients overflow: all ranks count the same steps
    _step_supports_amp_scaling = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's step on this rank's gradients; then, at the end of a round, the exchange."""
        engine = self._hvd
        engine.training.begin(engine)
        with scaled_back(self) as is_finite:
            loss = super().step(closure) if is_finite else None
        engine.training.end(engine)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # by torch's step hooks: the base's step calls them

    def end_epoch(self) -> None:
        """An epoch is over: needed where `steps_per_epoch` was not given. Ends the round. The same on every rank."""
        self._hvd.training.end_epoch()

    def end_round(self) -> None:
        """Exchanges what was changed since the last exchange: all ranks have common parameters then.

        The same on every rank: after the last step of a training, and before what needs common parameters.
        """
        self._hvd.training.end_round()

    def common_parameters(self) -> AbstractContextManager[None]:
        """The parameters are the common ones, as of the last exchange, in this context; then the rank's own again.

        For evaluation and saving between two exchanges. Sends nothing, so that a single rank may enter it.
        """
        return self._hvd.training.common_parameters()

    def synchronize(self) -> None:
        """Nothing: gradients stay this rank's own."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """As under Horovod; no gradient is exchanged anyway."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Any number of backward passes may come before a step: their gradients add up locally."""
        self.backward_passes_per_step = validation.integer("passes", passes, 1)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, and under "hvd_accordion" anchors, residuals, counts and the outer optimizers' states."""
        return {**super().state_dict(), STATE: state.saved(self._hvd)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Save and load one file per rank, of model and optimizer, to resume exactly.

        Without local steps' own state, the next step begins with the parameters of then as the common ones.
        """
        state_dict = dict(state_dict)
        ours = state_dict.pop(STATE, None)
        super().load_state_dict(state_dict)
        state.load(self._hvd, ours)

    def compression_report(self) -> CompressionReport:
        rounds = self._hvd.training.rounds
        return self._hvd.report(rounds.every, rounds.line())

    @property
    def stats(self) -> Stats:
        return self._hvd.stats(self._hvd.training.rounds.step)


class OnlyWindows:
    """A logger for one fragment's controller: epochs are those of the whole optimizer, which logs them."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def start(self, params: Mapping[str, object]) -> None:
        """The optimizer starts the logger."""

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """The optimizer logs epochs."""

    def log_window(self, window: int, layers: Mapping[str, LayerRecord]) -> None:
        self.logger.log_window(window, layers)


def local(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.nn.Parameter],
    compression: Compression,
    policy: Mapping[str, Policy],
    settings: Settings,
    local_steps: LocalSteps,
    buffers: Iterable[torch.Tensor],
    logger: Logger | None,
    name_of: Mapping[int, str],
) -> torch.optim.Optimizer:
    """An object of a subclass of the optimizer's own class, with its parameters, state and hooks.

    `name_of`: names by the parameters' identity, for those that come later.
    """
    prefix, place = Prefix(settings.process_set), transport.connect(settings.process_set)
    active = settings.process_set.included()
    if active:
        require_equal({**described(params, policy, settings), **local_steps.described()}, str(prefix), place)
    result = wrapped(optimizer, Local, settings, compression, name_of)
    itself = weakref.ref(result)
    lr = lambda: largest_rate(itself())  # noqa: E731
    known = logger if active and place.rank == 0 else None
    if known is not None:
        logged = settings.logged(type(optimizer).__name__, compression, policy, place.size, "torch", torch.__version__)
        known.start({**logged, "local_steps": str(local_steps)})
    sizes = {name: p.numel() for name, p in params.items()}
    parts = []
    for number, names in enumerate(fragments_of(sizes, local_steps.fragments)):
        mine_of = {name: params[name] for name in names}
        if mine_of:
            engine = _engine(mine_of, {name: policy[name] for name in names}, settings, lr, known)
            parts.append(Fragment(number, mine_of, engine, local_steps))
    result._hvd = LocalEngine(parts, buffers, lr, prefix, place, active, known)
    training_of(local_steps, settings.process_set, settings.steps_per_epoch, settings.seed).join(result._hvd)
    return result


def _engine(
    params: Mapping[str, torch.nn.Parameter],
    policy: Mapping[str, Policy],
    settings: Settings,
    lr: Callable[[], float],
    logger: Logger | None,
) -> Engine:
    """Exchanges what is put into the placeholders of these parameters."""
    held = {name: placeholder(p, wide(p), p.requires_grad) for name, p in params.items()}
    layers = [layer_of(name, p) for name, p in held.items() if p.requires_grad]
    size = settings.process_set.size() if settings.process_set.included() else 1
    controller = Controller(layers, policy, size, None, None, settings.min_compress_numel)
    member = Membership(None if logger is None else OnlyWindows(logger), lambda _: {}, "")
    engine = Engine(held, controller, settings, lr, Prefix(settings.process_set), member)
    engine.agree()
    return engine
