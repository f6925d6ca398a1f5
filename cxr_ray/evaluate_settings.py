"""Settings of `cxr-ray evaluate`; its own module, because who lists them need not wait for torch."""

from typing import Literal

from pydantic import Field

from cxr_ray.settings import Settings
from cxr_ray.train_settings import Views

Withhold = Literal["nothing", "clinical"]
Calibration = Literal["none", "temperature", "platt"]


class EvaluateSettings(Settings):
    """Settings of `cxr-ray evaluate`."""

    bundle: str = Field(description="Folder or URI of the bundle.")
    data: str = Field(description="Folder or URI of the dataset.")
    split: Literal["train", "val", "test"] = Field("test", description="Split to score.")
    out: str | None = Field(
        None, description="Folder or URI for evaluation.json, findings.csv and roc.png; none are written without it."
    )
    scores: str | None = Field(
        None, description="Parquet file for image_id, finding, probability and label, a row each; none without it."
    )
    withhold: Withhold = Field("nothing", description="'clinical' treats age, sex, view and history as unknown: an ablation.")
    tta: Views = Field("none", description="Test-time augmentation: the mean over views of each image (mirrored, ten crops).")
    subgroups: bool = Field(
        default=False, description="Score by sex, age, view, visit, images a patient, and whether a finding was known before."
    )
    ablate: bool = Field(
        default=False, description="Score without image, clinical inputs and history as well, and with two deliberate leaks."
    )
    calibrate: Calibration = Field(
        "none", description="Recalibration of the probabilities, fitted on the validation split: temperature or platt."
    )
    resamples: int = Field(1000, ge=100, le=100_000, description="Bootstrap resamples of patients.")
    batch_size: int = Field(64, ge=1, description="Images a forward pass.")
    workers: int = Field(1, ge=1, description="Processes that run the network.")
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs reserved for a process.")
    gpu: bool = Field(default=False, description="Give each process a GPU.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
