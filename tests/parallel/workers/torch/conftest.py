import pytest
import torch
from subsets import registered

import hvd_accordion.torch as hvd


@pytest.fixture(scope="session", autouse=True)
def process_sets(request):
    torch.set_num_threads(1)
    yield registered(hvd, request.session)
    hvd.shutdown()
