"""Compression specs: frozen values that say what to do to a gradient, and how its exchange goes. One family a file."""

from hvd_accordion.compression.base import CompressionSpec, Context
from hvd_accordion.compression.dense import Dense
from hvd_accordion.compression.feedback import exchange
from hvd_accordion.compression.half import BF16, FP16
from hvd_accordion.compression.low_rank import PowerSGD
from hvd_accordion.compression.quantised import QSGD
from hvd_accordion.compression.sparse import RandomK, TopK

__all__ = [
    "BF16",
    "FP16",
    "QSGD",
    "CompressionSpec",
    "Context",
    "Dense",
    "Exchanged",
    "PowerSGD",
    "RandomK",
    "TopK",
    "exchange",
]
