"""Resuming under other settings, or names: what fits is taken up, the rest starts anew with a warning, training goes on."""

from __future__ import annotations

import json
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Accordion, AccordionBatchSize, Auto, PowerSGD, TopK
from hvd_accordion.tensorflow.exchange import journal
from hvd_accordion.tensorflow.exchange.variables import layer_of

RULE = {"interval": 2, "unit": "steps", "eta": 1e9}


def network(names=("first", "second")) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    sizes = zip((50, 40), names, strict=True)
    return keras.Sequential([layers.Input((60,)), *(layers.Dense(size, name=name) for size, name in sizes)])


def compiled(options, twins, **how):
    net = network(**how)
    plain = keras.optimizers.SGD(0.01, momentum=0.9)
    net.compile(hvd.DistributedOptimizer(plain, process_set=twins, **options), loss="mse")
    net.optimizer.build(net.trainable_variables)
    return net


def fit(net, steps=5):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8 * steps, 60), np.float32), rng.standard_normal((8 * steps, 40), np.float32)
    net.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return net


def by_file(net, options, twins, folder):
    net.save(folder / "net.keras")
    keras.backend.clear_session()
    return hvd.load_model(folder / "net.keras", process_set=twins, **options)


def by_checkpoint(net, options, twins, folder):
    path = tf.train.Checkpoint(model=net, optimizer=net.optimizer).write(str(folder / "checkpoint"))
    keras.backend.clear_session()
    other = compiled(options, twins)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(path)
    return other


def by_checkpoint_into_what_has_trained(net, options, twins, folder):
    path = tf.train.Checkpoint(model=net, optimizer=net.optimizer).write(str(folder / "checkpoint"))
    keras.backend.clear_session()
    other = fit(compiled(options, twins), steps=1)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(path)
    other.optimizer.compression_report()
    return other


WAYS = [by_file, by_checkpoint, by_checkpoint_into_what_has_trained]
MEMORY = "rows of the memory of (first|second)/kernel, (first|second)/kernel, which has another number of them now"
CASES = {  # saved under, resumed under, warned of
    "the same": ({"compression": Accordion(**RULE)}, {"compression": Accordion(**RULE)}, None),
    "none to spec": ({}, {"compression": PowerSGD(2)}, None),
    "spec to none": ({"compression": TopK(0.1)}, {}, None),
    "spec to spec": ({"compression": TopK(0.1)}, {"compression": PowerSGD(2)}, None),
    "fewer columns": ({"compression": PowerSGD(4)}, {"compression": PowerSGD(2)}, MEMORY),
    "more columns": ({"compression": PowerSGD(2)}, {"compression": PowerSGD(4)}, MEMORY),
    "accordion to spec": ({"compression": Accordion(**RULE)}, {"compression": PowerSGD(4)}, "no Accordion decides now"),
    "accordion to none": ({"compression": Accordion(**RULE)}, {}, "no Accordion decides now"),
    "spec to accordion": ({"compression": PowerSGD(4)}, {"compression": Accordion(**RULE)}, "an Accordion starts anew"),
    "other layers": (
        {"compression": {"first*": Accordion(**RULE), "*": TopK(0.1)}},
        {"compression": {"*kernel": Accordion(TopK(0.1), TopK(0.05), **RULE), "*": None}},
        None,
    ),
    "other entries": (
        {"compression": Accordion(norm="exact", **RULE)},
        {"compression": Accordion(norm="sampled", **RULE)},
        None,
    ),
    "batch size to none": (
        {"batch_size": AccordionBatchSize(16, 64, **RULE)},
        {},
        "AccordionBatchSize: batch_size is None",
    ),
    "none to batch size": (
        {},
        {"batch_size": AccordionBatchSize(16, 64, **RULE)},
        "AccordionBatchSize, which starts anew",
    ),
    "auto to spec": ({"compression": Auto()}, {"compression": TopK(0.1)}, None),
}


