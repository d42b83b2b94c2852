"""The methods as optimizer classes, whatever the framework: names, arguments, defaults. Shells are mixed in behind them."""

from __future__ import annotations

from functools import partial
from typing import Any

from hvd_accordion.compression import Dense, TopK
from hvd_accordion.optim import factories
from hvd_accordion.policy.assignment import Compression

TOP = TopK(0.03)


class ECLK:
    """Error compensated loopless Katyusha (Qian, Richtarik, Zhang, NeurIPS 2021, arXiv 2010.00091).

    Minimises P(x) = (1/n) sum_tau f^tau(x) + l1 ||x||_1 + (l2/2) ||x||^2 at an accelerated linear rate under any contraction
    compressor, on convex problems; ranks may have unlike data. Nothing is promised of deep networks. The formulas
    stand at `optim.iterates.Katyusha` and `optim.method.Method`.

    Parameters hold x, where gradients are taken; `solution()` swaps in y, which the theory is about. One round of
    collectives a step. Every rank must start from the same parameters (`hvd.broadcast_parameters`).

    Memory beside the parameters, in copies of them: y, z, w, the residual, grad f^tau(w), h; under shift="learnt" h_tau too.

    Args:
        params: as any optimizer's.
        compression: a spec that is a contraction (all are, with error feedback; unbiased ones are scaled by 1/(1 + omega) by
            themselves), an Accordion, or a dict from parameter-name glob to these. Vectors are compressed too.
        smoothness: L of f, > 0; `estimate_smoothness` measures it.
        strong_convexity: mu of f, >= 0; 0 is plain convex.
        p: probability that w moves, in (0, 1]. Default: 3 times the share of bytes that travels; with shift="learnt" the
            contraction, which is K/d for TopK.
        theta1, theta2: weights in (0, 1), theta1 + theta2 <= 1. Default of theta1: min(sqrt(mu / (L1 p)), 1) theta2.
        l1, l2: of the part that is not in the closures, >= 0; taken through its prox.
        shift: "refresh" sends grad f^tau(w) dense whenever w has moved; "learnt" sends no gradient dense but the first.
        lr: eta / L1, in place of `smoothness`, where nobody knows one; needs theta1.
        smoothness_factor: c in L1 = c smoothness, > 0. Default: 1, and 4 under RandomK. Where all directions curve about as
            much and little travels it must be larger, up to about 1/(10 delta); a warning says so when it diverges.
        seed: of the coin and everything random in compression; the global generators are left alone.
        process_set: the ranks that take part.
        steps_per_epoch, logger: as `DistributedOptimizer`'s; epochs matter to an Accordion and to the logger.

    Raises ValueError or TypeError for what is out of range, and at the first step, on every rank the same, where ranks are
    configured differently or start from different parameters.
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
    """Loopless Katyusha (Kovalev, Horvath, Richtarik 2019, arXiv 1901.08689), uncompressed: one dense allreduce a step.

    Args: as `ECLK`'s; p is 1 by default.
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
    """x+ = prox(x - lr g): what the methods without momentum have in common."""

    def _begin(
        self, params: Any, compression: Compression, name: str, seed: int, options: dict[str, Any], **chosen: Any
    ) -> None:
        chosen = {"reduced": False, **chosen}
        make = partial(factories.descent, name=name, seed=seed, **chosen)
        super().__init__(params, compression, make, seed, **options)  # type: ignore[call-arg]


class ECSGD(_Descent):
    """SGD with error feedback (Seide et al. 2014; Stich et al. 2018, arXiv 1809.07599); with full gradients EC-GD.

    Comes to a stand at a distance from the solution where ranks have unlike data.

    Args:
        lr: step size, > 0; default: 1 / smoothness.
        the others: as `ECLK`'s.
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
    """Error compensated loopless SVRG: ECLK's estimate and shifts without its momentum.

    Args:
        lr: step size, > 0; default: 1 / smoothness.
        the others: as `ECLK`'s.
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
    """Loopless SVRG (Kovalev, Horvath, Richtarik 2019, arXiv 1901.08689), uncompressed.

    Args:
        lr: step size, > 0; default: 1 / smoothness.
        the others: as `ECLK`'s.
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
    """EF21 (Richtarik, Sokolov, Fatkhullin 2021, arXiv 2106.05203): each rank's gradient is learnt by compressed differences.

    Args:
        lr: step size, > 0; default: 1 / smoothness.
        the others: as `ECLK`'s.
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
