"""The bytes that are counted are those that the kernel sees on the interface, and follow the level (Gloo over loopback)."""

import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from hvd_accordion import BF16, QSGD, Accordion, Dense, PowerSGD, RandomK, TopK
from tests.parallel.reference import on_the_wire

SHAPE = (2048, 1024)  # 8 MB: messages of all specs are large against Horovod's own
PAIRS = [(Dense(), TopK(0.1)), (BF16(), RandomK(0.3)), (PowerSGD(128), PowerSGD(64)), (QSGD(7), QSGD(1))]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_counted_is_sent_at_each_level_of_one_trace(pair):
    weight = tf.Variable(tf.zeros(SHAPE), name="w")
    averaging = hvd.GradientExchange(Accordion(*pair, interval=10**6, unit="steps"))
    gradient = tf.random.stateless_normal(SHAPE, (0, hvd.rank()))
    traces = []

    @tf.function
    def step():
        traces.append(1)
        return averaging([gradient + weight], [weight])

    for level, spec in enumerate(pair):
        step()
        averaging.state.levels.assign([level])
        step()
        hvd.allreduce(tf.zeros(1), name="before")
        steps, wire, counted = 10, on_the_wire(), averaging.stats.sent_bytes
        for _ in range(steps):
            step()
        hvd.allreduce(tf.zeros(1), name="after")
        wire, counted = (on_the_wire() - wire) / hvd.size(), averaging.stats.sent_bytes - counted
        print(f"{spec}: counted {counted / steps:,.0f} bytes a step, on the wire {wire / steps:,.0f}")
        assert counted == pytest.approx(wire, rel=0.05)
        assert counted / steps == pytest.approx(spec.bytes_per_step(SHAPE, "float32", hvd.size()))
    assert len(traces) == 1
