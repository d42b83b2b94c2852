"""Horovod's trainer against Hugging Face's own on one process with the whole batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import DistributedType
from torch.utils.data import DataLoader, IterableDataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

import hvd_accordion.torch as hvd
from hvd_accordion import QSGD, Accordion, AccordionBatchSize, Dense, PowerSGD, TopK
from hvd_accordion.integrations.transformers import HorovodTrainer, HorovodTrainerMixin
from tests.integrations.workers.transformers_common import (
    DEFAULTS,
    accuracy,
    alone,
    assert_ranks_equal,
    flat,
    history,
    horovod,
    model,
    text,
)

EXACT = {"none": None, "dense": Dense()}
LOSSY = {
    "powersgd": PowerSGD(2),
    "topk": TopK(0.05),
    "qsgd": QSGD(7),
    "accordion": Accordion(critical=PowerSGD(4), relaxed=TopK(0.05), interval=1, eta=0.1),
}


def assert_same(ours, theirs):
    assert torch.allclose(flat(ours.model), flat(theirs.model), atol=1e-6, rtol=0)
    assert_ranks_equal(flat(ours.model))
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert history(ours, key) == pytest.approx(history(theirs, key), rel=2e-6), key


@pytest.mark.parametrize("compression", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("passes", [1, 3])
def test_training_is_that_of_one_process(compression, passes, tmp_path):
    """Also where an epoch's last update has fewer micro-batches, and ranks unequal numbers of labels."""
    options = {"gradient_accumulation_steps": passes, "per_device_train_batch_size": 2, "num_train_epochs": 2}
    theirs = alone(tmp_path, **options)
    expected = theirs.train()
    assert min(history(theirs, "grad_norm")) > 2 * theirs.args.max_grad_norm  # clipping bites
    ours = horovod(tmp_path, compression=compression, **options)
    got = ours.train()
    assert got.global_step == expected.global_step
    assert got.training_loss == pytest.approx(expected.training_loss, abs=1e-6)
    assert ours.state.total_flos == theirs.state.total_flos
    assert_same(ours, theirs)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_optimizer_and_scheduler_of_the_user(clip, tmp_path):
    def made(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        halved = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, halved], [4])

    options = {"max_steps": 7, "max_grad_norm": clip}
    trainers = []
    for make in (alone, horovod):
        net = model()
        trainers.append(make(tmp_path, net, optimizers=made(net), **options))
        trainers[-1].train()
    assert len(set(history(trainers[1], "learning_rate"))) > 4
    assert_same(*reversed(trainers))


def test_distributed_optimizer_of_the_user(tmp_path):
    nets = model(), model()
    theirs = alone(tmp_path, nets[0], optimizers=(torch.optim.SGD(nets[0].parameters(), 0.1), None), max_steps=4)
    theirs.train()
    ours = horovod(tmp_path, nets[1], optimizers=(distributed(nets[1], compression=Dense()), None), max_steps=4)
    ours.train()
    assert_same(ours, theirs)


def test_label_smoothing_and_local_means(tmp_path):
    options = {"label_smoothing_factor": 0.1, "max_steps": 4, "gradient_accumulation_steps": 2}
    theirs = alone(tmp_path, **options)
    theirs.train()
    ours = horovod(tmp_path, compression=Dense(), **options)
    ours.train()
    assert_same(ours, theirs)
    ours = horovod(tmp_path, average_tokens_across_devices=False, max_steps=2)
    ours.train()
    assert_ranks_equal(flat(ours.model))


def test_bfloat16(tmp_path):
    options = {"bf16": True, "max_steps": 6}
    theirs = alone(tmp_path, **options)
    theirs.train()
    for compression in (None, PowerSGD(8)):
        ours = horovod(tmp_path, compression=compression, **options)
        ours.train()
        assert_ranks_equal(flat(ours.model))
        assert history(ours, "loss") == pytest.approx(history(theirs, "loss"), rel=0.02)
    ours = horovod(tmp_path, model().to(torch.bfloat16), compression=Dense(), eval_dataset=text(5), max_steps=2)
    ours.train()
    assert_ranks_equal(flat(ours.model))
    assert ours.predict(text(5)).predictions.shape == (5, 16, 256)


