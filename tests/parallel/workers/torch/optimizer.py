"""The compressing optimizer in the situations that a torch user gets into."""

import itertools
import warnings
import weakref
from types import SimpleNamespace

import horovod.torch as horovod
import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import BF16, Accordion, Dense, PowerSGD, TopK, Warmup
from tests.parallel import user_policy
from tests.parallel.local_memory import Counted
from tests.parallel.workers.torch.common import assert_ranks_equal, batch, flat, loss_of, model, sgd, train

LOSSY = PowerSGD(2)


def wrap(net, optimizer=None, **options):
    options.setdefault("compression", LOSSY)
    return hvd.DistributedOptimizer(optimizer or sgd(net), net.named_parameters(), **options)


def joined_reference(steps, optimizer_of=sgd, passes=1):
    """Training of one process on all ranks' batches."""
    net = model()
    optimizer = optimizer_of(net)
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(passes):
            loss = sum(loss_of(net, step * passes + i, rank) for rank in range(hvd.size())) / hvd.size()
            loss.backward()
        optimizer.step()
    return flat(net)


def test_is_an_optimizer_of_the_users_class():
    net = model()
    inner = torch.optim.AdamW(net.parameters(), lr=0.1)
    optimizer = wrap(net, inner)
    assert isinstance(optimizer, torch.optim.AdamW) and type(optimizer).__name__ == "AdamW"
    assert optimizer.param_groups is inner.param_groups and optimizer.defaults == inner.defaults
    with pytest.raises(ValueError, match="already"):
        wrap(net, optimizer)


def test_lossless_equals_one_process():
    net = model()
    train(net, wrap(net, compression=Dense()), range(10))
    assert torch.allclose(flat(net), joined_reference(10), atol=1e-6)


def test_accumulates_backward_passes():
    net = model()
    optimizer = wrap(net, compression=Dense(), backward_passes_per_step=2)
    train(net, optimizer, range(5), passes=2)
    assert torch.allclose(flat(net), joined_reference(5, passes=2), atol=1e-6)
    optimizer.set_backward_passes_per_step(1)
    train(net, optimizer, range(3))
    optimizer.zero_grad()
    loss_of(net, 0).backward()
    with pytest.raises(AssertionError, match="more than backward_passes_per_step"):
        loss_of(net, 0).backward()
    optimizer.synchronize()


def test_leftover_passes_are_exchanged():
    net = model()
    optimizer = wrap(net, backward_passes_per_step=4)
    loss_of(net, 0).backward()
    optimizer.step()
    assert_ranks_equal(flat(net))


def test_sum():
    net, summed = model(), model()
    train(net, wrap(net, sgd(net, lr=0.02)), range(8))
    train(summed, wrap(summed, sgd(summed, lr=0.02 / hvd.size()), op=hvd.Sum), range(8))
    assert torch.allclose(flat(net), flat(summed), atol=1e-5)


def test_predivide_changes_nothing_but_rounding():
    net, other = model(), model()
    train(net, wrap(net), range(4))
    train(other, wrap(other, gradient_predivide_factor=4.0), range(4))
    assert torch.allclose(flat(net), flat(other), atol=1e-5)


def test_clipping_between_synchronize_and_step():
    net = model()
    optimizer = wrap(net, sgd(net, momentum=0.0, lr=1.0))
    before = flat(net)
    optimizer.zero_grad()
    loss_of(net, 0).backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert (flat(net) - before).norm() <= 1.001e-3
    assert_ranks_equal(flat(net))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(net, 1).backward()
        optimizer.synchronize()
        steps = optimizer.stats.steps
        optimizer.step()
    assert any("skip_synchronize" in str(w.message) for w in caught)
    assert optimizer.stats.steps == steps


