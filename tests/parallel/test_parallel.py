"""What only real ranks can show: each case is a pytest file of workers/, run on every rank by horovodrun."""

import pytest
from launcher import worker

pytestmark = pytest.mark.parallel


def test_plain_is_horovod():
    worker("plain", ranks=2)


@pytest.mark.parametrize(("ranks", "transport"), [(2, "mpi"), (2, "gloo"), (4, "mpi"), (4, "gloo")])
def test_specs(ranks, transport):
    worker("specs", ranks, transport, timeout=300)
