"""Names of variables, and whose a restored residual is."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_accordion.tensorflow.exchange.state import State, outside, variable
from hvd_accordion.tensorflow.exchange.variables import check_groups, layer_of, names_of, value_of


def named(name: str) -> tf.Variable:
    return tf.Variable(0.0, name=name)


def test_names_of_a_keras_model_are_paths_without_what_all_begin_with():
    layers = [keras.layers.Dense(2, name=name) for name in ("first", "second")]
    net = keras.Sequential([keras.layers.Input((3,)), *layers], name="net")
    with keras.name_scope("outer"):
        inner = keras.layers.Dense(2, name="inner")
        inner.build((None, 3))
    expected = ["first/kernel", "first/bias", "second/kernel", "second/bias"]
    assert [v.path.removeprefix("net/") for v in net.variables] == expected
    assert names_of(net.variables) == expected
    assert names_of(inner.variables) == ["kernel", "bias"]


def test_names_of_tf_variables():
    assert names_of([named("w"), named("scope/b"), tf.Variable(0.0)]) == ["w", "scope/b", "Variable"]
    assert names_of([named("net/a/w"), named("net/a/b"), named("net/b/w")]) == ["a/w", "a/b", "b/w"]
    assert names_of([named("net/w")]) == ["w"]
    assert names_of([]) == []


def test_a_name_is_never_left_out_altogether():
    assert names_of([named("a"), named("a/b")]) == ["a", "a/b"]
    assert names_of([named("a/w"), named("a/w")]) == ["w", "w_1"]


def test_names_that_stand_twice_are_numbered():
    assert names_of([named("w"), named("w"), named("w")]) == ["w", "w_1", "w_2"]
    assert names_of([named("w"), named("w_1"), named("w")]) == ["w", "w_1", "w_2"]
    assert names_of([named("w"), named("w"), named("w_1")]) == ["w", "w_1", "w_1_1"]
    assert names_of([named("w")], taken=["w", "w_1"]) == ["w_2"]


def test_the_value_of_a_variable():
    w = tf.Variable([1.0])
    ours = keras.Variable(np.ones((2, 3)), dtype="float32")
    assert value_of(w) is w and isinstance(value_of(ours), tf.Variable) and value_of(ours) is value_of(ours)
    layer = layer_of("w", ours)
    assert (layer.name, layer.shape, layer.dtype) == ("w", (2, 3), "float32") and "CPU:0" in layer.device
    assert layer_of("w", tf.Variable(tf.zeros(3, tf.bfloat16))).dtype == "bfloat16"


def test_groups_are_a_number_or_lists_of_variables():
    v, w = keras.Variable([1.0]), tf.Variable([1.0])
    for good in (None, 0, 3, [], [[v], [w]]):
        check_groups(good)
    for bad in (-1, [[1]], [[v, w], [v]]):
        with pytest.raises(ValueError, match="groups"):
            check_groups(bad)
    for bad in (1.5, "all", True):
        with pytest.raises(TypeError, match=r"groups must be an integer >= 0, got"):
            check_groups(bad)


# a restored residual


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("me", "owner", "factor"),
    [
        ((0, 2), (0, 2), 1.0),
        ((1, 2), (0, 2), 0.0),  # another rank's
        ((0, 4), (0, 2), 2.0),  # more ranks: each counts for less in the mean
        ((1, 2), (1, 4), 0.5),
        ((3, 4), (1, 2), 0.0),
    ],
)
def test_a_residual_is_its_ranks_own_and_scaled_with_their_number(me, owner, factor, graph):
    state = State(*me)
    state.residual = {"0": variable([1.0, -3.0], tf.float32), "1": variable([5.0], tf.float64)}
    state.owner.assign(owner)
    claim = tf.function(state.claim, autograph=False) if graph else state.claim
    for _ in range(2):  # the second time it is its own
        claim()
        np.testing.assert_array_equal(state.residual["0"], np.array([1.0, -3.0]) * factor)
        np.testing.assert_array_equal(state.residual["1"], np.array([5.0]) * factor)
        assert tuple(state.owner.numpy()) == me


def test_a_state_that_nobody_saved_has_an_owner():
    assert tuple(State(1, 3).owner.numpy()) == (1, 3)


def test_arrays_go_in_and_out():
    first, second = State(0, 2), State(1, 2)
    for state in (first, second):
        state.residual = {"0": variable([0.0], tf.float32)}
        state.memory = {"0": {"q": variable([[0.0]], tf.float32)}}
    first.residual["0"].assign([2.0])
    first.memory["0"]["q"].assign([[3.0]])
    first.levels.assign([1, 0, 1])  # of any length
    first.journal.assign("{}")
    second.load(first.arrays())
    assert second.residual["0"].numpy() == 2 and second.memory["0"]["q"].numpy() == 3
    assert second.levels.numpy().tolist() == [1, 0, 1] and second.journal.numpy() == b"{}"
    assert second.owner.numpy().tolist() == [0, 2], "it is still the other's"
    second.load({"step": np.int64(7)})
    assert int(second.step) == 7 and second.residual["0"].numpy() == 2
    assert second.load(first.arrays()) == []
    left = second.load({"residual.0": np.ones(2), "memory.1.q": np.ones((1, 1)), "residual.1": np.zeros(1)})
    assert left == ["what was kept as residual.0, memory.1.q, for which there is no place"]
    assert second.residual["0"].numpy() == 2, "what does not fit is not taken"


def test_variables_can_be_made_while_a_function_is_traced_again():
    made = []

    @tf.function(reduce_retracing=False)
    def add(x):
        made.append(outside(lambda: tf.Variable(1.0)))
        return made[-1] + x

    assert float(add(1.0)) == 2.0 and float(add(2.0)) == 3.0 and len(made) == 2
