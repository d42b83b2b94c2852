"""Without horovodrun: one rank, nothing is sent, everything else works."""

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, PowerSGD, TopK


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


def test_norm_is_that_of_the_summed_gradient():
    weight = torch.nn.Parameter(torch.zeros(40, 50))
    recorder = Recorder()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=0.1), [("w", weight)], Accordion(interval=1), steps_per_epoch=4, logger=recorder
    )
    total = torch.zeros_like(weight)
    for step in range(4):
        g = torch.randn(40, 50, generator=torch.Generator().manual_seed(step))
        total += g
        optimizer.zero_grad()
        (weight * g).sum().backward()
        optimizer.step()
    assert recorder.windows[0][1]["w"].norm == pytest.approx(float(total.norm()), rel=1e-6)


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
