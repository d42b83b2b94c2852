"""The primitives of each backend, and its copy of a numpy array, which it may update in place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import numpy as np
import tensorflow as tf
import torch

from hvd_accordion.ops import numpy as numpy_ops
from hvd_accordion.ops import tensorflow as tensorflow_ops
from hvd_accordion.ops import torch as torch_ops


def as_on_a_gpu() -> ModuleType:
    """Returns torch's primitives with the code path of a GPU."""
    spec = importlib.util.find_spec("hvd_accordion.ops.torch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.is_on_cpu = lambda x: False
    return module


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


BACKENDS: dict[str, tuple[ModuleType, Callable]] = {
    "numpy": (numpy_ops, np.array),
    "torch": (torch_ops, to_torch),
    "torch-gpu": (as_on_a_gpu(), to_torch),
    "tensorflow": (tensorflow_ops, tf.constant),
}
FRAMEWORKS = {name: backend for name, backend in BACKENDS.items() if name != "numpy"}
