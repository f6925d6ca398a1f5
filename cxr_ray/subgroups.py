"""Subgroups of a split: by patient, by how the film was taken, and by what was known of the patient before.

A finding that an earlier visit already showed is easy to repeat; one that no earlier visit showed has to be seen. The two are
scored apart, finding by finding: that is the honest test of detection.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cxr_ray.records import from_fixed_lists
from cxr_ray.resampling import Interval
from cxr_ray.split_scores import mean_auroc

COLUMNS = ("image_id", "patient_key", "sex", "age_years", "view", "history_count", "history_ever")
_AGES = ((0, 18), (18, 40), (40, 60), (60, 80), (80, 200))
_IMAGES = ((1, 2), (2, 6), (6, 21), (21, None))


@dataclass(frozen=True)
class Subgroup:
    """Some images of a split, or for each finding some.

    Attributes
    ----------
    by, name
        Such as "view" and "AP".
    member
        bool, shape (N, K).
    """

    by: str
    name: str
    member: np.ndarray


@dataclass(frozen=True)
class SubgroupScore:
    """Mean AUC of a subgroup over the findings that have both classes in it.

    Attributes
    ----------
    images
        With at least one finding in the subgroup.
    findings
        How many could be scored.
    """

    by: str
    name: str
    images: int
    patients: int
    findings: int
    auroc: Interval


def subgroups(table: pa.Table) -> Iterator[Subgroup]:
    """All subgroups of a split that are not empty.

    Parameters
    ----------
    table
        `COLUMNS` of the split, one row an image.
    """
    ever = from_fixed_lists(table["history_ever"])

    def of(by: str, name: str, chosen: np.ndarray) -> Subgroup:
        return Subgroup(by, name, np.broadcast_to(chosen[:, None], ever.shape) if chosen.ndim == 1 else chosen)

    found = [
        *(of("sex", name, chosen) for name, chosen in _values(table["sex"])),
        *(of("age", name, chosen) for name, chosen in _ages(table["age_years"].to_numpy())),
        *(of("view", name, chosen) for name, chosen in _values(table["view"])),
        *(of("visit", name, chosen) for name, chosen in _visits(table["history_count"].to_numpy())),
        *(of("per patient", name, chosen) for name, chosen in _images(table["patient_key"].to_numpy())),
        of("finding", "known", ever == 1),
        of("finding", "new", ever == 0),
    ]
    return (group for group in found if group.member.any())


def score_subgroup(
    group: Subgroup,
    probabilities: np.ndarray,
    labels: np.ndarray,
    patient_keys: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> SubgroupScore:
    """Score a subgroup as the whole split is scored; arguments as of `split_scores.score`."""
    within = np.where(group.member, labels, np.nan)
    rows = group.member.any(axis=1)
    kept = within[rows]
    both = (np.nansum(kept, axis=0) > 0) & (np.nansum(1 - kept, axis=0) > 0)
    auroc = mean_auroc(probabilities[rows][:, both], kept[:, both], patient_keys[rows], resamples=resamples, seed=seed)
    return SubgroupScore(
        by=group.by,
        name=group.name,
        images=int(rows.sum()),
        patients=len(np.unique(patient_keys[rows])),
        findings=int(both.sum()),
        auroc=auroc,
    )


def _values(column: pa.ChunkedArray) -> Iterator[tuple[str, np.ndarray]]:
    values = np.array(["unknown" if value is None else value for value in column.to_pylist()])
    return ((str(value), values == value) for value in np.unique(values))


def _ages(years: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for low, high in _AGES:
        name = f"{low}-{high - 1}" if high < _AGES[-1][1] else f"{low}+"
        yield name, (years >= low) & (years < high)
    yield "unknown", np.isnan(years)


def _visits(count: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "first", count == 0
    yield "follow-up", count > 0
    yield "unknown", np.isnan(count)


def _images(patient_keys: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    _, patients, held = np.unique(patient_keys, return_inverse=True, return_counts=True)
    count = held[patients]
    for low, high in _IMAGES:
        name = f"{low} image" if high == low + 1 else f"{low}+ images" if high is None else f"{low}-{high - 1} images"
        yield name, (count >= low) & (count < (high or np.inf))
