"""The norms of averaged gradients that policies and the batch size decide from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hvd_accordion.ops import torch as ops
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.norm_window import NormWindow


class GradientNorms:
    """Two windows: of adaptive layers, and of all layers, whose norms make up that of the whole model."""

    def __init__(self, controller: Controller, seed: int) -> None:
        self.controller = controller
        self.layers = NormWindow(ops, controller.levels.sample_size, seed)
        self.model = NormWindow(ops, lambda _, count: controller.batch.sample_size(count), seed)
        self.begin()

    def begin(self) -> None:
        """Before an update: what is measured now."""
        self.measured, self.measures_model = set(self.controller.levels.measured), self.controller.measures_model
        self.measuring = self.measures_model or bool(self.measured)

    def add(self, means: Mapping[str, torch.Tensor], is_finite: torch.Tensor, weight: float) -> None:
        """Means of an update, each as often as it stands for a step."""
        self.layers.add({name: mean for name, mean in means.items() if name in self.measured}, is_finite, weight)
        if self.measures_model:
            self.model.add(means, is_finite, weight)

    def take(self, layers: Sequence[str], all_layers: Sequence[str]) -> list[float]:
        """Norms, whose sums start anew. Waits for the device."""
        return [*self.layers.norms(layers), *self.model.norms(all_layers)]
