"""Mirrors horovod.torch: every public name of it, submodules too, with a DistributedOptimizer that compresses.

`import hvd_accordion.torch as hvd` in place of `import horovod.torch as hvd` changes nothing until `compression` is given.
"""

import sys as _sys

import horovod.torch as _horovod
from horovod.torch import *  # noqa: F403

for _name, _module in list(_sys.modules.items()):
    if _name.startswith("horovod.torch."):  # so that "import hvd_accordion.torch.elastic" finds Horovod's
        _sys.modules.setdefault(_name.replace("horovod.torch", __name__, 1), _module)
for _name in dir(_horovod):
    if not _name.startswith("_"):
        globals()[_name] = getattr(_horovod, _name)

from hvd_accordion.torch.distributed_optimizer import DistributedOptimizer  # noqa: E402
from hvd_accordion.torch.state import broadcast_optimizer_state  # noqa: E402

__all__ = [_name for _name in dir(_horovod) if not _name.startswith("_")]
__all__ += ["DistributedOptimizer", "broadcast_optimizer_state"]
