"""Localisation: whether a finding's heatmap points at the place where radiologists saw it.

The pointing game (Zhang et al. 2016, arXiv 1608.00507): a map scores if its maximum lies in the box. It asks for no threshold,
and two answers that know nothing of the film are there to be beaten: a point drawn at random, which scores the share of the
image that the box covers, and the image's centre, which lies in .97 of the boxes of NIH's large hearts and in none of its
nodules. No margin is granted around a box.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr_ray.boxes import Box
from cxr_ray.findings import FINDINGS
from cxr_ray.resampling import Interval, PatientResamples

_CENTRE = 0.5


@dataclass(frozen=True)
class PointingScore:
    """The pointing game over some boxes; shares 0 to 1 with 95 % intervals over patients.

    Attributes
    ----------
    boxes, patients
        How many.
    hits
        Share of the boxes that hold the maximum of their map.
    at_random
        What a point drawn at random would score: the mean share of the image that a box covers.
    at_centre
        Share of the boxes that hold the image's centre.
    above_centre
        `hits` less `at_centre`, drawn from the same resamples.
    """

    boxes: int
    patients: int
    hits: Interval
    at_random: Interval
    at_centre: Interval
    above_centre: Interval


@dataclass(frozen=True)
class Localisation:
    """The pointing game over all boxes.

    Attributes
    ----------
    findings
        Finding to its score, in NIH order; only findings with boxes.
    overall
        Over all boxes, so that common findings count more.
    mean
        The mean over the findings, as Zhang et al. have it.
    """

    findings: dict[str, PointingScore]
    overall: PointingScore
    mean: PointingScore
    resamples: int


def pointed(maps: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Whether the maximum of each map lies in its box.

    A pixel lies in a box if its centre does. Where several pixels share the maximum, the score is the share of them that lie in
    the box, which is what choosing one of them at random would score: a map without any contrast gets the chance level, and
    not what its first pixel happens to give.

    Parameters
    ----------
    maps
        Float, shape (N, h, w), of any resolution.
    boxes
        N of them, each on the image of its map.

    Returns
    -------
    numpy.ndarray
        float64, shape (N,), 0 to 1.

    Raises
    ------
    ValueError
        If there are not as many maps as boxes, or a map has a value that is not finite.
    """
    if maps.ndim != 3 or len(maps) != len(boxes):
        raise ValueError(f"maps have shape {maps.shape}, and there are {len(boxes)} boxes; give (N, h, w) and N boxes")
    if not np.isfinite(maps).all():
        raise ValueError("maps have values that are not finite; their maximum says nothing")
    tied = maps == maps.max(axis=(1, 2), keepdims=True)
    inside = np.stack([_inside(box, *maps.shape[1:]) for box in boxes]) if boxes else np.zeros_like(tied)
    return (tied & inside).sum(axis=(1, 2)) / tied.sum(axis=(1, 2))


def _inside(box: Box, height: int, width: int) -> np.ndarray:
    """Which pixels have their centre in the box; bool, shape (height, width)."""
    down, across = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    rows = (box.y <= down) & (down < box.y + box.height)
    columns = (box.x <= across) & (across < box.x + box.width)
    return rows[:, None] & columns


def holds_centre(box: Box) -> bool:
    """Whether the image's centre lies in the box."""
    return box.x <= _CENTRE < box.x + box.width and box.y <= _CENTRE < box.y + box.height


def pointing_game(
    boxes: Sequence[Box], hits: np.ndarray, patient_keys: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> Localisation:
    """Score what `pointed` found.

    Parameters
    ----------
    boxes
        N of them, at least one.
    hits
        Of each box, 0 to 1; float, shape (N,).
    patient_keys
        Of each box, shape (N,); boxes with the same key are drawn together.

    Raises
    ------
    ValueError
        If there is no box, or the lengths differ.
    """
    if not boxes or not len(boxes) == len(hits) == len(patient_keys):
        raise ValueError(
            f"{len(boxes)} boxes, {len(hits)} hits, {len(patient_keys)} patients; give as many of each, at least 1"
        )
    figures = _figures(boxes, hits)
    named = np.array([box.finding for box in boxes])
    members = {name: named == name for name in FINDINGS if name in named}
    groups = np.stack([*members.values(), np.ones(len(boxes), dtype=bool)]).astype(np.float64)
    point = _means(np.ones((1, len(boxes))), figures, groups)[0]
    drawing = PatientResamples(patient_keys, resamples, seed)
    blocks = [_means(weights, figures, groups) for weights in drawing.weights()]
    drawn = np.concatenate([np.empty((0, *point.shape)), *blocks])
    scores = [
        _score(int(group.sum()), len(np.unique(patient_keys[group > 0])), point[k], drawn[:, k])
        for k, group in enumerate(groups)
    ]
    mean = _score(len(boxes), drawing.patients, point[:-1].mean(axis=0), drawn[:, :-1].mean(axis=1))
    return Localisation(dict(zip(members, scores[:-1], strict=True)), scores[-1], mean, resamples)


def _figures(boxes: Sequence[Box], hits: np.ndarray) -> np.ndarray:
    """What is averaged, in the order of `PointingScore`; float64, shape (N, 4)."""
    centre = np.array([holds_centre(box) for box in boxes], dtype=np.float64)
    return np.stack([hits, [box.area for box in boxes], centre, hits - centre], axis=1)


def _means(weights: np.ndarray, figures: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Means of the figures (N, 4) in each group (G, N) where boxes count as often as `weights` (B, N) say; (B, G, 4).

    NaN where a resample has no box of the group.
    """
    times = weights[:, None, :] * groups
    counted = times.sum(axis=2, keepdims=True)
    return np.divide(times @ figures, counted, out=np.full((*times.shape[:2], figures.shape[1]), np.nan), where=counted > 0)


def _score(boxes: int, patients: int, point: np.ndarray, drawn: np.ndarray) -> PointingScore:
    intervals = [Interval.of_draws(value, draws) for value, draws in zip(point, drawn.T, strict=True)]
    return PointingScore(boxes, patients, *intervals)
