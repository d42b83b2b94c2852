import pytest
import torch

import hvd_accordion.torch as hvd


@pytest.fixture(scope="session", autouse=True)
def horovod():
    torch.set_num_threads(1)
    hvd.init(process_sets="dynamic")
    yield
    hvd.shutdown()
