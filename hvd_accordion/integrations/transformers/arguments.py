"""The place of a process among Horovod's ranks, told to Accelerate and to TrainingArguments; and what can't work.

Accelerate would find a launcher's variables (`OMPI_COMM_WORLD_SIZE`, `WORLD_SIZE`, ...) and start torch.distributed. Here
its `PartialState` is one of a process alone, to which Horovod's rank and size are then given: data are shared out and
files written by them, and nothing else is told to communicate.
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

# by which Accelerate knows of a launcher; it takes -1 for absent
LAUNCHERS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# in which ranks may differ
OWN = (
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
    """Gives the arguments this process's place among Horovod's ranks, which it joins if need be; returns the device."""
    if not hvd.is_initialized():
        hvd.init()
    AcceleratorState._reset_state(reset_partial_state=True)  # as TrainingArguments does
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
    """Makes a class of TrainingArguments Horovod's: `class Arguments(HorovodArgumentsMixin, Seq2SeqTrainingArguments)`."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        return place(self)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """The others wait until rank 0 (or each host's first rank, where `local`) has done what is within."""
        first = (hvd.local_rank() if local else hvd.rank()) == 0
        if not first:
            hvd.barrier()
        try:
            yield
        finally:
            if first:
                hvd.barrier()


class HorovodTrainingArguments(HorovodArgumentsMixin, TrainingArguments):
    """TrainingArguments, all with their meaning, of a rank of Horovod. `per_device_*_batch_size` are a rank's."""


def check(args: TrainingArguments) -> None:
    """Raises ValueError, on all ranks the same, where they differ in their arguments or ask for what can't work."""
    if hvd.size() > 1:
        mine = {f.name: getattr(args, f.name) for f in fields(args) if not f.name.startswith(OWN)}
        data = args.accelerator_config.to_dict()
        require_equal({**mine, **data}, "transformers.arguments", hvd.global_process_set)
    for name, value, allowed in refused(args):
        raise ValueError(f"{name} must be {allowed} under Horovod, got {value!r}")


def refused(args: TrainingArguments) -> Iterator[tuple[str, Any, str]]:
    """Name, value, and what is allowed instead, of each argument that can't work."""
    for name in ("deepspeed", "fsdp", "parallelism_config"):
        if getattr(args, name, None):
            yield name, getattr(args, name), "unset: every rank holds the whole model"
    for name, why in (
        ("auto_find_batch_size", "a rank alone can't start anew"),
        ("enable_jit_checkpoint", "ranks hear of a signal at different steps"),
    ):
        if getattr(args, name, False):
            yield name, True, f"False: {why}"
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        yield "optim", optim, "an optimizer that steps after backward, when gradients are averaged"
    data = args.accelerator_config
    for name, only in (("split_batches", False), ("even_batches", True), ("use_seedable_sampler", True)):
        if getattr(data, name) is not only:
            yield f"accelerator_config.{name}", getattr(data, name), f"{only}"
    if data.dispatch_batches:
        yield "accelerator_config.dispatch_batches", True, "False or None: every rank reads its own data"
