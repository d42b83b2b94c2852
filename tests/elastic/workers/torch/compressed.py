"""Horovod's documented elastic pattern with several compressions side by side, each on a model of its own.

In every step ranks are compared bit by bit, and the books are kept: what was applied and what waits is what was given. So a
mean with a wrong scale shows, and a residual that is dropped, doubled or scaled wrongly.
"""

import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, PowerSGD, RandomK, TopK
from tests.elastic.changes import Changes

LR, BATCH, EXAMPLES = 0.1, 24, 1200
KINDS = {
    "none": {},
    "powersgd": {"compression": PowerSGD(2)},
    "topk": {"compression": TopK(0.1)},
    "randomk": {"compression": RandomK(0.2)},
    "accordion": {"compression": Accordion(PowerSGD(4), TopK(0.05), interval=7, unit="steps", eta=0.3)},
    "batch": {"batch_size": AccordionBatchSize(BATCH, 4 * BATCH, interval=8, unit="steps", eta=1e3, warmup=0)},
}

torch.set_num_threads(1)
hvd.init()
changes = Changes()


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))


def optimizer_of(net, options):
    sgd = torch.optim.SGD(net.parameters(), lr=LR)
    return hvd.DistributedOptimizer(sgd, net.named_parameters(), min_compress_numel=64, **options)


generator = torch.Generator().manual_seed(1)
examples = torch.randn(EXAMPLES, 24, generator=generator)
dataset = torch.utils.data.TensorDataset(examples, examples @ torch.randn(24, 4, generator=generator) / 5)
models = {kind: network() for kind in KINDS}
optimizers = {kind: optimizer_of(models[kind], options) for kind, options in KINDS.items()}


def flat(tensors):
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def everywhere(of):
    """A vector of this rank: what `of` gives of each model, one after another."""
    return torch.cat([of(kind) for kind in KINDS])


def weights(kind):
    return flat(models[kind].parameters())


def kept(kind, part):
    """Of the named part of what the optimizer keeps for the model's layers."""
    state = optimizers[kind].state_dict().get("hvd_accordion", {"residual": {}, "accumulated": {"sums": {}}})
    its = {**state, **state["accumulated"]}[part]
    return flat(its.get(name, torch.zeros_like(p)) for name, p in models[kind].named_parameters())


def residuals(kind):
    return kept(kind, "residual")


def waiting(kind):
    return residuals(kind) + kept(kind, "sums")


def total():
    """What was applied until now, and the mean of what waits."""
    return everywhere(weights) / -LR + hvd.allreduce(everywhere(waiting), name="waiting")


@hvd.elastic.run
def train(state):
    changes.enter()
    held = state.held.get(changes.host)  # each rank's share of the mean, as it was among the ranks of before
    share = everywhere(residuals) / hvd.size()
    assert torch.allclose(share, torch.zeros_like(share) if held is None else held, atol=1e-7), "residuals"
    begin, given, done = total(), 0.0, False
    while not done:
        loader = torch.utils.data.DataLoader(dataset, BATCH // hvd.size(), sampler=state.sampler)
        for i, (x, y) in enumerate(loader):
            losses, gradients = {}, []
            for kind, net in models.items():
                optimizers[kind].zero_grad()
                loss = (net(x) - y).pow(2).mean()
                gradients += torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
                loss.backward()
                optimizers[kind].step()
                losses[kind] = loss.item()
            given = given + hvd.allreduce(flat(gradients))  # no name: Horovod numbers it, alike on ranks old and new
            state.sampler.record_batch(i, len(x))
            state.step += 1
            check(state, begin + given)
            if changes.steps == 0 or state.step % 8 == 0:
                record(state, losses=losses)
            if state.step % 3 == 0:
                state.commit()
            done = changes.step(hvd.rank(), hvd.size())
            if done:
                break
        else:
            state.sampler.set_epoch(state.sampler.epoch + 1)
    report = optimizers["accordion"].compression_report()
    regimes = sorted({row.regime for row in report if row.regime})
    record(state, regimes=regimes, passes=optimizers["batch"]._hvd.controller.batch.passes, losses=losses, over=True)


def check(state, expected):
    mine = everywhere(weights)
    everyone = hvd.allgather(mine[None], name="weights")
    assert all(torch.equal(mine, other) for other in everyone), f"ranks differ at step {state.step}"
    now, begin = total(), 0
    for kind in KINDS:
        part = slice(begin, begin := begin + weights(kind).numel())
        off = (now[part] - expected[part]).abs().max() / expected[part].abs().max()
        assert off < 1e-4, f"{kind}, {hvd.size()} ranks: the books are off by {off} at step {state.step}"
    shares = hvd.allgather(everywhere(residuals)[None] / hvd.size(), name="shares")
    state.held = dict(zip(hvd.allgather_object(changes.host, name="hosts"), shares, strict=True))


def record(state, **what):
    changes.record(rank=hvd.rank(), size=hvd.size(), step=state.step, **what)


state = hvd.elastic.TorchState(
    **{f"model_{kind}": net for kind, net in models.items()},
    **{f"optimizer_{kind}": optimizer for kind, optimizer in optimizers.items()},
    sampler=hvd.elastic.ElasticSampler(dataset, seed=5),
    step=0,
    held={},
)
train(state)
