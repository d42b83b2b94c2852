"""What an optimizer's compression remembers: saved, taken up again, and brought into line among the ranks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from hvd_accordion.compression.sharing import RESIDUAL, Sharing, scale
from hvd_accordion.policy import assignment
from hvd_accordion.torch.exchange.agreement import any_rank, broadcast_object
from hvd_accordion.torch.exchange.engine import Engine
from hvd_accordion.torch.exchange.micro_batches import wide
from hvd_accordion.torch.exchange.plain import PlainEngine
from hvd_accordion.torch.reports import STATE
from hvd_accordion.training import resume
from hvd_accordion.training.controller import Controller

OWN = ("rank", "size", "residual")  # of what is saved, this rank's own; of memory what its spec declares so

NO_MICRO_BATCHES: dict[str, Any] = {"count": 0, "sums": {}}


def saved(engine: Engine) -> dict[str, Any]:
    return {
        "rank": engine.rank,
        "size": engine.size,
        "controller": engine.controller.state_dict(),
        "residual": engine.channel.unsent(),
        "memory": {name: dict(memory) for name, memory in engine.channel.memory.items() if memory},
        "summed": dict(engine.norms.layers.summed),
        "summed_whole": dict(engine.norms.model.summed),
        "accumulated": engine.batch.state_dict(),
    }


def take_up(engine: Engine, state: Mapping[str, Any] | None) -> None:
    """Loads state; where a backward pass has started exchanges, when these have ended. None: nothing was saved."""
    if state is not None and "residual" not in state:
        resume.warn_of(["what local steps kept, for gradients are exchanged now"], stacklevel=4)
        state = None
    if engine.in_flight:
        if state is not None:  # an update is on its way: micro-batches of another are none of its
            engine.when_exchanged = functools.partial(load, engine, {**state, "accumulated": NO_MICRO_BATCHES})
        return
    averaged = engine.evaluation.averaged  # gradients stay what they are
    if state is None:
        engine.batch.clear()
        engine.reset()
    else:
        load(engine, state)
    engine.evaluation.averaged = averaged


def load(engine: Engine, state: Mapping[str, Any]) -> None:
    """Takes up what fits of saved state, starts the rest anew, and warns of it once.

    What follows from a change of the rank, or of the number of ranks, see `Sharing`. A residual of another rank begins at
    zero, for ranks plan by which layers have one. Sums of other
    entries than an Accordion's `norm` needs now are not taken. Micro-batches under way are taken from whichever rank
    saved them: all must have as many.
    """
    params, controller = engine.params, engine.controller
    whole = state.get("summed_whole", {})  # neither is in files of older versions
    accumulated = state.get("accumulated", NO_MICRO_BATCHES)
    unknown = _misfits(params, state["residual"], accumulated["sums"])
    unknown += [n for part in (state["memory"], state["summed"], whole) for n in part if n not in params]

    def fitting(part: Mapping[str, Any]) -> dict[str, Any]:
        return {name: kept for name, kept in part.items() if name not in unknown}

    saved_at, now_at = (state["rank"], state["size"]), (engine.rank, engine.size)
    memory, forgotten = _memory(controller, fitting(state["memory"]))
    left = controller.load_state_dict(state["controller"])  # raises before anything is taken up
    if unknown:
        left.append(f"what was kept of {resume.in_words(sorted(set(unknown)))}: no such parameters")
    if forgotten:
        left.append(f"memory of {resume.in_words(forgotten)}, which their compression does not need")
    if not controller.batch.adapts and accumulated["count"]:
        left.append(f"{accumulated['count']} micro-batches of an incomplete batch")
        accumulated = NO_MICRO_BATCHES

    def own(name: str, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(params[name].device, copy=True)

    claimed = {n: _claimed(controller, n, kept, saved_at, now_at) for n, kept in memory.items()}
    engine.channel.memory = {n: {key: own(n, x) for key, x in kept.items()} for n, kept in claimed.items()}
    counts = {name: p.numel() for name, p in params.items()}
    engine.norms.layers.load(fitting(state["summed"]), counts, own)
    engine.norms.model.load(fitting(whole), counts, own)
    engine.batch.load_state_dict({**accumulated, "sums": fitting(accumulated["sums"])})
    engine.reset()
    engine.channel.residual = {name: own(name, x) for name, x in fitting(state["residual"]).items()}
    for residual in engine.residual.values():
        residual.mul_(scale(RESIDUAL, saved_at, now_at) or 0.0)
    engine.replan()
    resume.warn_of(left, stacklevel=5)


def _misfits(params: Mapping[str, torch.Tensor], *parts: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are of no parameter's shape."""
    return [n for part in parts for n, x in part.items() if n not in params or x.shape != params[n].shape]


