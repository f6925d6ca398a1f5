"""Progress where there is no terminal: lines of a log."""

import re

import pytest

from cxr_ray import progress
from cxr_ray.progress import ProgressReport

LINE = re.compile(
    r"(?P<task>\w+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>\w+), (?P<rate>\d+) (?P=unit)/s"
    r"(?P<note>, .*?)?(?:, (?P<left>\d+) s left| in (?P<took>[\d.]+) s)"
)


@pytest.fixture
def lines(capsys):
    def read():
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    return read


@pytest.fixture
def always(monkeypatch):
    """Print on every step instead of every ten seconds."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)


def parts(line):
    match = LINE.fullmatch(line)
    assert match, line
    return match.groupdict()


def test_the_end_is_one_line_with_count_rate_and_time(lines):
    with ProgressReport("ingest", 100, "images") as report:
        for _ in range(10):
            report.advance(10)
    (line,) = lines()
    seen = parts(line)
    assert (seen["task"], seen["done"], seen["total"], seen["unit"]) == ("ingest", "100", "100", "images")
    assert int(seen["rate"]) > 0
    assert seen["took"] is not None


def test_work_that_stopped_early_says_what_is_left(lines):
    with ProgressReport("train", 100, "images") as report:
        report.move_to(40, "loss 0.5", rate=20.0)
        assert lines() == []
    (line,) = lines()
    seen = parts(line)
    assert (seen["done"], seen["total"], seen["note"]) == ("40", "100", ", loss 0.5")
    assert seen["left"] is not None


def test_lines_on_the_way(lines, always):
    with ProgressReport("train", 100, "images") as report:
        report.move_to(25, "epoch 1/2", rate=25.0)
        report.move_to(75, rate=50.0)
    assert lines() == [
        "train: 25/100 images, 25 images/s, epoch 1/2, 3 s left",
        # What was printed last is not printed again at the end, with or without an error.
        "train: 75/100 images, 50 images/s, 0 s left",
    ]


@pytest.mark.parametrize(
    ("done", "total", "rate"), [(0, 0, None), (1, 0, None), (0, 5, 0.0), (5, 5, 0.0), (3, 5, 0.0), (7, 5, None)]
)
def test_no_division_by_zero(lines, always, done, total, rate):
    with ProgressReport("x", total, "things") as report:
        report.move_to(done, rate=rate)
        report.advance(0)
    for line in lines():
        assert parts(line)["done"] == str(done)


def test_nothing_done_prints_nothing(lines):
    with ProgressReport("x", 5, "things"):
        pass
    assert lines() == []


def test_after_an_error_there_is_no_line_of_success(lines):
    with pytest.raises(RuntimeError), ProgressReport("x", 5, "things") as report:
        report.advance(5)
        raise RuntimeError
    assert lines() == []


def test_the_total_may_come_later_and_work_may_go_back(lines):
    with ProgressReport("train", 0, "images") as report:
        report.set_total(50)
        report.move_to(30)
        report.move_to(10)
        report.advance(40)
    (line,) = lines()
    assert (parts(line)["done"], parts(line)["total"]) == ("50", "50")


def test_a_line_that_is_said_stays_whole(lines):
    with ProgressReport("train", 5, "images") as report:
        report.say("going on from the checkpoint of epoch 3, " + "x" * 200)
    assert lines() == ["train: going on from the checkpoint of epoch 3, " + "x" * 200]
