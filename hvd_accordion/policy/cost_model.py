"""What an exchange costs in seconds: latency, bandwidth and a constant of each collective, and the compression itself.

The alpha-beta model: a collective takes `overhead + hops * latency + sent bytes / bandwidth`. `gamma` is the third part,
seconds of compression and decompression per value of a spec as somebody measured them (seconds on one rank: where ranks
share cores, the caller multiplies). Not in it: congestion of the switches, links of different speed, stragglers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from hvd_accordion.comm.collectives import AllGather, AllReduce, AllToAll, Request, sent
from hvd_accordion.compression.base import CompressionSpec, Message, size

if TYPE_CHECKING:
    from hvd_accordion.policy.layers import Group, Layer

Sample: TypeAlias = tuple[type[Request], float, int, float]  # a collective, bytes of one rank's payload, ranks, seconds
Gamma: TypeAlias = Mapping[CompressionSpec, float]  # seconds of compression per value


@dataclass(frozen=True)
class Link:
    """How a rank is joined to the others.

    Args:
        latency: seconds of each hop of a collective, >= 0.
        bandwidth: bytes a second that one rank sends, > 0; math.inf where bytes cost nothing.
        overhead: seconds of each collective whatever its size and the number of ranks, >= 0: Horovod's cycle.
    """

    latency: float
    bandwidth: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        if not (self.latency >= 0 and self.bandwidth > 0 and self.overhead >= 0):
            raise ValueError(f"latency and overhead must be >= 0 and bandwidth > 0, got {self!r}")


def hops(kind: type[Request], n: int) -> int:
    """Latencies one after another of a collective among n ranks.

    Assumed are the algorithms that send the fewest bytes in few rounds: allreduce 2 ceil(log2 n) (halving, then doubling;
    a ring would take 2 (n-1)), allgather ceil(log2 n) (doubling), alltoall n - 1 (a message to every rank).
    Of 2, 4 and 8 ranks on one machine (Open MPI, 1 to 10 kB) all of it hid in Horovod's cycle of 5 ms: it is not measured.
    """
    rounds = math.ceil(math.log2(n)) if n > 1 else 0
    return {AllReduce: 2 * rounds, AllGather: rounds, AllToAll: n - 1}.get(kind, 0)


def constant(kind: type[Request], n: int, link: Link) -> float:
    """Seconds of a collective without its bytes."""
    return link.overhead + hops(kind, n) * link.latency if hops(kind, n) else 0.0


def seconds(kind: type[Request], nbytes: float, n: int, link: Link) -> float:
    """Of a collective among n ranks, each with a payload of `nbytes`; 0 on one rank."""
    return constant(kind, n, link) + sent(kind, nbytes, n) / link.bandwidth


def round_seconds(spec: CompressionSpec, n: int, link: Link, dtype: Any = "float32") -> float:
    """The constants of an exchange's rounds: what a group pays once, however many layers share it."""
    return sum(constant(kind, n, link) for kind, _ in spec.messages((64, 64), dtype, n))


def layer_seconds(
    shape: Sequence[int], dtype: Any, spec: CompressionSpec, n: int, link: Link, gamma: float = 0.0
) -> float:
    """What one layer more costs a group: its bytes and its compression. `gamma`: seconds per value of this spec."""
    if n == 1:
        return 0.0
    messages = spec.messages(shape, dtype, n)
    if _joined(spec, messages):  # one of n alike: padded with them, not by itself
        messages = [(kind, nbytes / n) for kind, nbytes in spec.messages((n * size(shape),), dtype, n)]
    return _wire(messages, n, link) + gamma * size(shape)


def group_messages(layers: Sequence[Layer], spec: CompressionSpec, n: int) -> list[Message]:
    """The collectives of a group: in each round the payloads of all layers together."""
    if not layers:
        return []
    each = [spec.messages(layer.shape, layer.dtype, n) for layer in layers]
    if _joined(spec, each[0]):
        return spec.messages((sum(layer.numel for layer in layers),), layers[0].dtype, n)
    return [(rounds[0][0], sum(nbytes for _, nbytes in rounds)) for rounds in zip(*each, strict=True)]


def exchange_seconds(layers: Sequence[Layer], spec: CompressionSpec, n: int, link: Link, gamma: float = 0.0) -> float:
    """Of one group by itself: compression, and its rounds one after another, each with the payloads of all layers."""
    if n == 1:
        return 0.0
    rounds = sum(seconds(kind, nbytes, n, link) for kind, nbytes in group_messages(layers, spec, n))
    return rounds + gamma * sum(layer.numel for layer in layers)