def _memory(
    controller: Controller, saved: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """What the specs that a layer may get can use of its saved memory, and the names of layers that lose some."""
    kept = {
        name: {key: x for key, x in memory.items() if key in assignment.memory_sharing(name, controller.policy[name])}
        for name, memory in saved.items()
    }
    return kept, [name for name, memory in saved.items() if len(kept[name]) < len(memory)]


def _claimed(
    controller: Controller, name: str, memory: Mapping[str, torch.Tensor], saved: tuple[int, int], now: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """What a layer's memory is at this place, if it was saved at another; without what starts anew."""
    sharing = assignment.memory_sharing(name, controller.policy[name])
    scales = {key: scale(sharing[key], saved, now) for key in memory}
    return {key: x * factor if factor != 1.0 else x for key, x in memory.items() if (factor := scales[key]) is not None}


def _memory_of(engine: Engine, shared: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Of all memory what is equal on all ranks, or what is this rank's own."""
    policy = engine.controller.policy
    sharing = {name: assignment.memory_sharing(name, policy[name]) for name in engine.channel.memory}
    return {
        name: {
            key: x for key, x in memory.items() if (sharing[name].get(key, Sharing.SHARED) is Sharing.SHARED) == shared
        }
        for name, memory in engine.channel.memory.items()
    }


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict, with the counts of one that Horovod alone exchanges for."""
    engine, found = getattr(optimizer, "_hvd", None), optimizer.state_dict()
    return {**found, STATE: {"controller": engine.controller.state_dict()}} if _plain(engine) else found


def shared(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Of `everything`, what all ranks should have in common."""
    found, engine = everything(optimizer), getattr(optimizer, "_hvd", None)
    return {**found, STATE: _common(engine, found[STATE])} if STATE in found else found


def _common(engine: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Of residuals only which layers have one: ranks plan by that."""
    common = {key: part for key, part in state.items() if key not in OWN}
    if not _plain(engine):
        common["memory"] = _memory_of(engine, shared=True)
    return {**common, "held": list(state.get("residual", ()))}


def take(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Takes up the state that `everything` gave; or another's `shared`, beside what is this rank's own."""
    engine, state = getattr(optimizer, "_hvd", None), dict(state)
    if _plain(engine):
        engine.controller.load_state_dict(state.pop(STATE)["controller"])
    elif isinstance(engine, Engine):
        own = {} if "residual" in state[STATE] else _own(engine, state[STATE])
        state[STATE] = {**state[STATE], **own, "rank": engine.rank}
        engine.drop()
    optimizer.load_state_dict(state)


def _plain(engine: Any) -> TypeGuard[PlainEngine]:
    return isinstance(engine, PlainEngine)


def _own(engine: Engine, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank keeps where it takes up what another shares; where it has no residual and the other has, zeros."""
    mine = engine.channel.unsent()
    held = {name: engine.params[name] for name in shared["held"]}
    residual = {
        name: mine[name] if name in mine else torch.zeros(p.shape, dtype=wide(p), device=p.device)
        for name, p in held.items()
    }
    mine_of = _memory_of(engine, shared=False)
    memory = {n: {**shared["memory"].get(n, {}), **mine_of.get(n, {})} for n in {**shared["memory"], **mine_of}}
    own: dict[str, Any] = {"rank": engine.rank, "size": engine.size, "residual": residual, "memory": memory}
    if engine.batch.count == shared["accumulated"]["count"]:  # its own micro-batches are as good, and resume exactly
        own["accumulated"] = engine.batch.state_dict()
    return own


def broadcast(engine: Engine, root_rank: int) -> None:
    """Gives every rank what `root_rank` shares; what is a rank's own stays where it is."""
    root, transport = list(engine.transport.ranks).index(root_rank), engine.transport
    theirs = broadcast_object(_common(engine, saved(engine)), root, f"{engine.prefix}.state", transport)
    # a rank without gradients has not started the exchange that others are in, and must follow when they do
    if any_rank(engine.in_flight, f"{engine.prefix}.in_flight", transport):
        theirs["accumulated"] = NO_MICRO_BATCHES
        engine.when_exchanged = lambda: load(engine, {**theirs, **_own(engine, theirs)})
    else:
        load(engine, {**theirs, **_own(engine, theirs)})
