"""One update's gradients: averaged over the ranks, or left as they are where a rank is alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from hvd_accordion.ops import torch as ops
from hvd_accordion.torch.exchange.norms import GradientNorms
from hvd_accordion.torch.exchange.participation import Participation
from hvd_accordion.torch.exchange.update_exchange import UpdateExchange


def average(exchange: UpdateExchange, participation: Participation, norms: GradientNorms, further: bool) -> float:
    """Writes means over the ranks into `.grad`, and adds them to the norms. Returns the bytes that this rank sent.

    `further`: whether this is another exchange of a step that is counted already, whose gradients are not measured.
    """
    if participation.turnouts is not None:
        participation.announce(exchange.batch.count + 1, further)
    unseen = exchange.start_rest()
    results, sent = exchange.finish(norms.measuring, participation.writes)
    factor = participation.factor(exchange.batch.divisor)
    # a mean counts for as much as it is made of
    measure = None if further else partial(norms.add, weight=participation.last_update_steps)
    exchange.write(results, factor, measure, participation.writes)
    for p in (exchange.params[name] for name in unseen if participation.writes):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # as Horovod leaves it
    return sent


def apply_alone(
    exchange: UpdateExchange, participation: Participation, norms: GradientNorms, further: bool, names: Sequence[str]
) -> float:
    """The same for one rank: `.grad` stays, but for a batch's sums and for residuals of a time with more ranks.

    `names`: of the parameters that the update changes.
    """
    batch, residual, sums = exchange.batch, exchange.channel.residual, {}
    participation.announce(batch.count + 1, further)
    factor = participation.factor(batch.divisor)
    for name in names:
        grad, unsent = batch.take(name), residual.pop(name, None)
        if unsent is not None:
            sums[name] = unsent if grad is None else unsent + grad
        elif grad is not None and participation.turnouts is not None:
            sums[name] = grad * factor
    exchange.groups.prepare()
    exchange.groups.write(sums)
    for name in () if further else names if norms.measures_model else norms.measured:
        grad = exchange.params[name].grad
        if grad is not None and not grad.is_sparse:
            norms.add({name: grad.detach()}, ops.all_finite([grad]), participation.last_update_steps)
    return 0.0
