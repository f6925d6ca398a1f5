"""Heatmaps of chosen images of a split, on Ray Data: for the cases of a report, and for the boxes of radiologists."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray
import ray.data

from cxr_ray.boxes import Box
from cxr_ray.bundle import Bundle, load_bundle
from cxr_ray.clinical import withheld
from cxr_ray.dataset import Dataset
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.findings import FINDINGS
from cxr_ray.heatmap import explain_all
from cxr_ray.localisation import pointed
from cxr_ray.progress import ProgressReport
from cxr_ray.records import clinical_columns, clinical_inputs
from cxr_ray.shard_rows import read_rows

_IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class Asked:
    """An image of the split, by its position in the order of `Dataset.read`, and the finding that its map is of."""

    row: int
    finding: int


@dataclass(frozen=True)
class Explained:
    """A stored square (uint8, (size, size)) and its map (float32, (size, size)), as `heatmap.explain_all` has it."""

    film: np.ndarray
    heat: np.ndarray


def explained(settings: EvaluateSettings, dataset: Dataset, asked: Sequence[Asked]) -> list[Explained]:
    """Films and maps, in the order in which they are asked for; `settings` name the bundle, the split and the resources."""
    size = dataset.require_pixels()
    found = {
        row["number"]: Explained(_array(row["film"], np.uint8, size), _array(row["heat"], np.float32, size))
        for row in _run(settings, dataset, asked, None)
    }
    return [found[number] for number in range(len(asked))]


def hits(settings: EvaluateSettings, dataset: Dataset, asked: Sequence[Asked], boxes: Sequence[Box]) -> np.ndarray:
    """Whether each map's maximum lies in its box, as `localisation.pointed` has it; float64, shape (N,)."""
    found = {row["number"]: row["hit"] for row in _run(settings, dataset, asked, list(boxes))}
    return np.array([found[number] for number in range(len(asked))], dtype=np.float64)


def _run(settings: EvaluateSettings, dataset: Dataset, asked: Sequence[Asked], boxes: list[Box] | None) -> list[dict]:
    rows = [{"number": number, "row": each.row, "finding": each.finding} for number, each in enumerate(asked)]
    mapped = ray.data.from_items(rows).map_batches(
        _explain,
        fn_kwargs={"settings": settings, "dataset": ray.put(dataset), "boxes": boxes},
        batch_size=_IMAGES_AT_ONCE,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=settings.workers),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if settings.gpu else 0,
    )
    found: list[dict] = []
    with ProgressReport("heatmaps", len(rows), "maps") as progress:
        for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
            found += batch.to_pylist()
            progress.advance(batch.num_rows)
    return found


@lru_cache(maxsize=1)
def _bundle(uri: str, *, gpu: bool) -> Bundle:
    bundle = load_bundle(uri)
    if gpu:
        bundle.model.to("cuda")
    return bundle


def _explain(batch: pa.Table, settings: EvaluateSettings, dataset: ray.ObjectRef, boxes: list[Box] | None) -> pa.Table:
    bundle = _bundle(settings.bundle, gpu=settings.gpu)
    opened: Dataset = ray.get(dataset)
    size = opened.require_pixels()
    films = np.empty((batch.num_rows, size, size), dtype=np.uint8)
    encoding = bundle.layout.encoding
    groups = opened.row_groups(settings.split)
    table = read_rows(opened.filesystem, groups, batch["row"].to_numpy(), [*clinical_columns(encoding)], films)
    inputs = clinical_inputs(table, encoding)
    if settings.withhold == "clinical":
        inputs = withheld(inputs)
    maps = explain_all(bundle, films, inputs, batch["finding"].to_numpy())
    numbers = batch["number"]
    if boxes is not None:
        return pa.table({"number": numbers, "hit": pointed(maps, [boxes[number] for number in numbers.to_pylist()])})
    as_bytes = {"film": [film.tobytes() for film in films], "heat": [heat.tobytes() for heat in maps]}
    return pa.table({"number": numbers, **as_bytes})


def _array(content: bytes, dtype: type[np.generic], size: int) -> np.ndarray:
    return np.frombuffer(content, dtype=dtype).reshape(size, size)


def asked_for(boxes: Sequence[Box], rows: dict[str, int]) -> list[Asked]:
    """What to ask for boxes whose images are in the split; `rows` maps image ids to positions."""
    return [Asked(rows[box.image_id], FINDINGS.index(box.finding)) for box in boxes]
