"""Trains a small GPT on a text file, character by character, by one of several methods; or compares them.

horovodrun -np 2 python examples/pytorch/transformer_lm.py --method muon-local20-sign --text FILE
python examples/pytorch/transformer_lm.py --compare

Without --text it learns CPython's help. The global batch is fixed, so that runs on 2, 4 and 8 ranks compare. The last
tenth of the text is for validation. The last line of rank 0 on stdout is a JSON object: validation_loss (nats a character),
tokens_per_second, sent_bytes and dense_bytes (of each rank), steps, seconds (of training alone), ranks.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from pathlib import Path

import torch
from gpt import GPT
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from language_model import compare, inner_state, text
from language_model.methods import DENSE, METHODS

import hvd_accordion.torch as hvd
from hvd_accordion import MLflowLogger

parser = argparse.ArgumentParser(description="A small GPT on Horovod, trained by the method of your choice")
parser.add_argument("--method", choices=METHODS, default=DENSE)
parser.add_argument("--text", type=Path, metavar="FILE", help="text to learn, in UTF-8; default: CPython's help")
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--batch", type=int, default=16, help="sequences in a step of all ranks together")
parser.add_argument("--context", type=int, default=64, help="characters of a sequence")
parser.add_argument("--width", type=int, default=96)
parser.add_argument("--layers", type=int, default=3)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--lr", type=float, default=4e-3, help="of AdamW")
parser.add_argument("--muon-lr", type=float, default=0.02, help="of Muon")
parser.add_argument("--weight-decay", type=float, default=0.01)
parser.add_argument("--warmup", type=int, default=100, help="steps in which the rates grow to their full size")
parser.add_argument("--dense-steps", type=int, default=300, help="of 1-bit Adam, before it sends momentum")
parser.add_argument("--drop", type=float, default=0.67, help="share of the steps after which the rates drop x0.1")
parser.add_argument("--clip", type=float, default=1.0, help="limit of the gradients' norm")
parser.add_argument(
    "--average-state", type=int, metavar="N", help="average the optimizers' moments each N steps: for local steps"
)
parser.add_argument("--every", type=int, default=100, help="steps from one validation to the next")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")
parser.add_argument("--mlflow-uri", help="log to this MLflow server or database, such as sqlite:///mlflow.db")
parser.add_argument("--run-name", help="in MLflow; by default the method")
parser.add_argument(
    "--history", type=Path, metavar="FILE", help="write the result, and loss by bytes and time, as JSON"
)
parser.add_argument("--no-progress", action="store_true", help="no progress bar")
compare.add_arguments(parser, out="transformer")


def split(model):
    """Named parameters: the blocks' matrices, and all others."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    return matrices, {name: p for name, p in named.items() if name not in matrices}


def outer(momentum):
    """What makes the outer optimizer of local steps."""
    return functools.partial(torch.optim.SGD, lr=1.0, momentum=momentum)


def distributed(model, args, logger):
    """The method's optimizers, each over Horovod: AdamW for all, or Muon for the blocks' matrices."""
    method = METHODS[args.method]
    matrices, others = split(model)
    adamw = {"lr": args.lr, "betas": (0.9, 0.95)}
    if method.optimizer == "OneBitAdam":  # averages over the ranks by itself
        options = {"warmup_steps": args.dense_steps, "weight_decay": args.weight_decay, "logger": logger}
        return [hvd.OneBitAdam(model.parameters(), **adamw, named_parameters=model.named_parameters(), **options)]
    if method.optimizer == "Muon":
        parts = [(torch.optim.Muon, {"lr": args.muon_lr}, matrices), (torch.optim.AdamW, adamw, others)]
    else:
        parts = [(torch.optim.AdamW, adamw, dict(model.named_parameters()))]
    compression, local_steps = method.compression(), method.local_steps(outer)
    # hvd_accordion: choose the compression, and how many steps each rank takes by itself.
    return [
        hvd.DistributedOptimizer(
            make(params.values(), weight_decay=args.weight_decay, **settings),
            named_parameters=params.items(),
            compression=compression,
            local_steps=local_steps,  # one object: both optimizers exchange together
            seed=args.seed,
            logger=logger,
        )
        for make, settings, params in parts
    ]


