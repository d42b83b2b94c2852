"""Whose a kept tensor is, and what follows from that at another place."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import pytest

from hvd_accordion import Accordion, PowerSGD, TopK
from hvd_accordion.compression.sharing import RESIDUAL, Sharing, scale
from hvd_accordion.policy.assignment import memory_sharing
from hvd_accordion.policy.protocol import policy_of


@pytest.mark.parametrize(
    ("sharing", "same", "more_ranks", "another_rank"),
    [(Sharing.SHARED, 1.0, 1.0, 1.0), (Sharing.OWN, 1.0, 1.0, None), (Sharing.PART, 1.0, 2.0, None)],
)
def test_scale(sharing, same, more_ranks, another_rank):
    assert scale(sharing, (1, 2), (1, 2)) == same
    assert scale(sharing, (1, 2), (1, 4)) == more_ranks
    assert scale(sharing, (0, 2), (1, 4)) == another_rank


def test_a_residual_is_a_part_so_that_its_share_in_the_mean_stays():
    assert RESIDUAL is Sharing.PART
    assert 6.0 * scale(RESIDUAL, (0, 2), (0, 3)) / 3 == 6.0 / 2


def test_a_policy_knows_of_all_memory_of_its_specs():
    @dataclasses.dataclass(frozen=True)
    class Local(TopK):
        memory_sharing = MappingProxyType({"q": Sharing.OWN})

    assert memory_sharing("w", policy_of(PowerSGD(2))) == {"q": Sharing.SHARED}
    assert memory_sharing("w", Accordion(TopK(0.1), Local(0.1))) == {"q": Sharing.OWN}
    with pytest.raises(ValueError, match="its specs declare 'q' as shared and as own"):
        memory_sharing("w", Accordion(PowerSGD(2), Local(0.1)))
