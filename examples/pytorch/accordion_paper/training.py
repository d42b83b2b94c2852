"""One resumable training on Horovod ranks: each rank saves a checkpoint after every epoch, rank 0 a JSON at the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import hvd_accordion.torch as hvd
from accordion_paper.experiments import Run
from accordion_paper.floats import floats_a_step
from accordion_paper.tasks import Task, task
from hvd_accordion import Accordion, AccordionBatchSize, MLflowLogger
from hvd_accordion.training.reports import Stats
from hvd_accordion.utils.seeds import stable_hash


def train(
    run: Run, out: Path, data: Path | None = None, uri: str | None = None, progress: bool = False
) -> dict[str, Any]:
    """Trains, or resumes from the last epoch of which all ranks have a checkpoint. Writes OUT/STEM.json and returns it.

    Args:
        out: folder of the results. Checkpoints stay in a subfolder until the run is complete.
        data: folder with the files of CIFAR or WikiText-2.
        uri: MLflow server or database to which rank 0 logs.
    """
    hvd.init()
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe, first = run.experiment.recipe, hvd.rank() == 0
    torch.manual_seed(run.seed)
    work = task(run, data, hvd.rank(), hvd.size(), device)
    logger = MLflowLogger(uri, "accordion_paper", run.name) if uri and first else None
    optimizer = optimizer_of(run, work, logger)
    folder, settings = out / run.stem, run.settings(hvd.size())
    epoch, record = resume(folder, settings, work.network, optimizer)
    bar = tqdm(
        total=recipe.epochs * work.steps,
        initial=epoch * work.steps,
        desc=run.name,
        bar_format="{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ascii=True,
        mininterval=1.0,
        disable=not (progress and first),
    )
    while epoch < recipe.epochs:
        torch.manual_seed(stable_hash("dropout", run.seed, hvd.rank(), epoch))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(epoch, run.scale(hvd.size()))
        begin = time.perf_counter()
        updates = optimizer.stats.updates
        floats = train_epoch(run, work, optimizer, epoch, bar)
        seconds = time.perf_counter() - begin
        value = score(run, work)
        record["history"].append(
            {
                "value": value,
                "floats": floats,
                "seconds": seconds,
                "sent_bytes": optimizer.stats.sent_bytes,
                "dense_bytes": optimizer.stats.dense_bytes,
                # batches, except a large one that was in progress when the rate dropped
                "small": 2 * (optimizer.stats.updates - updates) > work.steps,
            }
        )
        record["regimes"].append({r.name: r.regime for r in optimizer.compression_report() if r.regime})
        epoch += 1
        if epoch < recipe.epochs:
            save(folder, settings, epoch, record, work.network, optimizer)
        if logger:
            logger.log_metrics({run.experiment.metric: value}, epoch - 1)
        bar.set_postfix_str(f"{run.experiment.metric} {value:.2f}", refresh=False)
    bar.close()
    if logger:
        logger.finish()
    result = summary(run, settings, record, optimizer.stats)
    if first:
        write(out / f"{run.stem}.json", result)
    hvd.barrier()  # checkpoints are removed only after the result is written
    for file in folder.glob(f"{hvd.rank()}-*.pt"):
        file.unlink()
    with contextlib.suppress(OSError):  # only the last rank finds it empty
        folder.rmdir()
    return result


def optimizer_of(run: Run, work: Task, logger: MLflowLogger | None) -> Any:
    """Returns SGD with the run's compression. All ranks start equally."""
    experiment, recipe = run.experiment, run.experiment.recipe
    optimizer = torch.optim.SGD(
        work.network.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    hvd.broadcast_parameters(work.network.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    batch_size = None
    if experiment.family == "batch" and run.mode == "accordion":
        small = run.batch * hvd.size()
        batch_size = AccordionBatchSize(
            small, small * experiment.factor, eta=0.5, interval=recipe.interval, warmup=recipe.warmup
        )
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=work.network.named_parameters(),
        compression=experiment.compression(run.mode),
        batch_size=batch_size,
        steps_per_epoch=work.steps,
        logger=logger,
        seed=run.seed,
        min_compress_numel=1,  # the authors compress every matrix
    )


def train_epoch(run: Run, work: Task, optimizer: Any, epoch: int, bar: Any) -> float:
    """Trains one epoch and returns the floats sent, by the paper's measure."""
    clip, sent = run.experiment.recipe.clip, 0.0
    each = floats_now(run, optimizer)
    for step, loss in enumerate(work.losses(epoch)):
        updates = optimizer.stats.updates
        optimizer.zero_grad()
        loss.backward()
        if clip:
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(work.network.parameters(), clip)
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        sent += each * (optimizer.stats.updates - updates)
        if step == 0:  # a drop of the rate shows after its first step
            each = floats_now(run, optimizer)
        bar.update()
    return sent


def floats_now(run: Run, optimizer: Any) -> int:
    """Returns the floats of a step at the current levels. A layer that no level makes smaller counts as critical."""
    policy = run.experiment.compression(run.mode)
    layers = []
    for row in optimizer.compression_report():
        spec = policy
        if isinstance(policy, Accordion):
            spec = policy.relaxed if row.regime == "relaxed" else policy.critical
        layers.append((spec, row.shape))
    return floats_a_step(layers, hvd.size())


def score(run: Run, work: Task) -> float:
    """Returns accuracy in per cent or perplexity on the test data of all ranks. Averages running statistics first."""
    buffers = [x for x in work.network.buffers() if x.is_floating_point()]
    if buffers:
        hvd.grouped_allreduce_(buffers, op=hvd.Average, name="buffers")
    mine = torch.tensor(work.score(), dtype=torch.float64)
    total, count = hvd.allreduce(mine, op=hvd.Sum, name="score").tolist()
    mean = total / count
    return 100 * mean if run.experiment.metric == "accuracy" else math.exp(min(mean, 700.0))


def summary(run: Run, settings: dict[str, Any], record: dict[str, Any], stats: Stats) -> dict[str, Any]:
    """Returns the run's JSON. `critical_fraction` is that of layers and steps, or of epochs in small batches."""
    history = record["history"]
    batches = sum(epoch["small"] for epoch in history) / len(history)
    return {
        "settings": settings,
        "metric": run.experiment.metric,
        "value": history[-1]["value"],
        "floats": sum(epoch["floats"] for epoch in history),
        "sent_bytes": history[-1]["sent_bytes"],
        "dense_bytes": history[-1]["dense_bytes"],
        "seconds": sum(epoch["seconds"] for epoch in history),
        "critical_fraction": batches if run.experiment.family == "batch" else stats.critical_fraction,
        **record,
    }


# files: written completely or not at all


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(part, path)


def save(
    folder: Path, settings: dict[str, Any], epoch: int, record: dict[str, Any], network: torch.nn.Module, optimizer: Any
) -> None:
    """Saves this rank's checkpoint after `epoch` epochs. The previous one is kept for ranks that did not get so far."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hvd.rank()}-{epoch}.pt"
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"settings": json.dumps(settings), "record": record, **state}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    (folder / f"{hvd.rank()}-{epoch - 2}.pt").unlink(missing_ok=True)


def resume(
    folder: Path, settings: dict[str, Any], network: torch.nn.Module, optimizer: Any
) -> tuple[int, dict[str, Any]]:
    """Restores the last epoch that every rank has saved with these settings. Returns the epochs done and their record."""
    found = {}
    for path in folder.glob(f"{hvd.rank()}-*.pt"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] == json.dumps(settings):
            found[int(path.stem.split("-")[1])] = state
    common = set.intersection(*map(set, hvd.allgather_object(list(found), name="checkpoints")))
    if not common:
        return 0, {"history": [], "regimes": []}
    epoch = max(common)
    network.load_state_dict(found[epoch]["network"])
    optimizer.load_state_dict(found[epoch]["optimizer"])
    if hvd.rank() == 0:
        sys.stderr.write(f"goes on after epoch {epoch}\n")
    return epoch, found[epoch]["record"]
