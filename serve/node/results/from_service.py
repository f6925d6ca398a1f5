"""The service's answer to an instance, in the form that results are made from."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydicom.dataset import Dataset

from cxr_ray.findings import FINDINGS
from serve.node.results.study_answer import FindingAnswer, ImageAnswer, Model

_SEXES = {"F": "female", "M": "male"}
_UNKNOWN = "not known"


def image_answer(header: Dataset, content_digest: str, prediction: Mapping[str, Any], answered_at: datetime) -> ImageAnswer:
    """An image and what `POST /v1/instances` says of it.

    Parameters
    ----------
    header
        The source instance without its pixels, with `file_meta`.
    content_digest
        As the spool has it.
    prediction
        The answer's JSON: `model`, `findings`, `clinical`, `warnings`.
    answered_at
        Aware, in the time zone in which results are to show it.

    Raises
    ------
    ValueError
        If the answer lacks something or does not hold the fourteen findings.
    """
    try:
        named = {finding["name"]: finding for finding in prediction["findings"]}
        return ImageAnswer(
            header=header,
            content_digest=content_digest,
            findings=tuple(_finding(named[name]) for name in FINDINGS),
            model=_model(prediction["model"]),
            inputs=input_words(prediction["clinical"]),
            warnings=tuple(map(str, prediction["warnings"])),
            answered_at=answered_at,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the service's answer lacks or garbles {error}; use a service of this version") from None


def input_words(clinical: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """What the model was told of the patient, in words; what was missing is said to be."""
    told = clinical or {}
    age, sex, view = told.get("age"), told.get("sex"), told.get("view")
    return (
        ("age", _UNKNOWN if age is None else f"{age:.3g} years"),
        ("sex", _SEXES.get(str(sex), _UNKNOWN)),
        ("view", str(view) if view else _UNKNOWN),
        ("history", _history(told.get("history"), told.get("earlier_visits") or (), told.get("history_source"))),
    )


def _model(said: Mapping[str, Any]) -> Model:
    # A bundle does not say that its outputs are calibrated, so that no result calls them probabilities.
    return Model(str(said["name"]), str(said["version"]), str(said["digest"]), calibrated=False)


def _finding(said: Mapping[str, Any]) -> FindingAnswer:
    return FindingAnswer(str(said["name"]), float(said["probability"]), float(said["threshold"]), bool(said["positive"]))


def _history(findings: Sequence[str] | None, visits: Sequence[Any], source: str | None) -> str:
    if findings is None:
        return _UNKNOWN
    seen = ", ".join(name.replace("_", " ") for name in findings) or "no finding"
    if source == "stored":
        # The store answers with none where it knows that there was no earlier visit.
        return f"{len(visits)} earlier visit{'' if len(visits) == 1 else 's'}: {seen}" if visits else "no earlier visit"
    return f"as stated: {seen}"
