"""A rank of any launcher: `init` brings it together with the others. Arguments: how many there are, then modules."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

from horovod.common.process_sets import ProcessSet

import hvd_accordion.comm.launch

logging.basicConfig(format="log: %(message)s", level=logging.INFO)


def summed(name: str, value: float) -> float:
    """Over all ranks, by Horovod's own collective."""
    framework = "torch" if name.endswith("torch") else "tensorflow"
    tensor = import_module("torch").tensor if framework == "torch" else import_module("tensorflow").constant
    hvd = import_module(f"horovod.{framework}")
    return float(hvd.allreduce(tensor([value]), op=hvd.Sum)[0])


size = int(sys.argv[1])
for name in sys.argv[2:]:
    hvd = import_module(name)
    for again in (False, True):
        if again and "OMPI_COMM_WORLD_SIZE" in os.environ:
            break  # MPI starts once in a process
        first = ProcessSet([0])
        hvd.init(process_sets=[first])
        assert hvd.size() == size and summed(name, float(2 ** hvd.rank())) == 2**size - 1
        assert first.process_set_id == 1
        place = f"{hvd.rank()} of {size}, {hvd.local_rank()} of {hvd.local_size()}, {hvd.cross_rank()} of {hvd.cross_size()}"
        if not again:
            os.write(1, f"{name}: {place}; {os.environ.get(hvd_accordion.comm.launch.YIELD)}\n".encode())
        hvd.shutdown()
