"""Results of scaling.py: fitted link and compression, predictions, Markdown tables and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from links_report import markdown
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from models import resnet18

from hvd_accordion import FP16, QSGD, CompressionSpec, Dense, PowerSGD, TopK
from hvd_accordion.comm import collectives
from hvd_accordion.policy import assignment, grouping
from hvd_accordion.policy.cost_model import Gamma, Link, Sample, fit, seconds, step_seconds, wire_seconds
from hvd_accordion.policy.layers import Group, Layer
from hvd_accordion.policy.protocol import policy_of
from hvd_accordion.tracking.figures import LINES, MARKERS

UNSHAPED = "unshaped"
SPECS: tuple[CompressionSpec, ...] = (Dense(), FP16(), QSGD(7), TopK(0.01), PowerSGD(4))
RATES = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 1e10 / 8, "100 Gbit/s": 1e11 / 8}
MANY = tuple(2**i for i in range(1, 11))
COUNTED = 100_000  # bytes from which the network's count must agree with the prediction


def nominal(link: str) -> float:
    """Converts a rate as `tc` writes it to bytes per second; 0 means unshaped."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    return 0.0 if link == UNSHAPED else float(link[:-4]) * units[link[-4:]] / 8


def resnet18_layers() -> list[Layer]:
    return [Layer(name, tuple(p.shape), "float32") for name, p in resnet18().network.named_parameters()]


def groups(layers: Sequence[Layer], spec: CompressionSpec, n: int) -> list[Group]:
    """Groups layers like the engines of the frameworks."""
    specs = {layer.name: assignment.level(layer, policy_of(spec), 0, n) for layer in layers}
    return grouping.grouped([layers[::-1]], specs, (), grouping.BUCKET_BYTES)


def samples(part: dict[str, Any]) -> list[Sample]:
    return [
        (getattr(collectives, row["kind"]), row["payload"], part["ranks"], taken)
        for row in part["collectives"]
        for taken in row["seconds"]
    ]


def gammas(part: dict[str, Any], link: Link, layers: Sequence[Layer]) -> dict[CompressionSpec, float]:
    """Returns seconds per value: the time of an unshaped exchange beyond its collectives."""
    values, found = sum(layer.numel for layer in layers), {}
    for row, spec in zip(part["exchanges"], SPECS, strict=True):
        rounds = sum(wire_seconds(groups(layers, spec, part["ranks"]), part["ranks"], link))
        found[spec] = max(0.0, statistics.median(row["seconds"]) - rounds) / values
    return found


def analysis(measured: Sequence[dict[str, Any]], compute: float | None, latency: float, cores: int) -> dict[str, Any]:
    layers = resnet18_layers()
    first = min(part["ranks"] for part in measured)
    fits = {part["link"]: fit(samples(part), latency) for part in measured if part["ranks"] == first}
    unshaped = next(part for part in measured if part["link"] == UNSHAPED)
    gamma = gammas(unshaped, fits[UNSHAPED], layers)
    shaped = {link: found for link, found in fits.items() if link != UNSHAPED}
    share = min(1.0, max(found.bandwidth / nominal(link) for link, found in shaped.items()))
    base = Link(latency, 1.0, statistics.median(found.overhead for found in shaped.values()))
    compute = compute or unshaped["compute"]
    parts = [part for part in measured if part["link"] != UNSHAPED]
    return {
        "facts": {
            "compute": compute,
            "latency": latency,
            "overhead": base.overhead,
            "share": share,
            "cores": cores,
            "fitted at": first,
            "load": [part["load"] for part in measured],
        },
        "links": {link: asdict(found) for link, found in fits.items()},
        "gamma": {str(spec): each for spec, each in gamma.items()},
        "wire": [row for part in measured for row in wire(part)],
        "collectives": [row for part in parts for row in collective_checks(part, fits[part["link"]])],
        "exchanges": [row for part in parts for row in exchange_checks(part, fits[part["link"]], gamma, layers, cores)],
        "steps": [
            row
            for name, rate in RATES.items()
            for row in steps(name, replace(base, bandwidth=share * rate), gamma, compute, layers)
        ],
    }


