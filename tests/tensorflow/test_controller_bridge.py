"""Where a graph leaves for Python: at a window's end and after its first step, nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from hvd_accordion import Accordion, PowerSGD
from hvd_accordion.tensorflow.exchange.controller_bridge import ControllerBridge


@pytest.fixture
def woken(monkeypatch):
    """Steps after which the graph called Python."""
    steps, really = [], ControllerBridge._decided

    def spy(self, step, *told):
        steps.append(int(step))
        return really(self, step, *told)

    monkeypatch.setattr(ControllerBridge, "_decided", spy)
    return steps


def steps_of(averaging, count: int, graph: bool = True):
    """The function that was traced, after it has run `count` times."""
    w = tf.Variable(tf.zeros((60, 50)))
    averaging.build([w])

    @tf.function
    def step(g):
        return averaging([g], [w])[0]

    for _ in range(count):
        (step if graph else step.python_function)(tf.ones((60, 50)))
    return step


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("compression", "options", "expected"),
    [
        (Accordion(interval=4, unit="steps"), {}, [1, 4, 5, 8, 9, 12]),
        (Accordion(interval=1, unit="steps"), {}, list(range(1, 13))),
        (Accordion(interval=2), {"steps_per_epoch": 4}, [1, 4, 5, 8, 9, 12]),  # epochs, whatever the interval
        (Accordion(interval=2), {}, [1]),
        (Accordion(interval=5, unit="steps"), {"steps_per_epoch": 6}, [1, 5, 6, 10, 11, 12]),
        (PowerSGD(2), {"steps_per_epoch": 5}, [5, 10]),
        (PowerSGD(2, start_after=3), {}, []),
        (None, {}, []),
    ],
    ids=str,
)
def test_the_graph_wakes_the_controller_at_windows_alone(compression, options, expected, graph, woken):
    averaging = hvd.GradientExchange(compression, **options)
    steps_of(averaging, 12, graph)
    assert woken == expected and averaging.stats.steps == 12


def test_after_end_epoch_the_first_step_of_the_next_wakes_it(woken):
    averaging, w = hvd.GradientExchange(Accordion(interval=1)), tf.Variable(tf.zeros((60, 50)))
    for _ in range(3):
        for _ in range(3):
            averaging([tf.ones((60, 50))], [w])
        averaging.end_epoch()
    assert woken == [1, 4, 7] and averaging.state.levels.numpy().tolist() == [1]


def ops_of(function) -> set[str]:
    graph = function.get_concrete_function(tf.ones((60, 50))).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return {node.op for node in nodes}


def test_a_graph_of_one_level_has_no_way_into_python(twins):
    for process_set in (hvd.global_process_set, twins):
        plain = hvd.GradientExchange(PowerSGD(2, start_after=3), process_set=process_set)
        adaptive = hvd.GradientExchange(Accordion(), process_set=process_set)
        assert not [op for op in ops_of(steps_of(plain, 1)) if "PyFunc" in op]
        assert [op for op in ops_of(steps_of(adaptive, 1)) if "PyFunc" in op] == ["PyFunc"]


def test_looking_at_numbers_in_between_changes_nothing():
    def trained(look: bool):
        averaging = hvd.GradientExchange(Accordion(interval=4, unit="steps"), steps_per_epoch=6)
        w = tf.Variable(tf.zeros((60, 50)), name="w")
        for i in range(13):
            averaging([tf.constant(np.random.default_rng(i % 2).standard_normal((60, 50)), tf.float32)], [w])
            if look:
                assert averaging.stats.steps == i + 1 and len(averaging.compression_report()) == 1
        return averaging.state

    for (name, seen), unseen in zip(trained(True).arrays().items(), trained(False).arrays().values(), strict=True):
        np.testing.assert_array_equal(seen, unseen, name)