@pytest.mark.parametrize(
    ("way", "case"),
    [
        *((by_file, case) for case in CASES),
        *(
            (by_checkpoint, case)
            for case in ("spec to spec", "fewer columns", "accordion to none", "batch size to none")
        ),
        *(
            (by_checkpoint_into_what_has_trained, case)
            for case in ("more columns", "spec to accordion", "other entries")
        ),
    ],
)
def test_what_fits_is_taken_up_and_training_goes_on(case, way, twins, tmp_path):
    saved_under, resumed_under, expected = CASES[case]
    net = fit(compiled(saved_under, twins))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = way(net, resumed_under, twins, tmp_path)
        before = other.optimizer.stats.steps
        fit(other)
    told = [str(w.message) for w in caught if "saved under other settings" in str(w.message)]
    if expected is None:
        told = [t for t in told if "for which there is no place" not in t and "what an Auto chose" not in t]
        assert not told
    else:
        assert len(told) == 1 and re.search(expected, told[0]), told
    small = "batch_size" in saved_under  # five micro-batches: an update of four, and one that waits
    assert before == (4 if small else 5)
    if "batch_size" not in resumed_under:
        assert other.optimizer.stats.steps == before + 5
    assert all(np.isfinite(w).all() for w in other.get_weights())
    controller = other.optimizer._hvd._engine.controller
    assert len(other.optimizer._hvd.state.levels.numpy()) == len(controller.levels.adaptive)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_factors_of_another_rank_keep_their_common_columns(way, twins, tmp_path):
    net = fit(compiled({"compression": PowerSGD(4)}, twins))
    saved = net.optimizer._hvd.state.memory["0"]["q"].numpy()
    for rank in (2, 6):
        with pytest.warns(UserWarning, match="which has another number of them now"):
            other = way(net, {"compression": PowerSGD(rank)}, twins, tmp_path)
            other.optimizer._hvd.restored([])
        q = other.optimizer._hvd.state.memory["0"]["q"].numpy()
        assert q.shape == (rank, *saved.shape[1:])
        np.testing.assert_array_equal(q[:4], saved[:rank])
        assert q[4:].any() == (rank > 4)


def test_layers_of_other_names_keep_regimes_and_norms(twins, tmp_path):
    """Keras counts the layers of a process: those of a fresh object may have other names than those that were saved."""
    options = {"compression": Accordion(**RULE)}
    net = fit(compiled(options, twins, names=("dense", "dense_1")))
    path = tf.train.Checkpoint(model=net, optimizer=net.optimizer).write(str(tmp_path / "checkpoint"))
    other = compiled(options, twins, names=("dense_1", "dense_3"))  # one that means another layer now
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert other.optimizer.stats.steps == 5
    ours, theirs = (x.optimizer._hvd._engine.controller.levels.observers[0] for x in (other, net))
    assert ours.norms == {
        "dense_1/kernel": theirs.norms["dense/kernel"],
        "dense_3/kernel": theirs.norms["dense_1/kernel"],
    }
    assert {row.name: row.regime for row in other.optimizer.compression_report() if row.regime} == {
        "dense_1/kernel": "relaxed",
        "dense_3/kernel": "relaxed",
    }
    for going_on in (net, other):
        fit(going_on)
    for mine, its in zip(other.get_weights(), net.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, its)


# the journal


def layers_of(*shapes, prefix="w"):
    return [layer_of(f"{prefix}{i}", tf.Variable(tf.zeros(shape))) for i, shape in enumerate(shapes)]


def test_a_journal_is_read_under_the_names_of_today():
    accordion = {"norms": {"w0": 1.0, "w1": 2.0}, "ratios": {"w1": 0.5}, "regimes": {"w0": "relaxed"}, "lr": 0.1}
    state = {"step": 3, "accordions": [accordion], "chosen": {"w1": "Dense()"}}
    text = journal.written(state, layers_of((2, 3), (3,)))
    rest = {"step": 3, "chosen": {"w1": "Dense()"}}
    assert journal.read(text, layers_of((2, 3), (3,))) == {
        **rest,
        "policies": [{"kind": "Accordion", "state": accordion}],
    }
    renamed = journal.read(text, layers_of((2, 3), (3,), prefix="x"))
    assert [mine["state"] for mine in renamed["policies"]] == [
        {"norms": {"x0": 1.0, "x1": 2.0}, "ratios": {"x1": 0.5}, "regimes": {"x0": "relaxed"}, "lr": 0.1}
    ]
    assert renamed["chosen"] == {"x1": "Dense()"} and renamed["step"] == 3
    other = journal.read(text, layers_of((2, 4), (3,)))
    assert set(other["policies"][0]["state"]["norms"]) == {"w0 (as saved)", "w1"}
    assert journal.read(json.dumps(state).encode(), layers_of((2, 3), prefix="x")) == state, "of an older version"
