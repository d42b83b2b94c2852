"""Figures: what is drawn, and that labels never touch. Looks are checked by eye, geometry here."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from hvd_accordion.tracking.figures import (
    CRITICAL,
    RELAXED,
    regimes_figure,
    sent_figure,
    short_name,
)


def windows(layers: int, count: int) -> list[dict[str, str]]:
    names = [f"layer{i}.conv{i % 3}.weight" for i in range(layers)]
    return [{n: "critical" if (i + w) % 3 else "relaxed" for i, n in enumerate(names)} for w in range(count)]


def render(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def touching(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of neighbouring tick labels that overlap in the rendered figure."""
    render(figure)
    pairs = []
    for axes in figure.findobj(lambda artist: hasattr(artist, "get_xticklabels")):
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            shown = [label for label in labels if label.get_text() and label.get_visible()]
            boxes = [(label.get_text(), label.get_window_extent()) for label in shown]
            pairs += [(a, b) for (a, x), (b, y) in pairwise(boxes) if x.overlaps(y)]
    return pairs


def test_sent_figure_draws_both_curves_and_the_ratio():
    figure = sent_figure([0, 1, 2], [200.0, 120.0, 100.0], [400.0] * 3)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines == {"sent": [200.0, 120.0, 100.0], "uncompressed": [400.0] * 3}
    assert "420 of 1,200 MB, 2.86 times less" in figure.axes[0].get_title()
    assert figure.axes[0].get_yscale() == "linear" and figure.axes[0].get_ylim()[0] == 0


def test_sent_figure_is_logarithmic_when_sent_would_hug_the_axis():
    assert sent_figure([0, 1], [2.0, 1.0], [400.0] * 2).axes[0].get_yscale() == "log"


@pytest.mark.parametrize("values", [[], [0.0], [5.0]])
def test_sent_figure_with_little_data(values):
    assert render(sent_figure(range(len(values)), values, values))[:4] == b"\x89PNG"


def test_sent_figure_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="equally long, got 2, 1 and 2"):
        sent_figure([0, 1], [1.0], [1.0, 1.0])


def test_regimes_figure_colours_cells():
    axes = regimes_figure([{"a": "critical", "b": "relaxed"}, {"a": "relaxed"}], ["first", "second"]).axes[0]
    image = axes.images[0]
    pixels = image.to_rgba(image.get_array())
    assert pixels[0, 0, :3] == pytest.approx(to_rgb(CRITICAL))
    assert pixels[0, 1, :3] == pytest.approx(to_rgb(RELAXED))
    assert pixels[1, 0, :3] == pytest.approx(to_rgb(RELAXED))
    assert pixels[1, 1, 3] == 0  # b is not in the second window
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]


@pytest.mark.parametrize(("layers", "count"), [(1, 1), (10, 40), (60, 1), (60, 40), (150, 200)])
def test_regimes_figure_labels_do_not_touch(layers, count):
    assert touching(regimes_figure(windows(layers, count))) == []
    assert touching(regimes_figure(windows(layers, count), [f"epoch {i}" for i in range(count)])) == []


@pytest.mark.parametrize(
    ("bad", "labels", "message"),
    [
        ([], None, "at least one layer"),
        ([{}], None, "at least one layer"),
        ([{"a": "hot"}], None, r"regime of 'a' must be 'critical', 'relaxed' or 'level i/n', got 'hot'"),
        ([{"a": "critical"}], ["x", "y"], "each of the 1 windows, got 2 labels"),
    ],
)
def test_regimes_figure_refuses(bad, labels, message):
    with pytest.raises(ValueError, match=message):
        regimes_figure(bad, labels)


def test_short_name_keeps_layers_apart():
    long = "transformer.encoder.block.{}.attention.self.query.weight"
    assert short_name("conv1.weight") == "conv1.weight"
    assert short_name(long.format(3)) == "t.e.b.3.a.self.query.weight" != short_name(long.format(4))
    assert len(short_name("x1" * 50)) == 32


def test_pyplot_is_never_imported():
    code = """
import sys
from hvd_accordion.tracking.figures import regimes_figure
regimes_figure([{"a": "critical"}]).savefig("/dev/null", format="png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
