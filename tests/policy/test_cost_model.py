"""What exchanges cost in seconds: by hand, and a link found again from what it would have taken."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import BF16, FP16, QSGD, Dense, EFSignSGD, PowerSGD, RandomK, TopK
from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll
from hvd_accordion.policy.cost_model import (
    Link,
    exchange_seconds,
    fit,
    group_messages,
    hops,
    layer_seconds,
    local_step_seconds,
    round_seconds,
    seconds,
    step_seconds,
    wire_seconds,
)
from hvd_accordion.policy.layers import Group, Layer

LINK = Link(latency=0.001, bandwidth=1e6, overhead=0.01)
FREE = Link(0.0, math.inf)
KINDS = [AllReduce, AllGather, AllToAll]
SPECS = [Dense(), FP16(), BF16(), QSGD(7), TopK(0.01), RandomK(0.01), PowerSGD(4), EFSignSGD()]


def layer(name="w", shape=(100, 50)) -> Layer:
    return Layer(name, shape, "float32")


def group(name, spec, *layers) -> Group:
    return Group(name, spec, layers, False)


# one collective


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(AllReduce, [0, 2, 4, 4, 6, 20]), (AllGather, [0, 1, 2, 2, 3, 10]), (AllToAll, [0, 1, 2, 3, 7, 1023])],
)
def test_hops(kind, expected):
    assert [hops(kind, n) for n in (1, 2, 3, 4, 8, 1024)] == expected


@pytest.mark.parametrize(
    ("kind", "n", "expected"),
    [
        (AllReduce, 2, 0.01 + 2 * 0.001 + 0.001),  # 1,000 bytes at 1 MB/s
        (AllReduce, 8, 0.01 + 6 * 0.001 + 0.00175),
        (AllGather, 8, 0.01 + 3 * 0.001 + 0.007),
        (AllToAll, 4, 0.01 + 3 * 0.001 + 0.00075),
        (AllFinite, 8, 0.0),
        (AllReduce, 1, 0.0),
    ],
)
def test_seconds_of_a_collective_of_1000_bytes(kind, n, expected):
    assert seconds(kind, 1000, n, LINK) == pytest.approx(expected)


def test_bytes_cost_nothing_on_a_link_without_bounds():
    assert seconds(AllReduce, 1e12, 8, FREE) == 0


@pytest.mark.parametrize("wrong", [(-1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, -1.0), (math.nan, 1.0, 0.0)])
def test_no_such_link(wrong):
    with pytest.raises(ValueError, match="latency and overhead must be >= 0 and bandwidth > 0"):
        Link(*wrong)


@given(st.sampled_from(KINDS), st.floats(0, 1e9), st.floats(0, 1e9), st.integers(1, 64), st.integers(1, 64))
def test_more_bytes_or_more_ranks_are_never_cheaper(kind, nbytes, more, n, others):
    cost = seconds(kind, nbytes, n, LINK)
    assert seconds(kind, nbytes + more, n, LINK) >= cost
    assert seconds(kind, nbytes, n + others, LINK) >= cost


# layers and groups


def test_rounds_of_a_group_hold_the_payloads_of_all_its_layers():
    layers = [layer("a"), layer("b", (10, 20))]
    assert group_messages(layers, PowerSGD(4), 2) == [(AllReduce, 16 * (100 + 10)), (AllReduce, 16 * (50 + 20))]
    expected = 2 * (0.01 + 2 * 0.001) + 16 * 180 / 1e6 + 1e-9 * 5200
    assert exchange_seconds(layers, PowerSGD(4), 2, LINK, 1e-9) == pytest.approx(expected)
    assert group_messages([], PowerSGD(4), 2) == []


@pytest.mark.parametrize("spec", [FP16(), QSGD(7)], ids=str)
def test_what_travels_as_one_vector_is_padded_once(spec):
    layers = [layer(f"l{i}", (8, 8)) for i in range(16)]
    assert group_messages(layers, spec, 64) == spec.messages((1024,), "float32", 64)


def test_constants_and_layers_make_up_a_group():
    """Each round's constants once, each layer's bytes and compression."""
    layers = [layer("a", (64, 64)), layer("b", (128, 64))]
    for spec in SPECS:
        for n in (2, 8):
            parts = sum(layer_seconds(x.shape, x.dtype, spec, n, LINK, 1e-8) for x in layers)
            whole = exchange_seconds(layers, spec, n, LINK, 1e-8)
            assert round_seconds(spec, n, LINK) + parts == pytest.approx(whole, rel=0.01)


def test_constants_of_the_rounds():
    assert round_seconds(Dense(), 4, LINK) == pytest.approx(0.01 + 4 * 0.001)
    assert round_seconds(PowerSGD(4), 4, LINK) == pytest.approx(2 * (0.01 + 4 * 0.001))
    assert round_seconds(QSGD(7), 4, LINK) == pytest.approx(0.02 + 3 * 0.001 + 2 * 0.001)
    assert round_seconds(Dense(), 4, LINK, "float16") == pytest.approx(0.02 + 3 * 0.001 + 2 * 0.001)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_rank_exchanges_nothing(spec):
    assert layer_seconds((64, 64), "float32", spec, 1, LINK, 1.0) == 0
    assert exchange_seconds([layer()], spec, 1, LINK, 1.0) == 0
    assert step_seconds(0.5, [group("g", spec, layer())], 1, LINK, {spec: 1.0}) == 0.5


@given(
    st.sampled_from(SPECS),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=5),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(1, 64),
    st.integers(1, 64),
)
@settings(deadline=None)
def test_more_layers_or_ranks_are_never_cheaper(spec, shapes, more, n, others):
    layers = [layer(str(i), shape) for i, shape in enumerate(shapes)]
    cost = exchange_seconds(layers, spec, n, LINK, 1e-9) * (1 - 1e-12)
    assert exchange_seconds([*layers, layer("more", more)], spec, n, LINK, 1e-9) >= cost
    # only rounding up to whole blocks can make a slice of an uneven count the larger
    assert exchange_seconds(layers, spec, n * 2 ** others.bit_length(), LINK, 1e-9) >= cost


# a step

A, B, C = layer("a", (100, 50)), layer("b", (100, 100)), layer("c", (10,))


def test_early_groups_hide_behind_backward_and_the_last_do_not():
    groups = [group("0", Dense(), B), group("1", Dense(), A)]
    early, late = wire_seconds(groups, 2, LINK)
    assert early == pytest.approx(0.04)
    assert late == pytest.approx(0.012 + 0.02)
    gamma = {Dense(): 1e-6}  # 0.015 s in all
    assert step_seconds(0.3, groups, 2, LINK, gamma) == pytest.approx(0.1 + 0.2 + 0.015 + 0.032)
    assert step_seconds(0.03, groups, 2, LINK, gamma) == pytest.approx(0.01 + 0.04 + 0.032)  # the link takes longer
    assert step_seconds(0.3, groups, 2, LINK, gamma, backward=0.0) == pytest.approx(0.3 + 0.04 + 0.032)


def test_the_last_group_of_each_spec_is_late_and_their_constants_pass_side_by_side():
    groups = [group("0", PowerSGD(4), B), group("1", PowerSGD(4), A), group("2", Dense(), C)]
    early, late = wire_seconds(groups, 2, LINK)
    assert early == pytest.approx(16 * 200 / 1e6)
    assert late == pytest.approx(2 * 0.012 + 16 * 150 / 1e6 + 40 / 1e6)


def test_local_steps_pay_for_an_exchange_once_in_a_round():
    groups, gamma = [group("0", Dense(), B), group("1", Dense(), A)], {Dense(): 1e-6}
    whole = 0.015 + 0.04 + 0.032
    assert local_step_seconds(0.3, groups, 2, LINK, gamma, 10) == pytest.approx(0.3 + whole / 10)
    assert local_step_seconds(0.03, groups, 2, LINK, gamma, 10, delay=1) == pytest.approx(0.03 + (whole - 0.03) / 10)
    assert local_step_seconds(0.3, groups, 2, LINK, gamma, 10, delay=1) == pytest.approx(0.3 + 0.015 / 10)
    assert local_step_seconds(0.3, groups, 1, LINK, gamma, 10) == 0.3


def test_no_groups():
    assert wire_seconds([], 2, LINK) == (0, 0)
    assert step_seconds(0.5, [], 2, LINK, {}) == 0.5


# fit


def measure(link, ranks=(2, 4, 8), sizes=(1e3, 1e4, 1e5, 1e6, 8e6), noise=lambda: 1.0, repeats=1):
    return [
        (kind, nbytes, n, seconds(kind, nbytes, n, link) * noise())
        for kind in KINDS
        for nbytes in sizes
        for n in ranks
        for _ in range(repeats)
    ]


links = st.builds(Link, st.floats(1e-4, 1e-2), st.floats(1e6, 1e9), st.floats(1e-3, 1e-2))


@given(links)
@settings(deadline=None, max_examples=30)
def test_a_link_is_found_again(link):
    found = fit(measure(link))
    assert found.latency == pytest.approx(link.latency, rel=0.01, abs=1e-6)
    assert found.bandwidth == pytest.approx(link.bandwidth, rel=0.01)
    assert found.overhead == pytest.approx(link.overhead, rel=0.01, abs=1e-6)


@given(links, st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_a_link_is_found_again_from_noisy_measurements(link, seed):
    """10 % noise, and one repeat in five ten times too slow."""
    noise = random.Random(seed)
    samples = measure(link, noise=lambda: noise.uniform(0.9, 1.1), repeats=5)
    samples = [(*known, t * (10 if i % 5 == 3 else 1)) for i, (*known, t) in enumerate(samples)]
    found = fit(samples)
    for kind, nbytes, n, _ in samples[::5]:
        assert seconds(kind, nbytes, n, found) == pytest.approx(seconds(kind, nbytes, n, link), rel=0.15)


@given(links, st.sampled_from([2, 4]))
@settings(deadline=None, max_examples=20)
def test_one_number_of_ranks_gives_the_sum_of_latency_and_overhead(link, n):
    samples = [s for s in measure(link, (n,)) if s[0] is AllReduce]
    waits = link.overhead + hops(AllReduce, n) * link.latency
    plain = fit(samples)
    assert plain.latency == 0
    assert plain.overhead == pytest.approx(waits, rel=0.01)
    told = fit(samples, latency=link.latency)
    assert told.latency == link.latency
    assert told.overhead == pytest.approx(link.overhead, rel=0.02, abs=1e-6)
    assert told.bandwidth == pytest.approx(link.bandwidth, rel=0.01)


def test_nothing_is_negative():
    """A latency given that is larger than what small messages take."""
    found = fit(measure(Link(0.001, 1e6, 0.0), (2,)), latency=0.1)
    assert found.latency == 0.1
    assert found.overhead == 0
    assert fit([(AllReduce, 1000, 2, 1.0), (AllReduce, 2000, 2, 0.5)]).bandwidth == math.inf


@pytest.mark.parametrize("samples", [[], [(AllReduce, 1000, 1, 1.0)], [(AllReduce, 1000, 2, 0.0)]], ids=str)
def test_what_can_not_be_fitted(samples):
    with pytest.raises(ValueError, match="sample"):
        fit(samples)
