"""What a user asks a distributed optimizer for, whatever the framework: checked, described to other ranks, logged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from hvd_accordion.compression import FP16, CompressionSpec, Dense
from hvd_accordion.policy.assignment import MIN_NUMEL
from hvd_accordion.policy.batch_size import AccordionBatchSize
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.utils import validation


@dataclass(frozen=True)
class Settings:
    """Horovod's arguments under Horovod's names, then our own. `groups` and `process_set` are the framework's to check.

    Raises ValueError or TypeError for what is out of range.
    """

    op: Any
    average: Any  # the framework's hvd.Average
    process_set: Any
    backward_passes_per_step: int = 1
    gradient_predivide_factor: float = 1.0
    groups: Any = None
    sparse_as_dense: bool = False
    steps_per_epoch: int | None = None
    seed: int = 0
    min_compress_numel: int = MIN_NUMEL
    batch_size: AccordionBatchSize | None = None
    uneven_inputs: bool = False
    residual_decay: float = 1.0

    def __post_init__(self) -> None:
        validation.integer("backward_passes_per_step", self.backward_passes_per_step, 1)
        validation.real("gradient_predivide_factor", self.gradient_predivide_factor, 0.0)
        validation.boolean("sparse_as_dense", self.sparse_as_dense)
        validation.boolean("uneven_inputs", self.uneven_inputs)
        validation.integer("seed", self.seed, 0)
        validation.real("residual_decay", self.residual_decay, 0.0, 1.0)
        validation.integer("min_compress_numel", self.min_compress_numel, 1)
        if self.steps_per_epoch is not None:
            validation.integer("steps_per_epoch", self.steps_per_epoch, 1)
        if self.gradient_predivide_factor != 1.0 and self.op != self.average:
            raise ValueError("gradient_predivide_factor not supported with op != Average")
        if self.batch_size is not None:
            self._check_batch_size(self.batch_size)

    def _check_batch_size(self, batch_size: Any) -> None:
        if not isinstance(batch_size, AccordionBatchSize):
            raise TypeError(f"batch_size must be an AccordionBatchSize or None, got {batch_size!r}")
        if self.backward_passes_per_step != 1:
            raise ValueError(
                "backward_passes_per_step must be 1 with batch_size, which decides how many passes make an update, "
                f"got {self.backward_passes_per_step}"
            )

    def scales(self, size: int) -> tuple[float, float]:
        """What a mean over `size` ranks multiplies with before and after its sum."""
        if self.gradient_predivide_factor == 1.0:
            return 1 / size, 1.0
        return 1 / self.gradient_predivide_factor, self.gradient_predivide_factor / size

    def described(self, framework: str, framework_version: str) -> dict[str, str]:
        """As text, for `agreement.require_equal`; without `groups`, whose members only the framework can name."""
        ours, horovod = version("hvd_accordion"), version("horovod")
        names = "op backward_passes_per_step gradient_predivide_factor sparse_as_dense steps_per_epoch seed "
        names += "min_compress_numel uneven_inputs residual_decay"
        versions = f"hvd_accordion {ours}, horovod {horovod}, {framework} {framework_version}"
        plain = {name: str(getattr(self, name)) for name in names.split()}
        return {"versions": versions, **plain, "batch_size": repr(self.batch_size)}

    def logged(
        self,
        optimizer: str,
        compression: Any,
        policy: Mapping[str, Policy],
        size: int,
        framework: str,
        its_version: str,
    ) -> dict[str, object]:
        """The parameters of a run, for the logger."""
        logged: dict[str, object] = {
            "optimizer": optimizer,
            "compression": getattr(compression, "__name__", None) or str(compression),
            "world_size": size,
            "backward_passes_per_step": self.backward_passes_per_step,
            "steps_per_epoch": self.steps_per_epoch,
            "compression_seed": self.seed,
            "version.hvd_accordion": version("hvd_accordion"),
            "version.horovod": version("horovod"),
            f"version.{framework}": its_version,
        }
        logged |= next((p.settings() for p in policy.values() if p.settings()), {})
        if self.batch_size is not None:
            own = ("small", "large", "eta", "interval", "unit", "lr_drop", "norm", "warmup")
            logged |= {f"batch_size.{key}": getattr(self.batch_size, key) for key in own}
        return logged


def groups_of(num_groups: int, groups: Any) -> Any:
    """Horovod's `groups`, where its old name may have been used."""
    if num_groups == 0:
        return groups
    warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=3)
    return num_groups if groups is None else groups


def check_op(op: Any, allowed: tuple[Any, ...], compression: Any, batch_size: Any = None) -> None:
    """ValueError where the ranks' values are to be combined in a way that compression can't: Adasum, Min, Max."""
    if op not in allowed:
        given = f"compression={compression!r}" if batch_size is None else f"batch_size={batch_size}"
        without = "compression=None" if batch_size is None else "compression=None and batch_size=None"
        raise ValueError(f"op must be hvd.Average or hvd.Sum with {given}; hvd.Adasum works with {without}")


def check_local(settings: Settings, compression: Any) -> None:
    """ValueError where local steps can't work with the other arguments."""
    check_op(settings.op, (settings.average,), compression)
    given = {
        "gradient_predivide_factor": (settings.gradient_predivide_factor, 1.0),
        "batch_size": (settings.batch_size, None),
        "uneven_inputs": (settings.uneven_inputs, False),
        "groups": (settings.groups if isinstance(settings.groups, list) else None, None),
    }
    for name, (value, allowed) in given.items():
        if value != allowed:
            raise ValueError(f"{name} must be {allowed} with local_steps, got {value!r}")


def check_logger(logger: Any) -> None:
    for method in ("log_epoch", "log_window", "start"):
        if logger is not None and not callable(getattr(logger, method, None)):
            raise TypeError(f"logger must have a method {method}(), as MLflowLogger has, got {logger!r}")


def is_horovods(compression: Any) -> bool:
    """Whether it is one of `hvd.Compression`, of whichever framework."""
    kind = compression if isinstance(compression, type) else type(compression)
    return any(c.__name__ == "Compressor" and c.__module__.startswith("horovod.") for c in kind.__mro__)


def plain_spec(compression: Any) -> CompressionSpec:
    """The spec with the cost of what Horovod itself sends under None, `hvd.Compression.none` or `.fp16`."""
    kind = compression if isinstance(compression, type) else type(compression)
    return FP16(error_feedback=False) if kind.__name__ == "FP16Compressor" else Dense()


def translated(compression: Any) -> Any:
    """A dict of globs with specs in place of Horovod's own compressors; anything else as it is."""
    if not isinstance(compression, Mapping):
        return compression
    return {glob: plain_spec(p) if is_horovods(p) else p for glob, p in compression.items()}