def wire(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns sent bytes relative to the prediction, for exchanges of more than `COUNTED` bytes."""
    rows = [{"what": row["kind"], "ratio": row["wire"] / row["sent"], **row} for row in part["collectives"]]
    rows += [{"what": row["spec"], "ratio": row["wire"] / row["predicted"], **row} for row in part["exchanges"]]
    return [
        {"ranks": part["ranks"], "link": part["link"], **{key: row[key] for key in ("what", "sent", "wire", "ratio")}}
        for row in rows
        if row["sent"] >= COUNTED
    ]


def collective_checks(part: dict[str, Any], link: Link) -> list[dict[str, Any]]:
    rows = []
    for row in part["collectives"]:
        predicted = seconds(getattr(collectives, row["kind"]), row["payload"], part["ranks"], link)
        rows.append(check(part, row["kind"], predicted, row["seconds"]) | {"payload": row["payload"]})
    return rows


def exchange_checks(
    part: dict[str, Any], link: Link, gamma: Gamma, layers: Sequence[Layer], cores: int
) -> list[dict[str, Any]]:
    """Predicts without overlap; ranks that share cores compress more slowly."""
    n, values, rows = part["ranks"], sum(layer.numel for layer in layers), []
    for row, spec in zip(part["exchanges"], SPECS, strict=True):
        compression = gamma[spec] * values * max(1.0, n / cores)
        predicted = compression + sum(wire_seconds(groups(layers, spec, n), n, link))
        rows.append(check(part, row["spec"], predicted, row["seconds"]))
    return rows


def check(part: dict[str, Any], what: str, predicted: float, times: Sequence[float]) -> dict[str, Any]:
    found = statistics.median(times)
    known = {"ranks": part["ranks"], "link": part["link"], "what": what}
    return {**known, "predicted": predicted, "measured": found, "ratio": predicted / found}


def steps(name: str, link: Link, gamma: Gamma, compute: float, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    rows = []
    gamma = {
        **gamma,
        Dense(): 0.0,
    }  # dense exchanges run in Horovod's thread, beside the training
    for spec in SPECS:
        for n in MANY:
            grouped = groups(layers, spec, n)
            taken = step_seconds(compute, grouped, n, link, gamma)
            dense = all(not group.spec.lossy for group in grouped) and spec.lossy
            row = {"link": name, "ranks": n, "spec": str(spec), "seconds": taken, "efficiency": compute / taken}
            rows.append({**row, "goes dense": dense})
    return rows


def page(result: dict[str, Any]) -> str:
    facts, specs = result["facts"], [str(spec) for spec in SPECS]
    first = facts["fitted at"]
    wires = [row["ratio"] for row in result["wire"]]
    worst = max(result["wire"], key=lambda row: abs(row["ratio"] - 1))
    load = f"{min(facts['load']):.1f} to {max(facts['load']):.1f}"
    text = [
        "# Exchanges among few ranks, measured, and among many, predicted",
        f"ResNet-18 (CIFAR), one rank on each namespace host, all on {facts['cores']} cores, load average {load}: what is "
        "measured with more load than cores is slower than the link. "
        f"Horovod's cycle {facts['cycle time, ms']:g} ms. Medians.",
        f"**Bytes that left a host over those predicted**, of the {len(wires)} messages and exchanges over "
        f"{COUNTED // 1000} kB: {min(wires):.3f} to {max(wires):.3f} (the latter with the headers of packets; furthest off: "
        f"{worst['what']}, {worst['sent'] / 1e6:.1f} MB, {worst['ranks']} ranks, {worst['link']}).",
        f"**The link, fitted at {first} ranks** (latency assumed: one number of ranks can't tell it from overhead):",
    ]
    rows = [["link", "MB/s", "of nominal", "ms a collective"]]
    for name, link in result["links"].items():
        share = f"{link['bandwidth'] / nominal(name):.2f}" if nominal(name) else "-"
        rows.append([name, f"{link['bandwidth'] / 1e6:.1f}", share, f"{1e3 * link['overhead']:.2f}"])
    text += [markdown(rows), "**Compression, from the unshaped link**:"]
    text.append(markdown([["spec", "ns a value"], *([s, f"{1e9 * g:.2f}"] for s, g in result["gamma"].items())]))
    slowed = "compression slowed by ranks / cores where ranks share cores"
    text.append(f"**Whole exchanges: seconds predicted / measured = ratio** ({slowed}; {first} ranks share the fit):")
    rows = [["link", "ranks", *specs]]
    for (link, n), found in by(result["exchanges"], "link", "ranks").items():
        cells = [f"{row['predicted']:.3f} / {row['measured']:.3f} = {row['ratio']:.2f}" for row in found]
        rows.append([link, str(n), *cells])
    text += [markdown(rows), "**Single collectives: predicted over measured**, median (least to largest):"]
    rows = [["link", "ranks", "AllReduce", "AllGather", "AllToAll"]]
    for (link, n), found in by(result["collectives"], "link", "ranks").items():
        kinds = by(found, "what")
        rows.append([link, str(n), *(spread([row["ratio"] for row in kinds[(kind,)]]) for kind in rows[0][2:])])
    text.append(markdown(rows))
    text.append(
        f"**Prediction, not measured: ms a step (efficiency)**, {1e3 * facts['compute']:.0f} ms of forward and backward, "
        f"{facts['share']:.0%} of the nominal bandwidth, {1e6 * facts['latency']:.0f} us a hop assumed, "
        f"{1e3 * facts['overhead']:.1f} ms a collective, compression on one core as measured. *: all layers go dense, as "
        "they would not get smaller. Compression is taken not to grow with the ranks."
    )
    for (link,), found in by(result["steps"], "link").items():
        rows = [[f"ranks, {link}", *specs]]
        for (n,), line in by(found, "ranks").items():
            cells = [f"{1e3 * r['seconds']:,.0f} ({r['efficiency']:.0%}){'*' * r['goes dense']}" for r in line]
            rows.append([str(n), *cells])
        text.append(markdown(rows))
    return "\n\n".join(text) + "\n"


def by(rows: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def draw(result: dict[str, Any]) -> Figure:
    """Plots predicted and measured exchanges, a panel per link, and below the predicted steps of many ranks."""
    specs = [str(spec) for spec in SPECS]
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, hspace=0.04)
    measured, predicted = by(result["exchanges"], "link"), by(result["steps"], "link")
    upper.suptitle("Exchange alone, ResNet-18: measured (markers) and predicted from the fit (lines)", fontsize=11)
    compute = f"{1e3 * result['facts']['compute']:.0f} ms"
    lower.suptitle(f"Training step, prediction: {compute} of forward and backward (grey line)", fontsize=11)
    for axes, ((link,), rows) in zip(panels(upper, len(measured)), measured.items(), strict=True):
        for i, spec in enumerate(specs):
            mine = [row for row in rows if row["what"] == spec]
            axes.plot([r["ranks"] for r in mine], [r["predicted"] for r in mine], color=LINES[i])
            beside = 1 + 0.03 * (i - len(specs) // 2)  # equal times stay visible beside each other
            axes.plot([r["ranks"] * beside for r in mine], [r["measured"] for r in mine], **marker(i))
        finish(axes, link.replace("mbit", " Mbit/s").replace("gbit", " Gbit/s"), sorted({r["ranks"] for r in rows}))
    for axes, ((link,), rows) in zip(panels(lower, len(predicted)), predicted.items(), strict=True):
        axes.axhline(result["facts"]["compute"], color="#8C8C8C", linewidth=1)
        for i, spec in enumerate(specs):
            mine = [row for row in rows if row["spec"] == spec]
            axes.plot([r["ranks"] for r in mine], [r["seconds"] for r in mine], color=LINES[i], linestyle="--")
        finish(axes, f"{link} (prediction)", sorted({r["ranks"] for r in rows})[::3])
    handles = [Line2D([], [], **{**marker(i), "linestyle": "-"}) for i in range(len(specs))]
    figure.legend(handles, specs, loc="outside lower center", ncols=len(specs), frameon=False)
    return figure


def panels(figure: Any, count: int) -> list[Any]:
    found = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    found[0].set_ylabel("seconds")
    return found


def marker(i: int) -> dict[str, Any]:
    return {"color": LINES[i], "marker": MARKERS[i], "markersize": 7, "markeredgecolor": "white", "linestyle": ""}


def finish(axes: Any, title: str, ranks: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel="ranks")
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(FixedLocator(list(ranks)))
    axes.xaxis.set_minor_locator(NullLocator())
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
