"""The picture of a study's answer, for those whose viewer shows no structured reports.

Dark as the films around it. The film and the same film under the leading finding's heatmap stand beside the table of all
fourteen; what was known of the patient, the model and the date below. Above and below stands, in words that cannot be taken
for a finding, that nobody has looked at it. Nobody's name is in it.
"""

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxr_ray.dicom_values import printable
from serve.node.results.result_object import made_at
from serve.node.results.source import orientation
from serve.node.results.study_answer import ImageAnswer, StudyAnswer, StudyFinding
from serve.priors_outcome import ABOUT_PRIORS

UNVERIFIED = "AI result, unverified"
NOT_DIAGNOSTIC = "not for diagnostic use"

WIDTH, HEIGHT = 1440, 900
_MARGIN = 24
_BANNER = 56
_FILMS = (_MARGIN, _BANNER + 52, 904, 640)
_TABLE = (936, _BANNER + 16, WIDTH - _MARGIN)
_ROW = 38
_BELOW = 672
_LINE = 20
_INPUT_LINES, _NOTE_LINES = 8, 4
_LAST = HEIGHT - 14

_GROUND = (16, 18, 20)
_PANEL = (0, 0, 0)
_TEXT = (226, 228, 230)
_FAINT = (150, 155, 160)
_RULE = (58, 62, 66)
_BAR = (94, 112, 128)
_ABOVE = (240, 170, 60)
_ABOVE_ROW = (48, 38, 22)
_ON_BANNER = (24, 18, 8)

_OPPOSITE = {"L": "R", "R": "L", "H": "F", "F": "H"}
_HEATMAP_WORDS = " The heatmap shows what raised the model's output, not a finding's outline."
_Colour = tuple[int, int, int]
_Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Heatmap:
    """The film under a heatmap, RGB, uint8, shape (height, width, 3), and the finding that it is of."""

    pixels: np.ndarray
    finding: str


def capture_picture(answer: StudyAnswer, radiograph: np.ndarray, heatmap: Heatmap | None) -> np.ndarray:
    """Draw a study's answer.

    Parameters
    ----------
    radiograph
        The leading image as it is stored, air dark: uint8, shape (height, width).

    Returns
    -------
    numpy.ndarray
        RGB, uint8, shape (900, 1440, 3).
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), _GROUND)
    page = _Page(ImageDraw.Draw(picture))
    _banner(page, answer)
    _films(picture, page, answer, radiograph, heatmap)
    _table(page, answer)
    _below(page, answer)
    words = f"{UNVERIFIED}, {NOT_DIAGNOSTIC}. Made by a neural network; no person has checked it."
    page.text((_MARGIN, _LAST), words + (_HEATMAP_WORDS if heatmap else ""), 15)
    return np.asarray(picture)


class _Page:
    """Text and shapes by their place, in pixels from the upper left corner."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def text(
        self, place: tuple[int, int], words: str, size: int, colour: _Colour = _TEXT, *, bold: bool = False, anchor: str = "ls"
    ) -> None:
        self.draw.text(place, printable(words), fill=colour, font=_font(size, bold), anchor=anchor)

    def fitted(self, place: tuple[int, int], words: str, size: int, width: int, colour: _Colour = _TEXT) -> None:
        """A line that ends in an ellipsis where it would be wider."""
        kept = words = printable(words)
        while kept and self.draw.textlength(words if kept == words else kept + "…", font=_font(size, False)) > width:
            kept = kept[:-1]
        self.text(place, words if kept == words else kept.rstrip() + "…", size, colour)

    def listed(self, box: _Box, rows: list[tuple[str, str]], size: int, indent: int, colours: tuple[_Colour, _Colour]) -> None:
        """Rows of a label and its text between the top and bottom of a box.

        Each has one line at least, two where there is room, and the last one all that are left.
        """
        left, base, right, bottom = box
        for following, (label, words) in zip(reversed(range(len(rows))), rows, strict=True):
            lines = (bottom - base) // _LINE - following
            self.text((left, base), label, size, colours[0])
            base = self._wrapped((left + indent, base), words, size, right, min(lines, 2) if following else lines, colours[1])

    def _wrapped(self, place: tuple[int, int], words: str, size: int, right: int, lines: int, colour: _Colour) -> int:
        """As many lines at most, parted between words; returns where the next one stands."""
        left, base = place
        rest = printable(words)
        for following in reversed(range(lines)):
            line = rest
            while following and " " in line and self.draw.textlength(line, font=_font(size, False)) > right - left:
                line = line.rpartition(" ")[0]
            self.fitted((left, base), line, size, right - left, colour)
            base += _LINE
            rest = rest[len(line) :].strip()
            if not rest:
                break
        return base

    def bar(self, box: _Box, colour: _Colour) -> None:
        if box[2] > box[0]:
            self.draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)


