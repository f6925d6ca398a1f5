"""Scores as rows for other programs: CSV, and JSON's own types."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cxr_ray.ablations import AblationScore
from cxr_ray.findings import FINDINGS
from cxr_ray.history_curves import HistoryCurves
from cxr_ray.localisation import Localisation
from cxr_ray.operating import OperatingPoint
from cxr_ray.resampling import Interval
from cxr_ray.split_scores import SplitScores
from cxr_ray.subgroups import SubgroupScore

_DIGITS = 6


def plain(value: object) -> object:
    """The same in JSON's types, rounded to six digits; null for what is no finite number."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if np.isfinite(value) else None
    return value


def findings_csv(scores: SplitScores, operating: Sequence[OperatingPoint]) -> str:
    """A row a finding, and one of the means; empty cells where nothing could be scored."""
    rows = []
    for name, finding, point in zip(FINDINGS, scores.findings, operating, strict=True):
        row: dict[str, object] = {"finding": name, "images": finding.images, "positives": finding.positives}
        row |= {"prevalence": finding.prevalence, **_interval("auc", finding.auroc)}
        row |= _interval("average_precision", finding.average_precision)
        row |= _interval("sensitivity_at_specificity_90", finding.sensitivity[0])
        row |= _interval("sensitivity_at_specificity_95", finding.sensitivity[1])
        row |= {"brier": finding.brier, "calibration_error": finding.calibration_error, **vars(point)}
        rows.append(row)
    mean = {"finding": "mean", "images": scores.images, **_interval("auc", scores.auroc)}
    rows.append(mean | _interval("average_precision", scores.average_precision))
    return csv_text(rows[0], rows)


def subgroups_csv(groups: Sequence[SubgroupScore]) -> str:
    """A row a subgroup."""
    rows = [{name: part for name, part in vars(group).items() if name != "auroc"} for group in groups]
    rows = [row | _interval("auc", group.auroc) for row, group in zip(rows, groups, strict=True)]
    return csv_text(rows[0], rows)


def ablations_csv(scores: Sequence[AblationScore]) -> str:
    """A row an ablation."""
    rows = [{"name": each.name, **_interval("auc", each.auroc), **_interval("difference", each.difference)} for each in scores]
    return csv_text(rows[0], rows)


def thresholds_csv(rules: Mapping[str, Sequence[OperatingPoint]]) -> str:
    """A row a rule and finding: what the rule's threshold does."""
    rows = [
        {"rule": rule, "finding": name, **vars(point)}
        for rule, points in rules.items()
        for name, point in zip(FINDINGS, points, strict=True)
    ]
    return csv_text(rows[0], rows)


def history_csv(curves: HistoryCurves) -> str:
    """A row a way to do without reports and share of them that is missing."""
    rows = [
        {"way": curve.name, "missing": share, **_interval("auc", interval)}
        for curve in curves.curves
        for share, interval in zip(curves.shares, curve.aurocs, strict=True)
    ]
    return csv_text(rows[0], rows)


def localisation_csv(found: Localisation) -> str:
    """A row a finding, one of all boxes, and one of the mean over findings."""
    rows = [
        {"finding": name, "boxes": score.boxes, "patients": score.patients}
        | _interval("hits", score.hits)
        | _interval("above_centre", score.above_centre)
        | {"at_random": score.at_random.value, "at_centre": score.at_centre.value}
        for name, score in {**found.findings, "all": found.overall, "mean": found.mean}.items()
    ]
    return csv_text(rows[0], rows)


def _interval(name: str, interval: Interval) -> dict[str, object]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def csv_text(names: Iterable[str], rows: Sequence[dict[str, object]]) -> str:
    """Rows as CSV, in the form of `plain`; empty cells for what is null or absent."""
    content = io.StringIO()
    writer = csv.DictWriter(content, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if (cell := plain(value)) is None else cell for name, value in row.items()} for row in rows)
    return content.getvalue()