def rate(step, args):
    """The share of the full learning rate: grows evenly, stays, drops to a tenth."""
    return min(1.0, (step + 1) / args.warmup) * (0.1 if step >= args.drop * args.steps else 1.0)


def update(model, optimizers, clip):
    """Clips the common norm of all gradients, the ranks' means where gradients are what travels, and steps."""
    with contextlib.ExitStack() as stack:
        for optimizer in optimizers:
            if hasattr(optimizer, "synchronize"):  # 1-bit Adam exchanges moments, when it steps
                optimizer.synchronize()
                stack.enter_context(optimizer.skip_synchronize())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()


def loss_of(model, tokens, **options):
    """Cross-entropy of each next character, in nats."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), **options)


def validation_loss(model, windows):
    """Mean over the validation windows of all ranks."""
    with torch.no_grad():
        total = sum(float(loss_of(model, part, reduction="sum")) for part in windows.split(64))
    # Horovod: add up over the ranks.
    sums = torch.tensor([total, windows[:, 1:].numel()], dtype=torch.float64)
    total, count = hvd.allreduce(sums, op=hvd.Sum, name="validation_loss").tolist()
    return total / count


def common_parameters(optimizers):
    """With local steps, the parameters as of the last exchange; else the parameters are common anyway."""
    first = optimizers[0]  # for the others, too
    return first.common_parameters() if hasattr(first, "common_parameters") else contextlib.nullcontext()


def train(args):
    # Horovod: initialize library.
    hvd.init()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    first, ranks = hvd.rank() == 0, hvd.size()

    data = text.load(args.text, args.context)
    batches = text.batches(data.train, args.context, args.batch, args.seed, hvd.rank(), ranks)
    windows = torch.from_numpy(text.windows(data.validation, args.context, hvd.rank(), ranks))
    model = GPT(data.vocabulary, args.context, args.width, args.layers, args.heads)
    # Horovod: broadcast parameters.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    logger = None
    if args.mlflow_uri and first:
        settings = {name: str(value) for name, value in vars(args).items()}
        logger = MLflowLogger(args.mlflow_uri, "transformer_lm", args.run_name or args.method, settings)
    optimizers = distributed(model, args, logger)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args)) for optimizer in optimizers
    ]

    seconds, points, clock = 0.0, [], []
    bar = tqdm(
        total=args.steps,
        desc=args.run_name or args.method,
        bar_format="{desc}: {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ascii=True,
        mininterval=1.0,
        disable=args.no_progress or not first,
    )
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, torch.from_numpy(next(batches))).backward()
        update(model, optimizers, args.clip)
        if args.average_state and step % args.average_state == 0:
            inner_state.average(hvd, optimizers)
        for scheduler in schedulers:
            scheduler.step()
        bar.update()
        seconds += time.perf_counter() - begin
        if step % args.every == 0 or step == args.steps:
            with common_parameters(optimizers):
                loss = validation_loss(model, windows)
            points.append([sum(optimizer.stats.sent_bytes for optimizer in optimizers), loss])
            clock.append(seconds)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if logger:
                logger.log_metrics({"validation_loss": loss}, step)
    bar.close()

    if not first:
        return
    if logger:
        logger.finish()
    result = {
        "method": args.method,
        "validation_loss": loss,
        "tokens_per_second": round(args.steps * args.batch * args.context / seconds),
        "sent_bytes": round(sum(optimizer.stats.sent_bytes for optimizer in optimizers)),
        "dense_bytes": round(sum(optimizer.stats.dense_bytes for optimizer in optimizers)),
        "steps": args.steps,
        "seconds": round(seconds, 3),
        "ranks": ranks,
        "seed": args.seed,
    }
    # in one write: horovodrun puts a tag before each
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    if args.history:
        args.history.write_text(json.dumps({**result, "points": points, "clock": clock}), encoding="utf-8")


if __name__ == "__main__":
    args = parser.parse_args()
    if args.compare is None:
        train(args)
    else:
        compare.run(Path(__file__), args)
