import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd


@pytest.fixture(scope="session", autouse=True)
def horovod():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    hvd.init(process_sets="dynamic")
    yield
    hvd.shutdown()


@pytest.fixture(autouse=True)
def fresh_names():
    """Keras numbers layers of one kind; each test starts anew, so that names don't depend on the tests before."""
    import keras

    keras.backend.clear_session()
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")
