"""What came of asking an archive for earlier studies, as results say it: in the report's tree, and in words on the picture."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from dicom_judges import report_lines
from PIL import ImageDraw
from result_answers import INPUTS, image, study

from cxr_ray.findings import FINDINGS
from serve.node.results.capture_picture import HEIGHT, WIDTH, Heatmap, capture_picture
from serve.node.results.result_object import file_bytes
from serve.node.results.settings import ResultSettings
from serve.node.results.structured_report import structured_report
from serve.node.results.study_answer import StudyAnswer
from serve.priors_outcome import PriorsOutcome

FILM = np.full((64, 64), 90, dtype=np.uint8)
HEAT = np.full((64, 64, 3), 90, dtype=np.uint8)
SAID = {
    "the archive did not answer within 5 s; predicted without its studies": PriorsOutcome(
        asked=True, outcome="timeout", studies=3, budget_seconds=5
    ),
    "the archive did not answer within 0.5 s; predicted with 1 of 3 earlier studies": PriorsOutcome(
        asked=True, outcome="timeout", studies=3, used=1, budget_seconds=0.5
    ),
    "the archive failed (the association ended before C-FIND was answered); predicted without its studies": PriorsOutcome(
        asked=True, outcome="failed", reason="the association ended before C-FIND was answered"
    ),
    "not every earlier study could be used; predicted with 1 of 2 earlier studies": PriorsOutcome(
        asked=True, outcome="found", studies=2, used=1
    ),
    "the archive was not asked (the film has no study date); predicted without its studies": PriorsOutcome(
        asked=False, outcome="off", reason="the film has no study date"
    ),
}
NOTHING_LACKS = [PriorsOutcome(asked=True, outcome="found", studies=2, used=2), PriorsOutcome(asked=True, outcome="none")]
LONG = (
    "ViewPosition is empty and the series is described at greater length than fits on a line of the picture below: view unknown"
)
ALL_FINDINGS = f"5 earlier visits: {', '.join(name.replace('_', ' ') for name in FINDINGS)}"

Box = tuple[float, float, float, float]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[StudyAnswer], list[tuple[str, Box]]]:
    """What is written into an answer's picture, in its order, and the box of each text."""
    written: list[tuple[str, Box]] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: tuple[int, int], words: str, **how: object) -> None:
        if words:
            written.append((words, self.textbbox(place, words, font=how["font"], anchor=how["anchor"])))
        draw_text(self, place, words, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)

    def draw(answer: StudyAnswer) -> list[tuple[str, Box]]:
        written.clear()
        capture_picture(answer, FILM, Heatmap(HEAT, answer.leading.answer.name))
        return list(written)

    return draw


def words(texts: list[tuple[str, Box]]) -> str:
    return " ".join(text for text, _ in texts)


def answered(outcome: PriorsOutcome, *others: str) -> StudyAnswer:
    return study(image(warnings=(*others, *outcome.warnings())))


def tree(answer: StudyAnswer, folder: Path) -> str:
    file = folder / "report.dcm"
    file.write_bytes(file_bytes(structured_report(answer, "comprehensive-3d", ResultSettings())))
    return "\n".join(report_lines(file))


@pytest.mark.parametrize(("sentence", "outcome"), SAID.items(), ids=[outcome.outcome for outcome in SAID.values()])
def test_report_and_picture_say_what_lacked(
    sentence: str, outcome: PriorsOutcome, drawn: Callable[[StudyAnswer], list[tuple[str, Box]]], tmp_path: Path
) -> None:
    answer = answered(outcome, *(f"note {number}" for number in range(9)))
    assert tree(answer, tmp_path).count(f'(,,"Algorithm Parameters")="warning: priors: {sentence}"') == len(FINDINGS)
    said = words(drawn(answer))
    assert f"priors {sentence}" in said
    assert said.count("priors") == 1


@pytest.mark.parametrize("outcome", NOTHING_LACKS, ids=[outcome.outcome for outcome in NOTHING_LACKS])
def test_nothing_is_said_where_nothing_lacks(
    outcome: PriorsOutcome, drawn: Callable[[StudyAnswer], list[tuple[str, Box]]], tmp_path: Path
) -> None:
    answer = answered(outcome)
    assert not any(word in tree(answer, tmp_path) for word in ("priors", "archive"))
    assert not any(word in words(drawn(answer)) for word in ("priors", "archive"))


@pytest.mark.parametrize(
    ("notes", "shown", "more"), [(0, 0, ""), (1, 1, ""), (4, 4, ""), (5, 3, "+2 more"), (12, 3, "+9 more")]
)
def test_the_picture_says_how_many_notes_it_leaves_out(
    notes: int, shown: int, more: str, drawn: Callable[[StudyAnswer], list[tuple[str, Box]]]
) -> None:
    said = words(drawn(study(image(warnings=tuple(f"about {number}" for number in range(notes))))))
    assert [f"Note: about {number}" in said for number in range(notes)] == [number < shown for number in range(notes)]
    assert said.count("Note:") == shown
    assert (" more" in said, more in said) == (bool(more), True)


@pytest.mark.parametrize("notes", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("history", ["not known", ALL_FINDINGS])
@pytest.mark.parametrize("reason", ["", "x " * 60])
def test_nothing_on_the_picture_overlaps_or_leaves_it(
    notes: int, history: str, reason: str, drawn: Callable[[StudyAnswer], list[tuple[str, Box]]]
) -> None:
    warnings = (*[LONG] * notes, *PriorsOutcome(asked=True, outcome="failed", reason=reason).warnings())
    texts = drawn(study(image(inputs=(*INPUTS[:3], ("history", history)), warnings=warnings), revision=12))
    for text, (left, top, right, bottom) in texts:
        assert 0 < left < right <= WIDTH - 20, text
        assert 0 < top < bottom <= HEIGHT - 8, text
    for (one, first), (other, second) in combinations(texts, 2):
        beside = first[2] <= second[0] or second[2] <= first[0]
        assert beside or first[3] <= second[1] or second[3] <= first[1], (one, other)


def test_a_note_takes_the_lines_that_there_are(drawn: Callable[[StudyAnswer], list[tuple[str, Box]]]) -> None:
    assert f"Note: {LONG}" in words(drawn(study(image(warnings=(LONG,)))))
    two = words(drawn(study(image(warnings=(LONG, LONG)))))
    assert two.count(LONG) == 2
    assert words(drawn(study(image(warnings=(LONG,) * 4)))).count("…") == 4
    known = words(drawn(study(image(inputs=(("history", ALL_FINDINGS),)))))
    assert f"history {ALL_FINDINGS}" in known
