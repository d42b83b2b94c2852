"""From a user's numbers to a method: checks, and the defaults that need no tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from hvd_accordion.compression import CompressionSpec, RandomK
from hvd_accordion.compression.base import size
from hvd_accordion.optim.iterates import Descent, Katyusha, Regulariser
from hvd_accordion.optim.method import Method
from hvd_accordion.policy import assignment
from hvd_accordion.policy.assignment import Compression, Layer, Policy, assign, sides
from hvd_accordion.utils import validation

# a method of layers, the specs that they start with, and the number of ranks
Make = Callable[[Sequence[Layer], Sequence[CompressionSpec], int], Method]
PLAIN_CONVEX = 1e-4  # mu / L1 that theta1 is chosen for where mu = 0


def contraction(policy: Policy) -> Policy:
    """The policy itself. ValueError or TypeError where a spec of it is no contraction compressor."""
    for side in sides(policy):
        if not isinstance(side, CompressionSpec):
            raise TypeError(f"compression must be a spec such as TopK(0.03), or an Accordion of specs, got {policy!r}")
        if side.lossy and not side.error_feedback:
            raise ValueError(
                f"compression must be a contraction, E||x - Q(x)||^2 <= (1 - delta) ||x||^2 with delta > 0: {side} sends "
                "what is not scaled for error feedback; leave out error_feedback=False"
            )
    return policy


def made(make: Make, layers: Sequence[Layer], policy: Mapping[str, Policy], world_size: int) -> Method:
    """The method, for the specs that the layers start with."""
    return make(layers, [assignment.level(x, policy[x.name], 0, world_size, 1) for x in layers], world_size)


def share(layers: Sequence[Layer], specs: Sequence[CompressionSpec], world_size: int) -> float:
    """Bytes of a compressed message, as its rank hands it over, for each of a dense one's: K/d for RandomK."""
    handed = dense = 0.0
    for layer, spec in zip(layers, specs, strict=True):
        dense += layer.nbytes
        messages = spec.messages(layer.shape, layer.dtype, world_size) if spec.lossy else []
        handed += sum(nbytes for _, nbytes in messages) if spec.lossy else layer.nbytes
    return min(1.0, handed / dense)


def katyusha(
    layers: Sequence[Layer],
    specs: Sequence[CompressionSpec],
    world_size: int,
    *,
    name: str,
    smoothness: float | None,
    strong_convexity: float,
    lr: float | None,
    smoothness_factor: float | None,
    p: float | None,
    theta1: float | None,
    theta2: float,
    l1: float,
    l2: float,
    shift: str,
    seed: int,
) -> Method:
    """ECLK or L-Katyusha; the arguments are `ECLK`'s.

    L1 = c L_f with c = 1 (4 under RandomK), p = 3 times the share that travels, theta1 = min(sqrt(mu / (L1 p)) theta2,
    theta2): no tuning. It converged under TopK on all logistic regressions that it was tried on, but not on a quadratic with
    even curvature of which 1 % travelled: that needed c = 8.
    """
    psi = Regulariser(validation.real("l1", l1, 0.0, open_low=False), validation.real("l2", l2, 0.0, open_low=False))
    mu = validation.real("strong_convexity", strong_convexity, 0.0, open_low=False)
    theta2 = validation.real("theta2", theta2, 0.0, 1.0, open_high=True)
    if theta1 is not None:
        theta1 = validation.real("theta1", theta1, 0.0, 1.0, open_high=True)
    p = probability(p, layers, specs, world_size, shift)
    if lr is not None:
        if theta1 is None or smoothness is not None:
            raise ValueError(f"lr={lr!r} takes the place of smoothness and needs theta1, got {smoothness=}, {theta1=}")
        L1 = theta2 / ((1 + theta2) * theta1) / validation.real("lr", lr, 0.0)
    elif smoothness is None:
        raise ValueError("smoothness, the constant L of f, must be given, got None; estimate_smoothness() measures it")
    else:
        L1 = validation.real("smoothness", smoothness, 0.0)
        validation.real("strong_convexity", mu, 0.0, L1, open_low=False)
        factor = 4.0 if any(isinstance(spec, RandomK) for spec in specs) else 1.0
        L1 *= factor if smoothness_factor is None else validation.real("smoothness_factor", smoothness_factor, 0.0)
    if theta1 is None:
        convexity = (mu + psi.l2) / L1 or PLAIN_CONVEX
        theta1 = min(math.sqrt(convexity / p) * theta2, theta2, 1 - theta2)
    if theta1 + theta2 > 1:
        raise ValueError(f"theta1 + theta2 must be at most 1, got {theta1!r} + {theta2!r}")
    return Method(name, Katyusha(L1, mu, theta1, theta2, psi), True, shift, True, p, seed)


def descent(
    layers: Sequence[Layer],
    specs: Sequence[CompressionSpec],
    world_size: int,
    *,
    name: str,
    reduced: bool,
    lr: float | None,
    smoothness: float | None,
    l1: float,
    l2: float,
    seed: int,
    p: float | None = None,
    shift: str = "none",
    has_residual: bool = True,
) -> Method:
    """EC-SGD, EC-LSVRG, L-SVRG or EF21; lr = 1 / smoothness unless given."""
    psi = Regulariser(validation.real("l1", l1, 0.0, open_low=False), validation.real("l2", l2, 0.0, open_low=False))
    if lr is None:
        if smoothness is None:
            raise ValueError(
                "lr or smoothness must be given, got None for both; estimate_smoothness() measures the second"
            )
        lr = 1 / validation.real("smoothness", smoothness, 0.0)
    p = probability(p, layers, specs, world_size, shift) if reduced else 0.0
    return Method(name, Descent(validation.real("lr", lr, 0.0), psi), reduced, shift, has_residual, p, seed)


def check_shift(shift: str) -> None:
    validation.choice("shift", shift, ("refresh", "learnt"))


def probability(
    p: float | None, layers: Sequence[Layer], specs: Sequence[CompressionSpec], world_size: int, shift: str
) -> float:
    """That w moves. By default three times the share that travels, so that refreshing costs some three times as much as
    the rest; under "learnt", where it costs nothing, but h_tau must follow w, the contraction: K/d for TopK."""
    if p is not None:
        return validation.real("p", p, 0.0, 1.0)
    if shift == "learnt":
        kept = sum(x.numel * spec.delta(x.shape) for x, spec in zip(layers, specs, strict=True))
        return kept / sum(x.numel for x in layers)
    return min(1.0, 3 * share(layers, specs, world_size))


def layer_of(name: str, shape: Sequence[int], dtype: str, device: str = "cpu") -> Layer:
    """A vector counts as a matrix of one row: unlike a deep network's, it is what a convex problem has to compress."""
    return Layer(name, tuple(shape) if len(shape) > 1 else (1, size(shape)), dtype, device)


def policies(compression: Compression, names: Sequence[str]) -> dict[str, Policy]:
    """Layer name -> spec or Accordion, all contractions."""
    return {name: contraction(policy) for name, policy in assign(compression, names).items()}
