"""Exchanges without state: Horovod's own allreduce, and the exchange of a rank that is alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.tensorflow.exchange.level_switch import dense_gradient
from hvd_accordion.tensorflow.exchange.norm_sums import NormSums
from hvd_accordion.tensorflow.exchange.planning import Plan
from hvd_accordion.tensorflow.exchange.state import State
from hvd_accordion.tensorflow.transport import Adasum, HorovodTransport


class Averaged(NamedTuple):
    """Layer name -> averaged gradient, and the bytes that this rank sent."""

    means: dict[str, Any]
    nbytes: tf.Tensor


def plain(
    plan: Plan,
    state: State,
    given: dict[str, Any],
    compression: Any,
    spec: CompressionSpec,
    prefix: str,
    transport: HorovodTransport,
) -> Averaged:
    """As Horovod itself does it: no state, no compression but a cast. `spec`: with the same cost."""
    settings = plan.settings
    means: dict[str, Any] = {}
    layers = plan.dense(given)
    grouped = bool(settings.groups and settings.op != Adasum)
    for i, run in enumerate(plan.runs(layers) if grouped else [[layer] for layer in layers]):
        grads = [dense_gradient(state, layer, given[layer.name]) for layer in run]
        name = f"{prefix}.{'group' if grouped else 'gradient'}.{i}"
        done = transport.plain(grads, name, settings.op, compression, settings.gradient_predivide_factor, grouped)
        means |= {layer.name: mean for layer, mean in zip(run, done, strict=True)}
    nbytes = sum(spec.bytes_per_step(x.shape, x.dtype, plan.size) for x in layers)
    return Averaged(means, tf.constant(nbytes, tf.float64))


def alone(plan: Plan, state: State, norms: NormSums, given: dict[str, Any], steps: Any) -> Averaged:
    """One rank: gradients stay, plus what it kept while there were others; norms are summed all the same."""
    layers = {layer.name: layer for layer in plan.dense(given)}
    keys = {name: plan.numbers[name] for name in layers}
    held = {name: state.residual[key] for name, key in keys.items() if key in state.residual}
    counted = set(norms.counted)
    names = [name for name in layers if name in counted or name in held]
    nothing = tf.constant(0.0, tf.float64)
    if not names:
        return Averaged(given, nothing)
    dense = {name: dense_gradient(state, layers[name], given[name]) for name in names}
    ok = ops.all_finite(list(dense.values()))
    for name, residual in held.items():
        dense[name] = tf.cast(dense[name], residual.dtype) + residual
        residual.assign(tf.where(ok, tf.zeros_like(residual), residual))
    norms.add(dense, ok, steps)
    return Averaged({**given, **{name: tf.cast(dense[name], layers[name].dtype) for name in held}}, nothing)
