"""What an exchange of gradients is configured with: checked, described to the other ranks and to the logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvd_accordion.policy.assignment import assign
from hvd_accordion.tensorflow.exchange.named_variables import NamedVariables
from hvd_accordion.tensorflow.exchange.variables import check_groups, check_process_set
from hvd_accordion.tensorflow.transport import Average, Compression, HorovodTransport, Sum, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.reports import Logger
from hvd_accordion.training.settings import Settings, check_logger, check_op, is_horovods, plain_spec, translated


@dataclass(frozen=True)
class Configuration:
    """The arguments of a `GradientExchange`.

    Args:
        compression: as the user gave it.
        compressor: Horovod's own, where gradients travel uncompressed, else None.
        policy: `compression` without anything of Horovod's.
        optimizer: name of the optimizer, for the logger.
        learning_rate: a variable, a number, a function that gives it, or None.
    """

    settings: Settings
    compression: Any
    compressor: Any
    policy: Any
    logger: Logger | None
    optimizer: str
    scale_local_gradients: bool
    learning_rate: Any

    @property
    def is_stateless(self) -> bool:
        """Whether a step is the same whatever was before: a rank that has just come may take part in it."""
        return self.compressor is not None and self.settings.backward_passes_per_step == 1

    def rate(self) -> tf.Tensor:
        """The learning rate now; 1 if the user gave none."""
        rate = self.learning_rate() if callable(self.learning_rate) else self.learning_rate
        return tf.convert_to_tensor(1.0 if rate is None else rate)

    def described(self, named: NamedVariables, variables: Sequence[Any]) -> dict[str, str]:
        """Everything in which ranks must agree, as text."""
        groups = self.settings.groups
        described = self.settings.described("tensorflow", tf.__version__)
        if isinstance(groups, list):
            groups = [[named.name(v) or "?" for v in group] for group in groups]
        described["groups"] = str(groups)
        described["compression"] = repr(self.policy) if self.compressor is None else str(self.compression)
        described["number of variables"] = str(len(variables))
        for i, v in enumerate(variables):
            local = ", local" if named.is_local(v) else ""
            described[f"variable {i}"] = f"{named.name(v)} {tuple(v.shape)} {tf.as_dtype(v.dtype).name}{local}"
        return described

    def start_logger(self, policy: Mapping[str, Any], transport: HorovodTransport) -> Logger | None:
        """The logger on the first rank, which has been given the run's parameters; None elsewhere."""
        if self.logger is None or transport.rank != 0 or not transport.included:
            return None
        framework = ("tensorflow", tf.__version__)
        self.logger.start(self.settings.logged(self.optimizer, self.compression, policy, transport.size, *framework))
        return self.logger


def configured(
    compression: Any,
    *,
    learning_rate: Any,
    logger: Logger | None,
    optimizer: str,
    scale_local_gradients: bool,
    **arguments: Any,
) -> Configuration:
    """Checks everything. `arguments`: of `Settings`. Raises ValueError or TypeError for what is out of range."""
    check_groups(arguments["groups"])
    check_logger(logger)
    elastic.check_process_set(arguments["process_set"], global_process_set)
    check_process_set(arguments["process_set"])
    settings = Settings(average=Average, **arguments)
    plain = compression is None or is_horovods(compression)
    if plain and settings.batch_size is not None:
        plain, compression = False, plain_spec(compression)
    if not plain:
        check_op(settings.op, (Average, Sum), compression, settings.batch_size)
    policy = plain_spec(compression) if plain else translated(compression)
    assign(policy, [], strict=False)  # raises for a value of a wrong type
    compressor = (compression or Compression.none) if plain else None
    return Configuration(
        settings, compression, compressor, policy, logger, optimizer, scale_local_gradients, learning_rate
    )
