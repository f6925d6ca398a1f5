"""The cases of a report: which films a reader should see, and what is shown of them."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa

from cxr_ray.boxes import Box
from cxr_ray.dataset import Dataset
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.explanations import Asked, explained
from cxr_ray.findings import FINDINGS
from cxr_ray.heatmap import overlay
from cxr_ray.predictions import Predictions
from cxr_ray.records import from_fixed_lists

# So many pixels an edge make a readable picture, however small the stored square.
_SHOWN_EDGE = 320
_COLUMNS = ("image_id", "age_years", "sex", "view", "history_ever")
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Case:
    """One film and finding.

    Attributes
    ----------
    film, overlay
        Pictures as data URIs.
    label
        Whether the label says that the finding is there.
    patient
        Age, sex, view and earlier findings, in words.
    box
        What a radiologist drew, if anybody did.
    """

    image_id: str
    finding: str
    probability: float
    threshold: float
    label: bool
    patient: str
    film: str
    overlay: str
    box: Box | None


@dataclass(frozen=True)
class CaseGroup:
    """Cases that were chosen for the same reason."""

    title: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class _Choice:
    row: int
    finding: int


def chosen(
    predictions: Predictions, thresholds: Sequence[float], boxes: Sequence[Box], count: int
) -> list[tuple[str, list[_Choice]]]:
    """For each reason at most `count` images and findings, no patient twice; certainty is the distance to the threshold.

    The distance is one of log-odds, so that rare and common findings are judged alike. Equal distances go by image id.
    """
    probabilities = np.clip(predictions.probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    cuts = np.clip(np.asarray(thresholds, dtype=np.float64), 1e-7, 1 - 1e-7)
    above = np.log(probabilities / (1 - probabilities)) - np.log(cuts / (1 - cuts))
    known, positive = np.isfinite(predictions.labels), predictions.labels == 1
    boxed = np.zeros_like(positive)
    rows = {str(image_id): row for row, image_id in enumerate(predictions.image_ids)}
    for box in boxes:
        if box.image_id in rows:
            boxed[rows[box.image_id], FINDINGS.index(box.finding)] = True
    reasons = (
        ("Called with most certainty, and labelled", above, positive & (above >= 0)),
        ("Called with most certainty, and not labelled", above, known & ~positive & (above >= 0)),
        ("Labelled, and missed with most certainty", -above, positive & (above < 0)),
        ("Least certain", -np.abs(above), known),
        ("With a radiologist's box, called with most certainty", above, boxed),
    )
    taken: set[object] = set()
    groups = []
    for title, order, allowed in reasons:
        picked = _first(np.where(allowed, order, -np.inf), predictions.patient_keys, taken, count)
        if picked:
            groups.append((title, picked))
    return groups


def _first(order: np.ndarray, patient_keys: np.ndarray, taken: set[object], count: int) -> list[_Choice]:
    """The highest, each of another patient and, as long as there are others, of another finding."""
    ranked = np.argsort(-order, axis=None, kind="stable")
    ranked = ranked[np.isfinite(order.ravel()[ranked])]
    picked: list[_Choice] = []
    for once in (True, False):
        for place in ranked:
            row, finding = divmod(int(place), order.shape[1])
            seen = {choice.finding for choice in picked}
            if len(picked) == count or (once and len(seen) == order.shape[1]):
                break
            if patient_keys[row] in taken or (once and finding in seen):
                continue
            taken.add(patient_keys[row])
            picked.append(_Choice(row, finding))
    return picked


def make_cases(
    settings: EvaluateSettings,
    dataset: Dataset,
    predictions: Predictions,
    thresholds: Sequence[float],
    boxes: Sequence[Box],
) -> tuple[CaseGroup, ...]:
    """Choose the cases, make their heatmaps and pictures; Ray has to be initialised."""
    groups = chosen(predictions, thresholds, boxes, settings.cases)
    table = dataset.read(settings.split, list(_COLUMNS))
    places = {image_id: place for place, image_id in enumerate(table["image_id"].to_pylist())}
    flat = [choice for _, choices in groups for choice in choices]
    asked = [Asked(places[str(predictions.image_ids[choice.row])], choice.finding) for choice in flat]
    maps = explained(settings, dataset, asked)
    by_place = {(box.image_id, box.finding): box for box in boxes}
    made = iter(
        Case(
            image_id=(image_id := str(predictions.image_ids[choice.row])),
            finding=(name := FINDINGS[choice.finding]).replace("_", " "),
            probability=float(predictions.probabilities[choice.row, choice.finding]),
            threshold=float(thresholds[choice.finding]),
            label=bool(predictions.labels[choice.row, choice.finding] == 1),
            patient=_patient(table.slice(each.row, 1)),
            film=_picture(_enlarged(shown.film)),
            overlay=_picture(overlay(_enlarged(shown.film), shown.heat)),
            box=by_place.get((image_id, name)),
        )
        for choice, each, shown in zip(flat, asked, maps, strict=True)
    )
    return tuple(CaseGroup(title, tuple(next(made) for _ in choices)) for title, choices in groups)


def _patient(row: pa.Table) -> str:
    age, sex, view = (row[name][0].as_py() for name in ("age_years", "sex", "view"))
    words = [f"{age:.0f} years" if age is not None else "age unknown", sex or "sex unknown", view or "view unknown"]
    ever = from_fixed_lists(row["history_ever"])[0]
    if np.isnan(ever).any():
        return ", ".join([*words, "history unknown"])
    before = [name.replace("_", " ") for name, seen in zip(FINDINGS, ever, strict=True) if seen]
    return ", ".join(words) + f"; before: {', '.join(before) or 'none of the fourteen'}"


def _enlarged(film: np.ndarray) -> np.ndarray:
    if film.shape[0] == _SHOWN_EDGE:
        return film
    how = cv2.INTER_AREA if film.shape[0] > _SHOWN_EDGE else cv2.INTER_CUBIC
    return cv2.resize(film, (_SHOWN_EDGE, _SHOWN_EDGE), interpolation=how)


def _picture(pixels: np.ndarray) -> str:
    """JPEG as a data URI; uint8, grey (H, W) or RGB (H, W, 3)."""
    stored = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, content = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
