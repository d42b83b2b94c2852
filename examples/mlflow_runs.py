"""MLflow's experiment of a program's trainings, and a run that sums them up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Experiment:
    """An experiment of a database; both are made here, before two trainings might.

    Args:
        uri: the database.
        name: of the experiment.
        artifacts: folder for files, if the experiment is new.
    """

    def __init__(self, uri: str, name: str, artifacts: Path) -> None:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        known = self._client.get_experiment_by_name(name)
        self._id = known.experiment_id if known else self._client.create_experiment(name, artifacts.as_uri())

    def log(self, run: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """One finished run with these metrics and files."""
        id: Any = self._client.create_run(self._id, run_name=run).info.run_id
        for key, value in metrics.items():
            self._client.log_metric(id, key, value)
        for file in files:
            self._client.log_artifact(id, str(file))
        self._client.set_terminated(id)
