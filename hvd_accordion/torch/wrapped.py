"""What the optimizers that exchange by themselves have in common: how they are made, and how parameters join them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hvd_accordion.policy.assignment import Compression, assign
from hvd_accordion.torch import configuration
from hvd_accordion.torch.horovod_takeover import class_of
from hvd_accordion.torch.reports import Reports
from hvd_accordion.training.settings import Settings


class Wrapped(Reports):
    """A subclass comes before the class of the user's optimizer among the bases.

    Attributes:
        _hvd: exchanges; takes in parameters by `add(params, policy)`.
        _compression: for parameters that come later, whose names `_name_of` has by their identity.
    """

    _hvd: Any
    _compression: Compression
    _name_of: Mapping[int, str]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Exchanges these parameters too. Every rank must add them at the same point.

        Their names are those of `(name, parameter)` where torch is given such, else those that `named_parameters` had
        for them, else made-up ones.
        """
        super().add_param_group(param_group)
        try:
            i = len(self.param_groups) - 1
            pairs = configuration.of_group(f"param_groups.{i}", self.param_groups[i])
            if "param_names" not in self.param_groups[i]:
                pairs = [(self._name_of.get(id(p), name), p) for name, p in pairs]
            configuration.check_unique([*self._hvd.params, *(name for name, _ in pairs)])
            more = dict(pairs)
            self._hvd.add(more, assign(self._compression, list(more), strict=False))
        except BaseException:
            self.param_groups.pop()
            raise


def wrapped(
    optimizer: torch.optim.Optimizer,
    added: type[Wrapped],
    settings: Settings,
    compression: Compression,
    name_of: Mapping[int, str],
) -> Any:
    """An object of a subclass of the optimizer's own class, with its parameters, state and hooks; `_hvd` is yet to be set.

    `name_of`: names by the parameters' identity, for those that come later.
    """
    kind: Any = class_of(type(optimizer), added)
    result = kind.__new__(kind)
    result.__dict__.update(optimizer.__dict__)
    result.__dict__.pop("step", None)  # a scheduler's wrapper around the old object's step
    result._compression, result._name_of = compression, name_of
    result.backward_passes_per_step = settings.backward_passes_per_step
    result.op, result.process_set = settings.op, settings.process_set
    return result
