"""Ranks that are configured differently: the same clear error on all of them, no hang."""

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, PowerSGD, TopK
from tests.parallel.workers.torch.common import model, sgd


def error_of(build):
    with pytest.raises(ValueError) as caught:
        build()
    message = str(caught.value)
    everyone = [bytes(b).decode().rstrip("\0") for b in hvd.allgather(padded(message)).tolist()]
    assert len(set(everyone)) == 1, everyone
    return message


def padded(text, size=2000):
    data = text.encode().ljust(size, b"\0")
    return torch.tensor([list(data)], dtype=torch.uint8)


def build(net=None, named=None, **options):
    net = net or model()
    return hvd.DistributedOptimizer(sgd(net), named or net.named_parameters(), **options)


def mine(ours, others):
    """A value that the last rank has differently."""
    return ours if hvd.rank() == hvd.size() - 1 else others


def test_different_specs():
    message = error_of(lambda: build(compression=mine(PowerSGD(2), PowerSGD(4))))
    assert "PowerSGD" in message and "rank=2" in message and "rank=4" in message


def test_compression_on_one_rank_only():
    message = error_of(lambda: build(compression=mine(None, TopK(0.01))))
    assert "rank 0 has" in message


def test_different_accordions():
    message = error_of(lambda: build(compression=mine(Accordion(eta=0.4), Accordion(eta=0.5))))
    assert "eta=0.4" in message and "eta=0.5" in message


def test_different_norms():
    message = error_of(lambda: build(compression=mine(Accordion(norm="exact"), Accordion())))
    assert "norm='exact'" in message and "norm='sampled'" in message


def test_different_batch_sizes():
    small, large = 4 * hvd.size(), 16 * hvd.size()
    message = error_of(lambda: build(batch_size=mine(AccordionBatchSize(small, large), None)))
    assert "batch_size" in message and "None" in message
    rules = AccordionBatchSize(small, large, lr_drop=0.4), AccordionBatchSize(small, large)
    assert "lr_drop=0.4" in error_of(lambda: build(batch_size=mine(*rules)))


def test_a_small_batch_that_ranks_cannot_share():
    message = error_of(lambda: build(batch_size=AccordionBatchSize(hvd.size() + 1, 8 * (hvd.size() + 1))))
    assert f"small must be a multiple of the {hvd.size()} ranks, got {hvd.size() + 1}" in message


def test_different_shapes():
    net = model()
    if hvd.rank() == 0:
        net[11] = torch.nn.Linear(48, 11)
    message = error_of(lambda: build(net, compression=PowerSGD(2)))
    assert "(11, 48)" in message and "(10, 48)" in message


def test_different_names_and_order():
    net = model()
    names = [(f"{mine('a', 'b')}.{name}", p) for name, p in net.named_parameters()]
    assert "b.0.weight" in error_of(lambda: build(net, names, compression=PowerSGD(2)))
    params = list(net.parameters())
    optimizer = torch.optim.SGD(mine(params, params[::-1]), lr=0.1)
    message = error_of(lambda: hvd.DistributedOptimizer(optimizer, net.named_parameters(), compression=PowerSGD(2)))
    assert "0.weight" in message


def test_different_number_of_parameters():
    net = model()
    optimizer = torch.optim.SGD(list(net.parameters())[: mine(3, 4)], lr=0.1)
    message = error_of(lambda: hvd.DistributedOptimizer(optimizer, net.named_parameters(), compression=TopK(0.1)))
    assert "number of parameters" in message


@pytest.mark.parametrize(
    "option", ["seed", "backward_passes_per_step", "steps_per_epoch", "min_compress_numel", "groups"]
)
def test_different_options(option):
    message = error_of(lambda: build(compression=PowerSGD(2), **{option: mine(3, 2)}))
    assert option in message


def test_different_dtype_and_frozen():
    net = model()
    net[5].requires_grad_(hvd.rank() == 0)
    assert "frozen" in error_of(lambda: build(net, compression=PowerSGD(2)))
    assert "float64" in error_of(lambda: build(model(mine(torch.float64, torch.float32)), compression=PowerSGD(2)))


def test_versions(monkeypatch):
    from hvd_accordion.training import settings

    monkeypatch.setattr(settings, "version", lambda name: mine("9.9.9", "1.0.0"))
    assert "9.9.9" in error_of(lambda: build(compression=PowerSGD(2)))


