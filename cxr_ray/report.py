"""What a reader sees of scores and predictions: the table of AUCs, the ROC picture, the picture of a study."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from cxr_ray.ablations import AblationScore
from cxr_ray.findings import FINDINGS
from cxr_ray.history_curves import HistoryCurves
from cxr_ray.localisation import Localisation, PointingScore
from cxr_ray.resampling import Interval
from cxr_ray.scoring import roc_curve
from cxr_ray.split_scores import SplitScores
from cxr_ray.subgroups import SubgroupScore
from cxr_ray.terminal import table

# Okabe & Ito's colours, distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def interval_text(interval: Interval) -> str:
    """A figure with its interval, such as ``0.812 (0.790-0.833)``; a dash where it cannot be scored."""
    if not np.isfinite(interval.value):
        return "-"
    return f"{interval.value:.3f} ({interval.low:.3f}-{interval.high:.3f})"


def scores_table(title: str, scores: SplitScores, published: Mapping[str, float] | None = None) -> Table:
    """Finding, positives with their share, AUC with interval, average precision, and the AUC that the source printed."""
    columns = [("finding", False), ("positives", True), ("AUC (95 % interval)", True), ("AP", True)]
    if published:
        columns.append(("published AUC", True))
    shown = table(title, columns)
    for name, finding in zip(FINDINGS, scores.findings, strict=True):
        share = f" ({finding.prevalence:.1%})" if finding.positives else ""
        row = [name.replace("_", " "), f"{finding.positives:,}{share}", interval_text(finding.auroc)]
        shown.add_row(*row, _figure(finding.average_precision.value), *([f"{published[name]:.3f}"] if published else []))
    shown.add_section()
    mean_published = [f"{np.mean(list(published.values())):.3f}"] if published else []
    means = (interval_text(scores.auroc), _figure(scores.average_precision.value))
    shown.add_row("mean", "", *means, *mean_published, style="bold")
    return shown


def subgroups_table(title: str, groups: Sequence[SubgroupScore]) -> Table:
    """Subgroup, images, patients, how many findings could be scored, and their mean AUC with interval."""
    columns = [("by", False), ("subgroup", False), ("images", True), ("patients", True), ("findings", True)]
    shown = table(title, [*columns, ("AUC (95 % interval)", True)])
    previous = ""
    for group in groups:
        if previous and group.by != previous:
            shown.add_section()
        counts = (f"{group.images:,}", f"{group.patients:,}", str(group.findings))
        shown.add_row("" if group.by == previous else group.by, group.name, *counts, interval_text(group.auroc))
        previous = group.by
    return shown


def ablations_table(title: str, honest: Interval, scores: Sequence[AblationScore]) -> Table:
    """Mean AUC as it is and under each ablation, and the difference, paired over patients."""
    shown = table(title, [("inputs", False), ("AUC (95 % interval)", True), ("difference", True)])
    shown.add_row("as they are", interval_text(honest), "", style="bold")
    for each in scores:
        change = each.difference
        shown.add_row(each.name, interval_text(each.auroc), f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})")
    return shown


def history_table(title: str, curves: HistoryCurves) -> Table:
    """Mean AUC at each share of missing reports, a column a way to do without them."""
    shown = table(title, [("missing", True), *((curve.name, True) for curve in curves.curves)])
    for number, share in enumerate(curves.shares):
        shown.add_row(f"{share:.0%}", *(interval_text(curve.aurocs[number]) for curve in curves.curves))
    return shown


def localisation_table(title: str, found: Localisation) -> Table:
    """Boxes, the share that holds the maximum of its map, and what a random point and the image's centre get."""
    shown = table(
        title, [("finding", False), ("boxes", True), ("hit (95 % interval)", True), ("random", True), ("centre", True)]
    )
    for name, each in found.findings.items():
        shown.add_row(name.replace("_", " "), *_pointing(each))
    shown.add_section()
    shown.add_row("all", *_pointing(found.overall), style="bold")
    return shown


def _pointing(each: PointingScore) -> list[str]:
    return [str(each.boxes), interval_text(each.hits), _figure(each.at_random.value), _figure(each.at_centre.value)]


def _figure(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def roc_picture(probabilities: np.ndarray, labels: np.ndarray, scores: SplitScores, title: str) -> bytes:
    """ROC curves of the fourteen findings as small multiples, PNG.

    Parameters
    ----------
    probabilities, labels
        float, shape (N, 14); labels NaN where unknown.
    """
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    figure.suptitle(f"{title}\nmean AUC {interval_text(scores.auroc)}", fontsize=11)
    axes = figure.subplots(3, 5, sharex=True, sharey=True)
    for panel, k in zip(axes.flat, range(len(FINDINGS)), strict=False):
        known = np.isfinite(labels[:, k])
        truth = labels[known, k]
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        panel.set_title(FINDINGS[k].replace("_", " "), fontsize=9)
        if 0 < truth.sum() < truth.size:
            false, true, _ = roc_curve(probabilities[known, k], truth)
            panel.plot(false, true, color=BLUE, linewidth=1.4)
        finding = scores.findings[k]
        text = f"AUC {finding.auroc.value:.3f}" if np.isfinite(finding.auroc.value) else "one class only"
        panel.text(0.97, 0.05, f"{text}\n{finding.positives:,} positive", ha="right", fontsize=8)
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
