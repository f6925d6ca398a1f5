"""Evaluation: a bundle's probabilities for a whole split, and the scores from them.

The split has to be complete: every row that the manifest counts is scored exactly once, or there is no score at all.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray.data

from cxr_ray import presets, storage
from cxr_ray.bundle import BundleDescription, load_bundle, read_description
from cxr_ray.clinical import Encoding, withheld
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import Dataset
from cxr_ray.engines import TorchEngine
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.findings import FINDINGS
from cxr_ray.progress import ProgressReport
from cxr_ray.records import clinical_columns, clinical_inputs, fixed_lists, from_fixed_lists, pixel_array
from cxr_ray.report import roc_picture
from cxr_ray.scoring import AurocScores, score_auroc
from cxr_ray.train_settings import Views


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
            "test_time_augmentation": self.settings.tta,
            "images": self.scores.images,
            "patients": self.scores.patients,
            "interval": f"95 % percentile bootstrap, {self.scores.resamples} resamples of patients",
            "mean": {key: _finite(value) for key, value in asdict(self.scores.mean).items()},
            "findings": by_finding,
        }


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


@lru_cache(maxsize=1)
def _engine(uri: str, threads: int | None, tta: Views) -> TorchEngine:
    """The network, loaded once in each process of the pool."""
    return TorchEngine(load_bundle(uri), threads=threads, tta=tta)


def _predict(batch: pa.Table, settings: EvaluateSettings, encoding: Encoding) -> pa.Table:
    inputs = clinical_inputs(batch, encoding)
    if settings.withhold == "clinical":
        inputs = withheld(inputs)
    threads = None if settings.gpu else max(1, available_cpus() // settings.workers)
    pixels = pixel_array(batch["pixels"]) if "pixels" in batch.column_names else np.empty((len(inputs), 0, 0), dtype=np.uint8)
    predicted = _engine(settings.bundle, threads, settings.tta).predict(pixels, inputs)
    return batch.select(["image_id", "patient_key", "labels"]).append_column("probabilities", fixed_lists(predicted))


def predict_split(settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset) -> Predictions:
    """Score every image of a split on Ray Data.

    Raises
    ------
    CxrRayError
        If what was scored is not exactly what the manifest counts.
    """
    encoding = bundle.layout.encoding
    pixels = [] if bundle.size is None else ["pixels"]
    columns = ["image_id", "patient_key", "labels", *pixels, *clinical_columns(encoding)]
    rows = ray.data.read_parquet(dataset.paths(settings.split), filesystem=dataset.filesystem).select_columns(columns)
    predicted = rows.map_batches(
        _predict,
        fn_kwargs={"settings": settings, "encoding": encoding},
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
    _check_fit(settings, bundle, dataset)
    if dataset.split(settings.split).labelled == 0:
        raise CxrRayError(f"--data {dataset.uri}: split {settings.split} has no labelled image; ingest with labels")
    predictions = predict_split(settings, bundle, dataset)
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


def _check_fit(settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset) -> None:
    if bundle.size is None:
        if settings.tta != "none":
            raise UsageError(f"setting 'tta' is {settings.tta!r}: bundle {bundle.name} reads no image; leave it out")
    elif (size := dataset.require_pixels()) != bundle.size:
        raise CxrRayError(
            f"--data {dataset.uri}: images of {size} pixels, the bundle was trained on {bundle.size}; "
            f"ingest with --size {bundle.size}"
        )
    smallest = presets.find(bundle.preset).smallest_size
    if settings.tta == "ten-crop" and bundle.input_size is not None and bundle.input_size * 7 // 8 < smallest:
        raise UsageError(
            f"setting 'tta' is 'ten-crop': a crop of 7/8 of {bundle.input_size} pixels is below the {smallest} that "
            f"{bundle.preset} needs; use flip or none"
        )


def _write(evaluation: Evaluation, out: str) -> None:
    filesystem, root = storage.resolve(out)
    filesystem.create_dir(root, recursive=True)
    content = json.dumps(evaluation.to_json(), indent=2, allow_nan=False).encode()
    predictions = evaluation.predictions
    title = f"{evaluation.bundle.name}, {evaluation.settings.split} split, {evaluation.scores.images:,} images"
    picture = roc_picture(predictions.probabilities, predictions.labels, evaluation.scores, title)
    storage.write_atomically(filesystem, f"{root}/evaluation.json", content)
    storage.write_atomically(filesystem, f"{root}/roc.png", picture)
