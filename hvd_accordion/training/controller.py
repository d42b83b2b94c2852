"""When what happens in a training: epochs and windows, levels of the layers, totals, what goes to the logger.

Floats, names and shapes only. A framework's engine tells it of steps and norms and asks it for levels.
"""

from __future__ import annotations

import copy
import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.compression.base import dense_bytes
from hvd_accordion.policy import assignment, norm_sampling
from hvd_accordion.policy.accordion import Accordion, Regime
from hvd_accordion.policy.assignment import MIN_NUMEL, Layer, Policy
from hvd_accordion.policy.batch_size import MODEL, AccordionBatchSize, limits, whole_norm
from hvd_accordion.policy.critical_regime import Rule
from hvd_accordion.training import resume
from hvd_accordion.training.reports import CompressionReport, LayerRecord, LayerReport, Logger, Stats

log = logging.getLogger("hvd_accordion")

MAX_STEPS_OF_EPOCH = 10_000  # of a first epoch whose end only end_epoch() can tell


class Controller:
    """Keeps the levels of all layers, and the size of the batch.

    A step is a call of the optimizer's `step()`. Where a batch is made of several, an update and its exchange come with
    the last of them, and the others are counted then.

    Args:
        layers: all that are exchanged, in the order of the parameters.
        policy: layer name -> spec or Accordion. Accordions are copied: their state is this training's.
        world_size: ranks that exchange.
        steps_per_epoch: steps after which an epoch ends by itself; None: `end_epoch` tells.
        logger: on rank 0, else None.
        batch_size: decides how many steps make an update; copied like an Accordion.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        policy: Mapping[str, Policy],
        world_size: int,
        steps_per_epoch: int | None = None,
        logger: Logger | None = None,
        min_numel: int = MIN_NUMEL,
        batch_size: AccordionBatchSize | None = None,
    ) -> None:
        if batch_size is not None:
            batch_size.fits(world_size)
        self.batch = copy.deepcopy(batch_size)
        self.policy: dict[str, Policy] = {}
        self._copies: dict[int, tuple[Accordion, Accordion]] = {}  # by the identity of the user's object
        self.adopt(policy)
        self.world_size, self.steps_per_epoch, self.min_numel = world_size, steps_per_epoch, min_numel
        self.logger = logger
        self.step = self.epoch = self.step_of_epoch = self.window = 0
        self.stats, self._epoch_start = Stats(), Stats()
        self.last_update_steps = 1  # steps of the last update
        self._due: list[Rule] = []
        self.chosen: dict[str, CompressionSpec] = {}
        self.set_layers(layers)
        self._silence = {"steps": 0, "counted": not self._needs_epochs}
        weakref.finalize(self, _warn_of_no_epochs, self._silence)

    def adopt(self, policy: Mapping[str, Policy]) -> None:
        """Takes in policies of layers; to be followed by `set_layers`."""
        for name, given in policy.items():
            if isinstance(given, Accordion):
                _, given = self._copies.setdefault(id(given), (given, copy.deepcopy(given)))
            self.policy[name] = given
        self.accordions = [mine for _, mine in self._copies.values()]
        self.rules: list[Rule] = [*self.accordions, *([self.batch] if self.batch is not None else [])]
        self._specs = set(itertools.chain.from_iterable(map(assignment.options, self.policy.values())))

    def set_layers(self, layers: Sequence[Layer]) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.adaptive = [
            x for x in layers if assignment.adaptive(x, self.policy[x.name], self.world_size, self.min_numel)
        ]
        self.dense_bytes = sum(dense_bytes(x.shape, x.dtype, self.world_size) for x in layers)
        self._refresh()

    def move(self, world_size: int, logger: Logger | None) -> None:
        """Among another number of ranks; `logger`: on rank 0, else None.

        ValueError where they can't share a small batch evenly.
        """
        if self.batch is not None:
            self.batch.fits(world_size)
        self.world_size, self.logger = world_size, logger
        self.set_layers(list(self.layers.values()))

    def _refresh(self) -> None:
        """After a change of levels or of the epoch: what every step would else work out anew."""
        self.changed = True  # the engine's, to reset when it has followed
        self.measured = [x.name for x in self.adaptive if self._accordion(x.name).measures(self.epoch)]
        critical = [x for x in self.adaptive if self.regime(x.name) is Regime.CRITICAL]
        self._critical_layers = len(critical) / max(1, len(self.adaptive))
        self._critical_bytes = sum(x.nbytes for x in critical) / max(1, sum(x.nbytes for x in self.adaptive))

    @property
    def _needs_epochs(self) -> bool:
        return self.steps_per_epoch is None and any(rule.needs_epochs for rule in self.rules)

    # levels

    def specs(self) -> dict[str, CompressionSpec]:
        """The spec of each layer at the step to come."""
        return {name: self.spec(layer) for name, layer in self.layers.items()}

    def spec(self, layer: Layer) -> CompressionSpec:
        return assignment.level(layer, self.policy[layer.name], self.step, self.world_size, self.min_numel, self.chosen)

    def choices(self) -> dict[str, tuple[CompressionSpec, ...]]:
        """The candidates of each layer that an Auto may compress."""
        found = {
            name: assignment.choices(layer, self.policy[name], self.world_size, self.min_numel)
            for name, layer in self.layers.items()
        }
        return {name: specs for name, specs in found.items() if specs}

    @property
    def undecided(self) -> bool:
        """Whether an Auto has yet to choose."""
        return any(name not in self.chosen for name in self.choices())

    def choose(self, chosen: assignment.Chosen) -> None:
        """An Auto's choices, the same on all ranks; layers that are not among them stay dense."""
        self.chosen = {name: chosen.get(name, Dense()) for name in self.choices()}
        self._refresh()

    def regime(self, name: str) -> Regime | None:
        policy = self.policy[name]
        return policy.regime(name) if isinstance(policy, Accordion) else None

    def _accordion(self, name: str) -> Accordion:
        policy = self.policy[name]
        assert isinstance(policy, Accordion)
        return policy

    def watched(self, name: str, count: int) -> int:
        """How many of a layer's `count` entries an engine adds up."""
        policy = self.policy[name]
        return policy.watched(count) if isinstance(policy, Accordion) else 0

    # the batch

    def limits(self, step: Any, step_of_epoch: Any, passes: Any) -> list[Any]:
        """The update to come is made of as many steps as the least of these; counts may be a framework's integers."""
        if self.batch is None:
            return [1]
        intervals = [rule.interval for rule in self.rules if rule.unit == "steps"]
        return limits(passes, step, step_of_epoch, self.steps_per_epoch, intervals)

    def micro_batches(self) -> int:
        """Steps of which the update to come is made."""
        return int(max(1, min(self.limits(self.step, self.step_of_epoch, self.passes))))

    @property
    def passes(self) -> int:
        """Steps of a full batch."""
        return 1 if self.batch is None else self.batch.passes

    @property
    def lr_scale(self) -> float:
        """What the learning rate is multiplied with for a full batch."""
        return 1.0 if self.batch is None else self.batch.lr_scale(self.epoch)

    @property
    def measures_whole(self) -> bool:
        """Whether the gradients of all layers are summed now."""
        return self.batch is not None and self.batch.measures(self.epoch)

    def watched_of_whole(self, count: int) -> int:
        """How many of a layer's `count` entries the whole model's norm is made of."""
        return 0 if self.batch is None else self.batch.watched(count)

    # steps and windows

    def advance(
        self,
        sent: float,
        seconds: float,
        steps: int = 1,
        updates: int | None = None,
        last_update_steps: int | None = None,
    ) -> bool:
        """Counts steps of which none but the last ends an epoch or window; tells whether that was an epoch's last.

        Args:
            sent: bytes.
            steps: of one update, or of several.
            updates: how many; None: one of all these steps, or one of each where no batch is made of several.
            of_update: steps of the last.

        Raises ValueError where a rule counts in epochs and nothing has told of one for too long.
        """
        stats = self.stats
        alone = self.batch is None
        stats.updates += (steps if alone else 1) if updates is None else updates
        self.last_update_steps = (1 if alone else steps) if last_update_steps is None else last_update_steps
        stats.steps += steps
        stats.sent_bytes += sent
        stats.dense_bytes += steps * self.dense_bytes
        stats.exchange_seconds += seconds
        stats.critical_layers += steps * self._critical_layers
        stats.critical_bytes += steps * self._critical_bytes
        self.step += steps
        self.step_of_epoch += steps
        if any(spec.active(self.step) != spec.active(self.step - steps) for spec in self._specs):
            self._refresh()
        self._silence["steps"] = self.step
        if self._needs_epochs and self.epoch == 0 and self.step_of_epoch > MAX_STEPS_OF_EPOCH:
            raise ValueError(
                f"steps_per_epoch is None and end_epoch() was not called in {MAX_STEPS_OF_EPOCH} steps, but an Accordion "
                "counts epochs and would leave its first regime, or learning rate, never: pass steps_per_epoch=len(loader), "
                'call optimizer.end_epoch() after each epoch, or use Accordion(..., unit="steps")'
            )
        self._fall_due([rule for rule in self.rules if rule.unit == "steps" and self.step % rule.interval == 0])
        return self.steps_per_epoch is not None and self.step_of_epoch >= self.steps_per_epoch

    def exchanged_again(self, sent: float, seconds: float) -> None:
        """Counts an exchange that is no step of its own, such as a closure's later ones."""
        self.stats.sent_bytes += sent
        self.stats.dense_bytes += self.dense_bytes
        self.stats.exchange_seconds += seconds

    def end_epoch(self) -> bool:
        """Counts an epoch, unless it has just ended by itself; tells whether it counted."""
        if self.step_of_epoch == 0:
            return False
        self._fall_due([rule for rule in self.rules if rule.unit == "epochs" and rule.measures(self.epoch)])
        done = self.stats.since(self._epoch_start)
        self._epoch_start = replace(self.stats)
        if self.logger is not None:
            batch = {} if self.batch is None else {**self.batch.metrics(self.epoch), "updates": done.updates}
            self.logger.log_epoch(self.epoch, {**done.metrics(), **batch})
        self.epoch += 1
        self.step_of_epoch = 0
        self._silence["counted"] = True
        self._refresh()
        return True

    def _fall_due(self, rules: Sequence[Rule]) -> None:
        used = {id(self.batch), *(id(self.policy[x.name]) for x in self.adaptive)} - {id(rule) for rule in self._due}
        self._due += [rule for rule in rules if id(rule) in used]

    def due(self) -> list[str]:
        """Layers whose gradient norms `observe` must be told now."""
        if not self._due:
            return []
        return [x.name for x in self.adaptive if any(a is self.policy[x.name] for a in self._due)]

    @property
    def model_norm_due(self) -> bool:
        """Whether `observe` must also be told the norms that make up that of the whole model."""
        return any(rule is self.batch for rule in self._due)

    @property
    def wants_lr(self) -> bool:
        """Whether the update that just ended was the first of an epoch or window: the time to see a drop of the rate."""
        before = self.step - self.last_update_steps
        return any(
            (self.step_of_epoch == self.last_update_steps if rule.unit == "epochs" else before % rule.interval == 0)
            for rule in self.rules
        )

    def observe(self, norms: Mapping[str, float], lr: float, whole: Mapping[str, float] | None = None) -> None:
        """A check: new regimes of what is due, from norms of watched entries that all ranks share.

        Args:
            norms: layer name -> norm, of the layers that are due.
            lr: the user's learning rate now.
            whole: layer name -> norm, of all layers of which the whole model's is made, if that is due.
        """
        records: dict[str, LayerRecord] = {}
        counts = {name: self.layers[name].numel for name in norms}
        norms = {n: norm * norm_sampling.scale(counts[n], self.watched(n, counts[n])) for n, norm in norms.items()}
        if self.model_norm_due and self.batch is not None:
            self._observe_whole(self.batch, whole or {}, lr)
        for accordion in (rule for rule in self._due if isinstance(rule, Accordion)):
            mine = {name: norm for name, norm in norms.items() if self.policy[name] is accordion}
            accordion.observe(mine, lr)
            for name, norm in mine.items():
                layer, spec = self.layers[name], self.spec(self.layers[name])
                nbytes = spec.bytes_per_step(layer.shape, layer.dtype, self.world_size)
                ratio = accordion.ratios.get(name)
                nbytes = round(nbytes / self.passes)
                records[name] = LayerRecord(norm, ratio, str(accordion.regime(name)), str(spec), nbytes)
        if self.model_norm_due and self.batch is not None:
            records[MODEL] = self._record_of_whole(self.batch)
        self._due = []
        self._refresh()
        if self.logger is not None and records:
            self.logger.log_window(self.window, records)
        self.window += 1

    def _observe_whole(self, batch: AccordionBatchSize, norms: Mapping[str, float], lr: float) -> None:
        counts = {name: self.layers[name].numel for name in norms}
        scaled = (norm * norm_sampling.scale(counts[n], batch.watched(counts[n])) for n, norm in norms.items())
        batch.observe(whole_norm(scaled), lr, self.epoch)

    def _record_of_whole(self, batch: AccordionBatchSize) -> LayerRecord:
        specs = self.specs()
        sent = sum(specs[n].bytes_per_step(x.shape, x.dtype, self.world_size) for n, x in self.layers.items())
        norm, ratio, regime = batch.norms[MODEL], batch.ratios.get(MODEL), str(batch.regime(MODEL))
        return LayerRecord(norm, ratio, regime, f"batches of {batch.small * batch.passes}", round(sent / batch.passes))

    def observe_lr(self, lr: float) -> bool:
        """Tells whether a drop of the learning rate made layers critical, or the batch small."""
        dropped = any([rule.observe_lr(lr) for rule in self.rules])
        if dropped:
            self._refresh()
        return dropped

    # reports and state

    def report(self, sent: Mapping[str, float]) -> CompressionReport:
        """`sent`: bytes of each layer in an exchange at the levels of now."""
        sent = {name: nbytes / self.passes for name, nbytes in sent.items()}
        specs, total = self.specs(), sum(sent.values())
        rows = []
        for name, layer in self.layers.items():
            regime = self.regime(name) if layer in self.adaptive else None
            dense = dense_bytes(layer.shape, layer.dtype, self.world_size)
            share = sent[name] / total if total else 0.0
            spec = str(specs[name])
            rows.append(LayerReport(name, layer.shape, spec, regime and str(regime), sent[name], dense, share))
        return CompressionReport(tuple(rows), "" if self.batch is None else self.batch.line(self.epoch))

    def state_dict(self) -> dict[str, Any]:
        counters = {key: getattr(self, key) for key in ("step", "epoch", "step_of_epoch", "window")}
        totals = {"stats": dict(vars(self.stats)), "epoch_start": dict(vars(self._epoch_start))}
        chosen = {name: str(spec) for name, spec in self.chosen.items()}
        rules = {"accordions": [a.state_dict() for a in self.accordions]}
        batch = None if self.batch is None else self.batch.state_dict()
        return {**counters, **totals, **rules, "chosen": chosen, "batch_size": batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes up what fits of a saved training, and starts the rest anew; all or nothing, should `state` be broken.

        Returns what was saved and does not fit, or is needed and was not saved, in words: see `resume.warn_of`.
        """
        counters = {key: int(state[key]) for key in ("step", "epoch", "step_of_epoch", "window")}
        stats, epoch_start = Stats(**state["stats"]), Stats(**state["epoch_start"])
        decides = [[name for name, p in self.policy.items() if p is a] for a in self.accordions]
        states, left = resume.accordion_states(state["accordions"], decides)
        batch = state.get("batch_size")
        if (batch is None) != (self.batch is None):
            left.append("an AccordionBatchSize" + (", which starts anew" if batch is None else ": batch_size is None"))
        if self.batch is not None:
            states.append(resume.NOTHING if batch is None else batch)
        fresh = copy.deepcopy(self.rules)
        for rule, its in zip(fresh, states, strict=True):
            rule.load_state_dict(its)
        chosen, lost = self._known_choices(state["chosen"])
        left += [f"what an Auto chose for {resume.in_words(lost)}"] if lost else []

        vars(self).update(counters)
        self.stats, self._epoch_start, self.chosen, self._due = stats, epoch_start, chosen, []
        for rule, loaded in zip(self.rules, fresh, strict=True):
            vars(rule).update(vars(loaded))
        self._refresh()
        self._silence["counted"] = self._silence["counted"] or self.epoch > 0
        return left

    def _known_choices(self, saved: Mapping[str, str]) -> tuple[dict[str, CompressionSpec], list[str]]:
        """Saved choices that the Autos of now may make, and the names of the layers whose choice is none of them."""
        known = {
            n: {str(s): s for s in (Dense(), *assignment.options(p))}
            for n, p in self.policy.items()
            if assignment.has_auto(p)
        }
        chosen = {name: known[name][s] for name, s in saved.items() if s in known.get(name, ())}
        return chosen, [name for name in saved if name not in chosen]


def _warn_of_no_epochs(silence: Mapping[str, Any]) -> None:
    if silence["steps"] and not silence["counted"]:
        log.warning(
            "An Accordion counts epochs, but in %d steps neither steps_per_epoch nor end_epoch() told of one: it never left "
            "its first regime, or learning rate",
            silence["steps"],
        )
