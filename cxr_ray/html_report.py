"""The report of an evaluation: one self-contained HTML file that a physician or a reviewer can open and keep."""

import base64
import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from cxr_ray import presets
from cxr_ray.completeness import comparable
from cxr_ray.evaluated import Evaluation
from cxr_ray.findings import FINDINGS
from cxr_ray.report import interval_text
from cxr_ray.report_figures import history_plot, precision_recall_plot, reliability_plot, roc_plot
from cxr_ray.resampling import Interval
from cxr_ray.settings import as_yaml, without_credentials

REPORT = "report.html"
_RULES = {
    "youden": "Largest sensitivity + specificity: what answers are judged by",
    "sensitivity_90": "Sensitivity of 90 %",
    "prevalence": "As many positive answers as positive labels",
}
_LIMITS = (
    "Labels of ChestX-ray14 were mined from reports by a program and are wrong in some of the films; these figures are of how "
    "well the labels are predicted, not of how well a disease is seen.",
    "Intervals tell the chance of which patients came into this split; not that of training the network once more, nor of "
    "another hospital.",
    "Findings are scored one by one without correction for their number.",
    "Research use only. Not a medical device; no figure here supports a decision about a patient.",
)


@dataclass(frozen=True)
class Axis:
    """Places of figures on an axis, in percent of its length."""

    low: float
    high: float

    @classmethod
    def of(cls, intervals: Iterable[Interval], low: float = 0.5) -> "Axis":
        """From `low`, or a tenth below what does not reach it, to 1."""
        lowest = min((each.low for each in intervals if math.isfinite(each.low)), default=low)
        return cls(min(low, math.floor(lowest * 10) / 10), 1.0)

    def at(self, value: float) -> float:
        """The place of a figure."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[float]:
        """A tick a tenth, or two where the axis is long; the last is 1."""
        step = 0.1 if self.high - self.low < 0.65 else 0.2
        return [round(self.high - number * step, 1) for number in range(int((self.high - self.low) / step + 1.001))][::-1]


def render(evaluation: Evaluation) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=PackageLoader("cxr_ray"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    environment.tests["scored"] = lambda interval: math.isfinite(interval.value)
    return environment.get_template(REPORT).render(_context(evaluation), interval_text=interval_text)


def _context(evaluation: Evaluation) -> dict[str, object]:
    scores, settings = evaluation.scores, evaluation.settings
    printed = comparable(evaluation.bundle, evaluation.extent)
    groups = evaluation.subgroups
    ablations = evaluation.ablations
    return {
        "title": f"{evaluation.bundle.name} {evaluation.bundle.version}: evaluation",
        "bundle": evaluation.bundle,
        "created": f"{evaluation.created:%Y-%m-%d}",
        "dataset_uri": evaluation.dataset_uri,
        "split": settings.split,
        "extent": evaluation.extent.in_words(),
        "official": evaluation.extent.is_official_test,
        "remarks": list(_remarks(evaluation)),
        "sections": _sections(evaluation),
        "scores": scores,
        "scored": sum(math.isfinite(finding.auroc.value) for finding in scores.findings),
        "mean_prevalence": _mean([each.prevalence for each in scores.findings if math.isfinite(each.auroc.value)]),
        "summary": list(_summary(evaluation)),
        "findings": [
            {"key": name, "name": _words(name), "scores": finding}
            for name, finding in zip(FINDINGS, scores.findings, strict=True)
        ],
        "axis": Axis.of([*(finding.auroc for finding in scores.findings)]),
        "published": dict(printed.auc) if printed else {},
        "published_mean": printed.mean if printed else None,
        "published_by": presets.find(evaluation.bundle.preset).source,
        "plots": _plots(evaluation),
        "rules": [
            {"title": _RULES.get(rule, rule), "points": list(zip(map(_words, FINDINGS), points, strict=True))}
            for rule, points in {"youden": evaluation.operating, **evaluation.other_operating}.items()
        ],
        "subgroups": [
            {"score": group, "first": number > 0 and groups[number - 1].by != group.by} for number, group in enumerate(groups)
        ],
        "group_axis": Axis.of(group.auroc for group in groups),
        "ablations": ablations,
        "ablation_axis": Axis.of([scores.auroc, *(each.auroc for each in ablations)]),
        "cases": evaluation.cases,
        "cases_note": _cases_note(evaluation),
        **_history(evaluation),
        **_localisation(evaluation),
        "origin": list(_origin(evaluation)),
        "settings": as_yaml(without_credentials(settings)),
        "limits": _LIMITS,
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _words(name: str) -> str:
    return name.replace("_", " ")


def _remarks(evaluation: Evaluation) -> Iterator[str]:
    settings = evaluation.settings
    if settings.withhold != "nothing":
        yield "clinical inputs withheld"
    if settings.calibrate != "none":
        yield f"probabilities recalibrated ({settings.calibrate})"
    if settings.tta != "none":
        yield f"test-time augmentation: {settings.tta}"


def _sections(evaluation: Evaluation) -> list[tuple[str, str]]:
    sections = {
        "findings": ("Findings", True),
        "curves": ("Curves", True),
        "thresholds": ("Thresholds", True),
        "subgroups": ("Subgroups", evaluation.subgroups),
        "ablations": ("Ablations", evaluation.ablations),
        "history": ("Missing reports", evaluation.history),
        "cases": ("Cases", evaluation.cases),
        "localisation": ("Localisation", evaluation.localisation),
        "origin": ("Data and code", True),
        "limits": ("Limits", True),
    }
    return [(name, text) for name, (text, there) in sections.items() if there]


def _summary(evaluation: Evaluation) -> Iterator[str]:
    """What a reader has to know before any table, in sentences made of the figures."""
    groups = {(group.by, group.name): group for group in evaluation.subgroups}
    known, new = groups.get(("finding", "known")), groups.get(("finding", "new"))
    if known is not None and new is not None:
        yield (
            f"Findings that no earlier visit showed are ranked with a mean AUC of {interval_text(new.auroc)}, those that one "
            f"showed with {interval_text(known.auroc)}: the first is what detection is worth."
        )
    for each in evaluation.ablations:
        if each.name in ("no image", "no clinical inputs", "no history"):
            yield f"With {each.name}: {interval_text(each.auroc)}, a difference of {each.difference.value:+.3f}."
    leak = next((each for each in evaluation.ablations if "this film" in each.name), None)
    if leak is not None:
        yield f"A history that leaks the film's own findings would have scored {leak.auroc.value:.3f}."
    if evaluation.history is not None:
        complete = evaluation.history.curves[0].aurocs[0].value
        for curve in evaluation.history.curves:
            without = f"{curve.aurocs[-1].value:.3f} instead of {complete:.3f}"
            yield f"With no report of earlier visits at all ({curve.name}): {without}."
    errors = [each.calibration_error for each in evaluation.scores.findings if math.isfinite(each.calibration_error)]
    if errors:
        yield f"Calibration error over the findings: {np.mean(errors):.3f} on average, {max(errors):.3f} at most."
    if evaluation.localisation is not None:
        hits, area = evaluation.localisation.overall.hits, evaluation.localisation.overall.at_random
        yield f"Heatmaps point into {interval_text(hits)} of the radiologists' boxes; a random point into {area.value:.3f}."


def _plots(evaluation: Evaluation) -> list[dict[str, object]]:
    probabilities, labels = evaluation.predictions.probabilities, evaluation.predictions.labels
    kinds: dict[str, list[dict[str, str]]] = {"roc": [], "pr": [], "reliability": []}
    for k, name in enumerate(FINDINGS):
        known = np.isfinite(labels[:, k])
        scores, truth = probabilities[known, k], labels[known, k]
        if not 0 < truth.sum() < truth.size:
            continue
        finding, point = evaluation.scores.findings[k], evaluation.operating[k]
        said = {
            "roc": (f"AUC {finding.auroc.value:.3f}", roc_plot(scores, truth, point)),
            "pr": (f"AP {finding.average_precision.value:.3f}", precision_recall_plot(scores, truth, point)),
            "reliability": (f"error {finding.calibration_error:.3f}", reliability_plot(scores, truth)),
        }
        for kind, (text, image) in said.items():
            kinds[kind].append({"name": _words(name), "said": text, "image": _data_uri(image)})
    notes = {
        "roc": ("ROC", "The dot is the bundle's threshold; the dotted line ranks by chance."),
        "pr": ("Precision and recall", "The dotted line is the prevalence, which a ranking by chance has as precision."),
        "reliability": (
            "Reliability",
            "Share of positives over mean probability in ten bins of equally many images, each panel to its own scale. On the "
            "dotted line probabilities are what they say.",
        ),
    }
    return [{"title": title, "note": note, "panels": kinds[kind]} for kind, (title, note) in notes.items()]


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _cases_note(evaluation: Evaluation) -> str:
    count = evaluation.settings.cases
    return (
        f"At most {count} films for each reason, no patient twice; certainty is the distance of the log-odds to the threshold. "
        "On the right, in warm colours, what speaks for the finding, scaled to each film's own maximum. A dashed box is a "
        "radiologist's. They show how the network answers, and prove nothing about it."
    )


def _history(evaluation: Evaluation) -> dict[str, object]:
    curves = evaluation.history
    if curves is None:
        return {"history_plot": None}
    return {
        "history_plot": _data_uri(history_plot(curves)),
        "history_note": "Mean AUC when a share of the earlier visits' reports, drawn at random, is not there at prediction. "
        "Either nothing is told of such a visit, or the network's own answer stands in for its report.",
        "history_names": [curve.name for curve in curves.curves],
        "history_rows": list(zip(curves.shares, zip(*(curve.aurocs for curve in curves.curves), strict=True), strict=True)),
    }


def _localisation(evaluation: Evaluation) -> dict[str, object]:
    found = evaluation.localisation
    if found is None:
        return {"localisation": []}
    rows = [*((_words(name), score) for name, score in found.findings.items()), ("all", found.overall)]
    return {
        "localisation": [
            {
                "name": name,
                "boxes": score.boxes,
                "hit": score.hits,
                "area": score.at_random.value,
                "centre": score.at_centre.value,
            }
            for name, score in rows
        ],
        "hit_axis": Axis(0.0, 1.0),
    }


def _origin(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    bundle = evaluation.bundle
    yield "Bundle", f"{bundle.name} {bundle.version}, preset {bundle.preset}, variant {bundle.variant}, digest {bundle.digest}"
    yield "Trained with", f"cxr-ray {bundle.code_version}, on the dataset of manifest SHA-256 {bundle.dataset_digest}"
    same = "the same" if bundle.dataset_digest == evaluation.dataset_digest else "another dataset than it was trained on"
    yield "Scored on", f"manifest SHA-256 {evaluation.dataset_digest} ({same})"
    readings = evaluation.readings
    if readings is not None:
        rows, bundles = sum(reading.rows for reading in readings), len({reading.digest for reading in readings})
        yield (
            "Readings of the test split",
            f"{len(readings)} up to now, with {_count(bundles, 'bundle')}, for {_count(rows, 'row')} of figures",
        )
    elif evaluation.settings.split == "test":
        yield "Readings of the test split", "not counted: the dataset's folder cannot be written to"
    packages = ", ".join(f"{name} {version(name)}" for name in ("cxr-ray", "torch", "ray", "numpy"))
    yield "Scored with", f"{packages}, Python {platform.python_version()}"
    speed = evaluation.predictions.speed
    if speed is not None:
        yield "Speed", f"{speed.images_per_second:,.0f} images/s on {speed.device}, batches of {speed.batch_size}"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"
