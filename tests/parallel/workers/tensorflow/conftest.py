import gc

import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from tests.parallel.subsets import registered


@pytest.fixture(scope="session", autouse=True)
def process_sets(request):
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    yield registered(hvd, request.session)
    hvd.shutdown()


@pytest.fixture(autouse=True)
def fresh_names():
    """Keras numbers layers of one kind; each test starts anew, so that names don't depend on the tests before."""
    import keras

    keras.backend.clear_session()
    gc.freeze()  # TensorFlow keeps the graphs of the tests before: no collection need walk through them again
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")
