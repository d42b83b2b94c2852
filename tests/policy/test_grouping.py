"""Which layers are exchanged together, in which order."""

from __future__ import annotations

import copy
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import QSGD, Accordion, Auto, Dense, PowerSGD, TopK
from hvd_accordion.policy.assignment import adaptive, auto_specs, level, reachable_specs
from hvd_accordion.policy.grouping import buckets, grouped, parts, split
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.protocol import policy_of

LATE = PowerSGD(4, start_after=10)
AUTO = Auto((PowerSGD(2), TopK(0.1), PowerSGD(40)))


def layer(name="w", shape=(64, 64), dtype="float32", device="cpu") -> Layer:
    return Layer(name, shape, dtype, device)


def layers(count: int, shape=(64, 64)) -> list[Layer]:
    return [layer(f"l{i}", shape) for i in range(count)]


def names(runs) -> list[list[str]]:
    return [[x.name for x in run] for run in runs]


# buckets and groups


def test_buckets_are_filled_in_the_order_given():
    assert names(buckets(layers(5), limit=2 * 64 * 64 * 4)) == [["l0", "l1"], ["l2", "l3"], ["l4"]]
    assert names(buckets(layers(5)[::-1], limit=2 * 64 * 64 * 4)) == [["l4", "l3"], ["l2", "l1"], ["l0"]]
    assert names(buckets(layers(3))) == [["l0", "l1", "l2"]]
    assert buckets([]) == buckets([], None) == []


def test_without_a_limit_there_is_one_bucket():
    large = [layer("a", (4096, 4096)), layer("b", (4096, 4096))]
    assert names(buckets(large, None)) == [["a", "b"]]
    assert names(buckets(large)) == [["a"], ["b"]]


def test_a_layer_larger_than_a_bucket_has_its_own():
    mixed = [layer("a"), layer("big", (1000, 1000)), layer("c")]
    assert names(buckets(mixed, limit=100_000)) == [["a"], ["big"], ["c"]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 400))
def test_buckets_keep_every_layer_once_within_the_limit(sizes, limit):
    given_layers = [layer(f"l{i}", (n,)) for i, n in enumerate(sizes)]
    runs = buckets(given_layers, limit)
    assert [x for run in runs for x in run] == given_layers
    assert all(sum(x.nbytes for x in run) <= limit or len(run) == 1 for run in runs)
    assert all(runs)
    for run, following in pairwise(runs):  # none is cut short
        assert sum(x.nbytes for x in run) + following[0].nbytes > limit


def test_split_is_horovods_groups():
    assert names(split(layers(5), 2)) == [["l4", "l3", "l2"], ["l1", "l0"]]
    assert names(split(layers(2), 5)) == [["l1"], ["l0"]]
    assert split([], 3) == []


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 12))
def test_split_is_nearly_equal(count, parts):
    runs = split(layers(count), parts)
    assert [x for run in runs for x in run] == layers(count)[::-1]
    assert len(runs) == min(parts, count)
    assert all(len(a) - len(b) in (0, 1) for a, b in pairwise(runs))


def test_a_group_has_one_spec_dtype_device_and_kind_of_feedback():
    run = [
        layer("a"),
        layer("b", dtype="float64"),
        layer("c", device="cuda:0"),
        layer("d"),
        layer("e"),
        layer("f"),
        layer("g"),
    ]
    specs = {x.name: TopK(0.1) for x in run} | {"e": Dense(), "f": Dense(), "g": TopK(0.1, error_feedback=False)}
    groups = grouped([run], specs, carried={"f"})
    got = [([x.name for x in g.layers], g.spec, g.has_residual) for g in groups]
    assert got == [
        (["a", "d"], TopK(0.1), True),
        (["b"], TopK(0.1), True),
        (["c"], TopK(0.1), True),
        (["e"], Dense(), False),
        (["f"], Dense(), True),  # its residual is to be sent
        (["g"], TopK(0.1, error_feedback=False), False),
    ]


def test_a_residual_travels_on_when_feedback_is_off():
    spec = TopK(0.1, error_feedback=False)
    (group,) = grouped([[layer("a")]], {"a": spec}, carried=["a"])
    assert group.has_residual


