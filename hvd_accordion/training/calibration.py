"""What an Auto must know before it chooses: the link by allreduces of different sizes, and exchanges without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hvd_accordion.comm.collectives import AllGather, AllReduce, AllToAll, Rounds
from hvd_accordion.comm.collectives import T as Result
from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.policy import cost_model
from hvd_accordion.policy.auto import Calibration
from hvd_accordion.policy.layers import Layer

SIZES = (2**12, 2**18, 2**20, 2**22, 2**24, 2**26)  # bytes of the allreduces
USUAL = 2**22  # larger ones where this one is too quick to tell, as far as the gradients go
QUICK = 0.1  # seconds
REPEATS = 3
TINY = (32, 32)


def measure(
    layers: Sequence[Layer],
    choices: Mapping[str, Sequence[CompressionSpec]],
    world_size: int,
    ready: Mapping[str, float],
    waited: float | None,
    allreduce: Callable[[int], float],
    exchange: Callable[[Layer, CompressionSpec], float],
    shared: Callable[[Sequence[float]], Sequence[float]],
) -> Calibration:
    """Measures on all ranks at the same point; what comes of it are rank 0's numbers.

    Args:
        choices: layer name -> the specs that an Auto may give it.
        ready: layer name -> seconds into backward when its gradient is ready, of the same layers on all ranks.
        waited: seconds from the end of backward to that of the exchange, where all travelled dense. None: not seen.
        allreduce: carries out one of so many bytes and gives its seconds.
        exchange: runs one of this layer under this spec, without sending, and returns its seconds.
        shared: rank 0's numbers from each rank's.
    """
    link = measured_link(allreduce, sum(x.nbytes for x in layers), world_size, shared)
    keys = [(x, spec) for x in layers for spec in choices.get(x.name, ())]
    kinds = list(dict.fromkeys((replace(x, name=""), spec) for x, spec in keys))
    # what an exchange takes however small, a group's layers share
    tiny = list(dict.fromkeys((replace(x, shape=TINY), spec) for x, spec in kinds))
    mine = [*ready.values(), -1.0 if waited is None else waited]
    numbers = iter(shared([*mine, *(exchange(x, spec) for x, spec in [*kinds, *tiny])]))
    ready = {name: next(numbers) for name in ready}
    if (waited := next(numbers)) >= 0:
        dense = sum(Dense().bytes_per_step(x.shape, x.dtype, world_size) for x in layers)
        ready = as_hidden(ready, dense / link.bandwidth, waited)
        if waited * link.bandwidth > dense:  # beside a training the link is slower than by itself
            link = replace(link, bandwidth=dense / waited)
    times = dict(zip([*kinds, *tiny], numbers, strict=True))

    def own(x: Layer, spec: CompressionSpec) -> float:
        whole, least = times[replace(x, name=""), spec], times[replace(x, name="", shape=TINY), spec]
        return max(whole - least, 0.1 * whole)

    return Calibration(link, world_size, ready, {(x.name, spec): own(x, spec) for x, spec in keys})


def as_hidden(ready: Mapping[str, float], wire: float, waited: float) -> dict[str, float]:
    """Ready times, moved towards the end of backward by as much as less was hidden behind it than could have been.

    Horovod's thread wants a core too: where all of them compute, little travels meanwhile. Of min(W, wire) seconds that
    could hide behind a backward pass of W, wire - waited did.
    """
    end = max(ready.values(), default=0.0)
    share = min(1.0, max(0.0, wire - waited) / max(min(end, wire), 1e-9))
    return {name: end - share * (end - at) for name, at in ready.items()}


def measured_link(
    allreduce: Callable[[int], float],
    most: int,
    world_size: int,
    shared: Callable[[Sequence[float]], Sequence[float]],
) -> cost_model.Link:
    """By allreduces of more and more bytes, of no more than `most` where they are large."""
    samples: list[cost_model.Sample] = []
    for size in SIZES:
        if size > USUAL and (size > most or samples[-1][3] > QUICK):
            break
        allreduce(size)  # the first of a size makes room for it
        times = shared([allreduce(size) for _ in range(REPEATS)])
        samples += [(AllReduce, float(size), world_size, t) for t in times]
    return cost_model.fit(samples)


def dry_run(rounds: Rounds[Result], ops: Ops, world_size: int) -> Result:
    """What rank 0's exchange comes to if all ranks held its values, with all the work that it makes for a rank.

    But for exchanges with an alltoall: what other ranks make of their slices is unknown, and rank 0's stands for each.
    """
    answer: object = None
    while True:
        try:
            request = rounds.send(answer)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        if isinstance(request, AllReduce):
            answer = list(request.tensors)
        elif isinstance(request, AllGather):
            answer = ops.stack([request.tensor] * world_size)
        elif isinstance(request, AllToAll):
            answer = ops.stack([request.tensor[0]] * world_size)
        else:
            answer = request.is_finite()
