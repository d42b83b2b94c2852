"""Horovod's documented elastic pattern with five compressions side by side, each on a model of its own.

In every step ranks are compared bit by bit, and the books are kept: what was applied and what waits in the residuals is what
was given, so a mean with a wrong scale, or a residual that is dropped, doubled or kept too large, shows.
"""

import torch
from changes import Changes

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, PowerSGD, TopK

LR = 0.02
KINDS = {
    "none": {},
    "powersgd": {"compression": PowerSGD(2)},
    "topk": {"compression": TopK(0.1)},
    "accordion": {"compression": Accordion(PowerSGD(4), TopK(0.05), interval=7, unit="steps", eta=0.3)},
    "batch": {"batch_size": AccordionBatchSize(24, 96, interval=8, unit="steps", eta=1e3, warmup=0)},
}

torch.set_num_threads(1)
hvd.init()
changes = Changes()


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))


def made(net, kind):
    sgd = torch.optim.SGD(net.parameters(), lr=LR)
    options = {"min_compress_numel": 64, "steps_per_epoch": 100, **KINDS[kind]}
    if kind == "none":
        options = {}
    return hvd.DistributedOptimizer(sgd, net.named_parameters(), **options)


TEACHER = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))


def batch(step):
    x = torch.randn(24 // hvd.size(), 24, generator=torch.Generator().manual_seed(1000 * step + hvd.rank()))
    return x, x @ TEACHER


def flat(tensors):
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def mean(x, name):
    return hvd.allreduce(x, name=name)


def waiting(net, optimizer):
    """The mean over the ranks of what waits in residuals and in micro-batches that are not applied yet."""
    kept = optimizer.state_dict().get("hvd_accordion", {"residual": {}, "accumulated": {"sums": {}}})
    parts = kept["residual"], kept["accumulated"]["sums"]
    total = [sum(part.get(name, torch.zeros_like(p)) for part in parts) for name, p in net.named_parameters()]
    return mean(flat(total), "waiting")


class Books:
    """Of one model: since the ranks were gathered, what was given must be what was applied and what waits."""

    def __init__(self, kind, net, optimizer):
        self.kind, self.net, self.optimizer = kind, net, optimizer

    def open(self):
        self.given, self.begin = 0.0, flat(self.net.parameters()) / -LR + waiting(self.net, self.optimizer)

    def give(self, loss):
        gradient = torch.autograd.grad(loss, list(self.net.parameters()), retain_graph=True)
        self.given = self.given + mean(flat(gradient), "given")

    def check(self, step):
        weights = flat(self.net.parameters())
        everyone = hvd.allgather(weights[None], name="weights")
        assert all(torch.equal(everyone[0], other) for other in everyone), f"{self.kind}: ranks differ at step {step}"
        now = weights / -LR + waiting(self.net, self.optimizer)
        off = (now - self.begin - self.given).abs().max() / (1e-3 + self.given.abs().max())
        assert off < 1e-3, f"{self.kind}, {hvd.size()} ranks: the books are off by {off} at step {step}"


models = {kind: network() for kind in KINDS}
optimizers = {kind: made(models[kind], kind) for kind in KINDS}
books = [Books(kind, models[kind], optimizers[kind]) for kind in KINDS]


@hvd.elastic.run
def train(state):
    changes.enter()
    for book in books:
        book.open()
    done = False
    while not done:
        x, y = batch(state.step)
        losses = {}
        for book in books:
            book.optimizer.zero_grad()
            loss = (book.net(x) - y).pow(2).mean()
            book.give(loss)
            loss.backward()
            losses[book.kind] = loss.item()
            book.optimizer.step()
        state.step += 1
        for book in books:
            book.check(state.step)
        if changes.steps % 4 == 0:
            changes.record(rank=hvd.rank(), size=hvd.size(), step=state.step, losses=losses)
        if state.step % 3 == 0:
            state.commit()
        done = changes.step(hvd.rank(), hvd.size())
    changes.record(
        rank=hvd.rank(),
        size=hvd.size(),
        step=state.step,
        regimes=sorted({row.regime for row in optimizers["accordion"].compression_report() if row.regime}),
        passes=optimizers["batch"]._hvd.controller.passes,
        over=True,
    )


state = hvd.elastic.TorchState(
    **{f"model_{kind}": net for kind, net in models.items()},
    **{f"optimizer_{kind}": optimizer for kind, optimizer in optimizers.items()},
    step=0,
)
train(state)
