"""An Auto on real ranks: all choose alike, by rank 0's numbers, and go on from there."""

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, Auto, Dense, PowerSGD, TopK
from hvd_accordion.policy.auto import PROBE_STEPS
from hvd_accordion.torch.exchange.calibration import Probe
from tests.parallel.workers.torch.common import assert_ranks_equal, flat, loss_of, model, sgd, train

AUTO = Auto((PowerSGD(2), TopK(0.02)))


@pytest.fixture
def link(monkeypatch):
    """Makes the link that rank 0 measures one of so many bytes a second; the other ranks see another one."""

    def of(bandwidth):
        mine = bandwidth if hvd.rank() == 0 else 1e15 / bandwidth
        measured = Probe._allreduce

        def allreduce(self, size, device):
            measured(self, size, device)
            return 1e-6 + size / mine

        monkeypatch.setattr(Probe, "_allreduce", allreduce)
        monkeypatch.setattr(Probe, "end_exchange", lambda self, waited: None)  # that was the real link

    return of


def made(net, compression=AUTO, **options):
    return hvd.DistributedOptimizer(sgd(net), net.named_parameters(), compression=compression, **options)


def chosen(optimizer):
    return {row.name: row.spec for row in optimizer.compression_report()}


@pytest.mark.parametrize(("bandwidth", "pays"), [(1e4, True), (1e13, False)])
def test_all_ranks_choose_by_rank_0s_numbers(link, bandwidth, pays):
    link(bandwidth)
    net = model()
    optimizer = made(net)
    train(net, optimizer, range(PROBE_STEPS - 1))
    assert set(chosen(optimizer).values()) == {"Dense()"}
    with pytest.raises(ValueError, match="advice needs"):
        optimizer.advice()
    train(net, optimizer, range(PROBE_STEPS - 1, 10))
    advice = optimizer.advice()
    assert advice.compresses is pays
    assert advice.measured.link.bandwidth == pytest.approx(bandwidth, rel=0.01)
    texts = hvd.allgather_object(str(advice), name="advice")
    assert len(set(texts)) == 1
    assert any(spec != "Dense()" for spec in chosen(optimizer).values()) is pays
    assert bool(optimizer._hvd.residual) is pays
    assert_ranks_equal(flat(net))


def test_the_choice_is_saved_and_not_made_again(link):
    link(1e4)
    net = model()
    optimizer = made(net)
    train(net, optimizer, range(6))
    weights = {name: x.clone() for name, x in net.state_dict().items()}
    state = optimizer.state_dict()
    state = {**state, "hvd_accordion": _copy(state["hvd_accordion"])}
    saved = {**state, "state": {k: _copy(v) for k, v in state["state"].items()}}
    train(net, optimizer, range(6, 10))
    link(1e13)
    other = model()
    resumed = made(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert chosen(resumed) == chosen(optimizer)
    train(other, resumed, range(6, 10))
    assert torch.equal(flat(net), flat(other))


def _copy(x):
    if isinstance(x, dict):
        return {k: _copy(v) for k, v in x.items()}
    return x.clone() if isinstance(x, torch.Tensor) else x


def test_it_decides_an_accordions_relaxed_side(link):
    link(1e4)
    net = model()
    accordion = Accordion(critical=Dense(), relaxed=AUTO, interval=2, unit="steps", eta=1e9)
    optimizer = made(net, accordion)
    train(net, optimizer, range(10))
    report = {row.name: row for row in optimizer.compression_report()}
    assert {row.regime for row in report.values()} == {None, "relaxed"}
    assert any(row.spec != "Dense()" for row in report.values())
    assert_ranks_equal(flat(net))


def test_a_rank_without_a_backward_pass_takes_part(link):
    link(1e4)
    net = model()
    optimizer = made(net)
    for step in range(6):
        optimizer.zero_grad()
        if hvd.rank() == 0 or step % 2:
            loss_of(net, step).backward()
        optimizer.step()
    assert optimizer.advice().compresses
    assert_ranks_equal(flat(net))


def test_on_the_real_link_the_prediction_is_made_of_what_was_measured():
    net = model()
    optimizer = made(net, {"*.weight": Auto(), "*": None})
    train(net, optimizer, range(5))
    advice = optimizer.advice()
    assert max(advice.measured.ready.values()) > 0 and advice.measured.link.bandwidth > 1e6
    assert all(t > 0 for t in advice.measured.compression.values())
    assert advice.step["chosen"] == min(advice.step.values())
    assert_ranks_equal(flat(net))


def test_there_is_no_advice_without_an_auto():
    optimizer = made(model(), PowerSGD(2))
    with pytest.raises(ValueError, match="advice needs"):
        optimizer.advice()


def test_layers_with_autos_of_their_own(link):
    link(1e4)
    net = model()
    optimizer = made(net, {"7.*": Auto(PowerSGD(2)), "9.*": Auto(TopK(0.02)), "*": None})
    train(net, optimizer, range(6))
    compressed = {name: spec for name, spec in chosen(optimizer).items() if spec != "Dense()"}
    assert compressed == {"7.weight": str(PowerSGD(2)), "9.weight": str(TopK(0.02))}
    assert_ranks_equal(flat(net))


def test_a_table_of_sparse_gradients_is_none_of_its_business(link):
    link(1e4)
    torch.manual_seed(7)
    net = torch.nn.ModuleDict({"table": torch.nn.Embedding(500, 32, sparse=True), "last": torch.nn.Linear(32, 40)})
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), 0.05), net.named_parameters(), compression=AUTO
    )
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randint(0, 500, (8,), generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        net["last"](net["table"](x)).square().mean().backward()
        optimizer.step()
    advice = optimizer.advice()
    assert [row.name for row in advice] == ["last.weight", "last.bias"] and advice[0].chosen.lossy
    assert_ranks_equal(flat(net))


def test_parameters_that_come_later_are_decided_on_then(link):
    link(1e4)
    net, more = model(), torch.nn.Linear(10, 200, bias=False)
    torch.nn.init.constant_(more.weight, 0.01)
    optimizer = made(net)
    train(net, optimizer, range(6))
    before = chosen(optimizer)
    optimizer.add_param_group({"params": [more.weight]})
    for step in range(6, 6 + PROBE_STEPS):
        assert chosen(optimizer) == before | {"param_groups.1.0": "Dense()"}
        optimizer.zero_grad()
        more(net(torch.ones(2, 1, 14, 14) * (step + hvd.rank()))).square().mean().backward()
        optimizer.step()
    assert len(optimizer.advice()) == len(before) + 1 and chosen(optimizer)["param_groups.1.0"] != "Dense()"
    assert_ranks_equal(torch.cat([flat(net), more.weight.detach().double().reshape(-1)]))


def test_a_backward_pass_in_several_parts_is_timed_by_its_last(link):
    link(1e4)
    net = model()
    optimizer = made(net, backward_passes_per_step=2)
    train(net, optimizer, range(5), passes=2)
    assert 0 < max(row.ready for row in optimizer.advice()) < 5
    assert optimizer.advice().compresses
    assert_ranks_equal(flat(net))
