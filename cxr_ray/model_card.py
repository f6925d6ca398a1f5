"""The model card of a bundle (Mitchell et al. 2019): what the network is, what it was trained on, how good it was found to be.

The card's last line holds the SHA-256 of all before it and the digest of its bundle, so that a changed byte, or the card of
another bundle, is noticed; it is no part of what identifies the bundle.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from cxr_ray import presets
from cxr_ray.bundle_description import BundleDescription


def model_card(description: BundleDescription, evaluation: Mapping[str, Any] | None = None) -> str:
    """The card in Markdown.

    Parameters
    ----------
    evaluation
        As ``evaluation.json`` has it; None for a bundle that was not yet evaluated.
    """
    parts = [
        _network(description),
        _not_evaluated() if evaluation is None else _performance(evaluation),
        _thresholds(description),
        _limits(description),
    ]
    return "\n".join(parts)


def seal(card: str, bundle_digest: str) -> bytes:
    """The card as it is written: with a last line that says what was written, and of which bundle."""
    content = card.encode()
    return content + f"<!-- bundle {bundle_digest} card {hashlib.sha256(content).hexdigest()} -->\n".encode()


def is_sealed(content: bytes, bundle_digest: str) -> bool:
    """Whether these are the bytes that `seal` gave for a card of this bundle."""
    card, mark, _ = content.rpartition(b"<!-- bundle ")
    return bool(mark) and content == _sealed_again(card, bundle_digest)


def _sealed_again(card: bytes, bundle_digest: str) -> bytes | None:
    try:
        return seal(card.decode(), bundle_digest)
    except UnicodeDecodeError:
        return None


def _network(description: BundleDescription) -> str:
    preset = presets.find(description.preset)
    variant = "" if description.variant == "default" else f", variant {description.variant}"
    assumed = [f"- Assumed where the source is silent: {'; '.join(preset.assumed)}"] if preset.assumed else []
    lines = [
        f"# Model card: {description.name} {description.version}",
        "",
        f"- Network: preset `{preset.name}`{variant} ({preset.source})",
        f"- Inputs: {description.inputs_in_words()}",
        *assumed,
        f"- Trained with cxr-ray {description.code_version} on the dataset of manifest SHA-256 `{description.dataset_digest}`",
        f"- Mean AUC on the validation split: {_number(description.validation.get('auc'))}",
        "",
        "**Not a medical device.** Research use only; every result needs a radiologist.",
        "",
    ]
    return "\n".join(lines)


def _not_evaluated() -> str:
    return "## Performance\n\nNot evaluated yet: `cxr-ray evaluate --card` writes the figures here.\n"


def _performance(evaluation: Mapping[str, Any]) -> str:
    findings = [
        (
            name.replace("_", " "),
            f"{scores['positives']:,}",
            _interval(scores["auc"]),
            f"{_number(scores['average_precision']['value'])} ({_number(scores['prevalence'])})",
            _number(scores["at_threshold"]["sensitivity"]),
            _number(scores["at_threshold"]["specificity"]),
            _number(scores["calibration_error"]),
        )
        for name, scores in evaluation["findings"].items()
    ]
    mean = ("mean", "", _interval(evaluation["mean"]["auc"]), _number(evaluation["mean"]["average_precision"]["value"]))
    parts = [
        "## Performance",
        "",
        f"{evaluation['title']}. Intervals: {evaluation['interval']}.",
        "",
        _table(
            ("finding", "positives", "AUC", "AP (prevalence)", "sensitivity", "specificity", "calibration error"),
            [*findings, (*mean, "", "", "")],
        ),
    ]
    if evaluation["subgroups"]:
        groups = [
            (group["by"], group["name"], f"{group['images']:,}", str(group["findings"]), _interval(group["auroc"]))
            for group in evaluation["subgroups"]
        ]
        parts += ["### Subgroups", "", _table(("by", "subgroup", "images", "findings", "mean AUC"), groups)]
    if evaluation["ablations"]:
        changes = [(each["name"], _interval(each["auroc"]), _interval(each["difference"])) for each in evaluation["ablations"]]
        parts += ["### What the figure owes to its inputs", "", _table(("inputs", "mean AUC", "difference"), changes)]
    return "\n".join(parts)


def _thresholds(description: BundleDescription) -> str:
    others = description.other_thresholds
    rows = [
        (name.replace("_", " "), f"{value:.4f}", *(f"{chosen[name]:.4f}" for chosen in others.values()))
        for name, value in description.thresholds.items()
    ]
    names = [_RULES.get(rule, rule) for rule in others]
    said = "Answers are judged by the first; all were chosen on the validation split."
    return f"## Thresholds\n\n{said}\n\n" + _table(("finding", "sensitivity + specificity", *names), rows)


_RULES = {"sensitivity_90": "sensitivity .90", "prevalence": "as many as are"}


def _limits(description: BundleDescription) -> str:
    lines = [
        "## Limits",
        "",
        "- The labels of ChestX-ray14 were mined from reports, not read by radiologists for this purpose; a model learns their "
        "errors as well.",
        "- One hospital's films, anonymised and reduced to 8 bits; elsewhere the figures have to be measured again.",
    ]
    if description.layout.history:
        lines.append(
            "- Part of what the history adds is that a report repeats the one before: see the findings that no earlier visit "
            "showed before relying on it for detection."
        )
    return "\n".join([*lines, "", ""])


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _interval(interval: Mapping[str, float | None]) -> str:
    if interval["value"] is None:
        return "-"
    return f"{_number(interval['value'])} ({_number(interval['low'])} to {_number(interval['high'])})"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) else "-"