@functools.cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("matplotlib is not installed; its DejaVu fonts are needed")
    file = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    # Raqm would shape text by libraries that differ from machine to machine.
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def _banner(page: _Page, answer: StudyAnswer) -> None:
    page.bar((0, 0, WIDTH, _BANNER), _ABOVE)
    page.text((_MARGIN, _BANNER // 2), UNVERIFIED, 27, _ON_BANNER, bold=True, anchor="lm")
    page.text((WIDTH - _MARGIN, _BANNER // 2), NOT_DIAGNOSTIC, 27, _ON_BANNER, bold=True, anchor="rm")
    revision = f"revision {answer.revision}" if answer.revision > 1 else ""
    page.text((WIDTH // 2, _BANNER // 2), revision, 20, _ON_BANNER, anchor="mm")


def _films(picture: Image.Image, page: _Page, answer: StudyAnswer, radiograph: np.ndarray, heatmap: Heatmap | None) -> None:
    left, top, right, bottom = _FILMS
    middle = (left + right) // 2
    panels: list[tuple[_Box, str, np.ndarray]]
    film = np.repeat(radiograph[:, :, None], 3, axis=2)
    if heatmap is None:
        panels = [((left, top, right, bottom), "Radiograph", film)]
    else:
        panels = [
            ((left, top, middle - 6, bottom), "Radiograph", film),
            ((middle + 6, top, right, bottom), _heatmap_title(answer, heatmap.finding), heatmap.pixels),
        ]
    several = len(answer.ordered)
    which = f"image {answer.ordered.index(answer.leading.image) + 1} of {several}" if several > 1 else ""
    for number, (box, title, pixels) in enumerate(panels):
        page.text((box[0], top - 12), title, 18, bold=True)
        page.text((box[2], top - 12), "" if number else which, 15, _FAINT, anchor="rs")
        place = _within(box, radiograph.shape[1], radiograph.shape[0])
        page.bar(box, _PANEL)
        size = (place[2] - place[0], place[3] - place[1])
        picture.paste(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3), place[:2])
        _sides(page, box, orientation(answer.leading.image.header))


def _heatmap_title(answer: StudyAnswer, finding: str) -> str:
    positive = any(found.answer.positive for found in answer.findings if found.answer.name == finding)
    return f"Heatmap: {shown(finding)}" + ("" if positive else " (below threshold)")


def _within(box: _Box, width: int, height: int) -> _Box:
    """The largest part of the box with the film's proportions, in its middle."""
    room = box[2] - box[0], box[3] - box[1]
    scale = min(room[0] / width, room[1] / height)
    drawn = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = box[0] + (room[0] - drawn[0]) // 2, box[1] + (room[1] - drawn[1]) // 2
    return left, top, left + drawn[0], top + drawn[1]


def _sides(page: _Page, box: _Box, runs: tuple[str, str] | None) -> None:
    """What the header says lies at the film's right and left edge; nothing where it does not say."""
    if runs is None:
        return
    middle = (box[1] + box[3]) // 2
    for place, side, anchor in (((box[0] + 8, middle), _OPPOSITE[runs[0]], "lm"), ((box[2] - 8, middle), runs[0], "rm")):
        page.draw.text(place, side, fill=_TEXT, font=_font(17, True), anchor=anchor, stroke_width=2, stroke_fill=_PANEL)


def _table(page: _Page, answer: StudyAnswer) -> None:
    left, top, right = _TABLE
    calibrated = answer.leading.image.model.calibrated
    page.text((left + 10, top + 24), "Finding", 15, _FAINT)
    page.text((right - 90, top + 24), "probability" if calibrated else "certainty", 15, _FAINT, anchor="rs")
    page.text((right - 10, top + 24), "threshold", 15, _FAINT, anchor="rs")
    for number, found in enumerate(answer.findings):
        _row(page, (left, top + 36 + _ROW * number, right), found)
    end = top + 36 + _ROW * len(answer.findings)
    page.bar((left + 10, end + 9, left + 13, end + 27), _TEXT)
    page.text((left + 20, end + 24), "operating threshold", 14, _FAINT)
    page.bar((left + 190, end + 12, left + 204, end + 25), _ABOVE)
    page.text((left + 211, end + 24), "at or above it", 14, _FAINT)


def _row(page: _Page, place: tuple[int, int, int], found: StudyFinding) -> None:
    left, top, right = place
    answer, base = found.answer, top + _ROW // 2
    if answer.positive:
        page.bar((left, top + 1, right, top + _ROW - 1), _ABOVE_ROW)
    colour = _ABOVE if answer.positive else _TEXT
    page.text((left + 10, base), shown(answer.name), 18, colour, bold=answer.positive, anchor="lm")
    first, last = left + 204, right - 158
    long = last - first
    page.bar((first, base - 8, last, base + 8), _RULE)
    page.bar((first, base - 8, first + round(long * answer.probability), base + 8), _ABOVE if answer.positive else _BAR)
    mark = first + round(long * answer.threshold)
    page.bar((mark - 1, base - 13, mark + 2, base + 13), _TEXT)
    page.text((right - 76, base), percent(answer.probability), 18, colour, bold=answer.positive, anchor="rm")
    page.text((right - 10, base), percent(answer.threshold), 15, _FAINT, anchor="rm")


def _below(page: _Page, answer: StudyAnswer) -> None:
    left, middle, right = _MARGIN, 620, WIDTH - _MARGIN
    page.bar((left, _BELOW, right, _BELOW + 1), _RULE)
    page.text((left, _BELOW + 24), "Inputs besides the image", 15, _FAINT)
    page.text((middle, _BELOW + 24), "Model", 15, _FAINT)
    top = _BELOW + 48
    inputs, notes = _inputs_and_notes(answer.leading.image)
    page.listed((left, top, middle - 30, top + _INPUT_LINES * _LINE), inputs[:_INPUT_LINES], 16, 90, (_FAINT, _TEXT))
    for line in _model_words(answer):
        page.fitted((middle, top), line, 16, right - middle)
        top += _LINE
    top += 8
    if len(notes) > _NOTE_LINES:
        kept = _NOTE_LINES - 1
        notes[kept:] = [("", f"+{len(notes) - kept} more")]
    page.listed((middle, top, right, top + _NOTE_LINES * _LINE), notes, 15, 48, (_FAINT, _FAINT))


def _inputs_and_notes(image: ImageAnswer) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the model was told, and with it which earlier studies it was not told of; then the other warnings."""
    inputs, notes = list(image.inputs), []
    for warning in image.warnings:
        if warning.startswith(ABOUT_PRIORS):
            inputs.append(("priors", warning.removeprefix(ABOUT_PRIORS)))
        else:
            notes.append(("Note:", warning))
    return inputs, notes


def _model_words(answer: StudyAnswer) -> list[str]:
    model = answer.leading.image.model
    made = made_at(answer)
    zone = f"{made:%z}"
    several = f" from {len(answer.images)} images, of each finding the highest" if len(answer.images) > 1 else ""
    return [
        f"{model.name}, version {model.version}",
        f"bundle SHA-256 {model.digest}",
        f"Answered {made:%Y-%m-%d %H:%M} UTC{zone[:3]}:{zone[3:5]}{several}",
    ]


def shown(finding: str) -> str:
    """A finding's name as people write it."""
    return finding.replace("_", " ").capitalize()


def percent(probability: float) -> str:
    """Two digits, and never 0 or 100, which nothing is."""
    value = 100 * probability
    if not 0.1 <= value <= 99.9:
        return "<0.1 %" if value < 0.1 else ">99.9 %"
    return f"{value:.1f} %" if value < 9.95 or value > 99 else f"{value:.0f} %"
