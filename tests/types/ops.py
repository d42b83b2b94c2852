"""Each framework's primitives have the protocol's names and arguments."""

import hvd_accordion.ops.numpy
import hvd_accordion.ops.tensorflow
import hvd_accordion.ops.torch
from hvd_accordion.ops.protocol import Ops

NUMPY: Ops = hvd_accordion.ops.numpy
TENSORFLOW: Ops = hvd_accordion.ops.tensorflow
TORCH: Ops = hvd_accordion.ops.torch
