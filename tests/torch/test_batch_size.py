"""AccordionBatchSize under torch, on one rank: every update is that of a loop that accumulates by hand."""

import copy
import itertools

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, TopK

STEPS = 7  # micro-batches an epoch: with batches of 4, one of 4 and one of 3
LR = 0.05


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(60, 50), torch.nn.ReLU(), torch.nn.Linear(50, 40)).to(dtype)


def loss_of(net, step):
    x = torch.randn(8, 60, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
    return net(x).square().mean()


def rule(**options):
    """Large from the second epoch on: no norm changes by 1,000 times."""
    return AccordionBatchSize(8, 32, **{"eta": 1e3, "interval": 1, "warmup": 2, **options})


def made(net, batch_size, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3)
    return hvd.DistributedOptimizer(optimizer, net.named_parameters(), batch_size=batch_size, **options)


def by_hand(net, groups, optimizer=None, clip=None):
    """`groups`: for each update, how many micro-batches and what scales the rate."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3)
    steps, rates = itertools.count(), [group["lr"] for group in optimizer.param_groups]
    for size, scale in groups:
        optimizer.zero_grad()
        for _ in range(size):
            loss_of(net, next(steps)).backward()
        for p in net.parameters():
            p.grad /= size
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        optimizer.step()


# batches of 1 in the first epoch and in the second, for which the first has nothing to compare with
SMALL = [(1, 1.0)] * (2 * STEPS)
GROWN = [[(4, s), (3, s * 0.75)] for s in (1.0, 2.5, 4.0, 4.0)]  # by epoch, with a warm-up of two
BY_HAND = [*SMALL, *itertools.chain(*GROWN)]


def assert_equal(net, other):
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("told", ["steps_per_epoch", "end_epoch"])
@pytest.mark.parametrize("clears", ["before", "after", "model"])
def test_equals_accumulation_by_hand(told, clears):
    net, other = network(), network()
    optimizer = made(net, rule(), steps_per_epoch=STEPS if told == "steps_per_epoch" else None)
    for step in range(6 * STEPS):
        if clears != "after":
            (optimizer if clears == "before" else net).zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        if clears == "after":
            optimizer.zero_grad()
        if told == "end_epoch" and step % STEPS == STEPS - 1:
            optimizer.end_epoch()
        assert [group["lr"] for group in optimizer.param_groups] == [LR]
    by_hand(other, BY_HAND)
    assert_equal(net, other)
    assert (optimizer.stats.steps, optimizer.stats.updates) == (6 * STEPS, 2 * STEPS + 8)
    assert "batch size 32 (relaxed): 4 micro-batches of 8, learning rate x4" in str(optimizer.compression_report())


def test_parameters_move_with_the_last_micro_batch_alone():
    net = network()
    optimizer, moved = made(net, rule(), steps_per_epoch=STEPS), []
    for step in range(4 * STEPS):
        before = copy.deepcopy(list(net.parameters()))
        complete = optimizer.completes_batch
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        moved.append(not all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True)))
        assert moved[-1] is complete
    assert moved == [True] * 2 * STEPS + [False, False, False, True, False, False, True] * 2


def test_clipping_acts_on_the_whole_batch():
    net, other = network(), network()
    optimizer = made(net, rule(), steps_per_epoch=STEPS)
    for step in range(4 * STEPS):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        with optimizer.skip_synchronize():
            optimizer.step()
    by_hand(other, BY_HAND[: 2 * STEPS + 4], clip=1e-3)
    assert_equal(net, other)


def test_closures():
    net, other = network(), network()
    optimizer, steps, losses = made(net, rule(), steps_per_epoch=STEPS), itertools.count(), []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, next(steps))
        loss.backward()
        return loss

    for _ in range(4 * STEPS):
        losses.append(optimizer.step(closure).detach())
    by_hand(other, BY_HAND[: 2 * STEPS + 4])
    assert_equal(net, other)
    assert len(losses) == 4 * STEPS and LR == optimizer.param_groups[0]["lr"]


def test_an_optimizer_with_many_calls_of_its_closure_is_refused():
    net = network()
    optimizer = made(net, rule(), torch.optim.LBFGS(net.parameters(), max_iter=3), steps_per_epoch=STEPS)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="batch_size: LBFGS calls its closure several times"):
        optimizer.step(closure)


def test_grad_scaler():
    net, other = network(), network()
    optimizer, scaler = made(net, rule(), steps_per_epoch=STEPS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4 * STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        if optimizer.completes_batch:
            optimizer.synchronize()
            assert optimizer.completes_batch
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    by_hand(other, BY_HAND[: 2 * STEPS + 4])
    assert_equal(net, other)
    optimizer.zero_grad()
    scaler.scale(loss_of(net, 0)).backward()
    with pytest.raises(ValueError, match=r"optimizer.completes_batch"):
        scaler.step(optimizer)


def test_a_step_left_out_after_an_overflow_loses_no_later_micro_batch():
    net = network()
    optimizer = made(net, rule(warmup=0), steps_per_epoch=8)
    for step in range(4 * 8):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        if step == 19:  # completes the first large batch; as a GradScaler does that found Inf
            optimizer.synchronize()
            continue
        assert optimizer.completes_batch is (step < 16 or step % 4 == 3)
        optimizer.step()
    assert (optimizer.stats.steps, optimizer.stats.updates) == (32, 16 + 4)
    assert hvd.DistributedOptimizer(torch.optim.SGD(network().parameters(), lr=LR)).completes_batch


def test_all_groups_rates_are_scaled_and_a_scheduler_sees_its_own():
    net, other = network(), network()

    def adam(of):
        groups = [{"params": of[0].parameters(), "lr": 0.01}, {"params": of[2].parameters(), "lr": torch.tensor(0.003)}]
        return torch.optim.AdamW(groups, foreach=False, capturable=False)

    optimizer = made(net, rule(), adam(net), steps_per_epoch=STEPS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    for step in range(4 * STEPS):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        scheduler.step()
    by_hand(other, BY_HAND[: 2 * STEPS + 4], adam(other))
    assert_equal(net, other)
    assert scheduler.get_last_lr() == [0.01, torch.tensor(0.003)]


def test_a_drop_of_the_rate_makes_the_batch_small_again():
    net = network()
    optimizer, updates = made(net, rule(), steps_per_epoch=STEPS), []
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = LR if epoch < 3 else LR / 10
        before = optimizer.stats.updates
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
        updates.append(optimizer.stats.updates - before)
    # seen with the first update of the epoch, which is still large; calm again after that epoch
    assert updates == [7, 7, 2, 1 + 3, 2]


def test_half_precision_adds_up_in_fp32():
    net = network(torch.bfloat16)
    optimizer = made(net, rule(warmup=0), torch.optim.SGD(net.parameters(), lr=0.0), steps_per_epoch=4)
    totals = [torch.zeros(p.shape) for p in net.parameters()]
    for step in range(12):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        for total, p in zip(totals, net.parameters(), strict=True):
            total += p.grad.float() if step >= 8 else 0.0
        optimizer.step()
    for total, p in zip(totals, net.parameters(), strict=True):
        assert torch.equal(p.grad, (total / 4).bfloat16())


def test_missing_gradients_count_as_zeros():
    net = network()
    optimizer = made(net, rule(warmup=0), torch.optim.SGD(net.parameters(), lr=0.0), steps_per_epoch=4)
    for step in range(12):
        optimizer.zero_grad()
        if step in (8, 11):
            net[2](torch.ones(2, 50)).sum().backward()
        else:
            loss_of(net, step).backward()
        optimizer.step()
    expected = network()
    for step in (9, 10):
        loss_of(expected, step).backward()
    assert torch.equal(net[0].weight.grad, expected[0].weight.grad / 4)


def test_norms_weigh_each_update_by_its_micro_batches():
    """With a rate of 0 all epochs have the same summed gradient, whatever the batches."""
    net = network()
    optimizer = made(net, rule(norm="exact"), torch.optim.SGD(net.parameters(), lr=0.0), steps_per_epoch=STEPS)
    batch, norms = optimizer._hvd.controller.batch.rule, []
    for _ in range(3):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
        norms.append(batch.norms["whole model"])
    other = network()
    for step in range(STEPS):
        loss_of(other, step).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in other.parameters()]).double().norm()
    assert optimizer.stats.updates == 2 * STEPS + 2
    assert norms == pytest.approx([float(expected)] * 3, rel=1e-5)


@pytest.mark.parametrize("cut", [2 * STEPS, 3 * STEPS + 2, 4 * STEPS + 5])
def test_resumes_bit_equal(cut):
    """Also in the middle of a batch."""
    nets = [network(), network()]
    whole = made(nets[0], rule(), steps_per_epoch=STEPS)
    for step in range(6 * STEPS):
        if step == cut:
            saved = copy.deepcopy((nets[0].state_dict(), whole.state_dict()))
        whole.zero_grad()
        loss_of(nets[0], step).backward()
        whole.step()
    resumed = made(nets[1], rule(), steps_per_epoch=STEPS)
    nets[1].load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for step in range(cut, 6 * STEPS):
        resumed.zero_grad()
        loss_of(nets[1], step).backward()
        resumed.step()
    assert_equal(*nets)
    assert resumed.stats.updates == whole.stats.updates
    with pytest.warns(UserWarning, match="an AccordionBatchSize: batch_size is None"):
        made(nets[1], None, compression=TopK(0.1)).load_state_dict(saved[1])


def test_what_cannot_be_is_refused():
    def refused(message, error=ValueError, **options):
        net = network()
        with pytest.raises(error, match=message):
            made(net, **{"batch_size": rule(), **options})

    refused("batch_size must be an AccordionBatchSize or None, got 8", TypeError, batch_size=8)
    refused("backward_passes_per_step must be 1 with batch_size", backward_passes_per_step=2)
    refused(r"op must be hvd.Average or hvd.Sum with batch_size=AccordionBatchSize\(8, 32", op=hvd.Adasum)
    with pytest.raises(ValueError, match="passes must be 1 with batch_size, got 3"):
        made(network(), rule()).set_backward_passes_per_step(3)


def test_composes_with_accordion_and_logs(recorder):
    net = network()
    accordion = Accordion(TopK(0.5), TopK(0.1), interval=1, eta=1e3)
    optimizer = made(net, rule(), compression=accordion, steps_per_epoch=STEPS, logger=recorder)
    for step in range(4 * STEPS):
        optimizer.zero_grad()
        loss_of(net, step % STEPS).backward()
        optimizer.step()
    assert recorder.params["batch_size.large"] == 32 and recorder.params["batch_size.warmup"] == 2
    told = [(m["batch_size"], m["lr_scale"], m["updates"], m["critical_batch"]) for _, m in recorder.epochs]
    assert told == [(8, 1.0, 7, 1.0), (8, 1.0, 7, 1.0), (32, 1.0, 2, 0.0), (32, 2.5, 2, 0.0)]
    windows = [layers for _, layers in recorder.windows]
    assert [set(layers) for layers in windows] == [{"0.weight", "2.weight", "whole model"}] * 4
    assert [w["whole model"].regime for w in windows] == ["critical", "relaxed", "relaxed", "relaxed"]
    assert [w["whole model"].spec for w in windows] == ["batches of 8"] + ["batches of 32"] * 3
    # an Accordion's norms weigh updates too: a larger batch is no change
    assert all(w[name].ratio < 0.5 for w in windows[1:] for name in w)


class Recorder:
    def __init__(self):
        self.params, self.epochs, self.windows = {}, [], []

    def start(self, params):
        self.params = dict(params)

    def log_epoch(self, epoch, metrics):
        self.epochs.append((epoch, dict(metrics)))

    def log_window(self, window, layers):
        self.windows.append((window, dict(layers)))


@pytest.fixture
def recorder():
    return Recorder()
