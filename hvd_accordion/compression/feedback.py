"""Error feedback, around any spec's exchange (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hvd_accordion.comm.collectives import AllFinite, Rounds, Tensor
from hvd_accordion.compression.base import CompressionSpec, Context, Memory
from hvd_accordion.ops.protocol import Ops


@dataclass(frozen=True)
class ExchangeResult:
    """What a group's step leaves: averaged gradients, residuals, the spec's memory, and whether the step was sound."""

    mean: list[Tensor]
    residual: list[Tensor] | None
    memory: list[Memory]
    ok: Tensor


def exchange(
    spec: CompressionSpec,
    ops: Ops,
    grads: list[Tensor],
    residual: list[Tensor] | None,
    memory: list[Memory],
    ctx: Context,
    places: Callable[[], Sequence[Tensor | None]] | None = None,
) -> Rounds[ExchangeResult]:
    """v = g + e; C(v) is sent; e' = v - C(v).

    A residual is also taken in by a spec that loses nothing: then all of it is sent. Where a step met NaN or Inf (`ok`
    false) residual and memory stay as they were. Gradients that meet a residual are only read; v may take its memory.

    Args:
        places: asked at the end for memory that averages may take, of a gradient's shape and the values' dtype each, or
            None where there is none.
    """
    if residual is not None and not spec.error_feedback:  # left by another level; only a contraction works it off
        spec = replace(spec, error_feedback=True)
    values = ops.upcast(grads)
    if residual is not None and spec.lossy:
        values = ops.add(values, residual)
    elif residual is not None:  # what loses nothing may average in place: the residual's memory must outlive that
        values = [v + e for v, e in zip(values, residual, strict=True)]
    done = yield from spec.exchange(ops, values, memory, ctx)
    ok = yield AllFinite(done.is_finite)
    into = None if places is None else list(places())
    if residual is None:
        mean, _ = done.finish(into, False)
    else:
        # where no remainder is wanted, gradients of other exchanges may yet be read: nothing is written into them
        finish = lambda left: done.finish(into if left else None, left)  # noqa: E731
        mean, residual = ops.commit_residual(ok, finish, values, residual, grads)
    return ExchangeResult(mean, residual, done.memory(ok), ok)
