import numpy as np
import pytest

from tests.parallel.workers.tensorflow.keras_checkpoint_common import NAMES, built, checkpoint, path
from tests.parallel.workers.tensorflow.keras_common import SPECS, fit, flat


@pytest.mark.parametrize("name", NAMES)
def test_four_epochs_and_two_before_which_a_checkpoint_is_saved(name):
    net, optimizer = built(name)
    fit(net, epochs=2)
    net.save(path(name, "model") + ".keras")
    checkpoint(net, optimizer).write(path(name, "checkpoint"))
    net.save_weights(path(name, "saved") + ".weights.h5")
    fit(net, epochs=2, seed=1)
    np.savez(path(name, "result") + ".npz", weights=flat(net), levels=optimizer._hvd.state.levels.numpy())
    assert SPECS[name] is None or optimizer.stats.steps == 20
