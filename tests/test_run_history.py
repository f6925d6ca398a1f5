"""The figures that a run keeps of its epochs: restarts, resuming, damage."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cxr_ray.errors import CxrRayError
from cxr_ray.run_history import RunHistory
from cxr_ray.train_events import EpochResult

FIRST = EpochResult(
    epoch=1, loss=0.25, val_loss=0.5, val_auc=0.625, val_auc_by_finding={"Edema": 0.75, "Hernia": 0.5}, learning_rate=1e-3,
    images_per_second=812.5, waiting=0.125, seconds=61.0, workers=2,
)  # fmt: skip


def epoch(number: int, **figures: float) -> EpochResult:
    return replace(FIRST, epoch=number, **figures)


def test_what_was_added_is_read_again_by_the_next_process(tmp_path):
    history = RunHistory(str(tmp_path / "run"))
    assert history.results == ()
    history.add(epoch(1))
    history.add(epoch(2, loss=0.125))
    assert RunHistory(str(tmp_path / "run")).results == (epoch(1), epoch(2, loss=0.125))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["epochs.json"]


def test_the_file_is_plain_json_with_the_names_of_the_figures(tmp_path):
    RunHistory(tmp_path.as_uri()).add(FIRST)
    assert json.loads((tmp_path / "epochs.json").read_text()) == [
        {
            "epoch": 1, "loss": 0.25, "val_loss": 0.5, "val_auc": 0.625, "val_auc_by_finding": {"Edema": 0.75, "Hernia": 0.5},
            "learning_rate": 1e-3, "images_per_second": 812.5, "waiting": 0.125, "seconds": 61.0, "workers": 2,
        }
    ]  # fmt: skip


def test_an_attempt_that_starts_again_replaces_its_epochs(tmp_path):
    history = RunHistory(str(tmp_path))
    for number in (1, 2, 3, 4):
        history.add(epoch(number))
    history.add(epoch(2, val_auc=0.875))
    assert history.results == RunHistory(str(tmp_path)).results == (epoch(1), epoch(2, val_auc=0.875))
    history.add(epoch(3))
    assert [result.epoch for result in history.results] == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path, value):
    result = replace(epoch(1, val_auc=value, val_loss=value), val_auc_by_finding={"Edema": value, "Mass": 0.5})
    RunHistory(str(tmp_path)).add(result)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "epochs.json").read_text(), parse_constant=refuse)[0]
    assert (row["val_auc"], row["val_loss"], row["val_auc_by_finding"]) == (None, None, {"Edema": None, "Mass": 0.5})
    (back,) = RunHistory(str(tmp_path)).results
    assert math.isnan(back.val_auc)
    assert math.isnan(back.val_loss)
    assert math.isnan(back.val_auc_by_finding["Edema"])
    assert (back.loss, back.val_auc_by_finding["Mass"]) == (0.25, 0.5)


def stored(**changed: object) -> str:
    row = {name: getattr(FIRST, name) for name in EpochResult.__dataclass_fields__} | changed
    return json.dumps([{name: value for name, value in row.items() if value != "absent"}])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"epoch": 1, "loss"', "Expecting ':' delimiter"),
        (b"\xff\xfe\x00", "codec"),
        (b"7", "not iterable"),
        (b"[7]", "dictionary"),
        (stored(loss="absent").encode(), r"0\.loss: Field required"),
        (stored(epoch=None).encode(), r"0\.epoch: "),
        (stored(val_auc="high").encode(), r"0\.val_auc: "),
        (stored(epoch=0).encode(), r"its epochs are \[0\]"),
        (json.dumps(json.loads(stored()) * 2).encode(), r"its epochs are \[1, 1\]"),
    ],
)
def test_a_damaged_file_is_named_with_its_remedy_in_one_line(tmp_path: Path, content, reason):
    (tmp_path / "epochs.json").write_bytes(content)
    with pytest.raises(CxrRayError, match=reason) as caught:
        RunHistory(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/epochs.json: damaged (")
    assert "; remove it" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "epochs.json").read_bytes() == content


def test_every_write_puts_a_whole_new_file_in_place_of_the_old(tmp_path):
    history = RunHistory(str(tmp_path))
    history.add(epoch(1))
    with (tmp_path / "epochs.json").open() as reader:
        history.add(epoch(2))
        assert [row["epoch"] for row in json.load(reader)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.json"]
