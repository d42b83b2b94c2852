"""A user's script, which mypy must pass; TensorFlow's own classes have no annotations, its tensors are Any."""

import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from hvd_accordion import PowerSGD

hvd.init()
weight = tf.Variable(tf.zeros((4, 4)))
with tf.GradientTape() as tape:
    loss = tf.reduce_sum(weight)
tape = hvd.DistributedGradientTape(tape, compression=PowerSGD(rank=2))
gradients = tape.gradient(loss, [weight])
hvd.broadcast_variables([weight], root_rank=0)
print(hvd.size(), hvd.allreduce(loss, op=hvd.Average))

exchange = hvd.GradientExchange(PowerSGD(rank=2), learning_rate=0.1)
exchange(gradients, [weight])
print(exchange.stats.sent_bytes)

hvd.DistributedGradientTape(tape, compresion=PowerSGD(rank=2))  # type: ignore[call-arg]
hvd.GradientExchange(0.01)  # type: ignore[arg-type]
