import os
import tempfile

import pytest
import torch

import hvd_accordion.torch as hvd


def pytest_configure(config):
    """In a common folder pytest's clean-up now and then fails over another rank's."""
    folder = tempfile.TemporaryDirectory(prefix="rank-")
    os.environ["PYTEST_DEBUG_TEMPROOT"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="session", autouse=True)
def ranks():
    torch.set_num_threads(1)
    hvd.init()
    yield
    hvd.shutdown()


@pytest.fixture
def shared(tmp_path):
    """A folder that all ranks see."""
    return hvd.broadcast_object(tmp_path, name="shared")
