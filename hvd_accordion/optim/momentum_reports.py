"""What 1-bit Adam and 0/1 Adam can tell of their two exchanges, in any framework."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from hvd_accordion.optim.momentum_schedule import Counts, Kind, Schedule
from hvd_accordion.training.reports import CompressionReport, Logger, Stats


class Exchange(Protocol):
    """A front end's GradientExchange."""

    @property
    def stats(self) -> Stats: ...
    def compression_report(self) -> CompressionReport: ...
    def end_epoch(self) -> None: ...


class MomentumReports:
    """Mix-in of the optimizers.

    Attributes:
        _dense, _momentum: the exchanges of gradients, dense, and of first moments.
        _logger: on rank 0, else None.
        _logged: the totals at the last end of an epoch.
        _epoch: epochs that have ended.
    """

    _dense: Exchange
    _momentum: Exchange
    _schedule: Schedule
    _logger: Logger | None
    _logged: Stats
    _epoch: int

    if TYPE_CHECKING:

        def _now(self) -> Counts:
            """The counts of now."""

    @property
    def warming_up(self) -> bool:
        """Whether the second moment still follows the gradients."""
        return self._now().warmup < 0

    @property
    def stats(self) -> Stats:
        """Running totals of steps, bytes and seconds; steps that send nothing count as such."""
        total = Stats()
        total.add(self._dense.stats)
        total.add(self._momentum.stats)
        local = self._now().step - total.steps
        total.add(Stats(local, 0.0, local * self._dense.compression_report().dense_bytes))
        return total

    def compression_report(self) -> CompressionReport:
        """Per parameter, of the exchange to come: shape, compression, regime, bytes a step, dense bytes, share.

        Where an exchange comes after several steps, each counts for its part of it. Prints as a table.
        """
        counts = self._now()
        if counts.warmup < 0 and counts.kind(self._schedule) is Kind.DENSE:
            return self._dense.compression_report()
        report, interval = self._momentum.compression_report(), counts.interval(self._schedule)
        rows = (replace(row, sent_bytes=row.sent_bytes / interval) for row in report)
        return CompressionReport(tuple(rows), f"an exchange each {interval} steps" if interval > 1 else report.batch)

    def end_epoch(self) -> None:
        """An epoch is over: for the logger, and for an Accordion that counts epochs. The same on every rank."""
        self._dense.end_epoch()
        self._momentum.end_epoch()
        if self._logger is not None:
            now = self.stats
            self._logger.log_epoch(self._epoch, now.since(self._logged).metrics())
            self._logged = now
        self._epoch += 1