def test_group_names_are_unique_and_the_same_in_every_process():
    run = [layer("a"), layer("b"), layer("c", dtype="float64"), layer("d", device="cuda:0"), layer("e")]
    specs = {"a": TopK(0.1), "b": TopK(0.2), "c": TopK(0.1), "d": TopK(0.1), "e": Dense()}
    groups = grouped([run, run[:2]], specs, carried=["e"])
    assert [g.name for g in groups] == [
        "0.0.0.topk.float32",
        "0.1.0.topk.float32",
        "0.2.0.topk.float64",
        "0.3.0.topk.float32",
        "0.4.0.dense.float32",
        "1.0.0.topk.float32",
        "1.1.0.topk.float32",
    ]
    assert grouped([run, run[:2]], specs, carried={"e"}) == groups


def test_a_run_is_cut_by_kind_before_it_is_cut_by_size():
    large, small = layer("large"), [layer(f"s{i}", (8, 8)) for i in range(3)]
    run = [small[0], large, small[1], layer("more"), small[2]]
    specs = {x.name: TopK(0.1) if x.numel == 4096 else Dense() for x in run}
    found = grouped([run], specs, limit=large.nbytes)
    assert [(g.name, [x.name for x in g.layers]) for g in found] == [
        ("0.0.0.dense.float32", ["s0", "s1", "s2"]),  # one, though others lie between them
        ("0.1.0.topk.float32", ["large"]),
        ("0.1.1.topk.float32", ["more"]),
    ]
    assert [len(g.layers) for g in grouped([run], specs)] == [3, 2]


spec_strategy = st.sampled_from(
    [Dense(), TopK(0.1), TopK(0.2), PowerSGD(1), PowerSGD(1, error_feedback=False), QSGD(7)]
)
kind_strategy = st.tuples(spec_strategy, st.sampled_from(["float32", "float64"]), st.booleans())


@settings(deadline=None)
@given(st.lists(kind_strategy, max_size=20), st.integers(1, 4), st.sampled_from([None, 1, 3 * 64 * 64 * 4]))
def test_grouping_loses_and_mixes_nothing(kinds, parts, limit):
    all_layers = [layer(f"l{i}", dtype=dtype) for i, (_, dtype, _) in enumerate(kinds)]
    specs = {f"l{i}": spec for i, (spec, _, _) in enumerate(kinds)}
    carried = {f"l{i}" for i, (_, _, held) in enumerate(kinds) if held}
    groups = grouped(split(all_layers, parts), specs, carried, limit)
    assert sorted(x.name for g in groups for x in g.layers) == sorted(x.name for x in all_layers)
    assert len({g.name for g in groups}) == len(groups)
    for g in groups:
        assert {specs[x.name] for x in g.layers} == {g.spec} and len({x.dtype for x in g.layers}) == 1
        assert limit is None or len(g.layers) == 1 or sum(x.nbytes for x in g.layers) <= limit
        feedback = g.spec.lossy and g.spec.error_feedback
        assert all(g.has_residual == (feedback or x.name in carried) for x in g.layers)


# parts: groups of a traced graph, whose levels change without a new plan


def parts_of(*runs, policies=None, **settings):
    """(name, names of the layers, specs, feeds_back) of each part; layers without a policy go under TopK(0.1)."""
    given_policies = {x.name: TopK(0.1) for run in runs for x in run} | (policies or {})
    policy = {name: policy_of(its) for name, its in given_policies.items()}
    found = parts(runs, policy, 2, **settings)
    return [(p.name, [x.name for x in p.layers], list(p.specs), p.has_residual) for p in found]


def test_a_part_has_the_same_specs_a_dtype_and_a_device():
    run = [layer("a"), layer("b", dtype="float64"), layer("c", device="cuda:0"), layer("d"), layer("e"), layer("f")]
    assert parts_of(run, policies={"e": QSGD(7), "f": LATE}) == [
        ("0.0.0.float32", ["a", "d"], [TopK(0.1)], True),
        ("0.1.0.float64", ["b"], [TopK(0.1)], True),
        ("0.2.0.float32", ["c"], [TopK(0.1)], True),
        ("0.3.0.float32", ["e"], [QSGD(7)], True),
        ("0.4.0.float32", ["f"], [LATE, Dense()], True),
    ]


def test_an_adaptive_layer_stays_alone():
    accordion = Accordion(TopK(0.1), TopK(0.01))
    run = [layer("a"), layer("b"), layer("bias", (4096,)), layer("small", (8, 8)), layer("dense")]
    policies = dict.fromkeys(["a", "b", "bias", "small"], accordion) | {"dense": Dense()}
    assert parts_of(run, policies=policies) == [
        ("0.0.0.float32", ["a"], [TopK(0.1), TopK(0.01)], True),
        ("0.1.0.float32", ["b"], [TopK(0.1), TopK(0.01)], True),
        ("0.2.0.float32", ["bias", "small", "dense"], [Dense()], False),
    ]


