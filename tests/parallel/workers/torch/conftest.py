import pytest
import torch

import hvd_accordion.torch as hvd
from tests.parallel.subsets import registered


@pytest.fixture(scope="session", autouse=True)
def process_sets(request):
    torch.set_num_threads(1)
    yield registered(hvd, request.session)
    hvd.shutdown()
