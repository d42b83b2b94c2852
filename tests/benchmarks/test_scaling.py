"""What scaling.py makes of measurements: here those that a known link and compression would have given."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from hvd_accordion.comm import collectives
from hvd_accordion.policy.cost_model import Link, seconds, wire_seconds

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
LINKS = {
    "unshaped": Link(5e-5, 4e9, 0.001),
    "100mbit": Link(5e-5, 0.9 * 12.5e6, 0.005),
    "1gbit": Link(5e-5, 0.9 * 125e6, 0.005),
}
NANOSECONDS = (1.0, 5.0, 20.0, 10.0, 4.0)  # of compression per value, in the order of SPECS


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(FOLDER))
    try:
        import scaling_report

        yield scaling_report
    finally:
        sys.path.remove(str(FOLDER))


def part(report, link, n, cores=2):
    layers, rows, exchanges = report.resnet18_layers(), [], []
    for kind in ("AllReduce", "AllGather", "AllToAll"):
        for payload in (1000, 100_000, 8_000_000):
            taken = seconds(getattr(collectives, kind), payload, n, LINKS[link])
            sent = collectives.sent(getattr(collectives, kind), payload, n)
            rows.append({"kind": kind, "payload": payload, "seconds": [taken] * 3, "wire": 1.01 * sent, "sent": sent})
    for spec, each in zip(report.SPECS, NANOSECONDS, strict=True):
        compression = 1e-9 * each * max(1, n / cores) * sum(layer.numel for layer in layers)
        taken = compression + sum(wire_seconds(report.groups(layers, spec, n), n, LINKS[link]))
        exchanges.append({"spec": str(spec), "seconds": [taken] * 3, "wire": 2e6, "sent": 2e6, "predicted": 2e6})
    return {"ranks": n, "link": link, "load": 1.0, "compute": 0.1, "collectives": rows, "exchanges": exchanges}


@pytest.fixture(scope="module")
def result(report):
    measured = [part(report, link, n) for link, n in [("unshaped", 2), *((x, n) for n in (2, 4, 8) for x in LINKS)]]
    measured = [p for p in measured if p["link"] != "unshaped" or p["ranks"] == 2]
    found = report.analysis(measured, None, 5e-5, cores=2)
    found["facts"]["cycle time, ms"] = 5.0
    return found


def test_rates(report):
    assert [report.nominal(x) for x in ("unshaped", "100mbit", "1gbit")] == [0, 12.5e6, 125e6]


def test_what_was_known_is_found_again(report, result):
    for link, found in result["links"].items():
        assert found["bandwidth"] == pytest.approx(LINKS[link].bandwidth, rel=0.01)
        assert found["overhead"] == pytest.approx(LINKS[link].overhead, rel=0.01)
    for each, found in zip(NANOSECONDS[1:], list(result["gamma"].values())[1:], strict=True):
        assert found == pytest.approx(1e-9 * each, rel=0.05)
    assert result["facts"]["share"] == pytest.approx(0.9, rel=0.01)
    assert all(row["ratio"] == pytest.approx(1, rel=0.05) for row in result["collectives"] + result["exchanges"])
    assert all(row["ratio"] in (pytest.approx(1), pytest.approx(1.01)) for row in result["wire"])


def test_predictions_reach_from_2_to_1024_ranks(report, result):
    rows = result["steps"]
    assert sorted({row["ranks"] for row in rows}) == [2**i for i in range(1, 11)]
    assert all(0 < row["efficiency"] < 1 and math.isfinite(row["seconds"]) for row in rows)
    dense = [row["seconds"] for row in rows if row["spec"] == str(report.SPECS[0]) and row["link"] == "1 Gbit/s"]
    assert dense == sorted(dense)


def test_page_and_picture(report, result, tmp_path):
    page = report.page(result)
    assert "Prediction, not measured" in page
    assert page.count("| 1024 ") == 3
    report.draw(result).savefig(tmp_path / "scaling.png")
