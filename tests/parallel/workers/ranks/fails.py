"""On rank 1 alone."""

import os


def test_of_rank_1():
    assert os.environ["OMPI_COMM_WORLD_RANK"] != "1", "the reason"
