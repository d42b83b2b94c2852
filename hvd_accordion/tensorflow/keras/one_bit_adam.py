"""1-bit Adam and 0/1 Adam as Keras optimizers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import keras

import hvd_accordion.compression as specs
from hvd_accordion.compression import CompressionSpec, EFSignSGD
from hvd_accordion.optim.momentum_schedule import Schedule
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.tensorflow.keras import copies
from hvd_accordion.tensorflow.keras.compressed_momentum import CompressedMomentum

SIGNS = EFSignSGD()


class Saved(CompressedMomentum):
    """Its config: numbers, schedule and spec. A process set and a logger are given to `hvd.load_model`."""

    _schedule_names: tuple[str, ...] = ("warmup_steps",)

    def get_config(self) -> dict[str, Any]:
        """Raises nothing for a compression that is no spec, but `from_config` does."""
        compression = self._momentum.configuration.policy
        name = type(compression).__name__ if isinstance(compression, CompressionSpec) else ""
        return {
            **super().get_config(),
            **{key: getattr(self, key) for key in ("beta_1", "beta_2", "epsilon")},
            **{key: getattr(self._schedule, key) for key in self._schedule_names},
            "compression": [name, asdict(compression) if name else {}],
            "seed": self._momentum.settings.seed,
            "min_compress_numel": self._momentum.settings.min_compress_numel,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """ValueError where the compression was no spec of this package."""
        config = dict(config)
        if isinstance(config.get("compression"), list):
            name, fields = config["compression"]
            kind = getattr(specs, name, None) if name else None
            if kind is None:
                raise ValueError(
                    f"compression of a saved {cls.__name__} must have been a spec of hvd_accordion such as EFSignSGD(): load "
                    "with compile=False, and compile with a new optimizer"
                )
            config["compression"] = kind(**fields)
        if (loading := copies.wrapping_of(cls, "")) is not None:  # by hvd.load_model
            given = loading.arguments
            config |= {key: given[key] for key in ("process_set", "logger")}
            config |= {} if given["compression"] is None else {"compression": given["compression"]}
        return super().from_config(config, custom_objects)


@keras.saving.register_keras_serializable(package="hvd_accordion")
class OneBitAdam(Saved):
    """1-bit Adam (Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He, ICML 2021, arXiv 2102.02888).

    In the warm-up it is AdamW on dense means of gradients. Then the second moment v is frozen, and each rank r sends its
    first moment instead of a gradient, compressed, with what was not sent before:

        m_r = beta_1 m + (1 - beta_1) g_r
        m   = mean over r of C(m_r + e_r),   e_r = m_r + e_r - C(m_r + e_r)
        x   = (1 - learning_rate weight_decay) x - learning_rate m / (sqrt(v) + epsilon)

    both moments corrected for their start at 0 as in Adam. Weights with v = 0, which had no gradient in the warm-up, stay
    where they are but for weight decay. Variables are equal on all ranks after each step; they must be so at the start
    (`hvd.callbacks.BroadcastGlobalVariablesCallback`).

    Memory: two moments, as AdamW, and the residual e_r.

    Args:
        learning_rate, beta_1, beta_2, epsilon, weight_decay: as `keras.optimizers.AdamW`'s, but for a `weight_decay` of None.
        warmup_steps: N >= 1; None: until ||v||_1, corrected for its start, has changed by less than 4 % in the last
            1 / (1 - beta_2) steps. That is measured each tenth of these, for all ranks alike. Give N where
            gradients are clipped by norm: then ||v||_1 looks stable from the start.
        compression: of first moments, as a `DistributedOptimizer`'s. 1-D and small tensors travel dense.
        process_set, seed, min_compress_numel: as a `DistributedOptimizer`'s; ranks outside of `process_set` must not use one.
        logger: as a `DistributedOptimizer`'s; metrics come with an epoch's end.
        options: as `keras.optimizers.Optimizer`'s. Clipping acts on the rank's own gradient.

    `epsilon` is added to the corrected root, as in the papers and in torch; Keras's Adam adds it before the correction.

    Callbacks of this package end its epochs and broadcast its state. IndexedSlices are made dense. A model saved with it
    loads by `hvd.load_model`, or by Keras's where this module is imported; save one file per rank to resume exactly.

    Raises ValueError or TypeError for arguments out of range; at the first step, on every rank the same, where ranks are
    configured differently; and under mixed_float16.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        *,
        warmup_steps: int | None = None,
        compression: Compression = SIGNS,
        **options: Any,
    ) -> None:
        numbers = learning_rate, beta_1, beta_2, epsilon, weight_decay
        super().__init__(*numbers, Schedule(warmup_steps), compression, **options)


@keras.saving.register_keras_serializable(package="hvd_accordion")
class ZeroOneAdam(Saved):
    """0/1 Adam (Lu, Li, Zhang, De Sa, He, 2022, arXiv 2202.06009): 1-bit Adam that exchanges less often.

    The method and its arguments are those of `hvd_accordion.torch.ZeroOneAdam`; all else is as `OneBitAdam`'s. Variables are
    equal on all ranks after an exchange.

    Args:
        warmup_steps: steps in which the second moment is updated, as `OneBitAdam`'s.
        kappa: dense steps at each interval of the warm-up, >= 1; the interval then doubles.
        double_every: steps after the warm-up after which the interval of exchanges doubles, >= 1.
        max_interval: the largest interval of exchanges, >= 1.
    """

    _schedule_names = ("warmup_steps", "kappa", "double_every", "max_interval")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        *,
        warmup_steps: int | None = None,
        kappa: int = 16,
        double_every: int = 32_768,
        max_interval: int = 16,
        compression: Compression = SIGNS,
        **options: Any,
    ) -> None:
        schedule = Schedule(warmup_steps, kappa, double_every, max_interval)
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay, schedule, compression, **options)
