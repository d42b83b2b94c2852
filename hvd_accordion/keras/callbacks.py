"""Mirrors horovod.keras.callbacks."""

from typing import Any

from hvd_accordion.tensorflow.keras import callbacks as _ours
from hvd_accordion.tensorflow.keras.callbacks import *  # noqa: F403
from hvd_accordion.tensorflow.keras.callbacks import __all__  # noqa: F401


class BestModelCheckpoint(_ours.BestModelCheckpoint):  # type: ignore[no-redef]
    """As hvd_accordion.tensorflow.keras.callbacks has it, of whole models alone, as horovod.keras's."""

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        filepath: Any = None,
    ) -> None:
        super().__init__(monitor, verbose, False, mode, save_freq, filepath)
