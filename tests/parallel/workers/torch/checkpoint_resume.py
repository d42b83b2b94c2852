"""10 steps, saved by checkpoint_save.py; 10 more in these new processes: bit-equal to 20 in one."""

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion.comm import naming
from tests.parallel.workers.torch.common import (
    SPECS,
    assert_ranks_equal,
    checkpoint,
    checkpointed,
    flat,
    model,
    sgd,
    train,
)


@pytest.mark.parametrize("name", SPECS)
def test_resume_is_exact(name):
    net, optimizer = checkpointed(name)
    saved = torch.load(checkpoint(name, "ten"), weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    train(net, optimizer, range(10, 20))
    expected = torch.load(checkpoint(name, "twenty"), weights_only=True)
    assert torch.equal(flat(net), expected["net"])
    ours, theirs = optimizer.state_dict()["hvd_accordion"], expected["optimizer"]["hvd_accordion"]
    assert ours["residual"].keys() == theirs["residual"].keys()
    for key in ours["residual"]:
        assert torch.equal(ours["residual"][key], theirs["residual"][key])
    for key in ours["memory"]:
        assert torch.equal(ours["memory"][key]["q"], theirs["memory"][key]["q"])
    assert ours["controller"]["policies"] == theirs["controller"]["policies"]
    assert ours["controller"]["stats"]["sent_bytes"] == theirs["controller"]["stats"]["sent_bytes"]


def test_one_ranks_file_for_all():
    """A residual is not taken by a rank that did not save it; training goes on with equal weights."""
    net, optimizer = checkpointed("powersgd4")
    saved = torch.load(checkpoint("powersgd4", "ten", rank=0), weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    residual = optimizer._hvd.residual.values()
    assert residual and all(x.any().item() == (hvd.rank() == 0) for x in residual)
    train(net, optimizer, range(10, 13))
    assert_ranks_equal(flat(net))


def test_another_number_of_ranks():
    _, optimizer = checkpointed("topk")
    saved = torch.load(checkpoint("topk", "ten"), weights_only=True)
    state = saved["optimizer"]["hvd_accordion"]
    before = {k: v.clone() for k, v in state["residual"].items()}
    state["size"] = 2 * hvd.size()
    optimizer.load_state_dict(saved["optimizer"])
    for key, value in before.items():
        assert torch.allclose(optimizer._hvd.residual[key], value / 2)


def loaded(name, saved, warning):
    net, optimizer = checkpointed(name)
    net.load_state_dict(saved["net"])
    with pytest.warns(UserWarning, match=warning) as told:
        optimizer.load_state_dict(saved["optimizer"])
    assert len(told) == 1
    train(net, optimizer, range(10, 12))
    assert_ranks_equal(flat(net))
    return optimizer


def test_state_of_another_model():
    saved = torch.load(checkpoint("topk", "ten"), weights_only=True)
    residual = saved["optimizer"]["hvd_accordion"]["residual"]
    residual |= {"other.weight": torch.zeros(3), "9.weight": torch.zeros(3)}
    optimizer = loaded("topk", saved, r"what was kept of 9\.weight, other\.weight: no such parameters")
    assert optimizer.stats.steps == 12 and optimizer._hvd.residual["9.weight"].shape == (48, 48)


@pytest.mark.parametrize(
    ("before", "after", "warning"),
    [
        ("accordion", "topk", "no Accordion decides now.*; memory of .*, which their compression does not need"),
        ("topk", "accordion", r"an Accordion starts anew, for no regimes were saved of 0\.weight"),
        ("accordion", "accordion-kinds", "memory of"),
        ("powersgd4", "globs", "an Accordion starts anew"),
    ],
)
def test_resumes_under_another_compression(before, after, warning):
    saved = torch.load(checkpoint(before, "ten"), weights_only=True)
    optimizer = loaded(after, saved, warning)
    assert optimizer.stats.steps == 12 and optimizer._hvd.residual.keys() >= {"5.weight", "7.weight"}


def test_plain_checkpoint_is_horovods():
    net = model()
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters())
    train(net, optimizer, range(2))
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    _, lossy = checkpointed("topk")
    lossy.load_state_dict(optimizer.state_dict())


def adam(net, name):
    inner = torch.optim.AdamW(net.parameters(), lr=1e-3)
    options = {} if name == "none" else {"compression": SPECS[name], "steps_per_epoch": 4}
    return hvd.DistributedOptimizer(inner, net.named_parameters(), **options)


@pytest.mark.parametrize("name", ["none", *SPECS])
def test_restore_is_exact(name):
    """What follows a restore is what followed the commit, as often as it is restored."""
    net = model()
    optimizer = adam(net, name)
    state = hvd.elastic.TorchState(model=net, optimizer=optimizer, step=0)
    state.sync()
    train(net, optimizer, range(6))
    state.step = 6
    state.save()
    runs = []
    for _ in range(3):
        assert state.step == 6
        train(net, optimizer, range(6, 12))
        state.step = 12
        runs.append((flat(net), optimizer.stats.steps, optimizer.stats.sent_bytes))
        state.restore()
    assert all(torch.equal(runs[0][0], weights) for weights, *_ in runs) and len({run[1:] for run in runs}) == 1


@pytest.mark.parametrize("name", ["none", *SPECS])
def test_sync_brings_a_new_rank_to_the_point_of_the_others(name, monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    net = model()
    state = hvd.elastic.TorchState(model=net, optimizer=adam(net, name), step=0)
    state.sync()
    train(net, state.optimizer, range(5))
    state.step = 5
    kept = {key: x.clone() for key, x in getattr(state.optimizer._hvd, "residual", {}).items()}
    if hvd.rank() == hvd.size() - 1:  # another in its place, which has never seen a step
        naming.gathered()
        net = model()
        state = hvd.elastic.TorchState(model=net, optimizer=adam(net, name), step=0)
        kept = {key: torch.zeros_like(x) for key, x in kept.items()}
    else:
        state.reset()
    state.sync()
    assert state.step == 5 and state.optimizer.stats.steps == 5
    residual = getattr(state.optimizer._hvd, "residual", {})
    assert residual.keys() == kept.keys() and all(torch.equal(residual[key], x) for key, x in kept.items())
    train(net, state.optimizer, range(5, 12))
    assert_ranks_equal(flat(net))