def test_another_trainer_and_plain_arguments(tmp_path):
    class Mine(HorovodTrainerMixin, Seq2SeqTrainer):
        pass

    given = {**DEFAULTS, "use_cpu": False, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    args = Seq2SeqTrainingArguments(str(tmp_path), **given)
    ours = Mine(model(), args, train_dataset=text(32), eval_dataset=text(5), compression=TopK(0.1))
    assert args.world_size == hvd.size() and ours.is_world_process_zero() == (hvd.rank() == 0)
    assert ours.train().global_step == 4
    assert_ranks_equal(flat(ours.model))
    assert ours.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("compression", LOSSY.values(), ids=LOSSY)
def test_lossy_ranks_end_bit_equal(compression, tmp_path):
    different = model(seed=hvd.rank(), dropout=0.1)
    ours = horovod(tmp_path, different, compression=compression, num_train_epochs=3, gradient_accumulation_steps=2)
    losses = []
    for _ in range(2):  # a second training goes on with the same optimizer
        ours.train()
        losses += history(ours, "loss")
    assert_ranks_equal(flat(ours.model), compression)
    assert losses[-1] < losses[0]
    stats = ours.distributed_optimizer.stats
    assert stats.sent_bytes < 0.8 * stats.dense_bytes
    if isinstance(compression, Accordion):
        assert ours.distributed_optimizer._hvd.controller.epoch == 6


def test_dropout_is_a_ranks_own(tmp_path):
    drawn = []

    class Watched(HorovodTrainer):
        def training_step(self, *args, **options):
            drawn.append(torch.rand(1))
            return super().training_step(*args, **options)

    horovod(tmp_path, trainer=Watched, max_steps=1).train()
    everyone = hvd.allgather(drawn[0], name="drawn")
    assert len(set(everyone.tolist())) == hvd.size()


# evaluation


@pytest.mark.parametrize("examples", [12, 13, 11, 2])
@pytest.mark.parametrize("given", [{}, {"average_tokens_across_devices": False}, {"label_smoothing_factor": 0.1}])
def test_evaluation_is_that_of_one_process(examples, given, tmp_path):
    """Where the last batch is full, or leaves one rank some examples or none."""
    data = text(examples, start=40)
    options = {"eval_dataset": data, "compute_metrics": accuracy, "per_device_eval_batch_size": 3, **given}
    theirs = alone(tmp_path, **options)
    expected, predicted = theirs.evaluate(), theirs.predict(data).predictions
    ours = horovod(tmp_path, **options)
    got = ours.evaluate()
    assert got["eval_rows"] == examples
    for key in ("eval_loss", "eval_accuracy"):
        assert got[key] == pytest.approx(expected[key], abs=1e-6), key
    assert np.allclose(ours.predict(data).predictions, predicted, atol=1e-6)


class Normed(torch.nn.Module):
    """Takes no items to normalise its loss by, and has statistics of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)

    def forward(self, x, labels):
        logits = self.linear(self.norm(x)).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


def test_any_module_and_its_statistics(tmp_path):
    g = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, generator=g) + i % 3, "labels": torch.tensor(float(i))} for i in range(11)]
    ours = horovod(tmp_path, Normed(), data=data, eval_dataset=data, max_steps=3, per_device_eval_batch_size=2)
    ours.train()
    got = ours.evaluate()["eval_loss"]
    assert_ranks_equal(torch.cat([x.double().reshape(-1) for x in ours.model.state_dict().values()]))
    theirs = alone(tmp_path, ours.model, data=data, eval_dataset=data, per_device_eval_batch_size=2)
    assert got == pytest.approx(theirs.evaluate()["eval_loss"], abs=1e-5)


def test_predictions_of_unequal_length(tmp_path):
    """A rank's batch is padded to its own longest example, then to the longest of all ranks."""

    def collate(rows):
        length = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]),
            "labels": torch.tensor([row["labels"] + [-100] * (length - len(row["labels"])) for row in rows]),
        }

    data = [{key: values[: 4 + i] for key, values in row.items()} for i, row in enumerate(text(6, start=40))]
    theirs = alone(tmp_path, per_device_eval_batch_size=3, data_collator=collate)
    expected = theirs.predict(data)
    got = horovod(tmp_path, per_device_eval_batch_size=1, data_collator=collate).predict(data)
    assert np.array_equal(got.label_ids, expected.label_ids)
    for i, (mine, other) in enumerate(zip(got.predictions, expected.predictions, strict=True)):
        assert np.allclose(mine[: 4 + i], other[: 4 + i], atol=1e-5)


# data


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_a_stream_is_shared_out(tmp_path):
    options = {"data": Stream(text(32)), "per_device_train_batch_size": 4, "max_steps": 10}
    theirs = alone(tmp_path, **options)
    theirs.train()
    ours = horovod(tmp_path, compression=Dense(), **options)
    ours.train()
    assert_same(ours, theirs)


