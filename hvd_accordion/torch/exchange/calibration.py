"""Times what an Auto must know in torch. Here, and only here, something waits for the device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.compression import CompressionSpec, Context, exchange
from hvd_accordion.compression.base import Memory
from hvd_accordion.ops import torch as ops
from hvd_accordion.policy.auto import PROBE_STEPS, Advice, Calibration, advise
from hvd_accordion.policy.layers import Layer
from hvd_accordion.torch.exchange.agreement import from_rank_0
from hvd_accordion.training.calibration import REPEATS, dry_run, measure
from hvd_accordion.training.controller import Controller


class Probe:
    """Watches the backward passes of the first steps, then measures the rest."""

    def __init__(self, transport: Transport, prefix: Prefix | str) -> None:
        self.transport, self.prefix = transport, prefix
        self.ready: dict[str, float] = {}  # of the step under way, then of the last
        self.waited: float | None = None  # at the least, for the exchange since the end of backward
        self.steps = 0

    def gradient(self, name: str) -> None:
        """A gradient is complete."""
        self.ready[name] = time.perf_counter()

    def end_backward(self) -> None:
        """A step ends; counted on every rank, even where no gradient was."""
        self.steps += 1
        if not self.complete:
            self.ready = {}

    def end_exchange(self, waited: float) -> None:
        if self.steps > 1:  # the first warms up, and hides nothing
            self.waited = waited if self.waited is None else min(self.waited, waited)

    @property
    def complete(self) -> bool:
        return self.steps >= PROBE_STEPS

    def measure(self, layers: Sequence[Layer], choices: Mapping[str, Sequence[CompressionSpec]]) -> Calibration:
        """The same on all ranks."""
        n = self.transport.size
        device = layers[0].device if layers else "cpu"
        first = min(self.ready.values(), default=0.0)
        return measure(
            layers,
            choices,
            n,
            {x.name: self.ready.get(x.name, first) - first for x in layers},
            self.waited,
            lambda size: self._allreduce(size, device),
            lambda layer, spec: exchange_seconds(layer, spec, n),
            lambda numbers: from_rank_0(numbers, f"{self.prefix}.measured", self.transport),
        )

    def _allreduce(self, size: int, device: str) -> float:
        x = torch.ones(size // 4, device=device)
        begin = time.perf_counter()
        self.transport.wait(self.transport.allreduce([x], f"{self.prefix}.probe.{size}"))
        wait_for(x)
        return time.perf_counter() - begin


class AutoChoice:
    """What an `Auto` measures in the first steps, and what it chose. `probe`: as long as a choice is open."""

    def __init__(self) -> None:
        self.probe: Probe | None = None
        self.advice: Advice | None = None

    def begin(self, controller: Controller, transport: Transport, prefix: Prefix) -> None:
        """After a change of layers or choices."""
        undecided = transport.size > 1 and controller.undecided
        self.probe = (self.probe or Probe(transport, prefix)) if undecided else None

    def choose(self, controller: Controller, sparse: Mapping[str, int]) -> None:
        """Decides, on all ranks alike, if the first steps were seen. `sparse`: layers that are not compressed."""
        if self.probe is None or not self.probe.complete:
            return
        layers = [layer for name, layer in controller.layers.items() if name not in sparse]
        choices = controller.levels.candidates()
        self.advice = advise(layers, choices, self.probe.measure(layers, choices))
        controller.choose({layer.name: layer.chosen for layer in self.advice})


@torch.no_grad()
def exchange_seconds(layer: Layer, spec: CompressionSpec, world_size: int) -> float:
    """Of the layer's exchange under the spec, but for the network; on made-up gradients."""
    ctx = Context((layer.name,), layer.dtype, 0, 0, 0, world_size)
    like = torch.empty(layer.shape, dtype=getattr(torch, layer.dtype), device=layer.device)
    (wide,) = ops.upcast([like])
    values = ops.uniform(1, layer.numel, wide).sub_(0.5).view(layer.shape)
    residual: list[torch.Tensor] | None = [torch.zeros_like(wide)]
    memory: list[Memory] = [{}]
    times = []
    for _ in range(REPEATS):
        grad = like.copy_(values).clone()
        wait_for(grad)
        begin = time.perf_counter()
        step = dry_run(exchange(spec, ops, [grad], residual, memory, ctx), ops, world_size)
        wait_for(step.mean[0])
        times.append(time.perf_counter() - begin)
        residual, memory = step.residual, step.memory
    return min(times)


def wait_for(x: torch.Tensor) -> None:
    x.flatten()[:1].cpu()
