"""What MLflow holds after a training under fit is what the optimizer counted."""

import os
from pathlib import Path

import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from hvd_accordion import Accordion, MLflowLogger, TopK
from tests.parallel.workers.tensorflow.keras_common import assert_ranks_equal, compiled, fit, flat

FOLDER = Path(os.environ["LOGS"])


def test_mlflow_holds_what_was_counted(monkeypatch):
    monkeypatch.chdir(FOLDER)
    uri = f"sqlite:///{FOLDER}/mlflow.db"
    logger = MLflowLogger(tracking_uri=uri, experiment_name="e", run_name="r") if hvd.rank() == 0 else None
    net, optimizer = compiled(Accordion(TopK(0.1), TopK(0.01), interval=1), logger=logger)
    fit(net, epochs=4)
    assert_ranks_equal(flat(net))
    if hvd.rank() == 0:
        logger.finish()
        import mlflow

        client = mlflow.MlflowClient(uri)
        run = client.get_run(logger.run_id)
        assert run.info.status == "FINISHED" and run.data.params["optimizer"] == "SGD"
        assert run.data.params["version.tensorflow"] == tf.__version__ and run.data.params["eta"] == "0.5"
        assert run.data.params["world_size"] == str(hvd.size()) and run.data.params["relaxed"] == "TopK(ratio=0.01)"
        for key, total in (("sent_bytes", optimizer.stats.sent_bytes), ("dense_bytes", optimizer.stats.dense_bytes)):
            history = client.get_metric_history(logger.run_id, key)
            assert [m.step for m in history] == [0, 1, 2, 3]
            assert sum(m.value for m in history) == pytest.approx(total)
        critical = client.get_metric_history(logger.run_id, "critical_layers")
        assert sum(m.value for m in critical) / 4 == pytest.approx(optimizer.stats.critical_fraction)
        for layer in optimizer.compression_report():
            norms = client.get_metric_history(logger.run_id, f"layer/{layer.name}/norm")
            assert len(norms) == (4 if layer.regime else 0)
            assert all(m.value > 0 for m in norms)
        assert {"compression.png", "regimes.png"} <= {f.path for f in client.list_artifacts(logger.run_id)}
    hvd.allreduce(tf.zeros(1), name="end")
