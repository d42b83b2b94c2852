"""What an Auto must know before it chooses: the link by allreduces of different sizes, and exchanges without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hvd_accordion import cost
from hvd_accordion.auto import Measured
from hvd_accordion.collectives import AllGather, AllReduce, AllToAll, Rounds
from hvd_accordion.collectives import T as Result
from hvd_accordion.compression import CompressionSpec
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.plan import Layer

SIZES = (2**12, 2**18, 2**20, 2**22)  # bytes of the allreduces
REPEATS = 3


def measure(
    layers: Sequence[Layer],
    choices: Mapping[str, Sequence[CompressionSpec]],
    world_size: int,
    backward: float,
    allreduce: Callable[[int], float],
    exchange: Callable[[Layer, CompressionSpec], float],
    shared: Callable[[Sequence[float]], Sequence[float]],
) -> Measured:
    """Measures on all ranks at the same point; what comes of it are rank 0's numbers.

    Args:
        choices: layer name -> the specs that an Auto may give it.
        backward: seconds of a backward pass.
        allreduce: carries out one of so many bytes and gives its seconds.
        exchange: rehearses one of this layer under this spec and gives its seconds.
        shared: rank 0's numbers from each rank's.
    """
    sizes = [size for size in SIZES for _ in range(REPEATS + 1)]
    links = [allreduce(size) for size in sizes]
    keys = [(x, spec) for x in layers for spec in choices.get(x.name, ())]
    kinds = list(dict.fromkeys((x.shape, x.dtype, x.device, spec) for x, spec in keys))
    first = {(x.shape, x.dtype, x.device, spec): (x, spec) for x, spec in reversed(keys)}
    backward, *numbers = shared([backward, *links, *(exchange(*first[kind]) for kind in kinds)])
    samples = [(AllReduce, float(size), world_size, t) for size, t in zip(sizes, numbers, strict=False)]
    times = dict(zip(kinds, numbers[len(links) :], strict=True))
    compression = {(x.name, spec): times[x.shape, x.dtype, x.device, spec] for x, spec in keys}
    del samples[:: REPEATS + 1]  # the first of each size made room for it
    return Measured(cost.fit(samples), world_size, backward, compression)


def rehearse(rounds: Rounds[Result], ops: Ops, world_size: int) -> Result:
    """What rank 0's exchange comes to if all ranks held its values, with all the work that it makes for a rank.

    But for exchanges with an alltoall: what other ranks make of their slices is unknown, and rank 0's stands for each.
    """
    answer: object = None
    while True:
        try:
            request = rounds.send(answer)
        except StopIteration as stop:
            return stop.value
        if isinstance(request, AllReduce):
            answer = list(request.tensors)
        elif isinstance(request, AllGather):
            answer = ops.stack([request.tensor] * world_size)
        elif isinstance(request, AllToAll):
            answer = ops.stack([request.tensor[0]] * world_size)
        else:
            answer = request.sound()
