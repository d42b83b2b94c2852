"""Ranks that are configured differently get one and the same error; ranks that agree hardly notice."""

from __future__ import annotations

import hashlib

import pytest

from hvd_accordion.comm.agreement import first_difference, require_equal

SETTINGS = {"op": "Average", "seed": 0, "groups": None}


def text(settings: dict) -> bytes:
    return "\n".join(f"{key} = {value}" for key, value in settings.items()).encode()


class Ranks:
    """Gathers as a rank of several would see it; remembers what it was asked for."""

    def __init__(self, *everyone: dict):
        self.everyone, self.asked = everyone, []

    def gather(self, data: bytes, name: str) -> list[bytes]:
        self.asked.append((data, name))
        texts = [text(settings) for settings in self.everyone]
        return [hashlib.sha256(t).digest() for t in texts] if name.endswith(".digests") else texts

    def errors(self) -> list[str]:
        """What each rank is told."""
        found = []
        for settings in self.everyone:
            with pytest.raises(ValueError) as raised:
                require_equal(settings, "it", self.gather)
            found.append(str(raised.value))
        return found


def test_ranks_that_agree_gather_32_bytes_once():
    ranks = Ranks(SETTINGS, SETTINGS, SETTINGS)
    require_equal(SETTINGS, "prefix.0", ranks.gather)
    assert ranks.asked == [(hashlib.sha256(text(SETTINGS)).digest(), "prefix.0.digests")]


def test_where_they_differ_the_texts_are_gathered_under_another_name():
    other = SETTINGS | {"seed": 1}
    ranks = Ranks(SETTINGS, other)
    with pytest.raises(ValueError):
        require_equal(other, "prefix.0", ranks.gather)
    assert [name for _, name in ranks.asked] == ["prefix.0.digests", "prefix.0.settings"]
    assert ranks.asked[1][0] == text(other)


def test_all_ranks_get_the_same_error_that_names_the_first_difference():
    ranks = Ranks(SETTINGS, SETTINGS, SETTINGS | {"seed": 1, "groups": 3}, SETTINGS | {"op": "Sum"})
    told = "Ranks are configured differently: rank 0 has 'seed = 0', rank 2 has 'seed = 1'"
    assert ranks.errors() == [told] * 4


@pytest.mark.parametrize("reverse", [False, True])
def test_a_line_that_one_rank_lacks_is_nothing(reverse):
    more, fewer = SETTINGS | {"variable 0": "w (3,)"}, SETTINGS
    has, lacks = "'variable 0 = w (3,)'", "'nothing'"
    first, second = (lacks, has) if reverse else (has, lacks)
    (message,) = set(Ranks(*((fewer, more) if reverse else (more, fewer))).errors())
    assert message.endswith(f"rank 0 has {first}, rank 1 has {second}")


def test_a_rank_without_any_setting():
    (message,) = set(Ranks(SETTINGS, {}).errors())
    assert message.endswith("rank 0 has 'op = Average', rank 1 has ''")


def test_names_in_any_script():
    (message,) = set(Ranks({"layer": "größe"}, {"layer": "大きさ"}).errors())
    assert message.endswith("rank 0 has 'layer = größe', rank 1 has 'layer = 大きさ'")


def test_the_order_of_settings_counts():
    with pytest.raises(ValueError, match="rank 0 has 'a = 1', rank 1 has 'b = 2'"):
        require_equal({"a": 1, "b": 2}, "it", Ranks({"a": 1, "b": 2}, {"b": 2, "a": 1}).gather)


def test_digests_that_differ_over_equal_texts_are_an_error_all_the_same():
    """A rank that runs another version of this package might hash otherwise."""
    gather = lambda data, name: [data, b"other"] if name.endswith(".digests") else [data, data]  # noqa: E731
    with pytest.raises(ValueError, match="their texts are equal but not their digests"):
        require_equal(SETTINGS, "it", gather)
    assert first_difference([["a"], ["a"]]) == "their texts are equal but not their digests"
