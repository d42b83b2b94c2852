"""The one seam to a communication library: named collectives that are started, and waited for later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from hvd_accordion.comm.collectives import Tensor

Handle = Any  # of a collective that was started; a transport's own business
Reduction = Literal["sum", "max"]


class Transport(Protocol):
    """Collectives among some ranks, numbered 0, 1, ... `size` - 1.

    Every rank starts each collective under the same name, in any order. From its start until `wait` has returned, the
    tensors handed over belong to the transport: nobody reads those of an allreduce, nobody writes any.
    """

    @property
    def rank(self) -> int:
        """The number of this rank."""

    @property
    def size(self) -> int: ...

    @property
    def ranks(self) -> Sequence[int]:
        """The rank in the whole job of each number."""

    def allreduce(
        self,
        tensors: Sequence[Tensor],
        name: str,
        op: Reduction = "sum",
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> Handle:
        """Elementwise over the ranks, multiplied with the scales before and after. Result: a list of the same shapes.

        The result may take the memory of `tensors`.
        """

    def allgather(self, tensor: Tensor, name: str) -> Handle:
        """Result: the tensors of all ranks, joined along the first axis, in which they may differ."""

    def alltoall(self, tensor: Tensor, name: str) -> Handle:
        """Part r of `size` equal parts along the first axis goes to rank r. Result: the received parts, joined."""

    def broadcast(self, tensor: Tensor, root: int, name: str) -> Handle:
        """Result: the tensor of the rank of number `root`, in which all have one of that shape and dtype."""

    def poll(self, handle: Handle) -> bool:
        """Whether `wait` would return at once."""

    def wait(self, handle: Handle) -> Any:
        """The result; once for each handle."""
