"""Levels: which compression each layer travels under now, as its policy chooses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.compression.base import dense_bytes
from hvd_accordion.policy import assignment
from hvd_accordion.policy.critical_regime import Regime
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.training.reports import NO_REGIME, LayerRecord, LayerReport
from hvd_accordion.training.resume import Kept, State

Chosen = Mapping[str, CompressionSpec]  # of an Auto's candidates: layer name -> spec


class Levels:
    """The layers, their policies, and the specs that these choose now.

    Args:
        policy: layer name -> policy. Each is copied: its state is this training's.
    """

    def __init__(self, policy: Mapping[str, Policy], world_size: int, min_numel: int) -> None:
        self.world_size, self.min_numel = world_size, min_numel
        self.policy: dict[str, Policy] = {}
        # by the identity of the user's object: that, its copy, the state of its start
        self._copies: dict[int, tuple[Policy, Policy, State]] = {}
        self.layers: dict[str, Layer] = {}
        self.adaptive: list[Layer] = []
        self.chosen: dict[str, CompressionSpec] = {}
        self.version = 0  # counts refreshes
        self.next_change: int | None = None  # the step at which a policy may choose something else
        self.adopt(policy)

    def adopt(self, policy: Mapping[str, Policy]) -> None:
        """Takes in policies of layers; to be followed by `set_layers`."""
        for name, given in policy.items():
            if id(given) not in self._copies:
                mine = copy.deepcopy(given)
                self._copies[id(given)] = given, mine, copy.deepcopy(mine.state_dict())
            self.policy[name] = self._copies[id(given)][1]
        self.policies = [mine for _, mine, _ in self._copies.values()]
        self.observers = [mine for mine in self.policies if mine.window is not None]
        specs = (assignment.all_specs(name, mine) for name, mine in self.policy.items())
        self._specs_of_all = set(itertools.chain.from_iterable(specs))

    def set_layers(self, layers: Sequence[Layer], step: int, epoch: int) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.adaptive = [
            x for x in layers if assignment.adaptive(x, self.policy[x.name], self.world_size, self.min_numel)
        ]
        self.dense_bytes = sum(dense_bytes(x.shape, x.dtype, self.world_size) for x in layers)
        self.refresh(step, epoch)

    def refresh(self, step: int, epoch: int) -> None:
        """Asks the policies anew; `step` and `epoch` are those to come."""
        self.version += 1
        policy, size, small = self.policy, self.world_size, self.min_numel
        self.specs = {n: assignment.level(x, policy[n], step, size, small, epoch) for n, x in self.layers.items()}
        changes = (mine.next_change(step) for mine in self.policies)
        self.next_change = min((at for at in changes if at is not None), default=None)
        self.measured = [x.name for x in self.adaptive if self.measures(self.policy[x.name], epoch)]
        decided = [x for x in self.adaptive if self.regime(x.name) is not None]
        critical = [x for x in decided if self.regime(x.name) == Regime.CRITICAL]
        self.critical_layers = len(critical) / max(1, len(decided))
        self.critical_bytes = sum(x.nbytes for x in critical) / max(1, sum(x.nbytes for x in decided))

    @property
    def scheduled(self) -> bool:
        """Whether a policy's choice ever depends on the step."""
        return any(policy.next_change(0) is not None for policy in self.policies)

    def changes_between(self, before: int, now: int) -> bool:
        """Whether specs may differ between these two steps, for no other reason than the step."""
        scheduled = self.next_change is not None and now >= self.next_change
        return scheduled or any(spec.active(now) != spec.active(before) for spec in self._specs_of_all)

    @staticmethod
    def measures(policy: Policy, epoch: int) -> bool:
        """Whether the policy's gradients of this epoch are summed."""
        return policy.window is not None and policy.window.is_open(epoch)

    def regime(self, name: str) -> str | None:
        return self.policy[name].regime(name)

    def index(self, name: str, step: int, epoch: int) -> int:
        """The place of what the layer's policy chooses among its specs."""
        policy = self.policy[name]
        return list(policy.specs(name)).index(policy.choose(name, step, epoch))

    def sample_size(self, name: str, count: int) -> int:
        """How many of a layer's `count` entries its norm is made of."""
        window = self.policy[name].window
        return 0 if window is None else window.sample_size(count)

    # reports

    def bytes_per_step(self) -> dict[str, float]:
        """Bytes of each layer in an exchange, as its spec has it."""
        specs, size = self.specs, self.world_size
        return {name: specs[name].bytes_per_step(x.shape, x.dtype, size) for name, x in self.layers.items()}

    def records(self, norms: Mapping[str, float], passes: int) -> dict[str, LayerRecord]:
        """What the logger learns of layers whose norms were observed. `passes`: steps of an exchange."""
        found = {}
        for name, norm in norms.items():
            policy, layer, spec = self.policy[name], self.layers[name], self.specs[name]
            nbytes = round(spec.bytes_per_step(layer.shape, layer.dtype, self.world_size) / passes)
            regime = str(policy.regime(name) or NO_REGIME)
            found[name] = LayerRecord(norm, policy.change(name), regime, str(spec), nbytes)
        return found

    def rows(self, sent: Mapping[str, float]) -> list[LayerReport]:
        """A report's. `sent`: bytes of each layer a step."""
        total, rows = sum(sent.values()), []
        for name, layer in self.layers.items():
            regime = self.regime(name) if layer in self.adaptive else None
            dense = dense_bytes(layer.shape, layer.dtype, self.world_size)
            share, spec = sent[name] / total if total else 0.0, str(self.specs[name])
            rows.append(LayerReport(name, layer.shape, spec, regime and str(regime), sent[name], dense, share))
        return rows

    # an Auto's choice

    def candidates(self) -> dict[str, tuple[CompressionSpec, ...]]:
        """Of each layer whose policy has some that may compress it."""
        found = {
            name: assignment.auto_specs(layer, self.policy[name], self.world_size, self.min_numel)
            for name, layer in self.layers.items()
        }
        return {name: specs for name, specs in found.items() if specs}

    def resolve(self, chosen: Chosen) -> None:
        """What was chosen for layers with candidates, the same on all ranks; to be followed by `refresh`."""
        self.chosen = dict(chosen)
        for policy in self.policies:
            policy.resolve(self.chosen)

    def known_choices(self, saved: Mapping[str, str]) -> tuple[dict[str, CompressionSpec], list[str]]:
        """Saved choices that can be made now, and the names of the layers whose saved choice cannot."""
        known = {n: {str(s): s for s in (Dense(), *p.candidates)} for n, p in self.policy.items() if p.candidates}
        chosen = {name: known[name][s] for name, s in saved.items() if s in known.get(name, ())}
        return chosen, [name for name in saved if name not in chosen]

    # state

    def state_dict(self) -> list[dict[str, Any]]:
        """Kind and state of each policy that has some."""
        kept = [(type(policy).__name__, policy.state_dict()) for policy in self.policies]
        return [{"kind": kind, "state": state} for kind, state in kept if state]

    def kept(self) -> list[Kept]:
        """Of each policy with state: that of its start, and the layers that it decides."""
        return [
            Kept(type(mine).__name__, initial, tuple(name for name, p in self.policy.items() if p is mine))
            for mine, initial in self._stateful()
        ]

    def loaded(self, states: Sequence[State]) -> list[Policy]:
        """Copies of the policies with state, which have taken up these states."""
        fresh = [copy.deepcopy(mine) for mine, _ in self._stateful()]
        for mine, state in zip(fresh, states, strict=True):
            mine.load_state_dict(state)
        return fresh

    def take(self, loaded: Sequence[Policy]) -> None:
        """What `loaded` returned becomes the policies' state."""
        for (mine, _), other in zip(self._stateful(), loaded, strict=True):
            vars(mine).update(vars(other))

    def _stateful(self) -> list[tuple[Policy, State]]:
        return [(mine, initial) for _, mine, initial in self._copies.values() if initial]