def test_an_adaptive_layer_stays_alone_even_where_both_regimes_come_to_the_same():
    same = Accordion(TopK(0.1), TopK(0.1))
    assert [names for _, names, _, _ in parts_of([layer("a"), layer("b")], policies={"a": same})] == [["a"], ["b"]]


def test_a_part_feeds_back_if_any_of_its_levels_does():
    quiet = TopK(0.1, error_feedback=False)
    policies = {"a": quiet, "b": Accordion(quiet, TopK(0.01)), "c": Accordion(Dense(), quiet), "d": LATE}
    run = [layer(name) for name in policies]
    assert [has_residual for *_, has_residual in parts_of(run, policies=policies)] == [False, True, False, True]


def test_runs_stay_apart_and_small_is_what_the_user_says():
    first, second = [layer("a"), layer("small", (8, 8))], [layer("b")]
    assert parts_of(first, second, min_numel=64) == [
        ("0.0.0.float32", ["a", "small"], [TopK(0.1)], True),
        ("1.0.0.float32", ["b"], [TopK(0.1)], True),
    ]
    assert [names for _, names, *_ in parts_of(first)] == [["a"], ["small"]]


def test_parts_are_cut_by_kind_before_they_are_cut_by_size():
    run = [layer("a"), layer("bias", (64,)), layer("b"), layer("bias2", (64,)), layer("c")]
    assert [(name, names) for name, names, *_ in parts_of(run, limit=2 * 64 * 64 * 4)] == [
        ("0.0.0.float32", ["a", "b"]),
        ("0.0.1.float32", ["c"]),
        ("0.1.0.float32", ["bias", "bias2"]),
    ]


def test_parts_do_not_change_with_the_regimes():
    accordion = Accordion(TopK(0.1), TopK(0.01))
    runs, policy = split(layers(4), 2), {f"l{i}": accordion if i % 2 else policy_of(TopK(0.1)) for i in range(4)}
    before = parts(runs, policy, 2)
    for _ in range(2):
        accordion.observe({"l1": 1.0, "l3": 1.0}, 0.1)
    assert accordion.spec("l1") == TopK(0.01) and parts(runs, policy, 2) == before


auto_strategy = st.sampled_from([Auto(TopK(0.1)), Auto((PowerSGD(1), QSGD(7)))])
policy_strategy = st.one_of(
    spec_strategy,
    st.just(LATE),
    auto_strategy,
    st.builds(Accordion, spec_strategy, st.one_of(spec_strategy, auto_strategy)),
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(policy_strategy, st.sampled_from(["float32", "float64"])), max_size=12),
    st.integers(1, 4),
    st.booleans(),
)
def test_parts_lose_and_mix_nothing(kinds, count, decided):
    all_layers = [layer(f"l{i}", dtype=dtype) for i, (_, dtype) in enumerate(kinds)]
    policy = {f"l{i}": copy.deepcopy(policy_of(its)) for i, (its, _) in enumerate(kinds)}
    may = {x.name: auto_specs(x, policy[x.name], 2) for x in all_layers}
    chosen = {name: specs[-1] for name, specs in may.items() if specs and decided}
    for its in policy.values():
        its.resolve(chosen)
    found = parts(split(all_layers, count), policy, 2)
    assert sorted(x.name for p in found for x in p.layers) == sorted(policy)
    assert len({p.name for p in found}) == len(found)
    for p in found:
        assert all(reachable_specs(x, policy[x.name], 2) == list(p.specs) for x in p.layers)
        assert all(level(x, policy[x.name], 0, 2) in p.specs for x in p.layers)
        assert len({x.dtype for x in p.layers}) == 1
        assert len(p.layers) == 1 or not any(adaptive(x, policy[x.name], 2) for x in p.layers)


def test_layers_that_an_auto_leaves_dense_travel_with_other_dense_ones():
    run = [layer("a"), layer("b"), layer("bias", (4096,)), layer("c")]
    policies = dict.fromkeys("abc", AUTO)
    assert parts_of(run, policies=policies) == [("0.0.0.float32", ["a", "b", "bias", "c"], [Dense()], False)]
    chosen = {"a": TopK(0.1), "b": Dense(), "c": TopK(0.1)}
    decided = copy.deepcopy(AUTO)
    decided.resolve(chosen)
    assert parts_of(run, policies=dict.fromkeys("abc", decided)) == [
        ("0.0.0.float32", ["a", "c"], [TopK(0.1)], True),
        ("0.1.0.float32", ["b", "bias"], [Dense()], False),
    ]