def test_an_epoch_ends_where_a_rank_runs_out(tmp_path):
    class Own(HorovodTrainer):
        def get_train_dataloader(self):
            return DataLoader(Stream(text(12 - 4 * hvd.rank())), batch_size=2, collate_fn=self.data_collator)

    ours = horovod(tmp_path, trainer=Own, compression=TopK(0.1), max_steps=5, gradient_accumulation_steps=2)
    ours.train()  # of rank 1's four batches two updates an epoch
    assert ours.state.global_step == 5 and ours.distributed_optimizer.stats.updates == 5
    assert_ranks_equal(flat(ours.model))


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_every_example_once_an_epoch(strategy, tmp_path):
    seen = []

    class Watched(HorovodTrainer):
        def training_step(self, model, inputs, *rest):
            seen.append(inputs["input_ids"][:, :4].clone())
            return super().training_step(model, inputs, *rest)

    ours = horovod(
        tmp_path,
        model(dropout=0.1),
        trainer=Watched,
        train_sampling_strategy=strategy,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
    )
    ours.train()
    mine = torch.cat(seen).reshape(2, 16, 4)
    for epoch in range(2):
        everyone = hvd.allgather(mine[epoch], name="seen").tolist()
        assert sorted(everyone) == sorted(row["input_ids"][:4] for row in text(32)), strategy
    assert torch.equal(mine[0], mine[1]) == (strategy == "sequential")


# what can't work


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches must be True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches must be"),
        ({"optim": "adalomo"}, "optim must be an optimizer that steps after backward"),
        ({"max_steps": "rank"}, "rank 0 has 'max_steps = 1', rank 1 has 'max_steps = 2'"),
        ({"distributed": {"batch_size": 3}}, "distributed must not hold batch_size"),
    ],
)
def test_refused(given, message, tmp_path):
    given = {key: 1 + hvd.rank() if value == "rank" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=message):
        horovod(tmp_path, **given)


def distributed(net, **options):
    options = options or {"batch_size": AccordionBatchSize(2, 4, unit="steps", warmup=0)}
    return hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net.named_parameters(), **options)


def ECLK(net):
    return hvd.ECLK(net.parameters(), TopK(0.1), smoothness=10.0)


def test_refused_in_training(tmp_path):
    class Unaveraged(HorovodTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return self.compute_loss(model, inputs).detach()

    class Plain(HorovodTrainer):
        def create_optimizer(self, *_):
            self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
            return self.optimizer

    net = model()
    some = torch.optim.SGD([net.transformer.wte.weight], 0.1), None
    for error, message, trainer in [
        (RuntimeError, r"must call super\(\).training_step", horovod(tmp_path, trainer=Unaveraged)),
        (RuntimeError, r"must call super\(\).create_optimizer", horovod(tmp_path, trainer=Plain)),
        (ValueError, "optimizers must hold all trainable parameters", horovod(tmp_path, net, optimizers=some)),
        (ValueError, "rank 0 has 'updates of an epoch = 2'", horovod(tmp_path, data=text(32 + 32 * hvd.rank()))),
    ]:
        with pytest.raises(error, match=message):
            trainer.train()
    for error, message, optimizer, given in [
        (ValueError, "compression, logger and distributed must be None", distributed, {"compression": TopK(0.1)}),
        (ValueError, "batch_size of DistributedOptimizer must be None", distributed, {}),
        (TypeError, "a Trainer can't call ECLK", ECLK, {}),
    ]:
        net = model()
        with pytest.raises(error, match=message):
            horovod(tmp_path, net, optimizers=(optimizer(net), None), **given).train()
    with pytest.raises(ValueError, match="eval_dataset must have a length"):
        horovod(tmp_path).evaluate(Stream(text(4)))
    with pytest.raises(ValueError, match="hyperparameter_search"):
        horovod(tmp_path).hyperparameter_search()
    args = Seq2SeqTrainingArguments(str(tmp_path))
    args.distributed_state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match="args must be HorovodTrainingArguments here"):
        HorovodTrainer(model(), args)
    ours = horovod(tmp_path)
    alone(tmp_path)
    with pytest.raises(RuntimeError, match="have taken it out of Horovod's ranks"):
        ours.train()
    with pytest.raises(TypeError, match="must come before"):
        type("Late", (Trainer, HorovodTrainerMixin), {})
