"""Which DICOM images are frontal chest radiographs: a list of rules, each of which can refuse.

A rule reads what one group of attributes says and answers with a reason where that contradicts a frontal chest
radiograph. What no attribute says is allowed and noted as a warning, because real files leave nearly everything empty.

Attributes that describe the image or its series decide. The study's description cannot: "CHEST PA AND LATERAL" stands
on both images of the study; it is asked only for the part of the body, and only where nothing else names one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from cxr_ray.dicom_values import DicomValueError, code_strings, numbers, shown, text, whole_number
from cxr_ray.pixels import DamagedImage, UnusableImage
from cxr_ray.radiograph_words import (
    CHEST,
    CHEST_STEMS,
    FRONTAL,
    NO_BODY_PART,
    NOT_FRONTAL,
    NOT_FRONTAL_VIEW_POSITIONS,
    OTHER_REGIONS,
    VIEWS,
    words,
)

RADIOGRAPH_MODALITIES = ("CR", "DX", "DR")
# A smaller one is an icon. Of the 112,120 NIH originals, height to width goes from 0.56 to 1.84.
MIN_EDGE_PIXELS = 16
MAX_ASPECT = 2.0

_SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.1.1.1",  # Digital X-Ray, for processing: refused by its own rule, which says why
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture, and its multi-frame forms
    "1.2.840.10008.5.1.4.1.1.7.2",
    "1.2.840.10008.5.1.4.1.1.7.3",
    "1.2.840.10008.5.1.4.1.1.7.4",
)
_STANDARD_UIDS = "1.2.840.10008."
_SERIES_DESCRIPTIONS = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription")
_LOCALIZERS = ("LOCALIZER", "SCOUT", "TOPOGRAM")
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio")
_CHEST_CODES = ("51185008", "T-D3000", "39607008", "T-28000", "181216001", "302551006")
# CID 4010 "DX View" in SNOMED CT and in the SNOMED RT codes of older files.
_VIEW_CODES = {"272479007": "PA", "R-10214": "PA", "R-40888": "PA", "399348003": "AP", "R-10206": "AP"}
_FRONTAL_CODES = {*_VIEW_CODES, "399033003", "R-10202"}
_NOT_FRONTAL_CODES = frozenset(
    """
    399067008 R-102CD 399173006 R-10236 399198007 R-10232 30730003 G-A145 399182000 R-102C1 399184004 R-10238
    399236003 R-10234 399135007 R-10220 399356000 R-40985 399006002 R-10212 399038007 R-10210 399312000 R-10208
    399059000 R-10216 399160007 R-10204
    """.split()  # noqa: SIM905 - a column of 26 strings is harder to read
)
_ORIENTATION_AXES = {"L": "side", "R": "side", "A": "depth", "P": "depth", "H": "length", "F": "length"}

_Rule = Callable[[Dataset], str | None]


@dataclass(frozen=True)
class View:
    """A view position: "PA", "AP" or None, and what there is to say about it, if anything."""

    position: str | None
    warning: str | None


def check_frontal_chest(dataset: Dataset, name: str) -> list[str]:
    """Refuse what contradicts a frontal chest radiograph; return a warning for each thing the file leaves open.

    Raises
    ------
    UnusableImage
        Naming the attribute, its value and what is accepted.
    DamagedImage
        If an attribute that must be a number is none.
    """
    _apply(_REFUSALS, dataset, name)
    return [warning for doubt in _DOUBTS if (warning := doubt(dataset)) is not None]


def check_single_frame(dataset: Dataset, name: str) -> None:
    """Raise UnusableImage where the file holds several images, DamagedImage where it does not say how many."""
    _apply((_frames,), dataset, name)


def frontal_view(dataset: Dataset) -> View:
    """The view of a frontal radiograph: by ViewPosition, else by the view's code, else as its series is described."""
    stated = [view for view in VIEWS if view in _view_words(dataset)]
    coded = sorted({_VIEW_CODES[code] for code, _ in _codes(dataset, "ViewCodeSequence") if code in _VIEW_CODES})
    if stated and coded and stated != coded:
        return View(None, "ViewPosition and ViewCodeSequence disagree: view unknown")
    if len(stated) == 1:
        return View(stated[0], None)
    value = text(dataset, "ViewPosition").upper()
    open_still = f"ViewPosition is {shown(value) if value else 'empty'}"
    if len(coded) == 1:
        return View(coded[0], f"{open_still}: view {coded[0]} taken from ViewCodeSequence")
    described = {view: keyword for keyword, said in _described(dataset) for view in VIEWS if view in said}
    if len(described) == 1 and not any(said & NOT_FRONTAL for _, said in _described(dataset)):
        view, keyword = next(iter(described.items()))
        return View(view, f"{open_still}: view {view} taken from {keyword}")
    return View(None, f"{open_still}: view unknown")


