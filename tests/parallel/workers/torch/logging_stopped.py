"""A training whose MLflow server stops in the middle comes to the same weights as one that logs nothing."""

import os
import time
from pathlib import Path

import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, MLflowLogger, TopK
from tests.parallel.workers.torch.common import assert_ranks_equal, flat, model, sgd, train

FOLDER = Path(os.environ["LOGS"])
COMPRESSION = Accordion(critical=TopK(0.1), relaxed=TopK(0.01), interval=1)


def training(logger=None):
    net = model()
    optimizer = hvd.DistributedOptimizer(
        sgd(net), net.named_parameters(), compression=COMPRESSION, steps_per_epoch=1, logger=logger
    )
    return net, optimizer


def await_(condition, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_training_goes_on_without_its_server(monkeypatch):
    monkeypatch.chdir(FOLDER)
    unlogged, optimizer = training()
    train(unlogged, optimizer, range(40))

    logger = None
    if hvd.rank() == 0:
        logger = MLflowLogger(os.environ["TEST_TRACKING_URI"], "stopped", flush_timeout=1.0)
    net, optimizer = training(logger)
    train(net, optimizer, range(10))
    if hvd.rank() == 0:
        import mlflow

        client = mlflow.MlflowClient(os.environ["TEST_TRACKING_URI"])
        await_(lambda: logger.run_id is not None)
        await_(lambda: len(client.get_metric_history(logger.run_id, "sent_bytes")) == 10)
        assert logger.dropped == 0
        (FOLDER / "logged").touch()
        await_((FOLDER / "stopped").exists)
    hvd.barrier()

    slowest = 0.0
    for step in range(10, 40):
        begin = time.monotonic()
        train(net, optimizer, range(step, step + 1))
        slowest = max(slowest, time.monotonic() - begin)
    assert slowest < 2.0
    assert_ranks_equal(flat(net))
    assert torch.equal(flat(net), flat(unlogged))
    if hvd.rank() == 0:
        begin = time.monotonic()
        logger.finish()
        assert time.monotonic() - begin < 5.0
        assert logger.dropped >= 30 * 4  # at least four values an epoch
    hvd.barrier()
