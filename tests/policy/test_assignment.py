"""Which layer gets which compression, in which group."""

from __future__ import annotations

import copy

import pytest

from hvd_accordion import BF16, QSGD, Accordion, Auto, Dense, PowerSGD, RandomK, TopK
from hvd_accordion.policy import assignment
from hvd_accordion.policy.assignment import all_specs, assign, auto_specs, is_compressible
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.protocol import policy_of

NAMES = ["conv1.weight", "conv1.bias", "conv2.weight", "fc.weight"]


def layer(name="w", shape=(64, 64), dtype="float32", device="cpu") -> Layer:
    return Layer(name, shape, dtype, device)


def level(its_layer, policy, step, world_size, **settings):
    return assignment.level(its_layer, policy_of(policy), step, world_size, **settings)


def reachable_specs(its_layer, policy, world_size, **settings):
    return assignment.reachable_specs(its_layer, policy_of(policy), world_size, **settings)


def adaptive(its_layer, policy, world_size, **settings):
    return assignment.adaptive(its_layer, policy_of(policy), world_size, **settings)


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
    assert assign(TopK(0.1), NAMES) == dict.fromkeys(NAMES, policy_of(TopK(0.1)))
    assert all(policy is accordion for policy in assign(accordion, NAMES).values())


def test_no_compression_is_dense():
    assert assign(None, NAMES) == dict.fromkeys(NAMES, policy_of(Dense()))
    assert assign({}, NAMES) == dict.fromkeys(NAMES, policy_of(Dense()))


def test_the_first_glob_that_matches_counts_and_no_match_is_dense():
    chosen = assign({"conv1.*": TopK(0.1), "conv*": PowerSGD(2), "*.bias": BF16()}, [*NAMES, "fc.bias"])
    assert {name: policy.spec for name, policy in chosen.items()} == {
        "conv1.weight": TopK(0.1),
        "conv1.bias": TopK(0.1),
        "conv2.weight": PowerSGD(2),
        "fc.weight": Dense(),
        "fc.bias": BF16(),
    }
    assert list(chosen) == [*NAMES, "fc.bias"]


def test_none_in_a_dict_is_dense_and_shields_from_later_globs():
    assert assign({"fc.*": None, "*": TopK(0.1)}, NAMES)["fc.weight"] == policy_of(Dense())
    assert assign({"fc.*": None, "*": TopK(0.1)}, NAMES)["conv1.weight"] == policy_of(TopK(0.1))


def test_globs_know_case_and_ranges():
    assert assign({"conv[12].w?ight": TopK(0.1)}, NAMES)["conv2.weight"] == policy_of(TopK(0.1))
    with pytest.raises(ValueError, match="Conv"):
        assign({"Conv*": TopK(0.1)}, NAMES)


def test_an_unknown_glob_is_named_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'conv9\*' matches no parameter name.*conv1.weight.*fc.weight"):
        assign({"conv*": TopK(0.1), "conv9*": TopK(0.2)}, NAMES)
    assert assign({"conv9*": TopK(0.2)}, NAMES, strict=False) == dict.fromkeys(NAMES, policy_of(Dense()))


def test_a_glob_whose_layers_an_earlier_one_took_is_no_error():
    assert assign({"*": TopK(0.1), "fc.*": Dense()}, NAMES)["fc.weight"] == policy_of(TopK(0.1))


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
    assert is_compressible(layer(shape=shape), spec, 2) is compressed
    assert level(layer(shape=shape), spec, 0, 2) == (spec if compressed else Dense())


def test_topk_stops_shrinking_on_many_ranks():
    gathered = TopK(0.1, algorithm="allgather")  # grows with the ranks
    assert (
        is_compressible(layer(), gathered, 4)
        and not is_compressible(layer(), gathered, 16)
        and is_compressible(layer(), TopK(0.1), 64)
    )


def test_sixteen_bits_do_not_shrink_to_sixteen_bits():
    assert is_compressible(layer(dtype="float32"), BF16(), 2)
    assert not is_compressible(layer(dtype="float16"), BF16(), 2)
    assert is_compressible(layer(dtype="float16"), QSGD(7), 2)


def test_one_rank_is_planned_like_two():
    assert is_compressible(layer(), TopK(0.1), 1) and not is_compressible(layer(), TopK(0.7), 1)


def test_the_limit_of_small_can_be_set():
    assert is_compressible(layer(shape=(8, 8)), TopK(0.1), 2, min_numel=64)
    assert not is_compressible(layer(shape=(8, 8)), TopK(0.1), 2, min_numel=65)


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
def test_reachable_specs(policy, specs):
    assert reachable_specs(layer(), policy, 2) == specs


def test_reachable_specs_of_what_is_never_compressed():
    accordion = Accordion(TopK(0.1), TopK(0.01))
    assert (
        reachable_specs(layer(shape=(4096,)), accordion, 2)
        == reachable_specs(layer(shape=(8, 8)), accordion, 2)
        == [Dense()]
    )
    assert reachable_specs(layer(shape=(8, 8)), accordion, 2, min_numel=64) == [TopK(0.1), TopK(0.01)]
    gathered = TopK(0.1, algorithm="allgather")  # grows with the ranks
    assert reachable_specs(layer(), Accordion(gathered, TopK(0.01)), 16) == [Dense(), TopK(0.01)]