def _apply(rules: tuple[_Rule, ...], dataset: Dataset, name: str) -> None:
    for rule in rules:
        try:
            reason = rule(dataset)
        except DicomValueError as error:
            raise DamagedImage(f"{name}: {error}") from None
        if reason is not None:
            raise UnusableImage(f"{name}: {reason}")


def _modality(dataset: Dataset) -> str | None:
    modality = text(dataset, "Modality").upper()
    if modality in RADIOGRAPH_MODALITIES:
        return None
    accepted = ", ".join(RADIOGRAPH_MODALITIES)
    return f"Modality is {shown(modality) if modality else 'absent'}; only radiographs ({accepted}) are read"


def _sop_class(dataset: Dataset) -> str | None:
    sop_class = UID(text(dataset, "SOPClassUID"))
    if sop_class in _SOP_CLASSES or not sop_class.startswith(_STANDARD_UIDS):
        return None
    known = sop_class.name if sop_class.name != sop_class else "of an unknown kind"
    return f"SOPClassUID is {known}; only images of CR, DX and Secondary Capture are read"


def _intent(dataset: Dataset) -> str | None:
    intent = text(dataset, "PresentationIntentType").upper()
    for_processing = text(dataset, "SOPClassUID") == _SOP_CLASSES[2] and intent != "FOR PRESENTATION"
    if for_processing or intent == "FOR PROCESSING":
        return "PresentationIntentType is FOR PROCESSING, values of the bare detector; send the image FOR PRESENTATION"
    return None


def _frames(dataset: Dataset) -> str | None:
    frames = whole_number(dataset, "NumberOfFrames")
    return f"NumberOfFrames is {frames}; only single images are read" if frames > 1 else None


def _image_type(dataset: Dataset) -> str | None:
    localizers = [value for value in code_strings(dataset, "ImageType") if value in _LOCALIZERS]
    return f"ImageType is {localizers[0]}; only radiographs are read" if localizers else None


def _body_part(dataset: Dataset) -> str | None:
    body_part = _stated_body_part(dataset)
    if not body_part or any(stem in _plain(body_part) for stem in CHEST_STEMS):
        return None
    return f"BodyPartExamined is {shown(body_part)}; only chest radiographs are read"


def _anatomic_region(dataset: Dataset) -> str | None:
    for code, meaning in _codes(dataset, "AnatomicRegionSequence"):
        if code not in _CHEST_CODES and (other := _other_region(meaning)):
            return f"AnatomicRegionSequence says {other}; only chest radiographs are read"
    return None


def _described_region(dataset: Dataset) -> str | None:
    for keyword, said in _described(dataset):
        if other := _other_region(said):
            return f"{keyword} says {other}; only chest radiographs are read"
    return None


def _studied_region(dataset: Dataset) -> str | None:
    other = _other_region(words(text(dataset, "StudyDescription")))
    if not other or _names_chest(dataset):
        return None
    return f"StudyDescription says {other} and nothing says chest; only chest radiographs are read"


def _view_position(dataset: Dataset) -> str | None:
    said = sorted(_view_words(dataset) & NOT_FRONTAL_VIEW_POSITIONS)
    return f"ViewPosition is {' '.join(said)}; only frontal views (PA, AP) are read" if said else None


def _view_code(dataset: Dataset) -> str | None:
    for code, meaning in _codes(dataset, "ViewCodeSequence"):
        other = sorted(meaning & NOT_FRONTAL)
        if code in _NOT_FRONTAL_CODES or (other and code not in _FRONTAL_CODES):
            return f"ViewCodeSequence says {other[0] if other else code}; only frontal views (PA, AP) are read"
    return None


def _described_view(dataset: Dataset) -> str | None:
    for keyword, said in _described(dataset):
        other = sorted(said & NOT_FRONTAL)
        if other and not said & FRONTAL:
            return f"{keyword} says {other[0]}; only frontal views (PA, AP) are read"
    return None


