"""A tiny language model, its text, and trainings of it by Horovod's trainer and by Hugging Face's on one process."""

from __future__ import annotations

import copy
import pydoc_data.topics
from typing import Any

import numpy as np
import torch
from accelerate.utils import patch_environment
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

import hvd_accordion.torch as hvd
from hvd_accordion.integrations.transformers import HorovodTrainer, HorovodTrainingArguments
from hvd_accordion.integrations.transformers.arguments import LAUNCHERS

BYTES = pydoc_data.topics.topics["assert"].encode() + pydoc_data.topics.topics["class"].encode()
LENGTH = 16


def text(examples: int, start: int = 0) -> list[dict[str, Any]]:
    """Examples with unequal numbers of labels."""
    rows = []
    for i in range(start, start + examples):
        ids = list(BYTES[i * LENGTH : (i + 1) * LENGTH])
        ignored = i * 7 % 11
        rows.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return rows


def model(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **drop))


def accuracy(p: EvalPrediction) -> dict[str, float]:
    predicted, labels = np.argmax(p.predictions[:, :-1], -1), p.label_ids[:, 1:]
    return {"accuracy": float((predicted == labels)[labels != -100].mean()), "rows": len(labels)}


DEFAULTS = {
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,  # else Adam makes whole steps of gradients that are nothing but rounding
    "weight_decay": 0.1,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


OF_TRAINER = ("eval_dataset", "compute_metrics", "optimizers", "data_collator", "callbacks")
OURS = ("compression", "logger", "distributed")


def taken(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: given.pop(name) for name in names if name in given}


def horovod(folder: Any, net: Any = None, trainer: Any = HorovodTrainer, data: Any = None, **given: Any) -> Any:
    options = taken(given, OF_TRAINER + OURS)
    args = HorovodTrainingArguments(str(folder), **{**DEFAULTS, **given})
    return trainer(net or model(), args, train_dataset=text(32) if data is None else data, **options)


def alone(folder: Any, net: Any = None, data: Any = None, **given: Any) -> Trainer:
    """Trainer as it is, on this process and the whole batch. To be used up before one of `horovod` is made."""
    options = taken(given, OF_TRAINER)
    given = {**DEFAULTS, "per_device_train_batch_size": 8, **given}
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if name in given:
            given[name] *= hvd.size()
    with patch_environment(**dict.fromkeys(LAUNCHERS, -1)):
        args = TrainingArguments(str(folder), **given)
    return Trainer(net or model(), args, train_dataset=text(32) if data is None else data, **options)


def flat(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in net.parameters()])


def assert_ranks_equal(x: torch.Tensor, what: object = "") -> None:
    everyone = hvd.allgather(x.reshape(1, -1), name="ranks.equal")
    assert torch.isfinite(everyone).all(), what
    for other in everyone[1:]:
        assert torch.equal(everyone[0], other), f"ranks differ: {what}"


def history(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in copy.deepcopy(trainer.state.log_history) if key in entry]
