"""The course of a training run as a picture: loss, validation AUC and learning rate, epoch by epoch."""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from cxr_ray.report import BLUE, GREY, ORANGE
from cxr_ray.train_events import EpochResult

# More points than these run into each other.
_MARKERS = 20
_STEPS = (1, 2, 5, 10)
# Characters; datasets have long paths.
_TITLE_WIDTH = 80


def training_picture(results: Sequence[EpochResult], title: str) -> bytes:
    """Loss, validation AUC and learning rate by epoch, PNG of 1,300 x 1,200 pixels; as `training_figure`."""
    content = io.BytesIO()
    training_figure(results, title).savefig(content, format="png", dpi=200)
    return content.getvalue()


def training_figure(results: Sequence[EpochResult], title: str) -> Figure:
    """Three panels above each other over the same epochs: loss, validation AUC with its best epoch, learning rate.

    Parameters
    ----------
    results
        One or more epochs, in order. What is not finite is left out: a gap in its line.
    """
    figure = Figure(figsize=(6.5, 6.0), layout="constrained")
    figure.suptitle(textwrap.fill(title, _TITLE_WIDTH), fontsize=10)
    loss, auc, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    epochs = np.array([result.epoch for result in results])
    _draw_loss(loss, epochs, results)
    _draw_auc(auc, epochs, _finite([result.val_auc for result in results]))
    _draw_rate(rate, epochs, _finite([result.learning_rate for result in results]))
    best = _best(_finite([result.val_auc for result in results]))
    for panel in (loss, auc, rate):
        panel.grid(axis="y", color="#E6E6E6", linewidth=0.6)
        panel.set_axisbelow(True)
        if best is not None:
            panel.axvline(epochs[best], color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    margin = max(0.5, 0.02 * (epochs[-1] - epochs[0]))
    # No tick at epoch 0, which there is not.
    rate.set(xlabel="epoch", xlim=(epochs[0] - min(margin, 0.9), epochs[-1] + margin))
    rate.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=_STEPS, integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return figure


def _finite(values: Sequence[float]) -> np.ndarray:
    """float64, shape (epochs,), NaN for what is not finite."""
    given = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(given), given, np.nan)


def _best(aucs: np.ndarray) -> int | None:
    return None if np.isnan(aucs).all() else int(np.nanargmax(aucs))


def _line(panel: Axes, epochs: np.ndarray, values: np.ndarray, *, label: str, color: str, marker: str) -> None:
    panel.plot(
        epochs, values, color=color, linewidth=1.3, label=label,
        marker=marker, markersize=4.5, markerfacecolor="white", markeredgewidth=1.1, markevery=_marked(values),
    )  # fmt: skip


def _marked(values: np.ndarray) -> list[bool]:
    """Which points get a marker: some, so that lines are told apart in grey too, and those that no line runs through."""
    line = np.isfinite(np.concatenate([[np.nan], values, [np.nan]]))
    alone = line[1:-1] & ~line[:-2] & ~line[2:]
    regular = np.arange(len(values)) % (1 + (len(values) - 1) // _MARKERS) == 0
    return (alone | regular).tolist()


def _draw_loss(panel: Axes, epochs: np.ndarray, results: Sequence[EpochResult]) -> None:
    panel.set_ylabel("loss")
    trained, validated = (_finite([getattr(result, name) for result in results]) for name in ("loss", "val_loss"))
    _line(panel, epochs, trained, label="training", color=BLUE, marker="o")
    if np.isfinite(validated).any():
        _line(panel, epochs, validated, label="validation", color=ORANGE, marker="s")
    panel.legend(frameon=False, fontsize=8)


def _draw_auc(panel: Axes, epochs: np.ndarray, aucs: np.ndarray) -> None:
    panel.set_ylabel("validation AUC\n(mean of findings)")
    best = _best(aucs)
    if best is None:
        panel.set_yticks([])
        absent = "no finding has both classes in the validation split"
        panel.text(0.5, 0.5, absent, ha="center", transform=panel.transAxes, color=GREY)
        return
    _line(panel, epochs, aucs, label="_", color=ORANGE, marker="s")
    label = f"best: {aucs[best]:.3f}, epoch {epochs[best]}"
    panel.plot(epochs[best], aucs[best], "D", color="black", markersize=5.5, label=label)
    panel.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_rate(panel: Axes, epochs: np.ndarray, rates: np.ndarray) -> None:
    panel.set_ylabel("learning rate")
    panel.plot(epochs, rates, color="black", linewidth=1.3, marker="o", markersize=2.5, markevery=_marked(rates))
    if _falls_in_steps(rates):
        panel.set_yscale("log")
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        panel.set_ylim(0, 1.15 * np.nanmax(rates, initial=0.0) or 1.0)
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=_STEPS))


def _falls_in_steps(rates: np.ndarray) -> bool:
    """Tenth by tenth, which only a logarithmic axis shows; a cosine falls smoothly, and to 0, which only a linear one shows."""
    known = rates[np.isfinite(rates)]
    levels = np.unique(known)
    return levels.size > 1 and levels[0] > 0 and levels.size < known.size and bool(levels[-1] >= 10 * levels[0])