def _orientation(dataset: Dataset) -> str | None:
    axes = _orientation_axes(dataset)
    if "depth" in axes:
        return "PatientOrientation runs front to back; only frontal views are read"
    return None


def _shape(dataset: Dataset) -> str | None:
    rows, columns = whole_number(dataset, "Rows"), whole_number(dataset, "Columns")
    if rows <= 0 or columns <= 0:
        return None
    if min(rows, columns) < MIN_EDGE_PIXELS:
        return f"Rows and Columns are {rows} and {columns}, an icon; send the image itself"
    aspect = rows / columns * _pixel_aspect(dataset)
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        return f"the image is {aspect:.2g} times as high as wide; a chest film is {1 / MAX_ASPECT:g} to {MAX_ASPECT:g}"
    return None


def _body_part_unknown(dataset: Dataset) -> str | None:
    if _stated_body_part(dataset) or _names_chest(dataset):
        return None
    return "BodyPartExamined is empty: taken as a chest radiograph"


def _view_unknown(dataset: Dataset) -> str | None:
    return frontal_view(dataset).warning


def _private_class(dataset: Dataset) -> str | None:
    private = not text(dataset, "SOPClassUID").startswith(_STANDARD_UIDS)
    return "SOPClassUID is absent or private: taken as a radiograph" if private else None


def _unusual_orientation(dataset: Dataset) -> str | None:
    if len(_orientation_axes(dataset)) != 2:
        return None
    across, down = (value[0] for value in code_strings(dataset, "PatientOrientation"))
    if (across, down) == ("L", "F"):
        return None
    return f"PatientOrientation is {across}\\{down}, not L\\F: mirrored or turned, and read as it is stored"


_REFUSALS: tuple[_Rule, ...] = (
    _modality,
    _sop_class,
    _intent,
    _image_type,
    _body_part,
    _anatomic_region,
    _described_region,
    _studied_region,
    _view_position,
    _view_code,
    _described_view,
    _orientation,
    _frames,
    _shape,
)
_DOUBTS: tuple[_Rule, ...] = (_private_class, _body_part_unknown, _view_unknown, _unusual_orientation)


def _plain(value: str) -> str:
    return " ".join(sorted(words(value)))


def _stated_body_part(dataset: Dataset) -> str:
    body_part = text(dataset, "BodyPartExamined").upper()
    return "" if body_part in NO_BODY_PART else body_part


def _view_words(dataset: Dataset) -> frozenset[str]:
    return words(text(dataset, "ViewPosition"))


def _described(dataset: Dataset) -> Iterator[tuple[str, frozenset[str]]]:
    """Each description of the image or its series, by attribute, as its words."""
    for keyword in _SERIES_DESCRIPTIONS:
        yield keyword, words(text(dataset, keyword))


def _codes(dataset: Dataset, keyword: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Value and words of the meaning of each code in a code sequence."""
    sequence = dataset.get(keyword)
    for item in sequence if isinstance(sequence, Sequence) else ():
        yield text(item, "CodeValue").upper(), words(text(item, "CodeMeaning"))


def _other_region(said: frozenset[str]) -> str | None:
    """The part of the body that is named, unless the chest is named with it."""
    return None if said & CHEST else min(said & OTHER_REGIONS, default=None)


def _names_chest(dataset: Dataset) -> bool:
    regions = _codes(dataset, "AnatomicRegionSequence")
    return (
        bool(_stated_body_part(dataset))
        or any(code in _CHEST_CODES or meaning & CHEST for code, meaning in regions)
        or any(said & CHEST for _, said in _described(dataset))
    )


def _orientation_axes(dataset: Dataset) -> tuple[str, ...]:
    """Along which axis of the body rows and columns run (PS3.3 C.7.6.1.1.1); () where that is not said as it must be."""
    orientation = code_strings(dataset, "PatientOrientation")
    axes = tuple(_ORIENTATION_AXES.get(value[:1], "") for value in orientation)
    valid = len(set(axes)) == 2 and all(axes) and all(set(value) <= set("LRAPHF") for value in orientation)
    return axes if valid and len(axes) == 2 else ()


def _pixel_aspect(dataset: Dataset) -> float:
    """Height of a pixel as multiple of its width; 1 where neither a spacing nor a ratio is given."""
    for keyword in _SPACINGS:
        sizes = numbers(dataset, keyword)
        if len(sizes) == 2 and all(math.isfinite(size) and size > 0 for size in sizes):
            return sizes[0] / sizes[1]
    return 1.0
