"""Plots of one finding for the report, as SVG: ROC, precision and recall, reliability.

Each is a small figure of its own, so that a page can set them side by side on a desk and one under the other on a phone. Titles
stand in the page, where they can be searched.
"""

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_ray.calibration import reliability
from cxr_ray.history_curves import HistoryCurves
from cxr_ray.operating import OperatingPoint
from cxr_ray.report import BLUE, GREEN, GREY, ORANGE
from cxr_ray.scoring import precision_recall_curve, roc_curve

_INCHES = 2.1
_MOST_POINTS = 300
_HALVES = (0, 0.5, 1)
_SETTLED = 0.05
# Metrics of Verdana are those of DejaVu Sans, with which the text was set.
_FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "cxr-ray", "font.family": "DejaVu Sans", "font.size": 7.5}


def roc_plot(probabilities: np.ndarray, labels: np.ndarray, point: OperatingPoint) -> bytes:
    """ROC curve with the bundle's threshold on it; shapes (N,), labels 0 or 1, both present."""

    def draw(axes: Axes) -> None:
        false, true, _ = roc_curve(probabilities, labels)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        axes.plot(*_thinned(false, true), color=BLUE, linewidth=1.4)
        axes.plot(1 - point.specificity, point.sensitivity, "o", color=ORANGE, markersize=4.5)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01), xticks=_HALVES, yticks=_HALVES)

    return _svg(draw)


def precision_recall_plot(probabilities: np.ndarray, labels: np.ndarray, point: OperatingPoint) -> bytes:
    """Precision at each recall, with the prevalence and the bundle's threshold; shapes (N,), labels 0 or 1, both present."""

    def draw(axes: Axes) -> None:
        recall, precision = precision_recall_curve(probabilities, labels)
        axes.axhline(labels.mean(), color=GREY, linewidth=0.8, linestyle=":")
        axes.plot(*_thinned(recall, precision), color=BLUE, linewidth=1.4)
        if np.isfinite(point.precision):
            axes.plot(point.sensitivity, point.precision, "o", color=ORANGE, markersize=4.5)
        # The first few films give a precision of anything; what comes after them sets the scale.
        top = min(1.01, 1.15 * float(precision[recall >= _SETTLED].max()))
        axes.set(xlabel="sensitivity (recall)", ylabel="precision", xlim=(0, 1), ylim=(0, top), xticks=_HALVES)
        axes.locator_params(axis="y", nbins=4)

    return _svg(draw)


def reliability_plot(probabilities: np.ndarray, labels: np.ndarray) -> bytes:
    """Share of positives over mean probability in ten bins of equally many images; shapes (N,), labels 0 or 1."""

    def draw(axes: Axes) -> None:
        bins = reliability(probabilities, labels)
        top = float(max(bins.predicted.max(), bins.observed.max()) * 1.08) or 1.0
        axes.plot([0, top], [0, top], color=GREY, linewidth=0.8, linestyle=":")
        axes.plot(bins.predicted, bins.observed, "o-", color=BLUE, linewidth=1.2, markersize=3.5)
        axes.set(xlabel="mean probability", ylabel="share of positives", xlim=(0, top), ylim=(0, top))
        axes.locator_params(nbins=4)

    return _svg(draw)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points of a curve, evenly along its length: more cannot be seen at this size."""
    if len(x) <= _MOST_POINTS:
        return x, y
    length = np.r_[0, np.cumsum(np.hypot(np.diff(x), np.diff(y)))]
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], _MOST_POINTS)).clip(max=len(x) - 1))
    return x[kept], y[kept]


def history_plot(curves: HistoryCurves) -> bytes:
    """Mean AUC over the share of earlier reports that are missing, with 95 % intervals."""
    styles = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"))

    def draw(axes: Axes) -> None:
        for number, (curve, (colour, line, marker)) in enumerate(zip(curves.curves, styles, strict=False)):
            values = np.array([[each.value, each.low, each.high] for each in curve.aurocs])
            # Beside each other, so that whiskers of one share can be told apart.
            shares = 100 * np.array(curves.shares) + 1.2 * (number - 1)
            spread = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
            axes.errorbar(
                shares, values[:, 0], spread, color=colour, linestyle=line, marker=marker, markersize=4, label=curve.name
            )
        axes.set(
            xlabel="earlier reports that are missing, %", ylabel="mean AUC", xticks=[100 * share for share in curves.shares]
        )
        axes.legend(frameon=False, loc="lower left")

    return _svg(draw, size=(4.6, 3.2))


def _svg(draw: Callable[[Axes], None], size: tuple[float, float] = (_INCHES, _INCHES)) -> bytes:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue().decode()
    return text[text.index("<svg") :].replace("'DejaVu Sans'", _FONTS).encode()
