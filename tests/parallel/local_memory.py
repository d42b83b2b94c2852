"""A compressor whose memory is each rank's own, as a user may write one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from hvd_accordion import TopK
from hvd_accordion.compression import Sharing


@dataclass(frozen=True)
class Counted(TopK):
    """TopK that sums this rank's gradients, as its own and as its part of a mean."""

    memory_sharing = MappingProxyType({"total": Sharing.OWN, "part": Sharing.PART})

    def initial_memory(self, ops, value, name, seed):
        del name, seed
        return {key: ops.zeros_like([value])[0] for key in self.memory_sharing}

    def exchange(self, ops, values, memory, ctx):
        old = [{**self.initial_memory(ops, v, "", 0), **m} for v, m in zip(values, memory, strict=True)]
        new = [{key: x + v for key, x in m.items()} for v, m in zip(values, old, strict=True)]

        def keep(ok):
            return [{k: ops.where(ok, b[k], a[k]) for k in a} for a, b in zip(old, new, strict=True)]

        done = yield from super().exchange(ops, values, [{}] * len(values), ctx)
        return replace(done, memory=keep)
