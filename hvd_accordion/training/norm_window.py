"""Sums of averaged gradients over a window, and their norms: one for torch, TensorFlow and `optim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping

from hvd_accordion.comm.collectives import Tensor
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.policy import norm_sampling


class NormWindow:
    """Adds up, since a window's start, the entries of which a rule needs the norm.

    Args:
        sample_size: of a layer's name and its number of entries, how many of them are added up.
        seed: of which they are.
        summed: layer name -> vector of fp32 at least: a mapping of any kind, by default an empty dict.
    """

    def __init__(
        self,
        ops: Ops,
        sample_size: Callable[[str, int], int],
        seed: int,
        summed: MutableMapping[str, Tensor] | None = None,
    ) -> None:
        self.ops, self.sample_size, self.seed = ops, sample_size, seed
        self.summed: MutableMapping[str, Tensor] = {} if summed is None else summed
        self._entries: dict[tuple[str, int], Tensor] = {}  # by layer and sample size: positions; missing: all

    def add(self, means: Mapping[str, Tensor], is_finite: Tensor | None = None, weight: float = 1) -> None:
        """Adds `weight` times the averaged gradients. Nothing where the step met NaN or Inf, as the flag says."""
        if not means:
            return
        samples = self.ops.upcast([self.sample(name, mean) for name, mean in means.items()])
        new = [(name, x) for name, x in zip(means, samples, strict=True) if name not in self.summed]
        if new:
            zeros = self.ops.zeros_like([x for _, x in new])
            self.summed.update(zip((name for name, _ in new), zeros, strict=True))
        sums = self.ops.accumulate([self.summed[name] for name in means], samples, weight, is_finite)
        self.summed.update(zip(means, sums, strict=True))

    def sample(self, name: str, mean: Tensor) -> Tensor:
        """The entries of a layer that count, as a vector."""
        flat = self.ops.reshape(mean, (-1,))
        count = int(flat.shape[0])
        size = self.sample_size(name, count)
        if size >= count:
            return flat
        if (name, size) not in self._entries:
            self._entries[name, size] = norm_sampling.entries(self.ops, name, count, size, self.seed, flat)
        return self.ops.take(flat, self._entries[name, size])

    def norms(self, names: Iterable[str]) -> list[float]:
        """The sums' Euclidean norms, 0 where nothing was added. The sums start anew. Waits for the device."""
        sums = [self.summed.pop(name, None) for name in names]
        return [float(norm) for norm in [0.0 if x is None else self.ops.norm(x) for x in sums]]

    def load(
        self, saved: Mapping[str, Tensor], counts: Mapping[str, int], copy: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Takes up saved sums, but for those of another sample size than now.

        Args:
            counts: entries of each layer.
            copy: of a layer's name and its saved sum, a copy where the layer is.
        """
        fitting = {n: x for n, x in saved.items() if tuple(x.shape) == (self.sample_size(n, counts[n]),)}
        self.summed.clear()
        self.summed.update({name: copy(name, x) for name, x in fitting.items()})
