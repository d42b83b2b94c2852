"""What every DistributedOptimizer of this package can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from hvd_accordion.policy.auto import Advice, advice_of
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.reports import CompressionReport, Stats

if TYPE_CHECKING:
    from torch.optim import Optimizer as UsersClass  # comes after these classes among the bases
else:
    UsersClass = object

STATE = "hvd_accordion"  # our entry in the optimizer's state_dict


class Exchanging(Protocol):
    """What exchanges for an optimizer."""

    controller: Controller

    @property
    def completes_batch(self) -> bool: ...
    def bytes_per_step(self) -> dict[str, float]: ...
    def end_epoch(self) -> None: ...
    def release(self) -> None: ...


class Reports(UsersClass):
    """What every DistributedOptimizer of this package can tell."""

    _hvd: Exchanging

    def end_epoch(self) -> None:
        """An epoch is over: needed where `steps_per_epoch` was not given. The same on every rank."""
        self._hvd.end_epoch()

    def release(self) -> None:
        """Training is over: backward passes start no exchange any more, and another optimizer may take the parameters."""
        self._hvd.release()

    @property
    def completes_batch(self) -> bool:
        """Whether the `step()` of the backward pass that comes next, or has just run, updates the parameters."""
        return self._hvd.completes_batch

    def compression_report(self) -> CompressionReport:
        """Per layer: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        return self._hvd.controller.report(self._hvd.bytes_per_step()).under(type(self).__name__)

    def advice(self) -> Advice:
        """What an `Auto` measured, what each choice would cost, what it chose. Prints as a table.

        Raises ValueError where there is no Auto, or where it has not chosen yet.
        """
        return advice_of(self._hvd)

    @property
    def stats(self) -> Stats:
        """Running totals of steps, bytes and seconds."""
        return self._hvd.controller.stats

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} is distributed and can be neither copied nor pickled: its exchanges belong to this "
            "process. Copy its state_dict(), or wrap a copy of the optimizer that it was made from"
        )


if TYPE_CHECKING:

    class Distributed(Reports):
        """What a DistributedOptimizer is: the user's own class, and this."""
