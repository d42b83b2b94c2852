"""What MLflow holds after a training is what the optimizer counted; a dead server costs nothing."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, MLflowLogger, TopK
from tests.parallel.workers.torch.common import assert_ranks_equal, flat, model, sgd, train

FOLDER = Path(os.environ["LOGS"])


def test_mlflow_holds_what_was_counted(monkeypatch):
    monkeypatch.chdir(FOLDER)
    uri = os.environ.get("TEST_TRACKING_URI") or f"sqlite:///{FOLDER}/mlflow.db"
    logger = MLflowLogger(tracking_uri=uri, experiment_name="e", run_name="r") if hvd.rank() == 0 else None
    net = model()
    compression = Accordion(critical=TopK(0.1), relaxed=TopK(0.01), interval=1)
    optimizer = hvd.DistributedOptimizer(
        sgd(net), net.named_parameters(), compression=compression, steps_per_epoch=5, logger=logger
    )
    train(net, optimizer, range(20))
    assert_ranks_equal(flat(net))
    if hvd.rank() == 0:
        logger.finish()
        import mlflow

        client = mlflow.MlflowClient(uri)
        run = client.get_run(logger.run_id)
        assert run.info.status == "FINISHED" and run.info.run_name == "r"
        assert run.data.params["world_size"] == str(hvd.size())
        assert run.data.params["relaxed"] == "TopK(ratio=0.01)" and run.data.params["eta"] == "0.5"
        sent = client.get_metric_history(logger.run_id, "sent_bytes")
        assert [m.step for m in sent] == [0, 1, 2, 3]
        assert sum(m.value for m in sent) == pytest.approx(optimizer.stats.sent_bytes)
        dense = client.get_metric_history(logger.run_id, "dense_bytes")
        assert sum(m.value for m in dense) == pytest.approx(optimizer.stats.dense_bytes)
        critical = client.get_metric_history(logger.run_id, "critical_layers")
        assert sum(m.value for m in critical) / 4 == pytest.approx(optimizer.stats.critical_fraction)
        for layer in optimizer.compression_report():
            norms = client.get_metric_history(logger.run_id, f"layer/{layer.name}/norm")
            assert len(norms) == (4 if layer.regime else 0)
            if layer.regime:
                last = client.get_metric_history(logger.run_id, f"layer/{layer.name}/critical")[-1]
                assert last.value == (layer.regime == "critical")
        names = {f.path for f in client.list_artifacts(logger.run_id)}
        assert {"compression.png", "regimes.png", "regimes.json"} <= names
        windows = json.loads(Path(client.download_artifacts(logger.run_id, "regimes.json", str(FOLDER))).read_text())
        assert len(windows) == 4
    hvd.barrier()


def test_a_dead_server_neither_slows_nor_stops(monkeypatch):
    monkeypatch.chdir(FOLDER)
    logger = MLflowLogger(tracking_uri="http://127.0.0.1:9", flush_timeout=1.0) if hvd.rank() == 0 else None
    net = model()
    optimizer = hvd.DistributedOptimizer(
        sgd(net), net.named_parameters(), compression=TopK(0.1), steps_per_epoch=1, logger=logger
    )
    slowest = 0.0
    for step in range(30):
        begin = time.monotonic()
        train(net, optimizer, range(step, step + 1))
        slowest = max(slowest, time.monotonic() - begin)
    assert slowest < 2.0
    assert_ranks_equal(flat(net))
    assert torch.isfinite(flat(net)).all()
    if hvd.rank() == 0:
        begin = time.monotonic()
        logger.finish()
        assert time.monotonic() - begin < 5.0
