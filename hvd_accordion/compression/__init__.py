"""Compression specs: frozen values that describe how a gradient is compressed and exchanged. One family per file."""

from hvd_accordion.compression.base import CompressionSpec, Context, Decoded
from hvd_accordion.compression.dense import Dense
from hvd_accordion.compression.feedback import exchange
from hvd_accordion.compression.half import BF16, FP16
from hvd_accordion.compression.low_rank import PowerSGD
from hvd_accordion.compression.quantised import QSGD
from hvd_accordion.compression.sharing import Sharing
from hvd_accordion.compression.sign import EFSignSGD
from hvd_accordion.compression.sparse import RandomK, TopK

__all__ = [
    "BF16",
    "FP16",
    "QSGD",
    "CompressionSpec",
    "Context",
    "Decoded",
    "Dense",
    "EFSignSGD",
    "PowerSGD",
    "RandomK",
    "Sharing",
    "TopK",
    "exchange",
]