def test_added_parameters():
    optimizer = build(compression=PowerSGD(2))
    extra = torch.nn.Parameter(torch.zeros(mine(5, 6), 7))
    assert "(5, 7)" in error_of(lambda: optimizer.add_param_group({"params": [extra]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "topk"}, "compression must be .* got 'topk'"),
        ({"compression": {"nothing.*": TopK(0.1)}}, "glob 'nothing.*' matches no parameter name"),
        ({"compression": {"*": 3}}, r"compression\['\*'\] must be"),
        ({"compression": TopK(0.1), "op": hvd.Adasum}, "op must be hvd.Average or hvd.Sum"),
        ({"compression": TopK(0.1), "backward_passes_per_step": 0}, r"backward_passes_per_step must be .* got 0"),
        ({"compression": TopK(0.1), "steps_per_epoch": 0}, "steps_per_epoch must be .* got 0"),
        ({"compression": TopK(0.1), "steps_per_epoch": 2.5}, "steps_per_epoch must be .* got 2.5"),
        ({"compression": TopK(0.1), "seed": -1}, "seed must be .* got -1"),
        ({"compression": TopK(0.1), "gradient_predivide_factor": 0.0}, "gradient_predivide_factor must be"),
        ({"compression": TopK(0.1), "gradient_predivide_factor": 2.0, "op": hvd.Sum}, "gradient_predivide_factor"),
        ({"compression": TopK(0.1), "logger": 3}, "logger must have a method"),
        ({"compression": TopK(0.1), "groups": -1}, "groups must be .* got -1"),
        ({"compression": TopK(0.1), "groups": [[1]]}, "groups must consist of torch.Tensor"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(**options)


def test_bad_names():
    net = model()
    pairs = list(net.named_parameters())
    with pytest.raises(ValueError, match=r"duplicates: 0\.weight"):
        build(net, [*pairs, pairs[0]], compression=TopK(0.1))
    with pytest.raises(ValueError, match=r"not named: param_groups\[0\]\['params'\]\[0\] of shape \(8, 1, 3, 3\)"):
        build(net, pairs[1:], compression=TopK(0.1))
    with pytest.raises(ValueError, match="sequence of tuples"):
        build(net, [p for _, p in pairs], compression=TopK(0.1))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        hvd.DistributedOptimizer(net, compression=TopK(0.1))


def test_epochs_that_nobody_counts(monkeypatch):
    from hvd_accordion.training import counters

    monkeypatch.setattr(counters, "MAX_STEPS_OF_EPOCH", 3)
    net = model()
    optimizer = build(net, compression=Accordion())
    for _ in range(3):
        net(torch.randn(2, 1, 14, 14)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    net(torch.randn(2, 1, 14, 14)).sum().backward()
    with pytest.raises(ValueError, match="steps_per_epoch"):
        optimizer.step()


def test_two_optimizers_of_the_same_parameters():
    """Told at the first backward pass; one that goes, be it in a cycle and after training, is not in the way."""

    def step(optimizer):
        net(torch.randn(2, 1, 14, 14)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    net = model()
    old = build(net, compression=PowerSGD(2))
    step(old)
    optimizer = build(net, compression=TopK(0.1))
    message = error_of(lambda: step(optimizer))
    assert "parameter " in message and "belongs to two DistributedOptimizers" in message
    net.zero_grad()
    old.itself = old
    del old
    step(optimizer)
    step(optimizer)
    del optimizer
    old = build(net)  # Horovod's own, whose hooks outlive it
    optimizer = build(net, compression=TopK(0.1))
    assert "belongs to two DistributedOptimizers" in error_of(lambda: step(optimizer))
    net.zero_grad()
    old.release()
    step(optimizer)
    step(optimizer)


# elastic jobs: nothing is sent before the state's sync


@pytest.fixture
def elastic_job(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")


@pytest.mark.parametrize("compression", [None, PowerSGD(2)])
def test_elastic_settings_are_compared_in_sync(elastic_job, compression):
    if hvd.rank() == 0:
        build(compression=compression)  # on one rank only, as where others are in their sync
    net = model()
    state = hvd.elastic.TorchState(net, build(net, compression=mine(TopK(0.1), compression)), batch=0)
    message = error_of(state.sync)
    assert "optimizer: " in message and "TopK" in message
    net = model()
    more = mine({"epoch": 0}, {})
    message = error_of(hvd.elastic.TorchState(net, build(net, compression=compression), batch=0, **more).sync)
    assert "elastic state = " in message and "epoch" in message


def test_elastic_optimizers_outside_of_the_state(elastic_job):
    net = model()
    optimizer = build(net, compression=PowerSGD(2))
    hvd.elastic.TorchState(net, optimizer)
    net(torch.randn(2, 1, 14, 14)).sum().backward()
    with pytest.raises(RuntimeError, match=r"must be part of hvd\.elastic\.TorchState"):
        optimizer.step()


def test_what_does_not_work_in_elastic_jobs(elastic_job, first):
    net = model()
    with pytest.raises(ValueError, match=r"process_set must be hvd\.global_process_set in elastic training"):
        build(net, compression=PowerSGD(2), process_set=first)
    with pytest.raises(ValueError, match="ECLK does not work in elastic training"):
        hvd.ECLK(net.parameters(), smoothness=1.0, strong_convexity=0.1)
    with pytest.raises(ValueError, match="estimate_smoothness does not work in elastic training"):
        hvd.estimate_smoothness(lambda: None, net.parameters())


def test_eclk_in_an_elastic_state():
    net = model()
    optimizer = hvd.ECLK(net.parameters(), smoothness=1.0, strong_convexity=0.1)
    with pytest.raises(ValueError, match="optimizer must not be ECLK in an elastic state"):
        hvd.elastic.TorchState(net, optimizer)