def test_zero_grad_in_the_middle_of_an_exchange():
    net = model()
    optimizer = wrap(net)
    train(net, optimizer, range(1))
    loss_of(net, 1).backward()
    with pytest.raises(AssertionError, match="race condition"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


def test_exchange_starts_in_backward():
    net = model()
    optimizer = wrap(net, groups=3)
    train(net, optimizer, range(2))
    optimizer.zero_grad()
    loss_of(net, 2).backward()
    assert len(optimizer._hvd.exchange.started) == len(optimizer._hvd.exchange.plan.groups) >= 3
    assert len(optimizer._hvd.exchange.driver.running) == len(optimizer._hvd.exchange.plan.groups)
    optimizer.step()


def test_closure():
    net = model()
    optimizer = wrap(net, compression=Dense())

    for step in range(5):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(net, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).ndim == 0
    assert torch.allclose(flat(net), joined_reference(5), atol=1e-6)


def test_scheduler_made_before_and_after():
    net = model()
    inner = sgd(net)
    before = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = wrap(net, inner)
    after = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(net, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch can't see that the wrapped optimizer stepped
        before.step()
    after.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
    train(net, optimizer, range(1))
    assert optimizer.stats.steps == 2


def test_grad_scaler_skips_a_bad_step_on_every_rank():
    def run(bad_steps):
        net = model()
        optimizer = wrap(net, sgd(net, momentum=0.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, step)).backward()
            if step in bad_steps and hvd.rank() == hvd.size() - 1:
                net[5].weight.grad[3, 3] = float("inf")
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        return net, optimizer, scaler

    net, optimizer, scaler = run(())
    assert scaler.get_scale() == 256.0
    net, optimizer, scaler = run((0,))
    assert scaler.get_scale() == 128.0
    assert torch.isfinite(flat(net)).all()
    assert all(torch.isfinite(e).all() for e in optimizer._hvd.residual.values())
    assert_ranks_equal(flat(net))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("compression", [LOSSY, TopK(0.05), BF16(), Accordion(interval=3, unit="steps")], ids=str)
def test_bad_gradients_leave_no_trace(value, compression):
    net = model()
    optimizer = wrap(net, sgd(net, momentum=0.0, lr=0.0), compression=compression)
    train(net, optimizer, range(2))
    kept = {k: v.clone() for k, v in optimizer._hvd.residual.items()}
    factors = {k: m["q"].clone() for k, m in optimizer._hvd.channel.memory.items() if m}
    sums = {k: v.clone() for k, v in optimizer._hvd.norms.layers.summed.items()}
    optimizer.zero_grad()
    loss = loss_of(net, 2) * (value if hvd.rank() == 0 else 1.0)
    loss.backward()
    optimizer.synchronize()
    assert not torch.isfinite(net[5].weight.grad).all(), "the optimizer must see it"
    for name, residual in optimizer._hvd.residual.items():
        torch.testing.assert_close(residual, kept[name], rtol=0, atol=1e-7)  # the gradient was in it
    for name, q in factors.items():
        assert torch.equal(optimizer._hvd.channel.memory[name]["q"], q)
    if sums and optimizer._hvd.norms.layers.summed:
        for name, x in sums.items():
            assert torch.equal(optimizer._hvd.norms.layers.summed[name], x)
    train(net, optimizer, range(3, 5))
    assert all(torch.isfinite(e).all() for e in optimizer._hvd.residual.values())


def test_frozen_unused_and_one_sided_parameters():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.body = torch.nn.Linear(40, 40)
            self.frozen = torch.nn.Linear(40, 40)
            self.frozen.requires_grad_(False)
            self.unused = torch.nn.Linear(40, 40)
            self.one_sided = torch.nn.Linear(40, 40)

        def forward(self, x):
            x = self.frozen(self.body(x))
            return self.one_sided(x) if hvd.rank() == 0 else x

    net = Net()
    frozen, unused = net.frozen.weight.clone(), net.unused.weight.clone()
    optimizer = wrap(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for step in range(6):
        optimizer.zero_grad()
        net(torch.randn(4, 40, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    assert torch.equal(net.frozen.weight, frozen) and net.frozen.weight.grad is None
    assert torch.equal(net.unused.weight, unused)
    assert net.one_sided.weight.grad is not None
    assert_ranks_equal(flat(net))


def test_requires_grad_switched_during_training():
    net = model()
    net[5].requires_grad_(False)
    optimizer = wrap(net, compression=Dense())
    before = flat(net[5])
    train(net, optimizer, range(2))
    assert torch.equal(flat(net[5]), before)
    net[5].requires_grad_(True)
    train(net, optimizer, range(2, 4))
    assert not torch.equal(flat(net[5]), before)
    net[7].requires_grad_(False)
    held = flat(net[7])
    train(net, optimizer, range(4, 6))
    assert torch.equal(flat(net[7]), held)
    assert_ranks_equal(flat(net))

    reference = model()
    reference[5].requires_grad_(False)
    plain = sgd(reference)
    for step in range(6):
        if step == 2:
            reference[5].requires_grad_(True)
        if step == 4:
            reference[7].requires_grad_(False)
        plain.zero_grad()
        (sum(loss_of(reference, step, rank) for rank in range(hvd.size())) / hvd.size()).backward()
        plain.step()
    assert torch.allclose(flat(net), flat(reference), atol=1e-6)


def test_shared_parameters():
    net = model()
    net[9].weight = net[7].weight
    optimizer = wrap(net, compression=Dense())
    train(net, optimizer, range(4))
    assert_ranks_equal(flat(net))
    assert len(optimizer._hvd.params) == len(list(net.parameters()))


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_embedding_gradients(sparse_as_dense):
    def net_of():
        torch.manual_seed(3)
        return torch.nn.ModuleDict({"table": torch.nn.Embedding(300, 16, sparse=True), "out": torch.nn.Linear(16, 200)})

    def loss(net, rank):
        words = torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(rank))
        return net["out"](net["table"](words)).square().mean()

    net, reference = net_of(), net_of()
    optimizer = wrap(
        net, torch.optim.SGD(net.parameters(), lr=0.5), compression=Dense(), sparse_as_dense=sparse_as_dense
    )
    plain = torch.optim.SGD(reference.parameters(), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        if step != 2 or hvd.rank() == 0:  # at one step a rank has no gradient at all
            loss(net, hvd.rank()).backward()
        assert step == 2 or net["table"].weight.grad.is_sparse
        optimizer.step()
        plain.zero_grad()
        ranks = range(hvd.size()) if step != 2 else [0]
        (sum(loss(reference, rank) for rank in ranks) / hvd.size()).backward()
        plain.step()
    assert_ranks_equal(flat(net))
    assert torch.allclose(flat(net), flat(reference), atol=1e-6)
    sent = {layer.name: layer.sent_bytes for layer in optimizer.compression_report()}
    rows = 20 * (16 * 4 + 8)  # of a rank's 20 words: values, int64 indices
    dense = 300 * 16 * 4 * 2 * (1 - 1 / hvd.size())
    assert sent["table.weight"] == pytest.approx(dense if sparse_as_dense else rows * (hvd.size() - 1))


def test_a_bad_sparse_gradient_leaves_no_trace():
    net = torch.nn.ModuleDict({"table": torch.nn.Embedding(300, 64, sparse=True), "out": torch.nn.Linear(64, 64)})
    optimizer = wrap(net, torch.optim.SGD(net.parameters(), lr=0.0))
    for step in range(2):
        optimizer.zero_grad()
        net["out"](net["table"](torch.arange(step, step + 9))).square().mean().backward()
        optimizer.step()
    kept = optimizer._hvd.residual["out.weight"].clone()
    handle = net["table"].weight.register_hook(lambda g: g * float("nan"))
    optimizer.zero_grad()
    out = net["out"](net["table"](torch.arange(9)).detach() * 1.0)
    (out.square().mean() + net["table"](torch.arange(9)).sum()).backward()
    optimizer.step()
    handle.remove()
    torch.testing.assert_close(optimizer._hvd.residual["out.weight"], kept, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("compression", [LOSSY, TopK(0.05), Dense(), BF16()], ids=str)
def test_other_dtypes(dtype, compression):
    net = model(dtype)
    optimizer = wrap(net, compression=compression)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(net, step, dtype=dtype).backward()
        optimizer.step()
    assert all(p.grad.dtype == dtype for p in net.parameters())
    assert all(
        e.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for e in optimizer._hvd.residual.values()
    )
    assert_ranks_equal(flat(net))


def test_a_changed_dtype_or_shape_is_an_error():
    net = model()
    optimizer = wrap(net)
    train(net, optimizer, range(1))
    net.to(torch.float64)
    optimizer.zero_grad()
    loss_of(net, 1, dtype=torch.float64).backward()
    with pytest.raises(ValueError, match=r"gradient of .* was float32"):
        optimizer.step()


def test_channels_last():
    net = model().to(memory_format=torch.channels_last)
    train(net, wrap(net), range(3))
    other = model()
    train(other, wrap(other), range(3))
    assert torch.allclose(flat(net), flat(other), atol=1e-4)


def prepared(how):
    """A network whose gradients lie in memory in an unusual way, and what empties them between steps."""
    net = model(torch.float16 if how == "fp16" else torch.float32)
    if how == "channels_last":
        net = net.to(memory_format=torch.channels_last)
    if not how.startswith("flat"):
        return net, lambda optimizer: optimizer.zero_grad(set_to_none=how != "kept")
    params = list(net.parameters())
    if how == "flat, each":  # a view of all of a buffer is not that buffer
        buffers = [torch.zeros(p.numel()) for p in params]
        for p, part in zip(params, buffers, strict=True):
            p.grad = part.view_as(p)
        return net, lambda optimizer: torch._foreach_zero_(buffers)
    buffer = torch.zeros(sum(p.numel() for p in params) + 5)
    for p, part in zip(params, buffer.split([*(p.numel() for p in params), 5]), strict=False):
        p.grad = part.view_as(p)
    return net, lambda optimizer: buffer.zero_()


def span(x):
    """The bytes of a dense tensor in memory."""
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


@pytest.mark.parametrize("compression", [LOSSY, TopK(0.05), BF16(), Accordion(interval=2, unit="steps")], ids=str)
@pytest.mark.parametrize("how", ["flat", "flat, each", "channels_last", "fp16", "kept", "dropped"])
def test_gradients_are_exchanged_rightly_however_they_lie_in_memory(how, compression):
    """What was applied and what residuals hold is what was given, whatever the user does to gradients after a step."""
    net, emptied = prepared(how)
    optimizer = wrap(net, sgd(net, lr=0.0, momentum=0.0), compression=compression)
    engine, dtype = optimizer._hvd, next(net.parameters()).dtype
    places = {name: p.grad.data_ptr() for name, p in net.named_parameters() if how.startswith("flat")}
    given, applied, new = {}, {}, {}
    for name, p in net.named_parameters():
        given[name], applied[name] = (torch.zeros(p.shape, dtype=torch.float64) for _ in range(2))
        p.register_hook(lambda g, name=name: new.update({name: g.double().contiguous()}))
    for step in range(5):
        emptied(optimizer)
        loss_of(net, step, dtype=dtype).backward()
        optimizer.step()
        for name, p in net.named_parameters():
            given[name] += hvd.allreduce(new[name], name=f"given.{name}")
            applied[name] += p.grad.double()
        assert_ranks_equal(torch.cat([p.grad.double().reshape(-1) for p in net.parameters()]))
        spans = sorted(map(span, [*engine.residual.values(), *(p.grad for p in net.parameters())]))
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "memory is shared"
        for name, p in net.named_parameters():
            assert name not in engine.residual or engine.residual[name].data_ptr() != p.grad.data_ptr()
            assert not how.startswith("flat") or p.grad.data_ptr() == places[name], (
                "the user's buffer must hold the gradient"
            )
            assert p.grad.dtype == dtype and p.grad.shape == p.shape
            p.grad.fill_(float("nan") if how in ("fp16", "dropped") else 7.0)
    assert engine.residual or (how, compression) == ("fp16", BF16())  # which makes nothing smaller
    for name, total in given.items():
        held = hvd.allreduce(engine.residual[name].double(), name=f"held.{name}") if name in engine.residual else 0.0
        tolerance = 2e-3 if how == "fp16" else 1e-6  # a mean is rounded to the gradient's dtype
        assert (applied[name] + held - total).norm() <= tolerance * total.norm(), name


def test_several_optimizers():
    nets = [model(), model()]
    optimizers = [wrap(nets[0], compression=TopK(0.05)), wrap(nets[1])]
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, step).backward()
        for optimizer in reversed(optimizers):
            optimizer.step()
    for net in nets:
        assert_ranks_equal(flat(net))


def test_add_param_group():
    net, extra = model(), model()
    optimizer = wrap(net)
    train(net, optimizer, range(2))
    optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.01})
    for step in range(3):
        optimizer.zero_grad()
        (loss_of(net, step) + loss_of(extra, step)).backward()
        optimizer.step()
    assert_ranks_equal(flat(net))
    assert_ranks_equal(flat(extra))
    assert optimizer.compression_report()[-4].spec == str(LOSSY)


def test_takes_over_what_horovod_wrapped():
    net = model()
    theirs = horovod.DistributedOptimizer(sgd(net), net.named_parameters(), backward_passes_per_step=2)
    optimizer = hvd.DistributedOptimizer(theirs, compression=Dense())
    train(net, optimizer, range(5), passes=2)
    assert not theirs._handles
    assert optimizer.backward_passes_per_step == 2
    assert set(optimizer._hvd.params) == {name for name, _ in net.named_parameters()}
    assert torch.allclose(flat(net), joined_reference(5, passes=2), atol=1e-6)


def test_process_set(first):
    net = model()
    optimizer = wrap(net, process_set=first)
    train(net, optimizer, range(2))
    if hvd.rank() == 0:
        assert optimizer.stats.steps == 2 and optimizer.stats.sent_bytes == 0
    alone = model()
    plain = sgd(alone)
    train(alone, plain, range(2))
    assert torch.equal(flat(net), flat(alone)), "one rank exchanges with nobody; the others step by themselves"
    hvd.barrier()  # who is done must not end Horovod under the others


def test_process_set_of_some(others):
    net = model()
    for compression in (LOSSY, TopK(0.05), BF16(), Accordion(interval=2, unit="steps")):
        train(net, wrap(net, process_set=others, compression=compression), range(4))
    if others.included():
        everyone = hvd.allgather(flat(net)[None], process_set=others)
        assert len(everyone) == others.size() and all(torch.equal(everyone[0], other) for other in everyone)
    hvd.barrier()  # who is done must not end Horovod under the others


def test_compiled_model():
    net = model()
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = wrap(net, compression=Dense())
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step, hvd.rank())
        torch.nn.functional.cross_entropy(compiled(x), y).backward()
        assert step == 0 or optimizer._hvd.exchange.started
        optimizer.step()
    assert torch.allclose(flat(net), joined_reference(3), atol=1e-5)


def test_broadcast_optimizer_state():
    net = model()
    optimizer = wrap(net, compression=Accordion(interval=2, unit="steps"))
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.stats.steps == 0
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    train(net, optimizer, range(5))
    residual = {k: v.clone() for k, v in optimizer._hvd.residual.items()}
    if hvd.rank() != 0:
        optimizer._hvd.channel.memory.clear()
        optimizer._hvd.controller.levels.observers[0].regimes.clear()
        optimizer._hvd.controller.counters.step = 0
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer._hvd.controller.step == 5
    assert all(torch.equal(residual[k], v) for k, v in optimizer._hvd.residual.items())
    train(net, optimizer, range(5, 8))
    assert_ranks_equal(flat(net))


def test_lr_drop_makes_all_layers_critical():
    net = model()
    optimizer = wrap(net, sgd(net, lr=0.02), compression=Accordion(interval=2, unit="steps", eta=1e6))
    train(net, optimizer, range(4))
    assert {r.regime for r in optimizer.compression_report() if r.regime} == {"relaxed"}
    optimizer.param_groups[0]["lr"] *= 0.1 if hvd.rank() == 0 else 1.0  # rank 0 speaks for all
    train(net, optimizer, range(4, 5))
    assert {r.regime for r in optimizer.compression_report() if r.regime} == {"critical"}
    train(net, optimizer, range(5, 8))


def test_a_dropped_optimizer_lets_go_of_its_hooks():
    net = model()
    optimizer = wrap(net)
    train(net, optimizer, range(1))
    node = torch.autograd.graph.get_gradient_edge(net[0].weight).node  # with which the hooks would live on
    handle = node.register_hook(lambda *_: None)
    assert len(handle.hooks_dict_ref()) == 2
    del optimizer
    assert len(handle.hooks_dict_ref()) == 1
    loss_of(net, 1).backward()
    optimizer = wrap(net)
    train(net, optimizer, range(2))
    assert_ranks_equal(flat(net))


@pytest.mark.parametrize("compression", [LOSSY, TopK(0.05), BF16(), Dense()], ids=str)
def test_gradients_that_are_let_go_of_stay_for_one_update_at_most(compression):
    net = model()
    optimizer = wrap(net, compression=compression)
    before = []
    for step in range(4):
        train(net, optimizer, range(step, step + 1))
        assert not any(grad() for grad in before)
        before = [weakref.ref(p.grad) for p in net.parameters()]
        optimizer.zero_grad()


def test_lbfgs():
    net = model()
    optimizer = wrap(net, torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, tolerance_change=0, tolerance_grad=0))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_ranks_equal(flat(net))


def test_a_policy_of_the_users():
    def trained(net, optimizer, steps):
        seen = []
        for step in steps:
            seen.append({row.spec for row in optimizer.compression_report() if row.name in ("5.weight", "7.weight")})
            train(net, optimizer, range(step, step + 1))
        return seen

    net, other = model(), model()
    optimizer = wrap(net, compression=user_policy.Staircase(first=3))
    assert trained(net, optimizer, range(8)) == [{str(spec)} for spec in user_policy.EXPECTED]
    assert_ranks_equal(flat(net))
    policies = {"5.*": user_policy.Staircase(3), "*": PowerSGD(2)}
    first = wrap(other, compression=policies)
    trained(other, first, range(4))
    first.release()
    resumed = wrap(other, compression=policies)
    resumed.load_state_dict(first.state_dict())
    assert trained(other, resumed, range(4, 5)) == [{str(user_policy.EXPECTED[4]), str(PowerSGD(2))}]


def test_warm_up():
    net = model()
    optimizer = wrap(net, compression=Warmup(PowerSGD(1), steps=4, levels=2))
    ranks = []
    for step in range(6):
        ranks.append(next(row.spec for row in optimizer.compression_report() if row.name == "7.weight"))
        train(net, optimizer, range(step, step + 1))
    assert ranks == [str(PowerSGD(r)) for r in (4, 4, 2, 2, 1, 1)]
    assert_ranks_equal(flat(net))


def test_memory_that_is_a_ranks_own():
    net = model()
    optimizer = wrap(net, compression=Counted(0.2))
    train(net, optimizer, range(3))
    engine = optimizer._hvd

    def memory():
        return {(name, key): x.clone() for name, kept in engine.channel.memory.items() for key, x in kept.items()}

    before = memory()
    everyone = hvd.allgather(before["7.weight", "total"].reshape(1, -1), name="everyone")
    assert len(everyone.unique(dim=0)) == hvd.size()
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert all(torch.equal(x, before[key]) for key, x in memory().items()) and len(memory()) == len(before)

    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(x, before[key]) for key, x in memory().items())
    mine = optimizer.state_dict()
    ours = mine["hvd_accordion"]
    optimizer.load_state_dict({**mine, "hvd_accordion": {**ours, "size": 2 * hvd.size()}})  # there were twice the ranks
    assert all(torch.equal(x, before[key] / (2 if key[1] == "part" else 1)) for key, x in memory().items())
    optimizer.load_state_dict({**mine, "hvd_accordion": {**ours, "rank": hvd.rank() + 1}})
    assert memory() == {}  # another rank's

    optimizer.load_state_dict(mine)
    engine.transport = SimpleNamespace(rank=hvd.rank(), size=3 * hvd.size())  # as if so many had been
    engine.move()
    engine.agree()
    moved = memory()
    for (name, key), x in before.items():
        assert torch.allclose(moved[name, key], x / (3 if key == "part" else 1)), key
    train(net, optimizer, range(3, 5))
    assert_ranks_equal(flat(net))
