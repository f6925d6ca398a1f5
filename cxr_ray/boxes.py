"""Boxes that radiologists drew around findings: what heatmaps are judged by.

The NIH release has 984 in ``BBox_List_2017.csv`` (Wang et al. 2017), on 880 images of the official test list, for eight
findings. Its header breaks "Bbox [x,y,w,h]" into four columns and ends in empty ones that no row has; it writes
"Infiltrate" for Infiltration. The numbers are pixels of the released images, which are 1024 x 1024, from their upper left
corner.
"""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

from cxr_ray import storage
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import canonical

RELEASED_EDGE = 1024
_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
# Numbers are printed with fifteen digits; two that add up to the edge may be off in the last ones.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Box:
    """A box around a finding, in shares of the image's width and height.

    Attributes
    ----------
    image_id
        As datasets have it: the name of the file.
    finding
        Its name in NIH order.
    x, y
        The upper left corner, 0 to 1 from the image's own.
    width, height
        Above 0; the box ends within the image.
    """

    image_id: str
    finding: str
    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        """Share of the image that the box covers."""
        return self.width * self.height


def read_boxes(uri: str) -> tuple[Box, ...]:
    """Read a file in the layout of NIH's ``BBox_List_2017.csv``, in its order.

    Parameters
    ----------
    uri
        A path, or a URI of any pyarrow filesystem.

    Raises
    ------
    CxrRayError
        Naming the file, the line, the value and the remedy: the file is absent or no CSV, a column is missing, a number is
        unreadable, a box is empty or leaves the image, a finding is unknown, or there is no box at all.
    """
    filesystem, path = storage.resolve(uri)
    try:
        text = storage.read_bytes(filesystem, path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CxrRayError(f"{path}: is no text in UTF-8; download it again") from None
    rows = _rows(text, path)
    places = _places(next(rows, (1, []))[1], path)
    boxes = tuple(
        _box([row[place] if place < len(row) else "" for place in places], f"{path} line {line}") for line, row in rows
    )
    if not boxes:
        raise CxrRayError(f"{path}: holds no box; download it again")
    return boxes


def _rows(text: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not blank, without surrounding spaces, and the line that it ends in."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise CxrRayError(f"{path} line {reader.line_num}: is no readable CSV ({error}); download it again") from None


def _places(header: list[str], path: str) -> list[int]:
    absent = [repr(name) for name in _COLUMNS if name not in header]
    if absent:
        held = ", ".join(repr(name) for name in header if name) or "none"
        raise CxrRayError(f"{path} line 1: columns {', '.join(absent)} are missing, has {held}; give NIH's BBox_List_2017.csv")
    return [header.index(name) for name in _COLUMNS]


def _box(cells: list[str], where: str) -> Box:
    image_id, label, *numbers = cells
    if not image_id:
        raise CxrRayError(f"{where}: {_COLUMNS[0]} is empty; give the name of the image")
    try:
        finding = canonical(label)
    except CxrRayError as error:
        raise CxrRayError(f"{where}: {error}") from None
    x, y, width, height = (_number(text, name, where) for text, name in zip(numbers, "xywh", strict=True))
    inside = min(x, y) >= 0 and max(x + width, y + height) <= RELEASED_EDGE + _ROUNDING
    if not inside or min(width, height) <= 0:
        raise CxrRayError(
            f"{where}: box {', '.join(numbers)} is empty or leaves the image; "
            f"give x, y, w, h in pixels of the {RELEASED_EDGE} x {RELEASED_EDGE} image"
        )
    return Box(image_id, finding, x / RELEASED_EDGE, y / RELEASED_EDGE, width / RELEASED_EDGE, height / RELEASED_EDGE)


def _number(text: str, name: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CxrRayError(f"{where}: {name} is {text!r}; a number of pixels is needed")
    return number
