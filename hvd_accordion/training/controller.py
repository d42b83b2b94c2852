"""The controller: what one training counts, which levels its layers have, how large its batch is.

Floats, names and shapes only. After an update an engine calls `after_update`, which says what is due; from the numbers
`decide` makes new levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.policy import norm_sampling
from hvd_accordion.policy.assignment import MIN_NUMEL
from hvd_accordion.policy.batch_size import MODEL, AccordionBatchSize
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.policy.window import Window
from hvd_accordion.training import resume
from hvd_accordion.training.batch import Batch
from hvd_accordion.training.counters import Counters
from hvd_accordion.training.due import Due
from hvd_accordion.training.levels import Chosen, Levels
from hvd_accordion.training.reports import CompressionReport, Logger, Stats

__all__ = ["Controller", "Due"]

NO_NORMS: Mapping[str, float] = MappingProxyType({})


class Controller:
    """Keeps the levels of all layers, and the size of the batch.

    A step is a call of the optimizer's `step()`. Where a batch is made of several, an update and its exchange come with
    the last of them, and the others are counted then.

    Args:
        layers: all that are exchanged, in the order of the parameters.
        policy: layer name -> policy. Each is copied: its state is this training's.
        world_size: ranks that exchange.
        steps_per_epoch: steps after which an epoch ends by itself; None: `end_epoch` ends it.
        logger: on rank 0, else None.
        batch_size: decides how many steps make an update; copied like a policy.
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
        self.batch = Batch(batch_size)
        self.batch.check(world_size)
        self.counters = Counters(steps_per_epoch)
        self.levels = Levels(policy, world_size, min_numel)
        self.logger = logger
        self.set_layers(layers)

    # layers and ranks

    def adopt(self, policy: Mapping[str, Policy]) -> None:
        """Takes in policies of layers; to be followed by `set_layers`."""
        self.levels.adopt(policy)

    def set_layers(self, layers: Sequence[Layer]) -> None:
        self.levels.set_layers(layers, self.counters.step, self.counters.epoch)

    def move(self, world_size: int, logger: Logger | None) -> None:
        """Among another number of ranks; `logger`: on rank 0, else None.

        ValueError if they cannot share a small batch evenly.
        """
        self.batch.check(world_size)
        self.levels.world_size = world_size
        self.log_to(logger)
        self.set_layers(list(self.layers.values()))

    def log_to(self, logger: Logger | None) -> None:
        self.logger = logger
        if logger is not None:
            self.counters.logged()

    def _refresh(self) -> None:
        self.levels.refresh(self.counters.step, self.counters.epoch)

    @property
    def layers(self) -> dict[str, Layer]:
        return self.levels.layers

    @property
    def policy(self) -> dict[str, Policy]:
        return self.levels.policy

    @property
    def world_size(self) -> int:
        return self.levels.world_size

    @property
    def step(self) -> int:
        return self.counters.step

    @property
    def epoch(self) -> int:
        return self.counters.epoch

    @property
    def stats(self) -> Stats:
        return self.counters.stats

    @property
    def version(self) -> int:
        """Another number after each moment at which specs or what is measured may have changed."""
        return self.levels.version

    @property
    def windows(self) -> list[Window]:
        """Of all that observe norms: policies, then the batch."""
        windows = [*(policy.window for policy in self.levels.observers), self.batch.window]
        return [window for window in windows if window is not None]

    @property
    def needs_epochs(self) -> bool:
        """Whether something waits for ends of epochs that only `end_epoch` can bring."""
        needed = self.batch.needs_epochs or any(policy.needs_epochs for policy in self.levels.policies)
        return needed and self.counters.steps_per_epoch is None

    def specs(self) -> dict[str, CompressionSpec]:
        """The spec of each layer at the step to come."""
        return dict(self.levels.specs)

    # an Auto's choice

    @property
    def undecided(self) -> bool:
        """Whether an Auto has yet to choose."""
        return any(name not in self.levels.chosen for name in self.levels.candidates())

    def choose(self, chosen: Chosen) -> None:
        """An Auto's choices, the same on all ranks; layers that are not among them stay dense."""
        self.levels.resolve({name: chosen.get(name, Dense()) for name in self.levels.candidates()})
        self._refresh()

    # the batch

    def limits(self, step: Any, step_of_epoch: Any, passes: Any) -> list[Any]:
        """The update to come is made of as many steps as the least of these; counts may be a framework's integers."""
        return self.batch.limits(step, step_of_epoch, passes, self.counters.steps_per_epoch, self.windows)

    def micro_batches(self) -> int:
        """Steps of which the update to come is made."""
        return int(max(1, min(self.limits(self.counters.step, self.counters.step_of_epoch, self.batch.passes))))

    @property
    def lr_scale(self) -> float:
        """What the learning rate is multiplied with for a full batch."""
        return self.batch.lr_scale(self.counters.epoch)

    @property
    def measures_model(self) -> bool:
        """Whether the gradients of all layers are summed now."""
        return self.batch.window is not None and self.batch.window.is_open(self.counters.epoch)

    # after an update: two calls

    def after_update(
        self,
        sent: float,
        seconds: float,
        steps: int = 1,
        updates: int | None = None,
        last_update_steps: int | None = None,
    ) -> Due:
        """Counts steps of which none but the last ends an epoch or window; returns what is due for `decide`.

        Args:
            sent: bytes.
            seconds: of the training thread in the exchange.
            steps: of one update, or of several.
            updates: how many; None: one of all these steps, or one of each if no batch is made of several.
            last_update_steps: steps of the last.

        Raises ValueError if a policy counts in epochs and no end of an epoch was signalled for too long.
        """
        levels, counters, alone = self.levels, self.counters, not self.batch.adapts
        updates = (steps if alone else 1) if updates is None else updates
        last_update_steps = (1 if alone else steps) if last_update_steps is None else last_update_steps
        critical = steps * levels.critical_layers, steps * levels.critical_bytes
        added = Stats(steps, sent, steps * levels.dense_bytes, seconds, *critical, updates)
        counters.count(added, last_update_steps, self.needs_epochs)
        if levels.changes_between(counters.step - steps, counters.step):
            self._refresh()
        ended = counters.epoch_is_over
        lr = any(counters.has_begun(window) for window in self.windows)
        return self._due(lambda w: counters.ends_with_step(w) or (ended and counters.ends_with_epoch(w)), lr, ended)

    def exchanged_again(self, sent: float, seconds: float) -> None:
        """Counts an exchange that is no step of its own, such as a closure's later ones."""
        self.stats.add(Stats(0, sent, self.levels.dense_bytes, seconds))

    def end_epoch(self) -> Due:
        """What is due if an epoch ends now; nothing if one has just ended. `decide` counts it."""
        if self.counters.step_of_epoch == 0:
            return Due()
        return self._due(self.counters.ends_with_epoch, False, True)

    def _due(self, ends: Any, lr: bool, epoch_ended: bool) -> Due:
        due = [policy for policy in self.levels.observers if ends(policy.window)]
        layers = [x.name for x in self.levels.adaptive if any(self.policy[x.name] is policy for policy in due)]
        model = self.batch.window is not None and ends(self.batch.window)
        return Due(tuple(layers), model, lr, epoch_ended)

    def decide(
        self,
        due: Due,
        lr: float = 1.0,
        norms: Mapping[str, float] = NO_NORMS,
        model_norms: Mapping[str, float] = NO_NORMS,
    ) -> None:
        """New levels and the batch, from numbers that all ranks share.

        Args:
            lr: the user's learning rate now; needed if `due.needs_lr`.
            norms: layer name -> norm of the sampled entries, of `due.layers`.
            model_norms: the same of all layers, if `due.model`.
        """
        if due.lr:
            dropped = [policy.observe_lr(lr) for policy in self.levels.observers]
            if any([*dropped, self.batch.observe_lr(lr)]):
                self._refresh()
        if due.epoch_ended:
            self._end_epoch()
        if due.layers or due.model:
            self._observe(due, lr, norms, model_norms)

    def _end_epoch(self) -> None:
        epoch = self.counters.epoch
        done = self.counters.end_epoch()
        if self.logger is not None:
            self.logger.log_epoch(epoch, {**done.metrics(), **self.batch.metrics(epoch, done.updates)})
        self._refresh()

    def _observe(self, due: Due, lr: float, norms: Mapping[str, float], model_norms: Mapping[str, float]) -> None:
        counts = {name: self.layers[name].numel for name in norms}
        sizes = {name: self.levels.sample_size(name, count) for name, count in counts.items()}
        norms = {name: norm * norm_sampling.scale(counts[name], sizes[name]) for name, norm in norms.items()}
        if due.model:
            self.batch.observe(model_norms, lr, self.counters.epoch, self.layers)
        for policy in self.levels.observers:
            mine = {name: norm for name, norm in norms.items() if self.policy[name] is policy}
            if mine:
                policy.observe(mine, lr)
        self._refresh()
        if self.logger is not None:
            records = self.levels.records(norms, self.batch.passes)
            of_model = self.batch.record(sum(self.levels.bytes_per_step().values())) if due.model else None
            self.logger.log_window(self.counters.window, records if of_model is None else {**records, MODEL: of_model})
        self.counters.window += 1

    # reports and state

    def report(self, sent: Mapping[str, float]) -> CompressionReport:
        """`sent`: bytes of each layer in an exchange at the levels of now."""
        passes = self.batch.passes
        rows = self.levels.rows({name: nbytes / passes for name, nbytes in sent.items()})
        return CompressionReport(tuple(rows), self.batch.line(self.counters.epoch))

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.counters.state_dict(),
            "policies": self.levels.state_dict(),
            "chosen": {name: str(spec) for name, spec in self.levels.chosen.items()},
            "batch_size": self.batch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes up what fits of a saved training, and starts the rest anew; all or nothing, should `state` be broken.

        Returns what was saved and does not fit, or is needed and was not saved, in words: see `resume.warn_of`.
        """
        counters = Counters(self.counters.steps_per_epoch)
        counters.load_state_dict(state)
        states, left = resume.policy_states(resume.saved_policies(state), self.levels.kept())
        policies = self.levels.loaded(states)
        saved = state.get("batch_size")
        if (saved is None) == self.batch.adapts:
            left.append("an AccordionBatchSize" + (", which starts anew" if saved is None else ": batch_size is None"))
        rule = self.batch.loaded(saved)
        chosen, lost = self.levels.known_choices(state["chosen"])
        left += [f"what an Auto chose for {resume.in_words(lost)}"] if lost else []

        self.counters.load_state_dict(state)
        self.levels.take(policies)
        self.levels.resolve(chosen)
        self.batch.take(rule)
        self._refresh()
        return left
