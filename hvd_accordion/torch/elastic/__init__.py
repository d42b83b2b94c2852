"""Mirrors horovod.torch.elastic: every public name of it, with a TorchState that knows compression."""

import horovod.torch.elastic as _horovod
from horovod.torch.elastic import *  # noqa: F403

from hvd_accordion.utils.horovod_mirror import mirror as _mirror

__all__ = _mirror(_horovod, globals())

from hvd_accordion.torch.elastic import state
from hvd_accordion.torch.elastic.state import TorchState

__all__ += ["TorchState", "state"]
