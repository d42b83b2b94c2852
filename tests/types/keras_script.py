"""A user's script, which mypy must pass; Keras's own classes have no annotations."""

import keras

import hvd_accordion.keras
import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Accordion, TopK

hvd.init()
model = keras.Sequential([keras.layers.Dense(1)])
optimizer = hvd.DistributedOptimizer(
    keras.optimizers.SGD(0.1 * hvd.size()), compression=Accordion(critical=TopK(0.1), relaxed=TopK(0.01))
)
model.compile(optimizer=optimizer, loss="mse")
callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
model.fit([[1.0]], [1.0], callbacks=callbacks, verbose=hvd.rank() == 0)
print(hvd_accordion.keras.allreduce(1.0, name="x"))

hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=3)  # type: ignore[arg-type]
hvd.size(1)  # type: ignore[call-arg]
