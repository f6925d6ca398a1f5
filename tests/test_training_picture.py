"""The picture of a run: what its lines hold, for one epoch and for many, with figures missing."""

import io
import math
import warnings

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cxr_ray.train_events import EpochResult
from cxr_ray.training_picture import training_figure, training_picture

NAN = math.nan


def run(
    aucs: list[float], rates: list[float] | None = None, val_losses: list[float] | None = None, first: int = 1
) -> list[EpochResult]:
    given = zip(aucs, rates or [1e-3] * len(aucs), val_losses or [0.5] * len(aucs), strict=True)
    return [
        EpochResult(
            epoch=first + n, loss=1 / (first + n), val_loss=val_loss, val_auc=auc, val_auc_by_finding={}, learning_rate=rate,
            images_per_second=1.0, waiting=0.0, seconds=1.0, workers=1,
        )
        for n, (auc, rate, val_loss) in enumerate(given)
    ]  # fmt: skip


def cosine(count: int) -> list[float]:
    return [0.5e-3 * (1 + math.cos(math.pi * (n + 1) / count)) for n in range(count)]


def panels(figure: Figure) -> tuple[Axes, Axes, Axes]:
    loss, auc, rate = figure.axes
    return loss, auc, rate


def series(panel: Axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in panel.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def drawn(figure: Figure) -> Figure:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(figure).draw()
    return figure


def test_each_panel_holds_its_figures_over_the_same_epochs():
    results = run([0.6, 0.8, 0.7], [1e-3, 5e-4, 0.0], [0.75, 0.5, 0.625])
    loss, auc, rate = panels(drawn(training_figure(results, "chexnet")))
    assert series(loss, "training") == ([1, 2, 3], [1, 1 / 2, 1 / 3])
    assert series(loss, "validation") == ([1, 2, 3], [0.75, 0.5, 0.625])
    assert (list(auc.lines[0].get_xdata()), list(auc.lines[0].get_ydata())) == ([1, 2, 3], [0.6, 0.8, 0.7])
    assert list(rate.lines[0].get_ydata()) == [1e-3, 5e-4, 0.0]
    assert loss.get_xlim() == auc.get_xlim() == rate.get_xlim()
    assert [panel.get_ylabel() for panel in (loss, auc, rate)] == [
        "loss",
        "validation AUC\n(mean of findings)",
        "learning rate",
    ]
    assert (rate.get_xlabel(), loss.get_xlabel()) == ("epoch", "")
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]


@pytest.mark.parametrize(
    ("aucs", "epoch", "label"),
    [
        ([0.6, 0.8124, 0.7], 2, "best: 0.812, epoch 2"),
        ([NAN, 0.5, 0.75, NAN, 0.75], 3, "best: 0.750, epoch 3"),
        ([0.9], 1, "best: 0.900, epoch 1"),
    ],
)
def test_the_best_epoch_is_marked_in_every_panel(aucs, epoch, label):
    axes = panels(drawn(training_figure(run(aucs), "x")))
    assert series(axes[1], label) == ([epoch], [aucs[epoch - 1]])
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == [label]
    for panel in axes:
        assert [list(line.get_xdata()) for line in panel.lines if line.get_linestyle() == ":"] == [[epoch, epoch]]


def test_a_figure_that_is_missing_is_a_gap_and_one_between_gaps_is_still_seen():
    aucs = [0.5 + 0.001 * n for n in range(60)]
    aucs[40] = aucs[42] = NAN
    _, auc, _ = panels(drawn(training_figure(run(aucs, val_losses=[math.inf] + [0.5] * 59), "x")))
    values = np.array(auc.lines[0].get_ydata())
    assert np.flatnonzero(np.isnan(values)).tolist() == [40, 42]
    marked = np.flatnonzero(auc.lines[0].get_markevery()).tolist()
    assert 41 in marked
    assert 43 not in marked
    assert len(marked) <= 21
    loss = auc.figure.axes[0]
    assert np.isnan(series(loss, "validation")[1][0])


def test_a_split_that_tells_nothing_is_said_to_do_so():
    loss, auc, rate = panels(drawn(training_figure(run([NAN] * 3, val_losses=[NAN] * 3), "x")))
    assert [text.get_text() for text in auc.texts] == ["no finding has both classes in the validation split"]
    assert auc.lines[:] == []
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training"]
    assert not [line for panel in (loss, rate) for line in panel.lines if line.get_linestyle() == ":"]


@pytest.mark.parametrize(
    ("rates", "scale"),
    [
        ([1e-3, 1e-3, 1e-4, 1e-4, 1e-5], "log"),
        ([1e-3] * 5, "linear"),
        (cosine(50), "linear"),
        ([1e-3, 1e-3, 0.0], "linear"),
        ([NAN, NAN], "linear"),
    ],
)
def test_a_rate_that_falls_in_steps_is_shown_by_powers_of_ten(rates, scale):
    _, _, rate = panels(drawn(training_figure(run([0.5] * len(rates), rates), "x")))
    assert rate.get_yscale() == scale
    low, high = rate.get_ylim()
    assert all(low <= value <= high for value in rates if math.isfinite(value))


@pytest.mark.parametrize(("count", "first"), [(1, 1), (8, 1), (200, 1), (5, 7)])
def test_epochs_are_whole_and_every_text_lies_within_the_picture(count, first):
    figure = drawn(training_figure(run([0.7 + 0.0005 * n for n in range(count)], cosine(count), first=first), "chexnet: a run"))
    loss, auc, rate = panels(figure)
    low, high = rate.get_xlim()
    ticks = [tick for tick in rate.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) and first <= tick <= first + count for tick in ticks)
    assert low < first
    assert first + count - 1 < high
    for panel in (loss, auc, rate):
        for text in (panel.xaxis.label, panel.yaxis.label, *panel.get_yticklabels()):
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0


def test_a_long_title_stays_within_the_picture():
    title = f"multi-input, {'/data/archive-of-the-hospital' * 6}/nih 256"
    figure = drawn(training_figure(run([0.6, 0.7]), title))
    box = figure._suptitle.get_window_extent()
    assert figure.get_suptitle().replace("\n", "").replace(" ", "") == title.replace(" ", "")
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().y1 < box.y0


def test_the_two_losses_differ_without_their_colours():
    loss, *_ = panels(training_figure(run([0.6, 0.7]), "x"))
    assert len({line.get_marker() for line in loss.lines if line.get_label() in ("training", "validation")}) == 2


def test_the_picture_is_a_png_for_print():
    with Image.open(io.BytesIO(training_picture(run([0.6, 0.7]), "multi-input"))) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1300, 1200))
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        used = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0, 0, 0), (255, 255, 255)} <= used
