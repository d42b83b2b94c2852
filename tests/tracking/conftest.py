"""A database for MLflow, set up once for each file: that takes seconds."""

import os

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
import mlflow


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow puts artifacts where it sets up the database
        mlflow.MlflowClient(tracking_uri=uri).search_experiments()
    return uri


@pytest.fixture
def client(uri):
    return mlflow.MlflowClient(tracking_uri=uri)
