"""What each collective makes one rank send."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll, payload, sent


@pytest.mark.parametrize(
    ("request_type", "ranks", "nbytes"),
    [
        (AllReduce, 1, 0.0),
        (AllReduce, 2, 1000.0),  # half of it out, half of the sum back
        (AllReduce, 4, 1500.0),
        (AllReduce, 8, 1750.0),
        (AllGather, 1, 0.0),
        (AllGather, 2, 1000.0),
        (AllGather, 4, 3000.0),
        (AllGather, 8, 7000.0),
        (AllToAll, 1, 0.0),
        (AllToAll, 2, 500.0),  # a rank keeps its own row
        (AllToAll, 4, 750.0),
        (AllToAll, 8, 875.0),
        (AllFinite, 1, 0.0),
        (AllFinite, 8, 0.0),
    ],
)
def test_bytes_that_one_rank_sends_of_a_payload_of_1000(request_type, ranks, nbytes):
    assert sent(request_type, 1000, ranks) == nbytes


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_two_hop_allreduce_costs_what_an_allreduce_does(ranks):
    assert sent(AllToAll, 1000 * ranks, ranks) + sent(AllGather, 1000, ranks) == sent(AllReduce, 1000 * ranks, ranks)


def test_what_goes_to_the_network():
    x, y = np.zeros(3), np.zeros((2, 2))
    assert payload(AllReduce((x, y))) == [x, y]
    assert payload(AllGather(x)) == [x]
    (only,) = payload(AllToAll(y))
    assert only is y
    assert payload(AllFinite(lambda: np.array(True))) == []
