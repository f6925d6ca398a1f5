"""Commands made of settings: every field an option, every value checked in the model's words."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from cxr_ray.errors import UsageError
from cxr_ray.options import settings_command
from cxr_ray.settings import Settings


class Made(Settings):
    """Settings of a made-up command."""

    data: str = Field(description="Where from.")
    rate: float = Field(0.5, gt=0, description="How fast.")
    kind: Literal["one", "two"] = Field("one", description="Which.")
    gpu: bool = Field(default=False, description="Use a GPU.")
    meta: bool | None = Field(None, description="Read age, sex and view.")
    size: int | None = Field(None, description="How large.")


def called(*arguments: str) -> tuple[Made, bool]:
    seen = []
    command = settings_command(Made, lambda settings, json: seen.append((settings, json)), "Do what was made up.")
    command(args=list(arguments), standalone_mode=False)
    return seen[0]


def test_options_are_the_fields():
    made, json = called("--data", "here", "--rate", "2", "--kind", "two", "--gpu", "--no-meta", "--size", "7", "--json")
    assert made == Made(data="here", rate=2.0, kind="two", gpu=True, meta=False, size=7)
    assert json is True


def test_what_is_not_given_is_not_set():
    made, json = called("--data", "here")
    assert made.model_fields_set == {"data"}
    assert (made.meta, made.gpu, json) == (None, False, False)


def test_flags_win_over_the_file(tmp_path: Path):
    config = tmp_path / "settings.yaml"
    config.write_text("data: file\nrate: 3\ngpu: true\n")
    made, _ = called("--config", str(config), "--data", "flag")
    assert made == Made(data="flag", rate=3.0, gpu=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "setting 'data': Field required"),
        (("--data", "d", "--rate", "zero"), "setting 'rate' is 'zero': Input should be a valid number"),
        (("--data", "d", "--rate", "0"), "setting 'rate' is '0': Input should be greater than 0"),
        (("--data", "d", "--kind", "three"), "setting 'kind' is 'three': Input should be 'one' or 'two'"),
        (("--data", "d", "--size", "1.5"), "setting 'size' is '1.5': Input should be a valid integer"),
    ],
)
def test_values_are_refused_by_name_and_value(arguments, said):
    with pytest.raises(UsageError) as refused:
        called(*arguments)
    assert said in str(refused.value)


def test_help_gives_description_default_and_form():
    shown = subprocess.run(
        [sys.executable, "-m", "cxr_ray", "train", "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    said = " ".join(shown.replace("│", " ").split())
    assert "--learning-rate NUMBER Peak learning rate. [0.001]" in said
    assert "--loss bce|weighted-bce|balanced-bce|asymmetric" in said
    assert "--meta / --no-meta" in said
    assert "--data TEXT Dataset to train on" in said
    assert "--config" in said
    assert "--json" in said
