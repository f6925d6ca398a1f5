"""Values of a DICOM header, read so that nothing in them can break a line of text or tell of a patient.

Headers are written by hand as well as by machines, and a damaged one puts anything under any name. What a message may
repeat is therefore a code string as the standard allows it, and nothing else.
"""

import re

import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

# pydicom's warnings quote the values that they complain of, and so would carry patient data into logs.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# A code string of PS3.5 table 6.2-1, but for the blanks, which coded values do without and words typed by hand have.
_CODE_STRING = re.compile(r"[A-Z0-9_./\\+-]{1,16}")


class DicomValueError(ValueError):
    """A value of the header cannot be what it must be; the text names the attribute and the remedy."""


def printable(value: str) -> str:
    """One line of text: runs of control characters become a space."""
    return _CONTROL.sub(" ", value).strip()


def text(dataset: Dataset, keyword: str) -> str:
    r"""The value as one line of text; "" where it is absent or empty. Several values stay as DICOM writes them: A\B."""
    value = dataset.get(keyword)
    if isinstance(value, MultiValue):
        value = "\\".join(map(str, value))
    return "" if value is None else printable(str(value))


def code_strings(dataset: Dataset, keyword: str) -> list[str]:
    """The values in capitals, as comparisons need them; empty ones count, so that the others keep their places."""
    value = text(dataset, keyword).upper()
    return [part.strip() for part in value.split("\\")] if value else []


def shown(value: str) -> str:
    """What a message may repeat of a value: a code string, else only that it is something else."""
    return value if _CODE_STRING.fullmatch(value) else "free text"


def whole_number(dataset: Dataset, keyword: str) -> int:
    """The value as a number, 0 where it is absent or empty.

    Raises
    ------
    DicomValueError
        If the value is no whole number, or several.
    """
    value = dataset.get(keyword)
    try:
        return int(value or 0)
    except (TypeError, ValueError, OverflowError):
        raise DicomValueError(f"{keyword} is no whole number; send the file again") from None


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The values as numbers, [] where there are none.

    Raises
    ------
    DicomValueError
        If one is no number.
    """
    value = dataset.get(keyword)
    if value is None or value == "":
        return []
    try:
        return [float(part) for part in (value if isinstance(value, MultiValue | list | tuple) else [value])]
    except (TypeError, ValueError, OverflowError):
        raise DicomValueError(f"{keyword} is no number; correct the header") from None
