"""Evaluation: a bundle's probabilities for a whole split, and the scores from them.

The split has to be complete: every row that the manifest counts is scored exactly once, or there is no score at all.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
import ray.data
from pydantic import Field

from cxr_ray import storage
from cxr_ray.bundle import BundleDescription, load_bundle, read_description
from cxr_ray.clinical import withheld
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import Dataset
from cxr_ray.engines import TorchEngine
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.progress import ProgressReport
from cxr_ray.records import CLINICAL_COLUMNS, clinical_inputs, fixed_lists, from_fixed_lists, pixel_array
from cxr_ray.report import roc_picture
from cxr_ray.scoring import AurocScores, score_auroc
from cxr_ray.settings import Settings

Withhold = Literal["nothing", "clinical"]


class EvaluateSettings(Settings):
    """Settings of `cxr-ray evaluate`."""

    bundle: str = Field(description="Folder or URI of the bundle.")
    data: str = Field(description="Folder or URI of the dataset.")
    split: Literal["train", "val", "test"] = Field("test", description="Split to score.")
    out: str | None = Field(None, description="Folder or URI for evaluation.json and roc.png; none are written without it.")
    withhold: Withhold = Field("nothing", description="'clinical' treats age, sex, view and history as unknown: an ablation.")
    resamples: int = Field(1000, ge=100, le=100_000, description="Bootstrap resamples of patients.")
    batch_size: int = Field(64, ge=1, description="Images a forward pass.")
    workers: int = Field(1, ge=1, description="Processes that run the network.")
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs reserved for a process.")
    gpu: bool = Field(default=False, description="Give each process a GPU.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")


@dataclass(frozen=True)
class Predictions:
    """Scores of a split: probabilities float32 (N, 14), labels float32 (N, 14) with NaN for unknown, ids and patients (N,)."""

    image_ids: np.ndarray
    patient_keys: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found and on what."""

    settings: EvaluateSettings
    bundle: BundleDescription
    dataset_digest: str
    scores: AurocScores
    predictions: Predictions

    def to_json(self) -> dict[str, object]:
        """The scores for machines; a finding that cannot be scored is null."""
        by_finding = {
            name: {
                "auc": _finite(interval.value),
                "low": _finite(interval.low),
                "high": _finite(interval.high),
                "positives": count,
            }
            for name, interval, count in zip(FINDINGS, self.scores.findings, self.scores.positives, strict=True)
        }
        return {
            "bundle": {"name": self.bundle.name, "version": self.bundle.version, "digest": self.bundle.digest},
            "dataset_digest": self.dataset_digest,
            "trained_on_this_dataset": self.bundle.dataset_digest == self.dataset_digest,
            "split": self.settings.split,
            "withheld": self.settings.withhold,
            "images": self.scores.images,
            "patients": self.scores.patients,
            "interval": f"95 % percentile bootstrap, {self.scores.resamples} resamples of patients",
            "mean": {key: _finite(value) for key, value in asdict(self.scores.mean).items()},
            "findings": by_finding,
        }


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


@lru_cache(maxsize=1)
def _engine(uri: str, threads: int | None) -> TorchEngine:
    """The network, loaded once in each process of the pool."""
    return TorchEngine(load_bundle(uri), threads=threads)


def _predict(batch: pa.Table, settings: EvaluateSettings) -> pa.Table:
    inputs = clinical_inputs(batch)
    if settings.withhold == "clinical":
        inputs = withheld(inputs)
    threads = None if settings.gpu else max(1, available_cpus() // settings.workers)
    predicted = _engine(settings.bundle, threads).predict(pixel_array(batch["pixels"]), inputs)
    return batch.select(["image_id", "patient_key", "labels"]).append_column("probabilities", fixed_lists(predicted))


def predict_split(settings: EvaluateSettings, dataset: Dataset) -> Predictions:
    """Score every image of a split on Ray Data.

    Raises
    ------
    CxrRayError
        If what was scored is not exactly what the manifest counts.
    """
    columns = ["image_id", "patient_key", "labels", "pixels", *CLINICAL_COLUMNS]
    rows = ray.data.read_parquet(dataset.paths(settings.split), filesystem=dataset.filesystem).select_columns(columns)
    predicted = rows.map_batches(
        _predict,
        fn_kwargs={"settings": settings},
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=settings.workers),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if settings.gpu else 0,
    )
    expected = dataset.split(settings.split).images
    tables = []
    with ProgressReport("evaluate", expected, "images") as progress:
        for batch in predicted.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(batch)
            progress.advance(batch.num_rows)
    table = pa.concat_tables(tables)
    image_ids = table["image_id"].to_numpy()
    if len(image_ids) != expected or len(set(image_ids)) != expected:
        raise CxrRayError(
            f"{dataset.uri}: {len(set(image_ids))} of the {expected} images of split {settings.split} were scored; ingest again"
        )
    order = np.argsort(image_ids)
    return Predictions(
        image_ids=image_ids[order],
        patient_keys=table["patient_key"].to_numpy()[order],
        probabilities=from_fixed_lists(table["probabilities"])[order],
        labels=from_fixed_lists(table["labels"])[order],
    )


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Score a bundle on a split and write the results to `settings.out`; Ray has to be initialised.

    Raises
    ------
    CxrRayError
        If bundle or dataset are unusable or do not fit each other.
    """
    settings = settings.model_copy(update={"bundle": storage.absolute(settings.bundle)})
    bundle = read_description(settings.bundle)
    dataset = Dataset(settings.data)
    size = dataset.require_pixels()
    if size != bundle.size:
        raise CxrRayError(
            f"--data {settings.data}: images of {size} pixels, the bundle was trained on {bundle.size}; "
            f"ingest with --size {bundle.size}"
        )
    if dataset.split(settings.split).labelled == 0:
        raise CxrRayError(f"--data {settings.data}: split {settings.split} has no labelled image; ingest with labels")
    predictions = predict_split(settings, dataset)
    scores = score_auroc(
        predictions.probabilities,
        predictions.labels,
        predictions.patient_keys,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    evaluation = Evaluation(settings, bundle, dataset.digest, scores, predictions)
    if settings.out is not None:
        _write(evaluation, settings.out)
    return evaluation


def _write(evaluation: Evaluation, out: str) -> None:
    filesystem, root = storage.resolve(out)
    filesystem.create_dir(root, recursive=True)
    content = json.dumps(evaluation.to_json(), indent=2, allow_nan=False).encode()
    predictions = evaluation.predictions
    title = f"{evaluation.bundle.name}, {evaluation.settings.split} split, {evaluation.scores.images:,} images"
    picture = roc_picture(predictions.probabilities, predictions.labels, evaluation.scores, title)
    storage.write_atomically(filesystem, f"{root}/evaluation.json", content)
    storage.write_atomically(filesystem, f"{root}/roc.png", picture)
