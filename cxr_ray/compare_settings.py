"""Settings of `cxr-ray compare`; its own module, because who lists them need not wait for torch."""

import re
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from cxr_ray.settings import Settings
from cxr_ray.train_settings import TrainSettings

ALL, NONE = "all", "none"
# Settings that every training gets, where they are given.
HANDED_ON = ("epochs", "batch_size", "workers", "gpu", "cpus_per_worker", "threads", "seed")
_NAME = r"\w[\w.+-]*"


class CompareSettings(Settings):
    """Settings of `cxr-ray compare`; each preset is trained with its own recipe where they leave it open."""

    data: str = Field(description="Dataset to train and to score on: the folder or URI that 'cxr-ray ingest' wrote.")
    out: str = Field(description="Folder or URI of the comparison: a run a preset below it, and comparison.json, .csv, .md.")
    presets: str = Field(
        ALL,
        description="Presets to train, separated by commas, the reference first; all that the dataset can feed, or none.",
    )
    bundles: dict[str, str] | None = Field(
        None, description="Bundles to score as they are, separated by commas: NAME=URI, or a URI that is named by its folder."
    )
    split: Literal["val", "test"] = Field("test", description="Split to score.")
    init: Literal["random", "imagenet"] = Field(
        "random", description="Initial weights; imagenet for the networks that have such weights, random for the others."
    )
    epochs: int | None = Field(None, ge=1, description="Passes over the training split; each preset's recipe if not given.")
    batch_size: int | None = Field(
        None, ge=1, description="Images an optimiser step, over all workers; each preset's recipe if not given."
    )
    workers: str | None = Field(
        None, description="Training processes (DDP): a number, or a range such as 2..8; 1 if not given."
    )
    gpu: bool = Field(default=False, description="Give each worker a GPU, in training and in scoring.")
    cpus_per_worker: float | None = Field(
        None, gt=0, description="Logical CPUs reserved for a training worker; 0.5 if not given."
    )
    threads: int | None = Field(None, ge=0, description="CPU threads of a training worker; its share of the node if not given.")
    resamples: int = Field(1000, ge=100, le=100_000, description="Bootstrap resamples of patients.")
    seed: int = Field(0, ge=0, description="Seed of the trainings and of the bootstrap.")

    @field_validator("presets", mode="before")
    @classmethod
    def _presets(cls, value: object) -> str:
        names = [name.strip() for name in (value if isinstance(value, list) else str(value).split(","))]
        if not all(names):
            raise ValueError("names no preset between commas; give all, none, or presets separated by commas")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"names {', '.join(sorted(twice))} twice; name each preset once")
        if len(names) > 1 and {ALL, NONE} & set(names):
            raise ValueError("gives all or none beside others; give one of them, or presets separated by commas")
        return ",".join(names)

    @field_validator("bundles", mode="before")
    @classmethod
    def _bundles(cls, value: object) -> object:
        if value is None or isinstance(value, dict):
            return value
        found: dict[str, str] = {}
        for text in value if isinstance(value, list) else str(value).split(","):
            name, uri = _named(text.strip())
            if name in found:
                raise ValueError(f"has two bundles named {name}; write NAME=URI with another name for one of them")
            found[name] = uri
        return found

    @field_validator("bundles")
    @classmethod
    def _names(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name in value or {}:
            if re.fullmatch(_NAME, name) is None:
                raise ValueError(f"has a bundle named {name!r}; use letters, digits and . + - _")
        return value

    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, value: object) -> object:
        if value is None:
            return None
        try:
            return TrainSettings.model_validate({"data": "", "out": "", "workers": value}).workers
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    @property
    def named_presets(self) -> tuple[str, ...] | None:
        """The presets that were asked for by name; None for all that the dataset can feed."""
        if self.presets == ALL:
            return None
        return () if self.presets == NONE else tuple(self.presets.split(","))

    def handed_on(self) -> dict[str, object]:
        """What every training gets besides its recipe."""
        return {name: value for name in HANDED_ON if (value := getattr(self, name)) is not None}


def _named(text: str) -> tuple[str, str]:
    """A bundle's name and URI; without a name, that of its folder, or of the run whose ``bundle`` it is."""
    if match := re.fullmatch(rf"({_NAME})=(.+)", text):
        return match[1], match[2]
    folders = [part for part in text.partition("?")[0].split("/") if part]
    if len(folders) > 1 and folders[-1] == "bundle":
        folders.pop()
    if not folders or re.fullmatch(_NAME, folders[-1]) is None:
        raise ValueError(f"has {text!r}, which gives no name; write NAME=URI")
    return folders[-1], text
