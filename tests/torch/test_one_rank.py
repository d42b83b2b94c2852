"""Without horovodrun: one rank, nothing is sent, everything else works."""

import numpy as np
import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, PowerSGD, TopK
from hvd_accordion.ops import numpy as numpy_ops
from hvd_accordion.policy import norm_sampling


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


class Recorder:
    def __init__(self):
        self.params, self.epochs, self.windows = {}, [], []

    def start(self, params):
        self.params = dict(params)

    def log_epoch(self, epoch, metrics):
        self.epochs.append((epoch, dict(metrics)))

    def log_window(self, window, layers):
        self.windows.append((window, dict(layers)))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(60, 50), torch.nn.ReLU(), torch.nn.Linear(50, 40))


def train(net, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 60, generator=torch.Generator().manual_seed(step % 3))
        net(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("compression", [None, PowerSGD(2), TopK(0.1), Accordion()], ids=str)
def test_equals_the_bare_optimizer(compression):
    net, bare = network(), network()
    optimizer = torch.optim.Adam(net.parameters())
    optimizer = hvd.DistributedOptimizer(optimizer, net.named_parameters(), compression, steps_per_epoch=5)
    train(net, optimizer, 7)
    train(bare, torch.optim.Adam(bare.parameters()), 7)
    for p, q in zip(net.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.stats.steps == 7 and optimizer.stats.sent_bytes == 0
    optimizer.end_epoch()
    assert len(optimizer.compression_report()) == 4


def test_watches_and_logs_regimes():
    recorder, net = Recorder(), network()
    accordion = Accordion(interval=2, eta=0.5)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.01),
        net.named_parameters(),
        accordion,
        steps_per_epoch=3,
        logger=recorder,
    )
    train(net, optimizer, 3 * 5)
    assert recorder.params["eta"] == 0.5 and recorder.params["world_size"] == 1
    assert recorder.params["critical"] == "PowerSGD(rank=4)"
    assert {"version.torch", "version.horovod", "version.hvd_accordion"} <= recorder.params.keys()
    assert [epoch for epoch, _ in recorder.epochs] == [0, 1, 2, 3, 4]
    assert recorder.epochs[0][1]["critical_layers"] == 1.0
    assert [window for window, _ in recorder.windows] == [0, 1, 2]  # after epochs 1, 3 and 5
    first, second, _ = (layers for _, layers in recorder.windows)
    assert set(first) == {"0.weight", "2.weight"}
    assert first["0.weight"].ratio is None and first["0.weight"].regime == "critical"
    now = second["0.weight"]
    assert now.ratio == pytest.approx(abs(first["0.weight"].norm - now.norm) / first["0.weight"].norm)
    assert now.regime == ("critical" if now.ratio >= 0.5 else "relaxed")
    assert accordion.norms == {}, "the user's object is left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 50), (150, 90)], ids=["small", "large"])
@pytest.mark.parametrize("norm", ["sampled", "exact"])
def test_norm_is_that_of_the_summed_gradient(norm, shape, dtype):
    weight, recorder, accordion = torch.nn.Parameter(torch.zeros(shape, dtype=dtype)), Recorder(), Accordion(norm=norm)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=0.1), [("w", weight)], accordion, steps_per_epoch=4, logger=recorder, seed=3
    )
    total = np.zeros(shape)
    for step in range(4):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        if step == 2:  # leaves no trace, be it in an entry that is not even watched
            g[0, 0] = torch.nan
        else:
            total += g.double().numpy()
        optimizer.zero_grad()
        (weight * g).sum().backward()
        optimizer.step()
        assert step == 3 or [len(x) for x in optimizer._hvd.norms.layers.summed.values()] == [
            accordion.window.sample_size(weight.numel())
        ]
    assert recorder.windows[0][1]["w"].norm == pytest.approx(watched_norm(total, accordion, 3), rel=1e-5)
    assert optimizer._hvd.norms.layers.summed == {}


def watched_norm(total: np.ndarray, accordion: Accordion, seed: int) -> float:
    """Accordion's norm of layer "w", in numpy."""
    size = accordion.window.sample_size(total.size)
    picked = norm_sampling.entries(numpy_ops, "w", total.size, size, seed, total)
    assert len(set(picked)) == size
    return norm_sampling.scale(total.size, size) * np.linalg.norm(total.reshape(-1)[picked])


@pytest.mark.parametrize(("saved", "loaded"), [("sampled", "exact"), ("exact", "sampled"), ("sampled", "sampled")])
def test_sums_of_other_entries_are_not_taken_up(saved, loaded):
    torch.manual_seed(0)
    net = torch.nn.Linear(90, 150)

    def build(norm):
        inner = torch.optim.SGD(net.parameters(), lr=0.1)
        accordion = Accordion(interval=3, unit="steps", norm=norm)
        return hvd.DistributedOptimizer(inner, net.named_parameters(), accordion)

    def step(optimizer):
        optimizer.zero_grad()
        net(torch.ones(2, 90)).square().sum().backward()
        optimizer.step()

    optimizer = build(saved)
    step(optimizer)
    state = optimizer.state_dict()
    assert state["hvd_accordion"]["summed"]["weight"].shape == (8192 if saved == "sampled" else 90 * 150,)
    del optimizer
    other = build(loaded)
    other.load_state_dict(state)
    assert list(other._hvd.norms.layers.summed) == (["weight"] if saved == loaded else [])
    step(other)
    step(other)
    assert other._hvd.controller.counters.window == 1


def test_state_dict_round_trip_is_weights_only(tmp_path):
    net = network()
    build = lambda: hvd.DistributedOptimizer(  # noqa: E731
        torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters(), Accordion(interval=3, unit="steps")
    )
    optimizer = build()
    train(net, optimizer, 4)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del optimizer
    other = build()
    other.load_state_dict(state)
    assert other.stats.steps == 4
    ours, theirs = other.state_dict()["hvd_accordion"], state["hvd_accordion"]
    assert ours["controller"] == theirs["controller"]
    assert all(torch.equal(ours["summed"][k], theirs["summed"][k]) for k in theirs["summed"])


def test_globs_take_horovods_own_compressors():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    globs = {"0.weight": hvd.Compression.fp16, "2.*": hvd.Compression.none}
    optimizer = hvd.DistributedOptimizer(optimizer, net.named_parameters(), globs)
    specs = {layer.name: layer.spec for layer in optimizer.compression_report()}
    assert specs["0.weight"] == "FP16(error_feedback=False)" and specs["2.weight"] == "Dense()"


def test_every_optimizer_of_torch():
    """Any class of torch.optim that steps without a closure on 2-D parameters."""
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    for cls in classes:
        if cls in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam):
            continue
        weight = torch.nn.Parameter(torch.ones(40, 50))
        optimizer = hvd.DistributedOptimizer(cls([weight], lr=0.1), [("w", weight)], PowerSGD(2))
        (weight**2).sum().backward()
        optimizer.step()
        assert isinstance(optimizer, cls) and not torch.equal(weight, torch.ones(40, 50)), cls
