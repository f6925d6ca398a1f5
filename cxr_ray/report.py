"""What a reader sees of scores and predictions: the table of AUCs, the ROC picture, the picture of a study."""

import io
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from cxr_ray.findings import FINDINGS
from cxr_ray.scoring import AurocScores, Interval, roc_curve
from cxr_ray.terminal import table

# Okabe & Ito's colours, distinguishable with every kind of colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def interval_text(interval: Interval) -> str:
    """An AUC with its interval, such as ``0.812 (0.790-0.833)``; a dash where it cannot be scored."""
    if not np.isfinite(interval.value):
        return "-"
    return f"{interval.value:.3f} ({interval.low:.3f}-{interval.high:.3f})"


def auroc_table(title: str, scores: AurocScores, published: Mapping[str, float] | None = None) -> Table:
    """Finding, positives, AUC with interval, and what the source of the preset printed, if given."""
    columns = [("finding", False), ("positives", True), ("AUC (95 % interval)", True)]
    if published:
        columns.append(("published", True))
    shown = table(title, columns)
    for name, interval, positives in zip(FINDINGS, scores.findings, scores.positives, strict=True):
        row = [name.replace("_", " "), f"{positives:,}", interval_text(interval)]
        shown.add_row(*row, *([f"{published[name]:.3f}"] if published else []))
    shown.add_section()
    mean_published = [f"{np.mean(list(published.values())):.3f}"] if published else []
    shown.add_row("mean", "", interval_text(scores.mean), *mean_published, style="bold")
    return shown


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def roc_picture(probabilities: np.ndarray, labels: np.ndarray, scores: AurocScores, title: str) -> bytes:
    """ROC curves of the fourteen findings as small multiples, PNG.

    Parameters
    ----------
    probabilities, labels
        float, shape (N, 14); labels NaN where unknown.
    """
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    figure.suptitle(f"{title}\nmean AUC {interval_text(scores.mean)}", fontsize=11)
    axes = figure.subplots(3, 5, sharex=True, sharey=True)
    for panel, k in zip(axes.flat, range(len(FINDINGS)), strict=False):
        known = np.isfinite(labels[:, k])
        truth = labels[known, k]
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        panel.set_title(FINDINGS[k].replace("_", " "), fontsize=9)
        if 0 < truth.sum() < truth.size:
            false, true, _ = roc_curve(probabilities[known, k], truth)
            panel.plot(false, true, color=BLUE, linewidth=1.4)
        text = f"AUC {scores.findings[k].value:.3f}" if np.isfinite(scores.findings[k].value) else "one class only"
        panel.text(0.97, 0.05, f"{text}\n{scores.positives[k]:,} positive", ha="right", fontsize=8)
        panel.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.flat[-1].axis("off")
    figure.supxlabel("1 - specificity", fontsize=10)
    figure.supylabel("sensitivity", fontsize=10)
    return _png(figure)


def study_picture(
    pixels: np.ndarray, overlay: np.ndarray, explained: str, probabilities: dict[str, float], thresholds: dict[str, float],
    truth: list[str] | None, title: str,
) -> bytes:  # fmt: skip
    """A radiograph, its heatmap and the fourteen probabilities beside their thresholds, PNG.

    Parameters
    ----------
    pixels
        Stored square, uint8, shape (size, size).
    overlay
        RGB, uint8, shape (size, size, 3).
    explained
        The finding whose heatmap this is.
    truth
        Findings that are known to be present; None where nobody knows.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    film, heat, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    film.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    film.set_title("radiograph", fontsize=10)
    heat.imshow(overlay)
    heat.set_title(f"what speaks for {explained.replace('_', ' ')}", fontsize=10)
    for panel in (film, heat):
        panel.axis("off")
    places = np.arange(len(FINDINGS))
    values = [probabilities[name] for name in FINDINGS]
    above = [probabilities[name] >= thresholds[name] for name in FINDINGS]
    bars.barh(places, values, color=[ORANGE if high else BLUE for high in above], height=0.7)
    bars.plot([thresholds[name] for name in FINDINGS], places, "k|", markersize=9, label="threshold")
    present = truth or []
    marked = [f"{name.replace('_', ' ')}{'  ●' if name in present else ''}" for name in FINDINGS]
    bars.set_yticks(places, marked)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1), xlabel="probability")
    bars.set_title("● truly present" if truth is not None else "truth unknown", fontsize=10, loc="right")
    bars.legend(loc="lower right", fontsize=8, frameon=False)
    figure.text(0.005, 0.01, "Research use only, not a diagnosis", fontsize=8, color=GREY)
    return _png(figure)
