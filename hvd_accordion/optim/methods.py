"""The methods as framework-independent optimizer classes: names, arguments, defaults. Front ends derive from them."""

from __future__ import annotations

from functools import partial
from typing import Any

from hvd_accordion.compression import Dense, TopK
from hvd_accordion.optim import factories
from hvd_accordion.policy.assignment import Compression

TOP = TopK(0.03)


class ECLK:
    """Error compensated loopless Katyusha (Qian, Richtarik, Zhang, NeurIPS 2021, arXiv 2010.00091).

    Minimises P(x) = (1/n) sum_tau f^tau(x) + l1 ||x||_1 + (l2/2) ||x||^2. For convex f the rate is linear and accelerated
    with any contraction compressor, also if the ranks' data differ. There is no guarantee for deep networks. The formulas
    are documented in `optim.iterates.Katyusha` and `optim.method.Method`.

    Parameters hold x, where gradients are taken. `solution()` swaps in y, to which the theory applies. A step takes one
    round of collectives. Every rank must start from the same parameters (`hvd.broadcast_parameters`).

    Memory in copies of the parameters: y, z, w, the residual, grad f^tau(w), h, and h_tau with shift="learnt".

    Args:
        params: as in any optimizer.
        compression: a spec that is a contraction, an Accordion, or a dict from parameter-name glob to these. With error
            feedback all specs are contractions; unbiased ones are scaled by 1/(1 + omega). Vectors are compressed too.
        smoothness: L of f, > 0. `estimate_smoothness` estimates it.
        strong_convexity: mu of f, >= 0; 0 means convex.
        p: probability that w moves, in (0, 1]. Default: 3 times the fraction of bytes that is sent. With shift="learnt" the
            contraction, which is K/d for TopK.
        theta1: weight of z, in (0, 1), theta1 + theta2 <= 1. Default: min(sqrt(mu / (L1 p)), 1) theta2.
        theta2: weight of w, in (0, 1).
        l1: weight of ||x||_1, which is not part of the closures, >= 0. Handled by its proximal operator.
        shift: "refresh" sends grad f^tau(w) dense whenever w has moved. "learnt" sends only the first gradient dense.
        l2: weight of ||x||^2 / 2, likewise.
        lr: eta / L1, instead of `smoothness`; requires theta1.
        smoothness_factor: c in L1 = c smoothness, > 0. Default: 1, and 4 for RandomK. If the curvature is similar in all
            directions and little is sent, c must be larger, up to about 1/(10 delta). A warning is issued on divergence.
        seed: of the coin and of random compression. Global random generators are not used.
        process_set: the ranks that take part.
        steps_per_epoch: as in `DistributedOptimizer`. Accordion and the logger use epochs.
        logger: as in `DistributedOptimizer`.

    Raises:
        ValueError: an argument is out of range. At the first step, on every rank: the ranks' configurations or initial
            parameters differ.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        params: Any,
        compression: Compression = TOP,
        smoothness: float | None = None,
        strong_convexity: float = 0.0,
        p: float | None = None,
        theta1: float | None = None,
        theta2: float = 0.5,
        l1: float = 0.0,
        shift: str = "refresh",
        *,
        l2: float = 0.0,
        lr: float | None = None,
        smoothness_factor: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        factories.check_shift(shift)
        make = partial(
            factories.katyusha,
            name="ECLK",
            smoothness=smoothness,
            strong_convexity=strong_convexity,
            lr=lr,
            smoothness_factor=smoothness_factor,
            p=p,
            theta1=theta1,
            theta2=theta2,
            l1=l1,
            l2=l2,
            shift=shift,
            seed=seed,
        )
        super().__init__(params, compression, make, seed, **options)  # type: ignore[call-arg]


class LKatyusha:
    """Loopless Katyusha (Kovalev, Horvath, Richtarik 2019, arXiv 1901.08689) without compression: one allreduce per step.

    Arguments are those of `ECLK`, without `compression` and `shift`. The default of p is 1.
    """

    def __init__(
        self,
        params: Any,
        smoothness: float | None = None,
        strong_convexity: float = 0.0,
        p: float | None = None,
        theta1: float | None = None,
        theta2: float = 0.5,
        l1: float = 0.0,
        l2: float = 0.0,
        *,
        lr: float | None = None,
        smoothness_factor: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        make = partial(
            factories.katyusha,
            name="L-Katyusha",
            smoothness=smoothness,
            strong_convexity=strong_convexity,
            lr=lr,
            smoothness_factor=smoothness_factor,
            p=p,
            theta1=theta1,
            theta2=theta2,
            l1=l1,
            l2=l2,
            shift="none",
            seed=seed,
        )
        super().__init__(params, Dense(), make, seed, **options)  # type: ignore[call-arg]


class _Descent:
    """Base class of the methods without momentum: x+ = prox(x - lr g)."""

    def _begin(
        self, params: Any, compression: Compression, name: str, seed: int, options: dict[str, Any], **chosen: Any
    ) -> None:
        chosen = {"reduced": False, **chosen}
        make = partial(factories.descent, name=name, seed=seed, **chosen)
        super().__init__(params, compression, make, seed, **options)  # type: ignore[call-arg]


class ECSGD(_Descent):
    """SGD with error feedback (Seide et al. 2014; Stich et al. 2018, arXiv 1809.07599). With full gradients this is EC-GD.

    If the ranks' data differ, it converges only to a neighbourhood of the solution. Other arguments are those of `ECLK`.

    Args:
        lr: step size, > 0. Default: 1 / smoothness.
        smoothness: L of f, > 0, if lr is not given.
    """

    def __init__(
        self,
        params: Any,
        compression: Compression = TOP,
        lr: float | None = None,
        smoothness: float | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._begin(params, compression, "EC-SGD", seed, options, lr=lr, smoothness=smoothness, l1=l1, l2=l2)


class ECLSVRG(_Descent):
    """Error compensated loopless SVRG: ECLK's estimate and shifts without momentum. Other arguments are those of `ECLK`.

    Args:
        lr: step size, > 0. Default: 1 / smoothness.
        smoothness: L of f, > 0, if lr is not given.
    """

    def __init__(
        self,
        params: Any,
        compression: Compression = TOP,
        lr: float | None = None,
        smoothness: float | None = None,
        p: float | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        shift: str = "refresh",
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        factories.check_shift(shift)
        chosen = {"lr": lr, "smoothness": smoothness, "p": p, "l1": l1, "l2": l2, "shift": shift, "reduced": True}
        self._begin(params, compression, "EC-LSVRG", seed, options, **chosen)


class LSVRG(_Descent):
    """Loopless SVRG (Kovalev, Horvath, Richtarik 2019, arXiv 1901.08689) without compression.

    Other arguments are those of `ECLK`, without `compression` and `shift`.

    Args:
        lr: step size, > 0. Default: 1 / smoothness.
        smoothness: L of f, > 0, if lr is not given.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        smoothness: float | None = None,
        p: float | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        chosen = {"lr": lr, "smoothness": smoothness, "p": p, "l1": l1, "l2": l2, "reduced": True}
        self._begin(params, Dense(), "L-SVRG", seed, options, **chosen)


class EF21(_Descent):
    """EF21 (Richtarik, Sokolov, Fatkhullin 2021, arXiv 2106.05203).

    All ranks track each rank's gradient, from compressed differences. Other arguments are those of `ECLK`.

    Args:
        lr: step size, > 0. Default: 1 / smoothness.
        smoothness: L of f, > 0, if lr is not given.
    """

    def __init__(
        self,
        params: Any,
        compression: Compression = TOP,
        lr: float | None = None,
        smoothness: float | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        chosen = {"lr": lr, "smoothness": smoothness, "l1": l1, "l2": l2, "shift": "learnt", "has_residual": False}
        self._begin(params, compression, "EF21", seed, options, **chosen)
