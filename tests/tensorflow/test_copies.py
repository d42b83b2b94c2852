"""What Keras makes from the config of a distributed optimizer exchanges gradients, too, or refuses to train."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import horovod.tensorflow as horovod
import keras
import numpy as np
import pytest

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Accordion, PowerSGD, TopK
from hvd_accordion.tensorflow.keras import copies

DATA = np.random.default_rng(0).standard_normal((16, 60)), np.random.default_rng(1).standard_normal((16, 40))


@pytest.fixture(autouse=True)
def nothing_serialized(monkeypatch):
    """As in a new process."""
    keras.backend.clear_session()
    monkeypatch.setattr(copies, "_serialized", {})


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([layers.Input((60,)), layers.Dense(50, name="first"), layers.Dense(40, name="second")])


def compiled(optimizer=None, net=None, **options) -> keras.Model:
    net = net or network()
    plain = optimizer or keras.optimizers.SGD(0.01, momentum=0.9)
    net.compile(hvd.DistributedOptimizer(plain, **options), loss=keras.losses.MeanSquaredError())
    return net


def fit(net, **options):
    return net.fit(*DATA, batch_size=8, shuffle=False, verbose=0, **options)


def saved_and_loaded(net):
    path = f"{net.folder}/net.keras"
    net.save(path)
    return keras.models.load_model(path)


def in_a_network(optimizer):
    net = network()
    net.compile(optimizer, loss="mse")
    return net


WAYS = {
    "deepcopy": lambda net: in_a_network(copy.deepcopy(net.optimizer)),
    "pickle": lambda net: in_a_network(pickle.loads(pickle.dumps(net.optimizer))),
    "serialize": lambda net: in_a_network(keras.optimizers.deserialize(keras.optimizers.serialize(net.optimizer))),
    "from_config": lambda net: in_a_network(type(net.optimizer).from_config(net.optimizer.get_config())),
    "clone": lambda net: keras.models.clone_model(net),
    "deepcopy of the model": lambda net: copy.deepcopy(net),
    "pickle of the model": lambda net: pickle.loads(pickle.dumps(net)),
    "json": lambda net: keras.models.model_from_json(net.to_json()),
    "file": saved_and_loaded,
}


@pytest.mark.filterwarnings(
    "ignore:Skipping variable loading for optimizer"
)  # Keras saves what an optimizer alone can't load
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_exchanges_gradients_with_the_same_settings(way, trained, twins, tmp_path):
    options = {"compression": TopK(0.1), "backward_passes_per_step": 2, "average_aggregated_gradients": True}
    net = compiled(process_set=twins, **options)
    net.folder = str(tmp_path)
    if trained:
        fit(net)
    other = WAYS[way](net)
    made = other.optimizer
    assert made is not net.optimizer and type(made) is type(net.optimizer) and made.momentum == 0.9
    assert made._hvd.settings == net.optimizer._hvd.settings and made._hvd_sums.average
    before = made.stats.steps
    fit(other)
    assert made.stats.steps == before + 1 and 0 < made.stats.sent_bytes < made.stats.dense_bytes
    assert {row.spec for row in made.compression_report()} == {"TopK(ratio=0.1)", "Dense()"}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01)),
        lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.1, 10)),
        lambda: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.01))),
    ],
)
def test_copies_of_other_optimizers(optimizer, twins):
    net = compiled(optimizer(), compression=PowerSGD(2), process_set=twins)
    made = keras.models.clone_model(net)
    fit(made)
    assert type(made.optimizer) is type(net.optimizer) and made.optimizer.stats.sent_bytes > 0


def test_two_optimizers_of_one_class_keep_their_own_settings():
    first, second = (compiled(compression=spec) for spec in (TopK(0.1), Accordion()))
    made = [keras.models.clone_model(net).optimizer for net in (first, second, first)]
    assert [str(m._hvd.configuration.compression) for m in made] == [str(TopK(0.1)), str(Accordion()), str(TopK(0.1))]


def test_local_variables_stay_local_and_groups_are_those_of_the_variables_that_are_gone(twins):
    net = network()
    options = {"groups": [[net.layers[0].kernel, net.layers[1].kernel]], "process_set": twins}
    wrapped = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=net.layers[1], **options)
    wrapped.build(net.trainable_variables)
    net.compile(wrapped, loss="mse")
    made = keras.models.clone_model(net)
    fit(made)
    names = ["first/kernel", "first/bias", "second/kernel", "second/bias"]
    known = made.optimizer._hvd.named
    assert [known.is_local(v) for v in made.trainable_variables] == [False, False, True, True]
    assert [row.name for row in made.optimizer.compression_report()] == names
    assert made.optimizer._hvd.settings.groups is None


def test_the_config_of_another_process_trains_alone_but_not_among_several(monkeypatch, tmp_path):
    net = compiled(compression=TopK(0.1))
    fit(net)
    net.save(tmp_path / "net.keras")
    copies._serialized.clear()
    loaded = keras.models.load_model(tmp_path / "net.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.SGD) and int(loaded.optimizer.iterations) == 2
    fit(loaded)
    monkeypatch.setattr(horovod, "size", lambda: 2)
    again = keras.models.load_model(tmp_path / "net.keras")
    with pytest.raises(ValueError, match="made from the config of a DistributedOptimizer whose settings this process"):
        fit(again)
    monkeypatch.undo()
    again.compile(hvd.DistributedOptimizer(again.optimizer, compression=TopK(0.2)), loss="mse")
    assert int(again.optimizer.iterations) == 2
    fit(again)
    assert again.optimizer.stats.steps == 2 and type(again.optimizer).__mro__[2] is keras.optimizers.SGD


def test_variables_that_are_local_before_they_have_names_are_refused_not_exchanged(monkeypatch):
    net = network()
    net.compile(hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=net.layers[1]), loss="mse")
    made = keras.models.clone_model(net)
    monkeypatch.setattr(horovod, "size", lambda: 2)
    with pytest.raises(ValueError, match="made from the config"):
        fit(made)


def test_files_load_without_this_package_and_without_a_trace_of_it(tmp_path):
    net = compiled(compression=Accordion(interval=2, unit="steps"))
    fit(net)
    for name in ("net.keras", "net.h5"):
        net.save(tmp_path / name)
    code = """
import sys, keras
for path in sys.argv[1:]:
    optimizer = keras.models.load_model(path).optimizer
    assert type(optimizer) is keras.optimizers.SGD, type(optimizer)
    assert optimizer.momentum == 0.9
    if path.endswith(".keras"):  # the other format keeps no velocity, whoever saved it
        assert int(optimizer.iterations) == 2 and optimizer.momentums[0].numpy().any()
assert not [name for name in sys.modules if name.startswith(("hvd_accordion", "horovod"))]
"""
    files = [str(tmp_path / "net.keras"), str(tmp_path / "net.h5")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