@pytest.mark.parametrize("policy", [TopK(0.1), LATE, Accordion(LATE, TopK(0.01)), Accordion(TopK(0.7), LATE)], ids=str)
def test_whatever_level_a_layer_gets_is_a_candidate(policy):
    seen = set()
    for norm in (1.0, 1.0, 9.0):
        seen |= {level(layer(), policy, step, 2) for step in (0, 9, 10)}
        if isinstance(policy, Accordion):
            policy.observe({"w": norm}, 0.1)
    assert seen == set(reachable_specs(layer(), policy, 2))


# an Auto: dense until it has chosen, then what it chose

AUTO = Auto((PowerSGD(2), TopK(0.1), PowerSGD(40)))


def resolved(policy, **chosen):
    """The policy after a choice among its candidates."""
    policy = copy.deepcopy(policy)
    policy.resolve(chosen)
    return policy


def test_all_specs_of_a_policy():
    assert all_specs("w", policy_of(TopK(0.1))) == [TopK(0.1)]
    assert all_specs("w", AUTO) == [Dense(), PowerSGD(2), TopK(0.1), PowerSGD(40)]
    assert all_specs("w", Accordion(QSGD(7), TopK(0.1))) == [QSGD(7), TopK(0.1)]
    assert all_specs("w", Accordion(QSGD(7), AUTO)) == [QSGD(7), Dense(), PowerSGD(2), TopK(0.1), PowerSGD(40)]


def test_what_an_auto_chooses_is_what_was_chosen_for_the_layer():
    assert AUTO.choose("w", 0, 0) == Dense()
    assert resolved(AUTO, w=TopK(0.1), v=PowerSGD(2)).specs("w") == (TopK(0.1),)
    assert AUTO == resolved(AUTO, w=TopK(0.1)) and AUTO.specs("w") == (Dense(),)


def test_an_auto_chooses_among_those_that_may_compress_the_layer():
    assert auto_specs(layer(), AUTO, 2) == (PowerSGD(2), TopK(0.1))
    assert auto_specs(layer(shape=(4096,)), AUTO, 2) == auto_specs(layer(shape=(8, 8)), AUTO, 2) == ()
    assert auto_specs(layer(shape=(8, 8)), Auto(TopK(0.1)), 2, min_numel=64) == (TopK(0.1),)
    assert auto_specs(layer(), Accordion(QSGD(7), AUTO), 2) == (PowerSGD(2), TopK(0.1))
    assert auto_specs(layer(), Auto(PowerSGD(40)), 2) == auto_specs(layer(), policy_of(TopK(0.1)), 2) == ()
    assert auto_specs(layer(), Accordion(QSGD(7), TopK(0.1)), 2) == ()


def test_a_layer_travels_dense_until_an_auto_has_chosen():
    assert level(layer(), AUTO, 0, 2) == Dense() and reachable_specs(layer(), AUTO, 2) == [Dense()]
    for spec in (PowerSGD(2), Dense()):
        assert level(layer(), resolved(AUTO, w=spec), 0, 2) == spec
        assert reachable_specs(layer(), resolved(AUTO, w=spec), 2) == [spec]
    late = resolved(Auto(LATE), w=LATE)
    assert [level(layer(), late, step, 2) for step in (9, 10)] == [Dense(), LATE]
    assert reachable_specs(layer(), late, 2) == [LATE, Dense()]


def test_what_was_chosen_for_fewer_ranks_is_given_up_where_it_would_not_shrink():
    gathered = TopK(0.1, algorithm="allgather")
    auto = resolved(Auto(gathered), w=gathered)
    assert level(layer(), auto, 0, 4) == gathered
    assert level(layer(), auto, 0, 16) == Dense()
    assert reachable_specs(layer(), auto, 16) == [Dense()]


def test_an_auto_as_the_relaxed_side():
    assert reachable_specs(layer(), Accordion(QSGD(7), AUTO), 2) == [QSGD(7), Dense()]
    accordion = resolved(Accordion(QSGD(7), AUTO), w=TopK(0.1))
    assert reachable_specs(layer(), accordion, 2) == [QSGD(7), TopK(0.1)]
    assert level(layer(), accordion, 0, 2) == QSGD(7)
    for _ in range(2):
        accordion.observe({"w": 1.0}, 0.1)
    assert level(layer(), accordion, 0, 2) == TopK(0.1)
    accordion.resolve({})
    assert level(layer(), accordion, 0, 2) == Dense()


def test_an_accordion_is_adaptive_whatever_its_auto_chooses():
    assert adaptive(layer(), Accordion(Dense(), AUTO), 2)
    assert not adaptive(layer(shape=(4096,)), Accordion(Dense(), AUTO), 2)
    assert not adaptive(layer(), Accordion(Dense(), Auto(PowerSGD(40))), 2)
    assert not adaptive(layer(), AUTO, 2)


def test_an_auto_is_a_policy_for_all_or_in_a_dict():
    assert assign(AUTO, NAMES) == dict.fromkeys(NAMES, AUTO)
    assert assign({"fc.*": AUTO}, NAMES)["fc.weight"] == AUTO
    with pytest.raises(TypeError, match="an Auto"):
        assign(Auto, NAMES)
