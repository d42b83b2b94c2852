"""Builds a method from the user's arguments: checks them and derives defaults that need no tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from hvd_accordion.compression import CompressionSpec, RandomK
from hvd_accordion.compression.base import size
from hvd_accordion.optim.iterates import Descent, Katyusha, Regulariser
from hvd_accordion.optim.method import Method
from hvd_accordion.policy import assignment
from hvd_accordion.policy.assignment import Compression, assign
from hvd_accordion.policy.layers import Layer
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.utils import validation

# builds the method from the layers, their initial specs and the number of ranks
Make = Callable[[Sequence[Layer], Sequence[CompressionSpec], int], Method]
PLAIN_CONVEX = 1e-4  # the mu / L1 assumed for the default of theta1 if mu = 0


def contraction(layer: str, policy: Policy) -> Policy:
    """Returns the policy, if all of its specs are contraction compressors.

    Raises:
        TypeError: the policy has something other than specs.
        ValueError: a spec is not a contraction.
    """
    if policy.candidates:
        raise TypeError(f"compression must be a spec such as TopK(0.03), or an Accordion of specs, got {policy!r}")
    for spec in policy.specs(layer):
        if spec.lossy and not spec.error_feedback:
            raise ValueError(
                f"compression must be a contraction, E||x - Q(x)||^2 <= (1 - delta) ||x||^2 with delta > 0: {spec} is "
                "not scaled for error feedback; leave out error_feedback=False"
            )
    return policy


def build(make: Make, layers: Sequence[Layer], policy: Mapping[str, Policy], world_size: int) -> Method:
    """Builds the method for the specs of the first step."""
    return make(layers, [assignment.level(x, policy[x.name], 0, world_size, 1) for x in layers], world_size)


def payload_ratio(layers: Sequence[Layer], specs: Sequence[CompressionSpec], world_size: int) -> float:
    """Returns the payload bytes of a compressed message relative to a dense one, at most 1: K/d for RandomK."""
    compressed = dense = 0.0
    for layer, spec in zip(layers, specs, strict=True):
        dense += layer.nbytes
        messages = spec.messages(layer.shape, layer.dtype, world_size) if spec.lossy else []
        compressed += sum(nbytes for _, nbytes in messages) if spec.lossy else layer.nbytes
    return min(1.0, compressed / dense)


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
    """Builds ECLK or L-Katyusha. The arguments are those of `ECLK`.

    Defaults: L1 = c L_f with c = 1 (4 for RandomK), p = 3 times the payload ratio, theta1 = min(sqrt(mu / (L1 p)), 1) theta2.
    With these and TopK, all tested logistic regressions converged. A quadratic of uniform curvature, of which 1 % was sent,
    needed c = 8.
    """
    psi = Regulariser(validation.real("l1", l1, 0.0, open_low=False), validation.real("l2", l2, 0.0, open_low=False))
    mu = validation.real("strong_convexity", strong_convexity, 0.0, open_low=False)
    theta2 = validation.real("theta2", theta2, 0.0, 1.0, open_high=True)
    if theta1 is not None:
        theta1 = validation.real("theta1", theta1, 0.0, 1.0, open_high=True)
    p = probability(p, layers, specs, world_size, shift)
    if lr is not None:
        if theta1 is None or smoothness is not None:
            raise ValueError(f"lr={lr!r} replaces smoothness and requires theta1, got {smoothness=}, {theta1=}")
        L1 = theta2 / ((1 + theta2) * theta1) / validation.real("lr", lr, 0.0)
    elif smoothness is None:
        raise ValueError("smoothness, the constant L of f, must be given, got None; estimate_smoothness() estimates it")
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
    """Builds EC-SGD, EC-LSVRG, L-SVRG or EF21. By default lr = 1 / smoothness."""
    psi = Regulariser(validation.real("l1", l1, 0.0, open_low=False), validation.real("l2", l2, 0.0, open_low=False))
    if lr is None:
        if smoothness is None:
            raise ValueError(
                "lr or smoothness must be given, got None for both; estimate_smoothness() estimates smoothness"
            )
        lr = 1 / validation.real("smoothness", smoothness, 0.0)
    p = probability(p, layers, specs, world_size, shift) if reduced else 0.0
    return Method(name, Descent(validation.real("lr", lr, 0.0), psi), reduced, shift, has_residual, p, seed)


def check_shift(shift: str) -> None:
    """Raises ValueError unless `shift` is "refresh" or "learnt"."""
    validation.choice("shift", shift, ("refresh", "learnt"))


def probability(
    p: float | None, layers: Sequence[Layer], specs: Sequence[CompressionSpec], world_size: int, shift: str
) -> float:
    """Returns the probability that w moves.

    Default: three times the payload ratio, so that dense messages take about three times the bytes of compressed ones. With
    shift="learnt" there are no dense messages, but h_tau must follow w. Its default is the contraction, K/d for TopK.
    """
    if p is not None:
        return validation.real("p", p, 0.0, 1.0)
    if shift == "learnt":
        contracted = sum(x.numel * spec.delta(x.shape) for x, spec in zip(layers, specs, strict=True))
        return contracted / sum(x.numel for x in layers)
    return min(1.0, 3 * payload_ratio(layers, specs, world_size))


def layer_of(name: str, shape: Sequence[int], dtype: str, device: str = "cpu") -> Layer:
    """Describes a parameter. A vector counts as a matrix of one row, because the vectors of a convex problem are its bulk."""
    return Layer(name, tuple(shape) if len(shape) > 1 else (1, size(shape)), dtype, device)


def policies(compression: Compression, names: Sequence[str]) -> dict[str, Policy]:
    """Assigns a policy to each layer name and checks that all specs are contractions."""
    return {name: contraction(name, policy) for name, policy in assign(compression, names).items()}
