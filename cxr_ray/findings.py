"""The fourteen findings of ChestX-ray14: their order, their names and their DICOM codes.

The order is NIH's (Wang et al. 2017, extended to 14 classes with the release). Other tools sort the names or use an order
of their own, so names travel with every shard, bundle and score here, and `positions` aligns two lists by name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cxr_ray.errors import CxrRayError

FINDINGS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
SEPARATOR = "|"

# Spellings met in copies of the release, reduced by `_plain`, that differ from ours by more than case and separators.
_ALIASES = {"infiltrate": "Infiltration"}


@dataclass(frozen=True)
class Code:
    """A coded concept as DICOM writes it (PS3.3 section 8): value, coding scheme designator, meaning."""

    value: str
    scheme: str
    meaning: str


# SNOMED CT concepts from DICOM context groups where one exists (CID 645, 3700, 6104, 6105), else from agreeing public
# mappings. No agreed concept exists for pleural thickening, hence the private scheme.
CODES: dict[str, Code] = {
    "Atelectasis": Code("46621007", "SCT", "Atelectasis"),
    "Cardiomegaly": Code("8186001", "SCT", "Cardiomegaly"),
    "Effusion": Code("60046008", "SCT", "Pleural effusion"),
    "Infiltration": Code("409609008", "SCT", "Radiologic infiltrate of lung"),
    "Mass": Code("4147007", "SCT", "Mass"),
    "Nodule": Code("27925004", "SCT", "Nodule"),
    "Pneumonia": Code("233604007", "SCT", "Pneumonia"),
    "Pneumothorax": Code("36118008", "SCT", "Pneumothorax"),
    "Consolidation": Code("95436008", "SCT", "Lung consolidation"),
    "Edema": Code("19242006", "SCT", "Pulmonary edema"),
    "Emphysema": Code("87433001", "SCT", "Pulmonary emphysema"),
    "Fibrosis": Code("51615001", "SCT", "Fibrosis of lung"),
    "Pleural_Thickening": Code("pleural-thicken", "99CXRRAY", "Pleural thickening"),
    "Hernia": Code("84089009", "SCT", "Hiatal hernia"),
}


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


_BY_PLAIN_NAME = {_plain(name): name for name in FINDINGS} | _ALIASES


def canonical(name: str) -> str:
    """The finding that `name` spells, whatever its case and separators.

    Raises
    ------
    CxrRayError
        If `name` is none of the fourteen.
    """
    try:
        return _BY_PLAIN_NAME[_plain(name)]
    except KeyError:
        raise CxrRayError(f"finding {name!r} is not known; use one of: {', '.join(FINDINGS)}") from None


def encode(names: Iterable[str]) -> np.ndarray:
    """The 14 labels (uint8, shape (14,), NIH order) with 1 for each finding named; "No Finding" adds none.

    Raises
    ------
    CxrRayError
        If a name is unknown, or "No Finding" stands beside a finding.
    """
    labels = np.zeros(len(FINDINGS), dtype=np.uint8)
    given = [name.strip() for name in names if name.strip()]
    findings = [canonical(name) for name in given if _plain(name) != _plain(NO_FINDING)]
    if findings and len(findings) < len(given):
        raise CxrRayError(f"labels {SEPARATOR.join(given)!r} hold 'No Finding' beside a finding; remove one of them")
    for name in findings:
        labels[FINDINGS.index(name)] = 1
    return labels


def parse(text: str) -> np.ndarray:
    """The 14 labels (uint8, shape (14,)) of a NIH label text such as ``"Mass|Nodule"`` or ``"No Finding"``."""
    if not text.strip():
        raise CxrRayError("the label text is empty; write 'No Finding' where there is none")
    return encode(text.split(SEPARATOR))


def names(labels: Sequence[int] | np.ndarray) -> list[str]:
    """The findings present in 14 labels in NIH order."""
    return [name for name, present in zip(FINDINGS, labels, strict=True) if present]


def positions(wanted: Sequence[str], available: Sequence[str]) -> list[int]:
    """Where each finding of `wanted` stands in `available`, so that two lists are aligned by name.

    Raises
    ------
    CxrRayError
        If a wanted finding is not available.
    """
    where = {name: index for index, name in enumerate(available)}
    absent = [name for name in wanted if name not in where]
    if absent:
        raise CxrRayError(f"findings {', '.join(absent)} are not among {', '.join(available)}; train on the same findings")
    return [where[name] for name in wanted]
