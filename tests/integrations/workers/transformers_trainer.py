"""Horovod's trainer against Hugging Face's own on one process with the whole batch."""

import pytest
import torch
from transformers_common import alone, assert_ranks_equal, flat, history, horovod

from hvd_accordion import Dense

EXACT = {"none": None, "dense": Dense()}


@pytest.mark.parametrize("compression", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("passes", [1, 3])
def test_training_is_that_of_one_process(compression, passes, tmp_path):
    options = {"gradient_accumulation_steps": passes, "per_device_train_batch_size": 2, "num_train_epochs": 2}
    theirs = alone(tmp_path, **options)
    expected = theirs.train()
    ours = horovod(tmp_path, compression=compression, **options)
    got = ours.train()
    assert got.global_step == expected.global_step
    print((flat(ours.model) - flat(theirs.model)).abs().max(), got.training_loss - expected.training_loss)
    print(history(ours, "grad_norm"), history(theirs, "grad_norm"), history(ours, "loss"), history(theirs, "loss"))
    assert torch.allclose(flat(ours.model), flat(theirs.model), atol=1e-6, rtol=0)
    assert got.training_loss == pytest.approx(expected.training_loss, abs=1e-6)
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert history(ours, key) == pytest.approx(history(theirs, key), abs=2e-6), key
    assert_ranks_equal(flat(ours.model))
