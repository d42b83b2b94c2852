"""1-bit Adam and 0/1 Adam as torch optimizers."""

from __future__ import annotations

from typing import Any

from hvd_accordion.compression import EFSignSGD
from hvd_accordion.optim.momentum_schedule import Schedule
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.torch.optim.compressed_momentum import CompressedMomentum

SIGNS = EFSignSGD()


class OneBitAdam(CompressedMomentum):
    """1-bit Adam (Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He, ICML 2021, arXiv 2102.02888).

    In the warm-up it is AdamW on dense means of gradients. Then the second moment v is frozen, and each rank r sends its
    first moment instead of a gradient, compressed, with what was not sent before:

        m_r = beta1 m + (1 - beta1) g_r
        m   = mean over r of C(m_r + e_r),   e_r = m_r + e_r - C(m_r + e_r)
        x   = (1 - lr weight_decay) x - lr m / (sqrt(v) + eps)

    both moments corrected for their start at 0 as in Adam. Weights with v = 0, which had no gradient in the warm-up, stay
    where they are but for weight decay. A step's exchange does not overlap backward. Parameters are equal on all ranks
    after each step; they must be so at the start (`hvd.broadcast_parameters`).

    Memory: two moments, as AdamW, and the residual e_r.

    Args:
        params, lr, betas, eps, weight_decay: as `torch.optim.AdamW`'s, but for a `weight_decay` of 0.
        warmup_steps: N >= 1; None: until ||v||_1, corrected for its start, has changed by less than 4 % in the last
            1 / (1 - beta2) steps. That is measured each tenth of these, on rank 0 for all. Give N where
            gradients are clipped by norm: then ||v||_1 looks stable from the start.
        compression: of first moments, as a `DistributedOptimizer`'s. 1-D and small tensors travel dense.
        named_parameters, seed, min_compress_numel, process_set: as a `DistributedOptimizer`'s; ranks outside of
            `process_set` must not make one.
        logger: as a `DistributedOptimizer`'s; metrics come with `end_epoch()`.

    Accumulate gradients by several backward passes before `step()`. `torch.nn.utils.clip_grad_norm_` acts on the rank's own
    gradient. Under a `torch.amp.GradScaler` all ranks skip a step for which one of them has found NaN or Inf, and each keeps
    its own scale.

    Raises ValueError or TypeError for arguments out of range, and, on every rank the same, where ranks are configured
    differently.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int | None = None,
        compression: Compression = SIGNS,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, Schedule(warmup_steps), compression, **options)


class ZeroOneAdam(CompressedMomentum):
    """0/1 Adam (Lu, Li, Zhang, De Sa, He, 2022, arXiv 2202.06009): 1-bit Adam that exchanges less often.

    The warm-up sends less: the second moment v follows dense means of gradients at intervals that double after each `kappa`
    of them, and in between first moments are exchanged, compressed, as in `OneBitAdam`. After it, ranks exchange each H
    steps, with H doubled each `double_every` steps up to `max_interval`. Between exchanges each rank r steps on its own:

        m_r = beta1 m_r + (1 - beta1) g_r
        x_r = (1 - lr weight_decay) x_r - lr m_r / (sqrt(v) + eps)

    and an exchange takes all from the common x of the last one, with L the sum of the rates since then:

        m = mean over r of C(u_r + e_r),   u_r = mean of the m_r since then, weighted by their rates
        x = (product of the 1 - lr weight_decay since then) x - L m / (sqrt(v) + eps),   m_r = m

    The paper sends L u_r; with u_r a change of the rate leaves the residual e_r in scale. Where a step is dense, no moment is
    sent beside it. Parameters are equal on all ranks after an exchange; `common_parameters()` shows those of the last.

    Memory: two moments and the residual; from the first local step on also u_r and the common x.

    Args:
        warmup_steps: steps in which v is updated, as `OneBitAdam`'s.
        kappa: dense steps at each interval, >= 1.
        double_every: steps after which H doubles, >= 1: those in which the rate halves, in the paper.
        max_interval: the largest H, >= 1.

    All other arguments and all else are as `OneBitAdam`'s.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int | None = None,
        kappa: int = 16,
        double_every: int = 32_768,
        max_interval: int = 16,
        compression: Compression = SIGNS,
        **options: Any,
    ) -> None:
        schedule = Schedule(warmup_steps, kappa, double_every, max_interval)
        super().__init__(params, lr, betas, eps, weight_decay, schedule, compression, **options)
