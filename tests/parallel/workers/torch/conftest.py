import pytest
import torch
from subsets import registered

import hvd_accordion.torch as hvd


@pytest.fixture(scope="session", autouse=True)
def process_sets(request):
    torch.set_num_threads(1)
    yield registered(hvd, request.session)
    hvd.shutdown()


@pytest.fixture
def first(process_sets):
    """A process set of rank 0 alone."""
    return process_sets["first"]


@pytest.fixture
def others(process_sets):
    """A process set of all ranks but 0, where they are several; else of all."""
    return process_sets["others"]
