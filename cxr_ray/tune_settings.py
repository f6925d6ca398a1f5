"""Settings of the search for good training settings, and the ranges that it draws from."""

import math
from dataclasses import dataclass

from pydantic import Field, ValidationError, field_validator

from cxr_ray.train_settings import TrainSettings

DEFAULT_SEARCH = "learning_rate=1e-4..1e-2,weight_decay=1e-4..1e-1,loss=bce|weighted-bce|asymmetric,augment=0..2"
# What a search cannot vary: these say where and on what, not how.
_FIXED = ("data", "out", "resume", "mlflow", "workers", "epochs")


@dataclass(frozen=True)
class Range:
    """Numbers between two ends; drawn evenly on a logarithmic scale where both are positive, else evenly."""

    low: float
    high: float

    @property
    def logarithmic(self) -> bool:
        """Whether orders of magnitude are drawn."""
        return self.low > 0


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[str, ...]


def parse_search(text: str) -> dict[str, Range | Choice]:
    """Read ``name=low..high`` and ``name=one|other``, separated by commas.

    Raises
    ------
    ValueError
        Naming what cannot be read or is no setting of training.
    """
    found: dict[str, Range | Choice] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, values = part.partition("=")
        if not equals or name not in TrainSettings.model_fields or name in _FIXED:
            allowed = ", ".join(field for field in TrainSettings.model_fields if field not in _FIXED)
            raise ValueError(
                f"{part!r} names no setting to search; write NAME=LOW..HIGH or NAME=ONE|OTHER with one of: {allowed}"
            )
        found[name] = _values(name, values)
    if not found:
        raise ValueError("names nothing to search; write NAME=LOW..HIGH or NAME=ONE|OTHER")
    return found


def _values(name: str, text: str) -> Range | Choice:
    low, dots, high = text.partition("..")
    if not dots:
        choice = Choice(tuple(text.split("|")))
        for value in choice.values:
            _check(name, value)
        return choice
    try:
        found = Range(float(low), float(high))
    except ValueError:
        raise ValueError(f"{name}={text!r} is no range; write {name}=LOW..HIGH") from None
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
        raise ValueError(f"{name}={text!r} is no range that rises; write {name}=LOW..HIGH")
    for end in (found.low, found.high):
        _check(name, end)
    return found


def _check(name: str, value: object) -> None:
    try:
        TrainSettings.model_validate({"data": "", "out": "", name: value})
    except ValidationError as error:
        raise ValueError(f"{name}={value}: {error.errors()[0]['msg']}") from None


class TuneSettings(TrainSettings):
    """Settings of `cxr-ray tune`: those of a training, and how to search among them."""

    search: str = Field(DEFAULT_SEARCH, description="What to vary: NAME=LOW..HIGH or NAME=ONE|OTHER, separated by commas.")
    trials: int = Field(16, ge=1, description="Trainings to start.")
    at_once: int = Field(0, ge=0, description="Trainings at the same time; 0 for as many as the cluster has room for.")
    grace: int = Field(2, ge=1, description="Epochs that every training gets before a poor one is stopped.")
    reduction: int = Field(3, ge=2, description="Of so many trainings one goes on at each decision (ASHA).")

    @field_validator("search")
    @classmethod
    def _search(cls, value: str) -> str:
        parse_search(value)
        return value

    def trial(self, out: str, drawn: dict[str, object]) -> TrainSettings:
        """The settings of one training, with what was drawn for it."""
        own = self.model_dump(include=self.model_fields_set & TrainSettings.model_fields.keys())
        return TrainSettings.model_validate(own | drawn | {"out": out, "resume": False})
