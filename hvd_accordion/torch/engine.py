"""The way of a torch gradient: from its backward hook through its group's exchange back into `.grad`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion import plan, sampling
from hvd_accordion.auto import Advice, advise
from hvd_accordion.compression import CompressionSpec, Context, Dense, exchange
from hvd_accordion.compression.base import Memory
from hvd_accordion.controller import Controller
from hvd_accordion.ops import torch as ops
from hvd_accordion.plan import Group, Layer, Policy
from hvd_accordion.settings import Settings
from hvd_accordion.torch import sparse
from hvd_accordion.torch.agreement import from_rank_0, require_equal
from hvd_accordion.torch.configuration import layer_of
from hvd_accordion.torch.driver import Driver
from hvd_accordion.torch.probe import Probe

TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
    "backward_passes_per_step to accumulate gradients locally."
)


class Engine:
    """Exchanges the gradients of named parameters.

    Args:
        params: name -> parameter, in the order of the optimizer's parameters.
        controller: knows levels and windows; its layers are those of `params`.
        lr: gives the learning rate of now.
        prefix: of all names of collectives; unique to an optimizer, equal on all ranks.
    """

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        controller: Controller,
        settings: Settings,
        lr: Callable[[], float],
        prefix: str,
    ) -> None:
        self.params = dict(params)
        self.controller, self.settings, self.lr, self.prefix = controller, settings, lr, prefix
        self.process_set = settings.process_set
        self._join()
        self.residual: dict[str, torch.Tensor] = {}
        self.memory: dict[str, Memory] = {}
        self.kinds: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}  # of the gradients, as planned
        self.summed: dict[str, torch.Tensor] = {}  # watched entries of the averaged gradients since the window's start
        self.entries: dict[str, torch.Tensor | None] = {}  # which are watched; None: all
        self.sent: dict[
            str, tuple[CompressionSpec | None, float]
        ] = {}  # of each layer at its last exchange: spec, bytes
        self.sparse: sparse.SparseLayers | None = None  # unknown until the first gradients are
        self.backward_passes_per_step = settings.backward_passes_per_step
        self.passes: dict[str, int] = {}
        self.seconds = 0.0
        self.synchronized = False  # by the user, with no backward pass since
        self._hooks: dict[str, Any] = {}
        self.probe: Probe | None = None  # as long as an Auto has yet to choose
        self.advice: Advice | None = None
        self._replan()

    def _join(self) -> None:
        """Its place among the ranks, which elastic training may change between two loads of state."""
        self.active = self.process_set.included()
        self.size = self.process_set.size() if self.active else 1
        self.rank = self.process_set.rank() if self.active else 0
        self.controller.world_size = self.size
        self.driver = Driver(self.prefix, self.process_set, self.settings.scales(self.size))

    # plan: which layers, in which groups

    def trainable(self) -> list[str]:
        return [name for name, p in self.params.items() if p.requires_grad]

    def add(self, params: Mapping[str, torch.nn.Parameter], policy: Mapping[str, Policy]) -> None:
        """Takes in more parameters, the same on every rank."""
        described = {name: f"{layer_of(name, p)} {policy[name]!r}" for name, p in params.items()}
        if self.active:
            require_equal(described, f"{self.prefix}.{len(self.params)}", self.process_set)
        self.params.update(params)
        self.controller.adopt(policy)
        self._replan()

    def set_backward_passes_per_step(self, passes: int) -> None:
        self.backward_passes_per_step = passes
        self.passes = dict.fromkeys(self.passes, passes)

    def _replan(self) -> None:
        """Between steps: takes in a change of the trainable parameters or of the levels."""
        names = self.trainable()
        self.planned = names
        layers = [layer_of(name, self.params[name]) for name in names]
        self.controller.set_layers(layers)
        dense = [x for x in layers if x.numel and (self.sparse is None or x.name not in self.sparse.dims)]
        self.groups = self._grouped(dense)
        self.group_of = {layer.name: group for group in self.groups for layer in group.layers}
        for name in names:
            self.passes.setdefault(name, self.backward_passes_per_step)
            if self.active and name not in self._hooks:
                self._hooks[name] = self.params[name].register_post_accumulate_grad_hook(_hook(weakref.ref(self), name))
        undecided = self.size > 1 and self.controller.undecided
        self.probe = self.probe or Probe(self.process_set, self.prefix) if undecided else None
        self.controller.changed = False
        self.counted: dict[str, float] = {}
        self._begin()

    def _grouped(self, layers: list[Layer]) -> list[Group]:
        self.kinds |= {x.name: kind(self.params[x.name]) for x in layers}
        limit = None if self.settings.groups else plan.BUCKET_BYTES
        return plan.grouped(self._runs(layers), self.controller.specs(), self.residual, limit)

    def _runs(self, layers: list[Layer]) -> list[list[Layer]]:
        groups = self.settings.groups
        if isinstance(groups, int) and groups > 0:
            return plan.split(layers, groups)
        if isinstance(groups, list):
            by_id = {id(self.params[x.name]): x for x in layers}
            runs = [[by_id.pop(id(p)) for p in group if id(p) in by_id] for group in groups]
            return [run for run in runs if run] + [[x] for x in by_id.values()]
        return [layers[::-1]]  # in the order of backward

    def _begin(self) -> None:
        self.missing = {group.name: {layer.name for layer in group.layers} for group in self.groups}
        self.started: dict[str, Group] = {}
        self.measured = set(self.controller.measured)

    # a step: hooks, then synchronize

    @property
    def in_flight(self) -> bool:
        return bool(self.started)

    def on_gradient(self, name: str) -> None:
        """A backward pass has added to the parameter's gradient."""
        if self.size == 1:
            return
        begin = time.perf_counter()
        self.synchronized = False
        if self.passes[name] <= 0:
            raise AssertionError(TOO_MANY_PASSES)
        self.passes[name] -= 1
        if self.probe is not None and self.passes[name] == 0:
            self.probe.gradient(name)
        if self.passes[name] == 0 and self.sparse is not None:
            group = self.group_of.get(name)
            if name in self.sparse.dims:
                self._start_sparse(name)
            elif group is not None:
                self.missing[group.name].discard(name)
                if not self.missing[group.name]:
                    self._start(group)
            self.driver.poll()
        self.seconds += time.perf_counter() - begin

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the exchange of all gradients: every rank's `.grad` holds the mean (or sum)."""
        if not self.active:
            return
        begin = time.perf_counter()
        if self.probe is not None:
            self.probe.end_backward()
        try:
            if self.size > 1:
                sent = self._exchange()
            else:
                sent = self._alone()
        except BaseException:
            self.reset()
            raise
        self.seconds += time.perf_counter() - begin
        if self.probe is not None:
            self.probe.end_exchange(time.perf_counter() - begin)
        ended = self.controller.advance(sent, self.seconds)
        self.reset()
        if self.controller.wants_lr:
            (lr,) = from_rank_0([self.lr()], f"{self.prefix}.lr", self.process_set)
            self.controller.observe_lr(lr)
        if ended:
            self.controller.end_epoch()
        self._check()

    def end_epoch(self) -> None:
        if self.active and self.controller.end_epoch():
            self._check()

    def reset(self) -> None:
        """Ready for the next backward pass, whatever became of the last."""
        self.synchronized = False
        self.driver.reset()
        self.seconds = 0.0
        self.passes = dict.fromkeys(self.passes, self.backward_passes_per_step)
        self._begin()

    def _exchange(self) -> float:
        if self.sparse is None:
            now = {name: self.params[name] for name in self.trainable()}
            self.sparse = sparse.agree(now, f"{self.prefix}.sparse", self.settings)
            self._replan()
        late = [name for name in self.trainable() if name not in self.planned]
        if late:  # unfrozen since the last step: every rank sees so, and they go in groups of their own
            layers = [layer_of(name, self.params[name]) for name in late]
            self.controller.set_layers([*self.controller.layers.values(), *layers])
            self.groups = [*self.groups, *(_renamed(group, "late") for group in self._grouped(layers))]
        for group in self.groups:
            if group.name not in self.started:
                self._start(group)
        for name in self.sparse.dims:
            if name not in self.started:
                self._start_sparse(name)
        flags, total = [], 0.0
        for name in self.sparse.dims:
            flag, nbytes = self.sparse.finish(name, self.params[name])
            self.sent[name] = None, nbytes
            flags.append(flag)
            total += nbytes
        asked = bool(self.measured) or any(group.feeds_back or group.spec.lossy for group in self.groups)
        results = self.driver.finish(asked, flags)
        for group in self.groups:
            step, nbytes = results[group.name]
            self._accept(group, step)
            self._count(group, nbytes)
            total += nbytes
        return total

    @torch.no_grad()
    def _start(self, group: Group) -> None:
        self.started[group.name] = group
        names = tuple(layer.name for layer in group.layers)
        grads = [self._gradient(layer) for layer in group.layers]
        residual = None
        if group.feeds_back:
            for name, grad in zip(names, grads, strict=True):
                if name not in self.residual:
                    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
                    self.residual[name] = torch.zeros_like(grad, dtype=wide, memory_format=torch.contiguous_format)
            residual = [self.residual[name] for name in names]
        memory = [self.memory.get(name, {}) for name in names]
        ctx = Context(names, group.layers[0].dtype, self.controller.step, self.settings.seed, self.rank, self.size)
        self.driver.start(group.name, exchange(group.spec, ops, grads, residual, memory, ctx))

    def _start_sparse(self, name: str) -> None:
        assert self.sparse is not None
        self.started[name] = None  # type: ignore[assignment]
        self.sparse.start(name, self.params[name])

    def _gradient(self, layer: Layer) -> torch.Tensor:
        """The gradient, zeros where there is none, dense; an error where it is not what the layer was planned for."""
        p = self.params[layer.name]
        if p.grad is None or not p.requires_grad:
            return torch.zeros(layer.shape, dtype=p.dtype, device=p.device)
        if p.grad.is_sparse:
            if not self.settings.sparse_as_dense:
                raise ValueError(
                    f"the gradient of {layer.name} is sparse but was dense at the first step: pass sparse_as_dense=True"
                )
            return p.grad.to_dense()
        if kind(p.grad) != self.kinds[layer.name]:
            raise ValueError(
                f"the gradient of {layer.name} was {layer.dtype} {layer.shape} on {layer.device} when the optimizer was "
                f"made, now it is {ops.dtype(p.grad)} {tuple(p.grad.shape)} on {p.grad.device}; make a new optimizer for "
                "changed parameters"
            )
        return p.grad.detach() if owned(p.grad) else p.grad.clone(memory_format=torch.contiguous_format)

    def _accept(self, group: Group, step: Any) -> None:
        """Writes the means into the gradients, keeps residuals and memory, adds to the window's sums."""
        names = [layer.name for layer in group.layers]
        if step.residual is not None:
            self.residual.update(zip(names, step.residual, strict=True))
        self.memory.update(zip(names, step.memory, strict=True))
        self._watch({name: mean for name, mean in zip(names, step.mean, strict=True) if name in self.measured}, step.ok)
        if self.settings.op == hvd.Sum:
            torch._foreach_mul_(step.mean, float(self.size))
        into, new = [], []
        for name, mean in zip(names, step.mean, strict=True):
            p = self.params[name]
            if not p.requires_grad:
                continue
            if p.grad is None:
                p.grad = mean.to(p.dtype)
            elif p.grad.is_sparse:  # sparse_as_dense
                p.grad = mean.to(p.dtype).to_sparse(p.grad.sparse_dim())
            elif p.grad.data_ptr() == mean.data_ptr():
                continue
            elif owned(p.grad):  # the values' memory may be the residual's by now
                p.grad = mean.new_empty(0).set_(mean)  # that memory, but no view of another tensor
            else:
                into.append(p.grad)
                new.append(mean)
        if into:
            torch._foreach_copy_(into, new)

    def _watch(self, means: Mapping[str, torch.Tensor], ok: torch.Tensor) -> None:
        """Adds the watched entries to the window's sums, if the step was sound."""
        if not means or (ops.at_hand(ok) and not ok):
            return
        seen = ops.widen([self._watched(name, mean) for name, mean in means.items()])
        if not ops.at_hand(ok):
            seen = ops.unflatten(torch.where(ok, ops.flatten(seen), 0.0), seen)
        sums = [self.summed.setdefault(name, torch.zeros_like(x)) for name, x in zip(means, seen, strict=True)]
        torch._foreach_add_(sums, seen)

    def _watched(self, name: str, mean: torch.Tensor) -> torch.Tensor:
        """The entries of a layer of which its norm is made, as a vector."""
        flat = mean.reshape(-1)
        if name not in self.entries:
            count, seed = flat.numel(), self.settings.seed
            size = self.controller.watched(name, count)
            self.entries[name] = sampling.entries(ops, name, count, size, seed, flat) if size < count else None
        entries = self.entries[name]
        return flat if entries is None else ops.take(flat, entries)

    def _count(self, group: Group, nbytes: float) -> None:
        """Shares a group's bytes among its layers as their own specs would have it."""
        if self.counted.get(group.name) == nbytes:
            return
        self.counted[group.name] = nbytes
        predicted = [group.spec.bytes_per_step(x.shape, x.dtype, self.size) for x in group.layers]
        for layer, part in zip(group.layers, predicted, strict=True):
            self.sent[layer.name] = group.spec, nbytes * part / sum(predicted)

    def _alone(self) -> float:
        """One rank: gradients stay as they are; norms are watched all the same."""
        for name in self.measured:
            grad = self.params[name].grad
            if grad is not None and not grad.is_sparse:
                self._watch({name: grad.detach()}, ops.all_finite([grad]))
        return 0.0

    def _check(self) -> None:
        """Between steps: the regimes from the norms that are due, and the plan that follows from them."""
        names = self.controller.due()
        if names:
            sums = [self.summed.pop(name, None) for name in names]
            norms = [torch.linalg.vector_norm(x).double().cpu() if x is not None else torch.zeros(()) for x in sums]
            *shared, lr = from_rank_0([*map(float, norms), self.lr()], f"{self.prefix}.norms", self.process_set)
            self.controller.observe(dict(zip(names, shared, strict=True)), lr)
        if self.probe is not None and self.probe.complete:
            self._choose(self.probe)
        if self.controller.changed or self.planned != self.trainable():
            self._replan()

    def _choose(self, probe: Probe) -> None:
        """An Auto decides, on all ranks alike."""
        assert self.sparse is not None
        layers = [layer for name, layer in self.controller.layers.items() if name not in self.sparse.dims]
        choices = self.controller.choices()
        self.advice = advise(layers, choices, probe.measure(layers, choices))
        self.controller.choose({layer.name: layer.chosen for layer in self.advice})

    # reports and state

    def bytes_per_step(self) -> dict[str, float]:
        """Bytes of each layer a step: as counted at the last, or what the spec says where that is a new one."""
        specs, found = self.controller.specs(), {}
        for name, layer in self.controller.layers.items():
            spec, nbytes = self.sent.get(name, (Dense(), 0.0))
            counted = name in self.sent and spec in (None, specs[name])
            found[name] = nbytes if counted else specs[name].bytes_per_step(layer.shape, layer.dtype, self.size)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "size": self.size,
            "controller": self.controller.state_dict(),
            "residual": dict(self.residual),
            "memory": {name: dict(memory) for name, memory in self.memory.items() if memory},
            "summed": dict(self.summed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up saved state. A residual is its rank's own: saved by another rank, it is not taken.

        After a change of the number of ranks it is scaled by new/old, so that it counts for as much in the mean. Sums of
        other entries than an Accordion's `norm` asks for now are not taken.
        """
        tensors = ("residual", "memory", "summed")
        unknown = sorted({name for part in tensors for name in state[part]} - self.params.keys())
        if unknown:
            raise ValueError(f"state_dict holds compression state of unknown parameters: {', '.join(unknown)}")
        self._join()
        self.controller.load_state_dict(state["controller"])

        def own(name: str, x: torch.Tensor) -> torch.Tensor:
            return x.detach().to(self.params[name].device, copy=True)

        self.memory = {n: {key: own(n, x) for key, x in kept.items()} for n, kept in state["memory"].items()}
        watched = {name: self.controller.watched(name, self.params[name].numel()) for name in state["summed"]}
        self.summed = {name: own(name, x) for name, x in state["summed"].items() if x.shape == (watched[name],)}
        self.residual = {}
        if state["rank"] == self.rank:
            scale = self.size / state["size"]
            self.residual = {name: own(name, x).mul_(scale) for name, x in state["residual"].items()}
        self.reset()
        self._replan()


def kind(x: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return x.shape, x.dtype, x.device


def owned(grad: torch.Tensor) -> bool:
    """Whether the gradient has its memory for itself, as exchanges take it: contiguous, in fp32 or fp64."""
    alone = grad.untyped_storage().nbytes() == grad.nbytes and not grad._is_view()
    return alone and grad.is_contiguous() and grad.dtype in (torch.float32, torch.float64)


def _hook(engine: weakref.ref[Engine], name: str) -> Callable[[torch.Tensor], None]:
    def hook(_: torch.Tensor) -> None:
        alive = engine()
        if alive is not None:
            alive.on_gradient(name)

    return hook


def _renamed(group: Group, prefix: str) -> Group:
    return Group(f"{prefix}.{group.name}", group.spec, group.layers, group.feeds_back)
