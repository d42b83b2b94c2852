"""A training that is resumed is bit-equal to one that was not stopped; rank 0 writes, logs, and knows the best model."""

import os

import pytest
import torch
from transformers import TrainerCallback

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, PowerSGD, TopK
from tests.integrations.workers.transformers_common import assert_ranks_equal, flat, history, horovod, model, text

SPECS = {
    "none": None,
    "topk": TopK(0.05),
    "accordion": Accordion(critical=PowerSGD(4), relaxed=TopK(0.05), interval=1, eta=0.1),
}
UPDATES = {  # two an epoch of 32 examples; the second of each ends it
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
@pytest.mark.parametrize("compression", SPECS.values(), ids=SPECS)
def test_resume_is_exact(compression, sampling, shared):
    options = {**UPDATES, "compression": compression, "train_sampling_strategy": sampling}
    whole = horovod(shared, model(dropout=0.1), **options)
    whole.train()
    for step in (3, 4):  # within an epoch, and at its end
        path = os.path.join(shared, f"checkpoint-{step}")
        resumed = horovod(shared, model(seed=3, dropout=0.1), **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=path)
        assert torch.equal(flat(resumed.model), flat(whole.model)), (step, sampling)
        assert history(resumed, "loss") == history(whole, "loss")
        ours, theirs = resumed.distributed_optimizer.state_dict(), whole.distributed_optimizer.state_dict()
        if compression is not None:
            ours, theirs = ours["hvd_accordion"], theirs["hvd_accordion"]
            assert ours["residual"] and ours["residual"].keys() == theirs["residual"].keys()
            assert all(torch.equal(ours["residual"][name], theirs["residual"][name]) for name in ours["residual"])
            assert ours["controller"]["policies"] == theirs["controller"]["policies"]
            assert ours["controller"]["epoch"] == theirs["controller"]["epoch"] == 4
        hvd.barrier()
    mine = f"hvd_accordion_{hvd.rank()}.pt"
    assert os.path.exists(os.path.join(path, mine)) == (compression is not None and hvd.rank() > 0)
    assert os.path.exists(os.path.join(path, f"rng_state_{hvd.rank()}.pth"))


def test_resume_where_a_file_is_missing(shared, caplog):
    options = {**UPDATES, "compression": TopK(0.05), "num_train_epochs": 1}
    horovod(shared, **options).train()
    hvd.barrier()
    if hvd.rank() == 1:
        os.remove(os.path.join(shared, "checkpoint-2", "hvd_accordion_1.pt"))
    resumed = horovod(shared, model(seed=hvd.rank()), **{**options, "num_train_epochs": 2})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_ranks_equal(flat(resumed.model))
    assert ("starts without residuals" in caplog.text) == (hvd.rank() == 1)
    with pytest.raises(ValueError, match="rank 0, 1: no nowhere"):
        horovod(shared).train(resume_from_checkpoint="nowhere")


class Told(TrainerCallback):
    def __init__(self):
        self.logs = 0

    def on_log(self, args, state, control, logs=None, **_):
        self.logs += state.is_world_process_zero


def test_rank_0_writes_and_every_rank_ends_with_the_best(tmp_path, capfd):
    """Each rank has a folder of its own here, as on hosts without a common file system."""
    told, evaluations = Told(), []

    def age(_):
        evaluations.append(1)
        return {"age": len(evaluations)}

    ours = horovod(
        tmp_path,
        eval_dataset=text(12, start=40),
        compute_metrics=age,
        metric_for_best_model="age",
        greater_is_better=False,  # so that the first is the best
        callbacks=[told],
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        compression=PowerSGD(2),
    )
    ours.train()
    assert_ranks_equal(flat(ours.model))
    first, *_, last = history(ours, "eval_loss")
    assert ours.evaluate()["eval_loss"] == pytest.approx(first, abs=1e-6) != last
    ours.save_model(os.path.join(tmp_path, "model"))
    printed = capfd.readouterr().out
    if hvd.rank() == 0:
        assert told.logs >= 6 and "eval_loss" in printed and os.path.exists(os.path.join(tmp_path, "model"))
    else:
        assert told.logs == 0 and "loss" not in printed and not os.path.exists(os.path.join(tmp_path, "model"))


def test_main_process_first(shared):
    args = horovod(shared).args
    file = os.path.join(shared, "prepared")
    with args.main_process_first():
        assert os.path.exists(file) == (hvd.rank() > 0)
        open(file, "a").close()
    assert args.world_size == hvd.size() and args.process_index == hvd.rank()
    assert not torch.distributed.is_initialized()
