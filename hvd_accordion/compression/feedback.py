"""Error feedback around any spec's exchange (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hvd_accordion.comm.collectives import AllFinite, Rounds, Tensor
from hvd_accordion.compression.base import CompressionSpec, Context, Memory
from hvd_accordion.ops.protocol import Ops


@dataclass(frozen=True)
class ExchangeResult:
    """The averaged gradients, new residuals and new memory of a group, and whether the step was finite on all ranks."""

    mean: list[Tensor]
    residual: list[Tensor] | None
    memory: list[Memory]
    is_finite: Tensor


def exchange(
    spec: CompressionSpec,
    ops: Ops,
    grads: list[Tensor],
    residual: list[Tensor] | None,
    memory: list[Memory],
    ctx: Context,
    buffers: Callable[[], Sequence[Tensor | None]] | None = None,
    residual_decay: float = 1.0,
) -> Rounds[ExchangeResult]:
    """Exchanges gradients under error feedback: v = g + e; send C(v); e' = beta (v - C(v)).

    A lossless spec also adds the residual, and thereby sends all of it. If any rank met NaN or Inf, residual and memory
    stay unchanged. Gradients that are added to a residual are only read; v may reuse the residual's memory.

    Args:
        spec: the compression.
        ops: the framework's primitives.
        grads: this rank's gradients g, one per layer.
        residual: e, one per gradient in its shape, or None without error feedback.
        memory: the spec's memory of each layer.
        ctx: names, step, seed and rank.
        buffers: called after the last collective. Returns one buffer or None per layer, in which the average may be stored.
            A buffer has the gradient's shape and the dtype of the values.
        residual_decay: beta, in (0, 1]. Below 1 the residual forgets (SparseLoCo, Sarfi et al. 2025, arXiv 2508.15706). It
            is kept as it will be added, so that v = g + e holds for every beta.
    """
    if residual is not None and not spec.error_feedback:  # a previous level left it; only a contraction reduces it
        spec = replace(spec, error_feedback=True)
    values = ops.upcast(grads)
    if residual is not None and spec.lossy:
        values = ops.add(values, residual)
    elif residual is not None:  # a lossless exchange may average in place, and must not overwrite the residual
        values = [v + e for v, e in zip(values, residual, strict=True)]
    decoded = yield from spec.exchange(ops, values, memory, ctx)
    is_finite = yield AllFinite(decoded.is_finite)
    into = None if buffers is None else list(buffers())
    if residual is None:
        mean, _ = decoded.finish(into, False)
    else:
        # after a non-finite step other exchanges may still read their gradients: the buffers are not written
        def finish(want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            mean, left = decoded.finish(into if want_remainder else None, want_remainder)
            return mean, left if left is None or residual_decay == 1.0 else [x * residual_decay for x in left]

        mean, residual = ops.commit_residual(is_finite, finish, values, residual, grads)
    return ExchangeResult(mean, residual, decoded.memory(is_finite), is_finite)
