"""Which layer gets which compression, in which group."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion import BF16, QSGD, Accordion, Auto, Dense, PowerSGD, RandomK, TopK
from hvd_accordion.policy.assignment import (
    Layer,
    adaptive,
    allowed,
    assign,
    buckets,
    candidates,
    choices,
    grouped,
    level,
    options,
    parts,
    settled,
    sides,
    split,
)

NAMES = ["conv1.weight", "conv1.bias", "conv2.weight", "fc.weight"]


def layer(name="w", shape=(64, 64), dtype="float32", device="cpu") -> Layer:
    return Layer(name, shape, dtype, device)


def layers(count: int, shape=(64, 64)) -> list[Layer]:
    return [layer(f"l{i}", shape) for i in range(count)]


def names(runs) -> list[list[str]]:
    return [[x.name for x in run] for run in runs]


def test_a_layers_size():
    assert layer(shape=(3, 4, 5)).numel == 60
    assert [layer(shape=(10,), dtype=d).nbytes for d in ("float16", "bfloat16", "float32", "float64")] == [
        20,
        20,
        40,
        80,
    ]
    assert layer(shape=()).numel == 1


# assign


def test_one_policy_for_all_layers():
    accordion = Accordion()
    assert assign(TopK(0.1), NAMES) == dict.fromkeys(NAMES, TopK(0.1))
    assert all(policy is accordion for policy in assign(accordion, NAMES).values())


def test_no_compression_is_dense():
    assert assign(None, NAMES) == dict.fromkeys(NAMES, Dense())
    assert assign({}, NAMES) == dict.fromkeys(NAMES, Dense())


def test_the_first_glob_that_matches_counts_and_no_match_is_dense():
    chosen = assign({"conv1.*": TopK(0.1), "conv*": PowerSGD(2), "*.bias": BF16()}, [*NAMES, "fc.bias"])
    assert chosen == {
        "conv1.weight": TopK(0.1),
        "conv1.bias": TopK(0.1),
        "conv2.weight": PowerSGD(2),
        "fc.weight": Dense(),
        "fc.bias": BF16(),
    }
    assert list(chosen) == [*NAMES, "fc.bias"]


def test_none_in_a_dict_is_dense_and_shields_from_later_globs():
    assert assign({"fc.*": None, "*": TopK(0.1)}, NAMES)["fc.weight"] == Dense()
    assert assign({"fc.*": None, "*": TopK(0.1)}, NAMES)["conv1.weight"] == TopK(0.1)


def test_globs_know_case_and_ranges():
    assert assign({"conv[12].w?ight": TopK(0.1)}, NAMES)["conv2.weight"] == TopK(0.1)
    with pytest.raises(ValueError, match="Conv"):
        assign({"Conv*": TopK(0.1)}, NAMES)


def test_an_unknown_glob_is_named_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'conv9\*' matches no parameter name.*conv1.weight.*fc.weight"):
        assign({"conv*": TopK(0.1), "conv9*": TopK(0.2)}, NAMES)
    assert assign({"conv9*": TopK(0.2)}, NAMES, strict=False) == dict.fromkeys(NAMES, Dense())


def test_a_glob_whose_layers_an_earlier_one_took_is_no_error():
    assert assign({"*": TopK(0.1), "fc.*": Dense()}, NAMES)["fc.weight"] == TopK(0.1)


@pytest.mark.parametrize("wrong", [4, "powersgd", PowerSGD, [TopK(0.1)], 0.5])
def test_a_wrong_type_is_named(wrong):
    with pytest.raises(TypeError) as raised:
        assign(wrong, NAMES)
    assert str(raised.value).startswith("compression must be") and repr(wrong) in str(raised.value)
    with pytest.raises(TypeError) as raised:
        assign({"fc.*": wrong}, NAMES)
    assert str(raised.value).startswith("compression['fc.*'] must be") and repr(wrong) in str(raised.value)


def test_a_key_that_is_no_string_is_named():
    with pytest.raises(TypeError, match=r"key must be a glob.*got 3"):
        assign({3: TopK(0.1)}, NAMES)


# dense fallback


@pytest.mark.parametrize(
    ("shape", "spec", "compressed"),
    [
        ((64, 64), TopK(0.1), True),
        ((16, 4, 4, 4), TopK(0.1), True),
        ((4096,), TopK(0.1), False),  # 1-D
        ((), TopK(0.1), False),
        ((32, 31), TopK(0.1), False),  # small: 992 entries
        ((32, 32), TopK(0.1), True),
        ((64, 64), Dense(), False),
        # TopK sends 6 bytes an entry to each other rank, dense 4 there and back
        ((64, 64), TopK(0.67), False),
        ((64, 64), TopK(0.66), True),
        ((64, 64), TopK(0.99, values="float16"), True),  # 4 bytes an entry
        ((64, 64), TopK(1.0, values="float16"), False),
        ((64, 64), RandomK(1.0), False),
        ((64, 64), RandomK(0.9), True),
        # rank 4 of 64 x 64: 4096 floats against 512
        ((64, 64), PowerSGD(4), True),
        ((64, 64), PowerSGD(16), True),  # 2048 floats: twice less, just enough
        ((64, 64), PowerSGD(17), False),
        ((64, 64), PowerSGD(17, min_compression_rate=1.5), True),
        ((64, 64), PowerSGD(4, min_compression_rate=9), False),
        ((64, 64), PowerSGD(16, iterations=2), False),  # sent twice: would not shrink
        ((2048, 1), PowerSGD(1), False),  # a vector in effect
    ],
)
def test_what_travels_dense(shape, spec, compressed):
    assert allowed(layer(shape=shape), spec, 2) is compressed
    assert level(layer(shape=shape), spec, 0, 2) == (spec if compressed else Dense())


def test_topk_stops_shrinking_on_many_ranks():
    gathered = TopK(0.1, algorithm="allgather")  # grows with the ranks
    assert allowed(layer(), gathered, 4) and not allowed(layer(), gathered, 16) and allowed(layer(), TopK(0.1), 64)


def test_sixteen_bits_do_not_shrink_to_sixteen_bits():
    assert allowed(layer(dtype="float32"), BF16(), 2)
    assert not allowed(layer(dtype="float16"), BF16(), 2)
    assert allowed(layer(dtype="float16"), QSGD(7), 2)


def test_one_rank_is_planned_like_two():
    assert allowed(layer(), TopK(0.1), 1) and not allowed(layer(), TopK(0.7), 1)


def test_the_limit_of_small_can_be_set():
    assert allowed(layer(shape=(8, 8)), TopK(0.1), 2, min_numel=64)
    assert not allowed(layer(shape=(8, 8)), TopK(0.1), 2, min_numel=65)


# levels


def test_power_sgd_starts_after_its_steps():
    spec = PowerSGD(4, start_after=10)
    assert level(layer(), spec, 9, 2) == Dense()
    assert level(layer(), spec, 10, 2) == spec


def test_an_accordions_level_is_that_of_the_layers_regime():
    accordion = Accordion(critical=Dense(), relaxed=TopK(0.01))
    assert level(layer("a"), accordion, 0, 2) == Dense()
    for a in (1.0, 1.0):
        accordion.observe({"a": a, "b": 5 * a}, 0.1)
    accordion.observe({"a": 1.0, "b": 20.0}, 0.1)
    assert level(layer("a"), accordion, 0, 2) == TopK(0.01)
    assert level(layer("b"), accordion, 0, 2) == Dense()
    assert level(layer("a", (4096,)), accordion, 0, 2) == Dense()


def test_adaptive_is_what_a_regime_can_change():
    accordion = Accordion(critical=PowerSGD(40), relaxed=PowerSGD(1))
    assert adaptive(layer(), accordion, 2)  # one of the two is enough
    assert not adaptive(layer(shape=(4096,)), accordion, 2)
    assert not adaptive(layer(shape=(8, 8)), accordion, 2)
    assert adaptive(layer(shape=(8, 8)), Accordion(relaxed=TopK(0.1)), 2, min_numel=1)
    assert not adaptive(layer(), PowerSGD(1), 2)
    assert not adaptive(layer(), Accordion(critical=PowerSGD(40), relaxed=PowerSGD(41)), 2)


# candidates: all levels that a traced graph must hold

LATE = PowerSGD(4, start_after=10)


@pytest.mark.parametrize(
    ("policy", "specs"),
    [
        (Dense(), [Dense()]),
        (TopK(0.1), [TopK(0.1)]),
        (TopK(0.7), [Dense()]),  # would not shrink
        (LATE, [LATE, Dense()]),
        (PowerSGD(17, start_after=10), [Dense()]),
        (Accordion(TopK(0.1), TopK(0.01)), [TopK(0.1), TopK(0.01)]),
        (Accordion(TopK(0.01), TopK(0.1)), [TopK(0.01), TopK(0.1)]),  # critical first, whichever sends more
        (Accordion(TopK(0.7), TopK(0.01)), [Dense(), TopK(0.01)]),
        (Accordion(TopK(0.1), TopK(0.7)), [TopK(0.1), Dense()]),
        (Accordion(TopK(0.7), PowerSGD(40)), [Dense()]),
        (Accordion(TopK(0.1), TopK(0.1)), [TopK(0.1)]),
        (Accordion(Dense(), LATE), [Dense(), LATE]),
        (Accordion(LATE, TopK(0.1)), [LATE, TopK(0.1), Dense()]),
        (Accordion(LATE, PowerSGD(1, start_after=20)), [LATE, PowerSGD(1, start_after=20), Dense()]),
    ],
    ids=str,
)
def test_candidates(policy, specs):
    assert candidates(layer(), policy, 2) == specs


def test_candidates_of_what_is_never_compressed():
    accordion = Accordion(TopK(0.1), TopK(0.01))
    assert candidates(layer(shape=(4096,)), accordion, 2) == candidates(layer(shape=(8, 8)), accordion, 2) == [Dense()]
    assert candidates(layer(shape=(8, 8)), accordion, 2, min_numel=64) == [TopK(0.1), TopK(0.01)]
    gathered = TopK(0.1, algorithm="allgather")  # grows with the ranks
    assert candidates(layer(), Accordion(gathered, TopK(0.01)), 16) == [Dense(), TopK(0.01)]


@pytest.mark.parametrize("policy", [TopK(0.1), LATE, Accordion(LATE, TopK(0.01)), Accordion(TopK(0.7), LATE)], ids=str)
def test_whatever_level_a_layer_gets_is_a_candidate(policy):
    seen = set()
    for norm in (1.0, 1.0, 9.0):
        seen |= {level(layer(), policy, step, 2) for step in (0, 9, 10)}
        if isinstance(policy, Accordion):
            policy.observe({"w": norm}, 0.1)
    assert seen == set(candidates(layer(), policy, 2))


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
    policy = {x.name: TopK(0.1) for run in runs for x in run} | (policies or {})
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
    runs, policy = split(layers(4), 2), {f"l{i}": accordion if i % 2 else TopK(0.1) for i in range(4)}
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
    policy = {f"l{i}": its for i, (its, _) in enumerate(kinds)}
    may = {x.name: choices(x, policy[x.name], 2) for x in all_layers}
    chosen = {name: specs[-1] for name, specs in may.items() if specs and decided}
    found = parts(split(all_layers, count), policy, 2, chosen=chosen)
    assert sorted(x.name for p in found for x in p.layers) == sorted(policy)
    assert len({p.name for p in found}) == len(found)
    for p in found:
        assert all(candidates(x, policy[x.name], 2, chosen=chosen) == list(p.specs) for x in p.layers)
        assert all(level(x, policy[x.name], 0, 2, chosen=chosen) in p.specs for x in p.layers)
        assert len({x.dtype for x in p.layers}) == 1
        assert len(p.layers) == 1 or not any(adaptive(x, policy[x.name], 2) for x in p.layers)


# an Auto: dense until it has chosen, then what it chose

AUTO = Auto((PowerSGD(2), TopK(0.1), PowerSGD(40)))


def test_the_options_of_a_policy():
    assert options(TopK(0.1)) == [TopK(0.1)]
    assert options(AUTO) == [PowerSGD(2), TopK(0.1), PowerSGD(40)]
    assert options(Accordion(QSGD(7), TopK(0.1))) == [QSGD(7), TopK(0.1)]
    assert options(Accordion(QSGD(7), AUTO)) == [QSGD(7), PowerSGD(2), TopK(0.1), PowerSGD(40)]


def test_the_sides_of_a_policy():
    assert sides(TopK(0.1)) == (TopK(0.1),) and sides(AUTO) == (AUTO,)
    assert sides(Accordion(QSGD(7), AUTO)) == (QSGD(7), AUTO)  # critical before relaxed


def test_only_an_auto_is_settled_by_what_was_chosen():
    assert settled(layer("w"), AUTO, {}) == Dense()
    assert settled(layer("w"), AUTO, {"w": TopK(0.1), "v": PowerSGD(2)}) == TopK(0.1)
    assert settled(layer("w"), QSGD(7), {"w": TopK(0.1)}) == QSGD(7)


def test_an_auto_chooses_among_those_that_may_compress_the_layer():
    assert choices(layer(), AUTO, 2) == (PowerSGD(2), TopK(0.1))
    assert choices(layer(shape=(4096,)), AUTO, 2) == choices(layer(shape=(8, 8)), AUTO, 2) == ()
    assert choices(layer(shape=(8, 8)), Auto(TopK(0.1)), 2, min_numel=64) == (TopK(0.1),)
    assert choices(layer(), Accordion(QSGD(7), AUTO), 2) == (PowerSGD(2), TopK(0.1))
    assert choices(layer(), Auto(PowerSGD(40)), 2) == choices(layer(), TopK(0.1), 2) == ()
    assert choices(layer(), Accordion(QSGD(7), TopK(0.1)), 2) == ()


def test_a_layer_travels_dense_until_an_auto_has_chosen():
    assert level(layer(), AUTO, 0, 2) == Dense() and candidates(layer(), AUTO, 2) == [Dense()]
    for spec in (PowerSGD(2), Dense()):
        assert level(layer(), AUTO, 0, 2, chosen={"w": spec}) == spec
        assert candidates(layer(), AUTO, 2, chosen={"w": spec}) == [spec]
    late = Auto(LATE)
    assert [level(layer(), late, step, 2, chosen={"w": LATE}) for step in (9, 10)] == [Dense(), LATE]
    assert candidates(layer(), late, 2, chosen={"w": LATE}) == [LATE, Dense()]


def test_what_was_chosen_for_fewer_ranks_is_given_up_where_it_would_not_shrink():
    gathered = TopK(0.1, algorithm="allgather")
    chosen = {"w": gathered}
    assert level(layer(), Auto(gathered), 0, 4, chosen=chosen) == gathered
    assert level(layer(), Auto(gathered), 0, 16, chosen=chosen) == Dense()
    assert candidates(layer(), Auto(gathered), 16, chosen=chosen) == [Dense()]


def test_an_auto_as_the_relaxed_side():
    accordion = Accordion(QSGD(7), AUTO)
    assert candidates(layer(), accordion, 2) == [QSGD(7), Dense()]
    assert candidates(layer(), accordion, 2, chosen={"w": TopK(0.1)}) == [QSGD(7), TopK(0.1)]
    assert level(layer(), accordion, 0, 2, chosen={"w": TopK(0.1)}) == QSGD(7)
    for _ in range(2):
        accordion.observe({"w": 1.0}, 0.1)
    assert level(layer(), accordion, 0, 2, chosen={"w": TopK(0.1)}) == TopK(0.1)
    assert level(layer(), accordion, 0, 2) == Dense()


def test_an_accordion_is_adaptive_whatever_its_auto_chooses():
    assert adaptive(layer(), Accordion(Dense(), AUTO), 2)
    assert not adaptive(layer(shape=(4096,)), Accordion(Dense(), AUTO), 2)
    assert not adaptive(layer(), Accordion(Dense(), Auto(PowerSGD(40))), 2)
    assert not adaptive(layer(), AUTO, 2)


def test_layers_that_an_auto_leaves_dense_travel_with_other_dense_ones():
    run = [layer("a"), layer("b"), layer("bias", (4096,)), layer("c")]
    policies = dict.fromkeys("abc", AUTO)
    assert parts_of(run, policies=policies) == [("0.0.0.float32", ["a", "b", "bias", "c"], [Dense()], False)]
    chosen = {"a": TopK(0.1), "b": Dense(), "c": TopK(0.1)}
    assert parts_of(run, policies=policies, chosen=chosen) == [
        ("0.0.0.float32", ["a", "c"], [TopK(0.1)], True),
        ("0.1.0.float32", ["b", "bias"], [Dense()], False),
    ]


def test_an_auto_is_a_policy_for_all_or_in_a_dict():
    assert assign(AUTO, NAMES) == dict.fromkeys(NAMES, AUTO)
    assert assign({"fc.*": AUTO}, NAMES)["fc.weight"] == AUTO
    with pytest.raises(TypeError, match="an Auto"):
        assign(Auto, NAMES)
