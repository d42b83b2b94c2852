"""Trains a small GPT-2 on CPython's own documentation, byte by byte, by Hugging Face's Trainer with compressed gradients.

horovodrun -np 2 python examples/transformers/transformers_gpt.py --compression accordion

Nothing is downloaded. The last line of rank 0 on stdout is a JSON object: eval_loss (nats per byte), sent_bytes and
dense_bytes (of each rank), updates, seconds, ranks.
"""

import argparse
import json
import pydoc_data.topics
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, PowerSGD, TopK
from hvd_accordion.integrations.transformers import HorovodTrainer, HorovodTrainingArguments

COMPRESSION = {
    "none": None,
    "powersgd": PowerSGD(rank=4),
    "topk": TopK(0.01),
    "accordion": Accordion(critical=PowerSGD(rank=4), relaxed=PowerSGD(rank=1), interval=1),
}

parser = argparse.ArgumentParser(description="A small GPT-2 with compressed gradients")
parser.add_argument("--compression", choices=COMPRESSION, default="accordion")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--examples", type=int, help="training examples, at most 3,200; default: all")
parser.add_argument("--batch-size", type=int, default=8, help="batch size of each rank")
parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per update")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--length", type=int, default=128, help="bytes of an example")
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--output", help="folder for a checkpoint per epoch; default: none")
parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --output")


def examples(length):
    """Returns the documentation in pieces for training, and every tenth for evaluation."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    pieces = [list(text[i : i + length]) for i in range(0, len(text) - length, length)]
    rows = [{"input_ids": piece, "labels": piece} for piece in pieces]
    return [row for i, row in enumerate(rows) if i % 10], rows[::10]


def main():
    args = parser.parse_args()
    torch.set_num_threads(1)
    training, evaluation = examples(args.length)
    config = GPT2Config(
        vocab_size=256,
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = HorovodTrainer(
            GPT2LMHeadModel(config),
            HorovodTrainingArguments(
                args.output or folder,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                gradient_accumulation_steps=args.accumulate,
                learning_rate=args.lr,
                weight_decay=0.01,
                warmup_steps=20,
                max_grad_norm=1.0,
                logging_steps=20,
                eval_strategy="epoch",
                save_strategy="epoch" if args.output else "no",
                report_to="none",
                disable_tqdm=True,
                seed=args.seed,
            ),
            train_dataset=training[: args.examples],
            eval_dataset=evaluation,
            compression=COMPRESSION[args.compression],
        )
        trained = trainer.train(resume_from_checkpoint=args.resume)
        loss = trainer.evaluate()["eval_loss"]
    stats = trainer.distributed_optimizer.stats
    if hvd.rank() == 0:
        found = {
            "eval_loss": loss,
            "sent_bytes": stats.sent_bytes,
            "dense_bytes": stats.dense_bytes,
            "updates": trained.global_step,
            "seconds": trained.metrics["train_runtime"],
            "ranks": hvd.size(),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
