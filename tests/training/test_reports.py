"""The report's note on optimizers that compressed gradients do not suit."""

from __future__ import annotations

import pytest

from hvd_accordion.training.reports import CompressionReport, LayerReport


def report(sent):
    return CompressionReport((LayerReport("w", (10, 10), "PowerSGD(rank=1)", None, sent, 400.0, 1.0),))


@pytest.mark.parametrize(
    ("optimizer", "sent", "noted"),
    [("AdamW", 40.0, True), ("Nadam", 40.0, True), ("AdamW", 100.0, False), ("SGD", 4.0, False), ("Muon", 4.0, False)],
)
def test_note(optimizer, sent, noted):
    found = report(sent).under(optimizer)
    assert bool(found.note) == noted
    assert ("local steps" in str(found)) == noted
    assert found.layers == report(sent).layers


def test_an_empty_report_has_none():
    assert CompressionReport().under("AdamW").note == ""
