"""Gives Accelerate and TrainingArguments Horovod's rank and size, and checks arguments.

Accelerate would read a launcher's variables (`OMPI_COMM_WORLD_SIZE`, `WORLD_SIZE`, ...) and start torch.distributed. Here
its `PartialState` is created as for a single process and then gets Horovod's rank and size. Accelerate uses them to divide
the data and to decide which process writes files, but does not communicate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import patch_environment
from transformers import TrainingArguments

import hvd_accordion.torch as hvd
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.transport import connect

# variables by which Accelerate detects a launcher; -1 counts as unset
LAUNCHERS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# prefixes of arguments in which ranks may differ
OWN: tuple[str, ...] = (
    "output_dir",
    "run_name",
    "local_rank",
    "disable_tqdm",
    "report_to",
    "debug",
    "ddp_",
    "dataloader_num",
    "project",
)
OWN += ("hub_", "push_to_hub", "log_level", "trackio_", "accelerator_config", "dataloader_p", "dataloader_multi")


def place(args: TrainingArguments) -> torch.device:
    """Sets Horovod's rank and size in the arguments and returns the device. Initialises Horovod if necessary."""
    if not hvd.is_initialized():
        hvd.init()
    AcceleratorState._reset_state(reset_partial_state=True)  # like TrainingArguments
    with patch_environment(**dict.fromkeys(LAUNCHERS, -1)):
        state = PartialState(cpu=args.use_cpu)
    state.num_processes, state.process_index, state.local_process_index = hvd.size(), hvd.rank(), hvd.local_rank()
    if state.device.type == "cuda":
        state.device = torch.device("cuda", hvd.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(state.device)
    args.distributed_state = state
    args._n_gpu = 0 if state.device.type == "cpu" else 1
    return state.device


class HorovodArgumentsMixin:
    """Mix-in for classes of TrainingArguments: `class Arguments(HorovodArgumentsMixin, Seq2SeqTrainingArguments)`."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        return place(self)

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Lets the other ranks wait until rank 0, or with `local` the first rank of each host, leaves the context."""
        first = (hvd.local_rank() if local else hvd.rank()) == 0
        if not first:
            hvd.barrier()
        try:
            yield
        finally:
            if first:
                hvd.barrier()


class HorovodTrainingArguments(HorovodArgumentsMixin, TrainingArguments):
    """TrainingArguments of a Horovod rank. All arguments keep their meaning; `per_device_*_batch_size` are per rank."""


def check(args: TrainingArguments) -> None:
    """Checks the arguments.

    Raises:
        ValueError: on all ranks, if their arguments differ or one is not supported.
    """
    if hvd.size() > 1:
        mine = {f.name: getattr(args, f.name) for f in fields(args) if not f.name.startswith(OWN)}
        data = args.accelerator_config.to_dict()
        require_equal({**mine, **data}, "transformers.arguments", connect(hvd.global_process_set))
    for name, value, allowed in unsupported(args):
        raise ValueError(f"{name} must be {allowed} under Horovod, got {value!r}")


def unsupported(args: TrainingArguments) -> Iterator[tuple[str, Any, str]]:
    """Yields the name and value of each unsupported argument, and what is allowed instead."""
    for name in ("deepspeed", "fsdp", "parallelism_config"):
        if getattr(args, name, None):
            yield name, getattr(args, name), "unset: every rank holds the whole model"
    for name, reason in (
        ("auto_find_batch_size", "a single rank cannot restart"),
        ("enable_jit_checkpoint", "a signal reaches the ranks at different steps"),
    ):
        if getattr(args, name, False):
            yield name, True, f"False: {reason}"
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        yield "optim", optim, "an optimizer that steps after backward, when gradients are averaged"
    data = args.accelerator_config
    for name, required in (("split_batches", False), ("even_batches", True), ("use_seedable_sampler", True)):
        if getattr(data, name) is not required:
            yield f"accelerator_config.{name}", getattr(data, name), f"{required}"
    if data.dispatch_batches:
        yield "accelerator_config.dispatch_batches", True, "False or None: every rank reads its own data"
