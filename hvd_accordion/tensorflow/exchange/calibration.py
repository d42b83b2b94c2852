"""Measures the link and the compressors for an Auto, eagerly, before the graph is traced."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion.compression import CompressionSpec, Context, exchange
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.policy.auto import Calibration
from hvd_accordion.policy.layers import Layer
from hvd_accordion.tensorflow.exchange.agreement import from_rank_0
from hvd_accordion.tensorflow.transport import HorovodTransport
from hvd_accordion.training.calibration import REPEATS, dry_run, measure


def measured(
    layers: Sequence[Layer], choices: Mapping[str, Sequence[CompressionSpec]], name: str, transport: HorovodTransport
) -> Calibration:
    """The same on all ranks. No backward pass was seen yet: nothing counts as hidden behind it."""
    n = transport.size

    def allreduce(size: int) -> float:
        x = tf.ones(size // 4)
        begin = time.perf_counter()
        transport.allreduce([x], f"{name}.probe.{size}")[0][:1].numpy()
        return time.perf_counter() - begin

    return measure(
        layers,
        choices,
        n,
        {},
        None,
        allreduce,
        lambda layer, spec: exchange_seconds(layer, spec, n),
        lambda numbers: from_rank_0(numbers, f"{name}.measured", transport),
    )


def exchange_seconds(layer: Layer, spec: CompressionSpec, world_size: int) -> float:
    """Of the layer's exchange under the spec, as a graph, but for the network; on made-up gradients."""
    ctx = Context((layer.name,), layer.dtype, 0, 0, 0, world_size)
    (wide,) = ops.upcast([tf.zeros(layer.shape, layer.dtype)])
    values = tf.reshape(ops.uniform(1, layer.numel, wide) - 0.5, layer.shape)
    memory = spec.initial_memory(ops, wide, layer.name, 0)

    @tf.function(autograph=False)
    def run(grad: tf.Tensor, residual: tf.Tensor, memory: dict[str, Any]) -> tuple[tf.Tensor, tf.Tensor]:
        step = dry_run(exchange(spec, ops, [grad], [residual], [memory], ctx), ops, world_size)
        assert step.residual is not None
        return step.mean[0], step.residual[0]

    times, residual = [], wide
    for _ in range(REPEATS + 1):  # the first traces
        begin = time.perf_counter()
        mean, residual = run(tf.cast(values, layer.dtype), residual, memory)
        tf.reshape(mean, (-1,))[:1].numpy()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
