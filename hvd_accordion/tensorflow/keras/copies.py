"""Distributed optimizers that Keras makes anew from a config: clones, copies, optimizers of loaded models.

A config holds the wrapped optimizer's settings alone, so that a saved model loads without Horovod. What the wrapping
added stands here, by the optimizer's class and name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import keras

try:
    # Not public, and only of our own classes: keras.saving.register_keras_serializable would put the package's name into
    # the files, and Keras's HDF5 files would then load nowhere else.
    from keras.src.saving.object_registration import GLOBAL_CUSTOM_NAMES
except ImportError:
    GLOBAL_CUSTOM_NAMES = {}


@dataclass(frozen=True)
class Wrapping:
    """What a DistributedOptimizer adds to the optimizer that it wraps.

    Args:
        arguments: of its GradientExchange.
        average: of the gradients of several backward passes, not their sum.
        device: where exchanges run.
        local: names of the variables whose gradients stay the rank's own.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    average: bool = False
    device: str = ""
    local: frozenset[str] = frozenset()


_serialized: dict[tuple[type, str], Wrapping] = {}
_loading: ContextVar[Wrapping | None] = ContextVar("loading", default=None)


def register(kind: type, name: str) -> None:
    """Lets Keras find `kind`, the distributed form of one of its own optimizers' classes, where it reads a config.

    The name differs from the class's by its case alone: where it is not registered, Keras finds its own class.
    """
    odd = name[0].lower() + name[1:].upper()
    keras.saving.get_custom_objects()[odd] = kind
    GLOBAL_CUSTOM_NAMES[kind] = odd


def remember(kind: type, name: str, wrapping: Wrapping | None) -> None:
    """The optimizer of this class and name is about to be serialized. None: it can't be made again."""
    if wrapping is None:
        _serialized.pop((kind, name), None)
    else:
        _serialized[kind, name] = wrapping


def wrapping_of(kind: type, name: str) -> Wrapping | None:
    """Of an optimizer that is made from a config; None where this process has never serialized one of its name."""
    return _loading.get() or _serialized.get((kind, name))


def loading() -> bool:
    return _loading.get() is not None


@contextmanager
def wrapped(wrapping: Wrapping) -> Iterator[None]:
    """Within it every distributed optimizer that is made from a config has this wrapping."""
    token = _loading.set(wrapping)
    try:
        yield
    finally:
        _loading.reset(token)