def wire_seconds(groups: Sequence[Group], n: int, link: Link) -> tuple[float, float]:
    """What groups, in the order of backward, take of the network: before the end of backward, and after it.

    The last group of each spec gets ready only then. Groups are on their way together: their bytes add up, while the
    constants of the rounds pass side by side, so that those of the longest of the last groups count.
    """
    last = {(group.spec, group.layers[0].dtype): group for group in groups}.values()
    late = [group_messages(group.layers, group.spec, n) for group in last]
    early = [group_messages(group.layers, group.spec, n) for group in groups if group not in last]
    waits = max((sum(constant(kind, n, link) for kind, _ in messages) for messages in late), default=0.0)
    return sum(_wire(m, n, link) for m in early), sum(_wire(m, n, link) for m in late) + waits


def step_seconds(
    compute: float, groups: Sequence[Group], n: int, link: Link, gamma: Gamma, backward: float = 2 / 3
) -> float:
    """Of a training step: forward + max(backward + compression, bytes of the early groups) + rounds of the last groups.

    Args:
        compute: seconds of forward and backward; `backward` is the share of the latter.
        groups: in the order of backward. Those before the last hide behind it as far as they fit (see `wire_seconds`).
    """
    if n == 1:
        return compute
    compression = sum(gamma[group.spec] * layer.numel for group in groups for layer in group.layers)
    early, late = wire_seconds(groups, n, link)
    return compute * (1 - backward) + max(compute * backward + compression, early) + late


def local_step_seconds(
    compute: float, groups: Sequence[Group], n: int, link: Link, gamma: Gamma, every: int, delay: int = 0
) -> float:
    """Of a step of local steps, on average: compute + exchange / every.

    Nothing hides an exchange but the `delay` steps that go on meanwhile; compression is in the thread that computes.

    Args:
        compute: seconds of forward, backward and the optimizer.
        groups: of the whole model, which is exchanged each `every` steps.
    """
    if n == 1:
        return compute
    compression = sum(gamma[group.spec] * layer.numel for group in groups for layer in group.layers)
    travels = sum(wire_seconds(groups, n, link))
    return compute + (compression + max(0.0, travels - delay * compute)) / every


def fit(samples: Iterable[Sample], latency: float | None = None) -> Link:
    """The link that explains measured collectives best: non-negative least squares of relative errors.

    Of repeats (same kind, payload and ranks) the median counts; relative errors let small messages count as large ones.
    Samples of a single number of ranks can't tell latency and overhead apart, only what a collective takes at no bytes:
    then the latency is taken as given (0 unless it is) and the rest is overhead. Given with samples of several numbers
    of ranks, it is kept too.
    """
    times: dict[tuple[type[Request], float, int], list[float]] = {}
    for kind, nbytes, n, taken in samples:
        if n < 2 or not taken > 0:
            raise ValueError(f"a sample needs at least 2 ranks and more than 0 seconds, got {n} ranks, {taken} s")
        times.setdefault((kind, nbytes, n), []).append(taken)
    if not times:
        raise ValueError("samples must hold at least one measurement, got none")
    if latency is None and len({n for _, _, n in times}) == 1:
        latency = 0.0
    rows, targets = [], []
    for (kind, nbytes, n), found in times.items():
        whole = statistics.median(found)
        wave = float(hops(kind, n))
        row = [1.0, sent(kind, nbytes, n)]
        rows.append([x / whole for x in (row if latency is not None else [*row, wave])])
        targets.append((whole - wave * (latency or 0.0)) / whole)
    overhead, per_byte, *more = _non_negative(rows, targets)
    return Link(more[0] if latency is None else latency, 1 / per_byte if per_byte else math.inf, overhead)


def _joined(spec: CompressionSpec, messages: Sequence[Message]) -> bool:
    """Whether a group's values are coded as one vector, in slices of whole blocks (two_hop.py)."""
    return messages[0][0] is AllToAll and not spec.cuts_layers


def _wire(messages: Iterable[Message], n: int, link: Link) -> float:
    return sum(sent(kind, nbytes, n) for kind, nbytes in messages) / link.bandwidth


def _non_negative(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """x >= 0 with the least |rows x - targets|: coordinate descent on the normal equations, for few unknowns."""
    columns = list(zip(*rows, strict=True))
    gram = [[_dot(a, b) for b in columns] for a in columns]
    right = [_dot(a, targets) for a in columns]
    x = [0.0] * len(columns)
    for _ in range(5000):
        for i, line in enumerate(gram):
            if line[i]:
                x[i] = max(0.0, x[i] + (right[i] - _dot(line, x)) / line[i])
    return x


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
