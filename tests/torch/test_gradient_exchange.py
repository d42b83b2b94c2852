"""GradientExchange: equal to a DistributedOptimizer's means, saved and loaded, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import FP16, Accordion, Dense, PowerSGD, TopK
from tests.torch.simulated_ranks import SimulatedRanks

SHAPES = {"a": (40, 50), "b": (50,), "c": (50, 4, 10)}


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


def gradients(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def on_two_ranks(function):
    with pytest.MonkeyPatch.context() as patch:
        cluster = SimulatedRanks(2, patch)
        return cluster.run(lambda rank: function(rank, cluster.process_sets[rank]))


POLICIES = {
    "dense": None,
    "powersgd": PowerSGD(2),
    "accordion": Accordion(TopK(0.2), TopK(0.02), interval=2, unit="steps"),
    "each": {"a": PowerSGD(2), "*": Dense()},
    "sum": PowerSGD(2),
}


@pytest.mark.parametrize("name", POLICIES)
def test_means_are_a_distributed_optimizers(name):
    options = {"compression": POLICIES[name] or Dense(), "op": hvd.Sum if name == "sum" else hvd.Average}

    def script(rank, process_set):
        params = {n: torch.nn.Parameter(torch.zeros(shape)) for n, shape in SHAPES.items()}
        sgd = torch.optim.SGD(params.values(), 0.1)
        optimizer = hvd.DistributedOptimizer(sgd, params.items(), process_set=process_set, **options)
        exchange = hvd.GradientExchange(process_set=process_set, learning_rate=0.1, **options)
        for step in range(6):
            given = gradients(rank, step)
            for n, p in params.items():
                (p * given[n]).sum().backward()
            optimizer.step()
            means = exchange(given)
            assert all(torch.equal(means[n], p.grad) for n, p in params.items())
            assert all(torch.equal(x, gradients(rank, step)[n]) for n, x in given.items())
            optimizer.zero_grad()
        assert exchange.stats.steps == 6 and exchange.stats.sent_bytes == optimizer.stats.sent_bytes
        assert str(exchange.compression_report()) == str(optimizer.compression_report())

    on_two_ranks(script)


def test_saved_state_resumes_bit_for_bit():
    def script(rank, process_set):
        def made():
            accordion = Accordion(PowerSGD(4), PowerSGD(1), interval=1)
            return hvd.GradientExchange(accordion, process_set=process_set, steps_per_epoch=2)

        exchange, other = made(), made()
        assert exchange.state_dict() == {} and not exchange.compression_report()
        for step in range(5):
            exchange(gradients(rank, step))
        other.load_state_dict({**exchange.state_dict()})
        for step in range(5, 9):
            ours, theirs = exchange(gradients(rank, step)), other(gradients(rank, step))
            assert all(torch.equal(x, theirs[n]) for n, x in ours.items())
        assert other.stats.steps == 9

    on_two_ranks(script)


def test_none_is_a_gradient_of_zeros():
    def script(rank, process_set):
        exchange = hvd.GradientExchange(FP16(), process_set=process_set)
        exchange(gradients(rank, 0))
        given = gradients(rank, 1)
        means = exchange({**given, "b": None} if rank == 0 else given)
        torch.testing.assert_close(means["b"], gradients(1, 1)["b"] / 2, rtol=1e-3, atol=1e-3)

    on_two_ranks(script)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {**g, "d": g["a"]}, "new: d"),
        (lambda g: {"a": g["a"]}, "missing: b, c"),
        (lambda g: {**g, "a": g["a"][1:]}, "gradient of a must be torch.float32 \\(40, 50\\)"),
        (lambda g: {**g, "b": g["b"].double()}, "gradient of b must be torch.float32"),
    ],
)
def test_a_changed_set_is_refused_on_all_ranks(change, message):
    def script(rank, process_set):
        exchange = hvd.GradientExchange(PowerSGD(2), process_set=process_set)
        exchange(gradients(rank, 0))
        with pytest.raises(ValueError, match=message):
            exchange(change(gradients(rank, 1)))
        return exchange(gradients(rank, 1))  # and nothing was sent

    on_two_ranks(script)


def test_ranks_with_other_names_are_refused_alike():
    def script(rank, process_set):
        exchange = hvd.GradientExchange(PowerSGD(2), process_set=process_set)
        with pytest.raises(ValueError, match="Ranks are configured differently"):
            exchange({f"a{rank}": torch.ones(4)})

    on_two_ranks(script)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="compression must be"):
        hvd.GradientExchange("powersgd")
    with pytest.raises(TypeError, match="groups must be an int"):
        hvd.GradientExchange(groups=[[torch.ones(1)]])
    with pytest.raises(ValueError, match="seed"):
        hvd.GradientExchange(seed=-1)
    with pytest.raises(ValueError, match="first call must have a tensor"):
        hvd.GradientExchange()({"a": None})
