"""Adaptive gradient compression for Horovod. This package imports no framework; its subpackages import one each."""

from hvd_accordion.compression import (
    BF16,
    FP16,
    QSGD,
    CompressionSpec,
    Dense,
    EFSignSGD,
    PowerSGD,
    RandomK,
    TopK,
)
from hvd_accordion.policy.accordion import Accordion, Regime
from hvd_accordion.policy.auto import Auto
from hvd_accordion.policy.batch_size import AccordionBatchSize
from hvd_accordion.policy.local_steps import AccordionSteps, AutoSteps, LocalSteps
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.policy.warmup import Warmup
from hvd_accordion.policy.window import Window
from hvd_accordion.tracking.mlflow_logger import MLflowLogger

__version__ = "0.1.0"

__all__ = [
    "BF16",
    "FP16",
    "QSGD",
    "Accordion",
    "AccordionBatchSize",
    "AccordionSteps",
    "Auto",
    "AutoSteps",
    "CompressionSpec",
    "Dense",
    "EFSignSGD",
    "LocalSteps",
    "MLflowLogger",
    "Policy",
    "PowerSGD",
    "RandomK",
    "Regime",
    "TopK",
    "Warmup",
    "Window",
]
