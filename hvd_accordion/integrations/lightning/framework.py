"""Imports from Lightning. Its two packages have incompatible classes, so the one that the script uses is chosen."""

from __future__ import annotations

import sys
from importlib import import_module

PACKAGE = (
    "pytorch_lightning"
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    else "lightning.pytorch"
)

Callback = import_module(f"{PACKAGE}.callbacks").Callback
LightningOptimizer = import_module(f"{PACKAGE}.core.optimizer").LightningOptimizer
ClusterEnvironment = import_module(f"{PACKAGE}.plugins.environments").ClusterEnvironment
ParallelStrategy = import_module(f"{PACKAGE}.strategies").ParallelStrategy
rank_zero_only = import_module(f"{PACKAGE}.utilities.rank_zero").rank_zero_only
