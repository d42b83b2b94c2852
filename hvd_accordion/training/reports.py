"""What compression did, in numbers: running totals, and a table of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

# torch's and Keras's optimizers that divide by a root of the mean squared gradient
ADAM_LIKE = {"Adam", "AdamW", "Adamax", "NAdam", "Nadam", "RAdam", "Adafactor"}
NO_REGIME = "-"  # of a layer whose policy has no word for how it treats the layer


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did in one detection window."""

    norm: float  # of the accumulated gradient
    ratio: float | None  # relative change of the norm, None where there is nothing to compare with
    regime: str  # "critical", "relaxed", "level 1/3" between them, or NO_REGIME
    spec: str  # the compression in use
    bytes_per_step: int  # sent by each rank


class Logger(Protocol):
    """What the optimizer tells on rank 0. MLflowLogger is one; none of these may wait or raise."""

    def start(self, params: Mapping[str, object]) -> None: ...
    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None: ...
    def log_window(self, window: int, layers: Mapping[str, LayerRecord]) -> None: ...


@dataclass
class Stats:
    """Running totals since the optimizer was made (or loaded).

    Steps are calls of the optimizer's `step()`, and where an AccordionBatchSize makes one update of several, they are
    counted when it is made: `dense_bytes` is what an exchange of every one of them would have sent, so that `ratio` shows
    what large batches save, too.

    Bytes are those that one rank sends for the payloads really handed to the collectives, each in its
    bandwidth-optimal form (`comm.collectives.sent`), `dense_bytes` those of the same gradients uncompressed.
    """

    steps: int = 0
    sent_bytes: float = 0.0
    dense_bytes: float = 0.0
    exchange_seconds: float = 0.0  # the training thread's time in compression and communication
    critical_layers: float = 0.0  # sum over steps of the critical share of the adaptive layers
    critical_bytes: float = 0.0  # the same, layers weighted by their dense bytes
    updates: int = 0  # exchanges, each followed by an update of the parameters

    @property
    def ratio(self) -> float:
        """Times less sent than dense."""
        return self.dense_bytes / self.sent_bytes if self.sent_bytes else 1.0

    @property
    def critical_fraction(self) -> float:
        """Mean share of the adaptive layers that were critical; 0 where none adapts."""
        return self.critical_layers / self.steps if self.steps else 0.0

    def add(self, more: Stats) -> None:
        for key, value in vars(more).items():
            setattr(self, key, getattr(self, key) + value)

    def since(self, earlier: Stats) -> Stats:
        mine, theirs = asdict(self), asdict(earlier)
        return Stats(**{key: mine[key] - theirs[key] for key in mine})

    def metrics(self) -> dict[str, float]:
        """Flat numbers, as a logger takes them."""
        steps = max(1, self.steps)
        return {
            "sent_bytes": self.sent_bytes,
            "dense_bytes": self.dense_bytes,
            "compression_ratio": self.ratio,
            "critical_layers": self.critical_layers / steps,
            "critical_bytes": self.critical_bytes / steps,
            "exchange_seconds": self.exchange_seconds,
        }


@dataclass(frozen=True)
class LayerReport:
    """One layer now: `regime` is None where nothing adapts, bytes are per step and rank, `share` is of all bytes sent.

    Where a batch is made of several steps, each counts for its part of the one exchange.
    """

    name: str
    shape: tuple[int, ...]
    spec: str
    regime: str | None
    sent_bytes: float
    dense_bytes: float
    share: float


@dataclass(frozen=True)
class CompressionReport(Sequence[LayerReport]):
    """The layers in the order of the parameters; prints as a table.

    Args:
        batch: what an AccordionBatchSize, or local steps, do now.
        note: what was measured to serve this optimizer better; empty where nothing was.
    """

    layers: tuple[LayerReport, ...] = field(default_factory=tuple)
    batch: str = ""
    note: str = ""

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    @property
    def sent_bytes(self) -> float:
        return sum(layer.sent_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> float:
        return sum(layer.dense_bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "shape", "compression", "regime", "bytes a step", "dense", "share")]
        for r in self.layers:
            shape = "x".join(map(str, r.shape)) or "scalar"
            rows.append(
                (
                    r.name,
                    shape,
                    r.spec,
                    r.regime or NO_REGIME,
                    f"{r.sent_bytes:,.0f}",
                    f"{r.dense_bytes:,.0f}",
                    f"{r.share:.1%}",
                )
            )
        less = self.dense_bytes / self.sent_bytes if self.sent_bytes else 1.0
        rows.append(("total", "", f"{less:.1f}x less", "", f"{self.sent_bytes:,.0f}", f"{self.dense_bytes:,.0f}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*lines, *(line for line in (self.batch, self.note) if line)])

    def under(self, optimizer: str) -> CompressionReport:
        """With a note where gradients that are compressed more than 8 times meet an optimizer of Adam's kind."""
        strong = self.sent_bytes > 0 and self.dense_bytes > 8 * self.sent_bytes
        if not strong or optimizer not in ADAM_LIKE:
            return self
        note = (
            f"note: {optimizer} lost accuracy under compressed gradients on a transformer, local steps and 1-bit Adam less: "
            "see docs/transformers.md"
        )
        return replace(self, note=note)
