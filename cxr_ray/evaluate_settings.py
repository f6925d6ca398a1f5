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
        None, description="Folder or URI for report.html, evaluation.json and tables as CSV; none are written without it."
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
    prevalence: str | None = Field(
        None,
        description="CSV with the columns finding and prevalence: shares of positives to correct the probabilities for, with "
        "calibrate; those of the validation split if not given.",
    )
    history_curves: bool = Field(
        default=False,
        description="Score with a growing share of earlier reports missing, untold or replaced by the network's own answers.",
    )
    cases: int = Field(
        3, ge=0, le=20, description="Films shown in the report for each reason, with heatmaps; 0 for a report without films."
    )
    boxes: str | None = Field(
        None, description="Radiologists' boxes in the layout of NIH's BBox_List_2017.csv, to judge heatmaps by."
    )
    card: bool = Field(default=False, description="Write the bundle's model card again, with these figures.")
    resamples: int = Field(1000, ge=100, le=100_000, description="Bootstrap resamples of patients.")
    batch_size: int = Field(64, ge=1, description="Images a forward pass.")
    workers: int = Field(1, ge=1, description="Processes that run the network.")
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs reserved for a process.")
    gpu: bool = Field(default=False, description="Give each process a GPU.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
