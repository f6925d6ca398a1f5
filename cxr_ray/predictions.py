"""A bundle's probabilities for a whole split, on Ray Data.

The split has to be complete: every row that the manifest counts is scored exactly once, or there are no predictions at all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray.data

from cxr_ray.bundle import BundleDescription, load_bundle
from cxr_ray.clinical import ClinicalInputs, Encoding, withheld
from cxr_ray.cluster_growth import await_cpu
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.findings import FINDINGS
from cxr_ray.placement import check_task, reserved
from cxr_ray.progress import ProgressReport
from cxr_ray.records import clinical_columns, clinical_inputs, fixed_lists, from_fixed_lists, pixel_array
from cxr_ray.torch_engine import TorchEngine
from cxr_ray.train_settings import Views

_SECONDS, _DEVICE = "seconds", "device"


@dataclass(frozen=True)
class Speed:
    """How fast one process ran the network while it scored.

    From stored pixels and clinical values in memory to probabilities in memory: encoding, both ways between processor and GPU,
    and the network. Loading it and reading the data are not included, nor is the first batch of each process.

    Attributes
    ----------
    batch_size
        Images a forward pass; the last one may have fewer.
    device
        What computed, and in which arithmetic.
    """

    images_per_second: float
    batch_size: int
    device: str


@dataclass(frozen=True)
class Predictions:
    """Scores of a split: probabilities float32 (N, 14), labels float32 (N, 14) with NaN for unknown, ids and patients (N,).

    Attributes
    ----------
    speed
        None where it was not measured, as by a process that scored a single batch.
    """

    image_ids: np.ndarray
    patient_keys: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    speed: Speed | None = None

    def as_table(self) -> pa.Table:
        """One row an image and finding: image_id, finding, probability, label (null where unknown)."""
        flat = self.labels.reshape(-1)
        return pa.table(
            {
                "image_id": pa.array(np.repeat(self.image_ids.astype(str), len(FINDINGS))),
                "finding": pa.array(list(FINDINGS) * len(self.image_ids)).dictionary_encode(),
                "probability": pa.array(self.probabilities.reshape(-1)),
                "label": pa.array(np.nan_to_num(flat).astype(np.int8), mask=np.isnan(flat)),
            }
        )


@dataclass(frozen=True)
class OtherInputs:
    """What the network is given instead of what the dataset holds.

    Attributes
    ----------
    image_ids, inputs
        All images of the split, sorted by id, and their clinical values.
    blank
        Whether every film becomes its own mean grey.
    """

    image_ids: np.ndarray
    inputs: ClinicalInputs
    blank: bool = False


def predict_split(
    settings: EvaluateSettings,
    bundle: BundleDescription,
    dataset: Dataset,
    split: str,
    others: Sequence[OtherInputs] = (),
) -> list[Predictions]:
    """Score every image of a split, sorted by image id: with its own inputs, and then with each of `others`.

    All of them are scored in one pass: the data is read and the network loaded once.

    Raises
    ------
    CxrRayError
        If no node of the cluster can ever run the network, or what was scored is not exactly what the manifest counts.
    """
    check_task(
        reserved(settings.cpus_per_worker, gpu=settings.gpu), "setting 'gpu'" if settings.gpu else "setting 'cpus_per_worker'"
    )
    await_cpu()
    encoding = bundle.layout.encoding
    pixels = [] if bundle.size is None else ["pixels"]
    columns = ["image_id", "patient_key", "labels", *pixels, *clinical_columns(encoding)]
    rows = ray.data.read_parquet(dataset.paths(split), filesystem=dataset.filesystem).select_columns(columns)
    predicted = rows.map_batches(
        _predict,
        # References in a list are handed over as they are; each process of a node then reads the same memory.
        fn_kwargs={"settings": settings, "encoding": encoding, "others": [ray.put(each) for each in others]},
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=settings.workers),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if settings.gpu else 0,
    )
    expected = dataset.split(split).images
    tables = []
    with ProgressReport("evaluate", expected, "images") as progress:
        for batch in predicted.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(batch)
            progress.advance(batch.num_rows)
    table = pa.concat_tables(tables)
    image_ids = table["image_id"].to_numpy()
    if len(image_ids) != expected or len(set(image_ids)) != expected:
        raise CxrRayError(
            f"{dataset.uri}: {len(set(image_ids))} of the {expected} images of split {split} were scored; ingest again"
        )
    order = np.argsort(image_ids)
    patient_keys, labels = table["patient_key"].to_numpy()[order], from_fixed_lists(table["labels"])[order]
    scored = [from_fixed_lists(table[_column(number)])[order] for number in range(1 + len(others))]
    speed = _speed(table, settings.batch_size)
    return [
        Predictions(image_ids[order], patient_keys, probabilities, labels, None if number else speed)
        for number, probabilities in enumerate(scored)
    ]


def _speed(table: pa.Table, batch_size: int) -> Speed | None:
    seconds = table[_SECONDS].to_numpy()
    timed = np.isfinite(seconds)
    if not timed.any():
        return None
    devices = ", ".join(sorted(set(table[_DEVICE].to_pylist())))
    return Speed(float(timed.sum() / seconds[timed].sum()), batch_size, devices)


def _column(number: int) -> str:
    return f"probabilities_{number}"


@lru_cache(maxsize=1)
def engine_of(uri: str, threads: int | None, tta: Views) -> TorchEngine:
    """The network, loaded once in each process of the pool."""
    return TorchEngine(load_bundle(uri), threads=threads, tta=tta)


def _predict(batch: pa.Table, settings: EvaluateSettings, encoding: Encoding, others: list[ray.ObjectRef]) -> pa.Table:
    inputs = clinical_inputs(batch, encoding)
    if settings.withhold == "clinical":
        inputs = withheld(inputs)
    threads = None if settings.gpu else max(1, available_cpus() // settings.workers)
    pixels = pixel_array(batch["pixels"]) if "pixels" in batch.column_names else np.empty((len(inputs), 0, 0), dtype=np.uint8)
    loaded = engine_of.cache_info().misses
    engine = engine_of(settings.bundle, threads, settings.tta)
    first = engine_of.cache_info().misses > loaded
    begun = time.perf_counter()
    probabilities = engine.predict(pixels, inputs)
    seconds = np.nan if first else (time.perf_counter() - begun) / len(inputs)
    scored = batch.select(["image_id", "patient_key", "labels"])
    scored = scored.append_column(_column(0), fixed_lists(probabilities))
    scored = scored.append_column(_SECONDS, pa.array(np.full(len(inputs), seconds)))
    scored = scored.append_column(_DEVICE, pa.array([engine.device] * len(inputs)))
    for number, given in enumerate(ray.get(others), start=1):
        rows = np.searchsorted(given.image_ids, batch["image_id"].to_numpy())
        shown = _mean_grey(pixels) if given.blank else pixels
        scored = scored.append_column(_column(number), fixed_lists(engine.predict(shown, given.inputs.taken(rows))))
    return scored


def _mean_grey(pixels: np.ndarray) -> np.ndarray:
    return np.broadcast_to(pixels.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8), pixels.shape)
