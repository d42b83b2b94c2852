"""The paper's measure of traffic: floats per step of one worker, from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hvd_accordion.compression import CompressionSpec, PowerSGD, TopK
from hvd_accordion.compression.base import size
from hvd_accordion.compression.sparse import num_selected


def floats(spec: CompressionSpec, shape: Sequence[int], ranks: int) -> int:
    """Returns the floats that one worker sends for one tensor, counted like the authors' code.

    A matrix is n = shape[0] by m = the rest. PowerSGD: min(n, m, r) (n + m); TopK: 2 k ranks, a value and an index for each
    entry of each rank; other specs, and 1-D tensors with any spec: the number of elements.
    """
    count = size(shape)
    if len(shape) < 2:
        return count
    if isinstance(spec, PowerSGD):
        n, m = shape[0], count // shape[0]
        return min(n, m, spec.rank) * (n + m)
    if isinstance(spec, TopK):
        return 2 * num_selected(spec.ratio, count) * ranks
    return count


def floats_a_step(layers: Iterable[tuple[CompressionSpec, Sequence[int]]], ranks: int) -> int:
    """Returns the floats of a model, given pairs of a layer's level and shape."""
    return sum(floats(spec, shape, ranks) for spec, shape in layers)
