"""The data of the training benchmarks: datasets made by the product's own ingest, and the same images as tensors in memory.

python bench/train_data.py phantoms --patients N --size PX --out FOLDER
python bench/train_data.py pngs --count N --size PX --out FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from measuring import answer_of, script

if TYPE_CHECKING:
    from cxr_ray.shard_rows import ShardReader

TENSORS = "tensors.pt"
_COMPLETE = "complete"


def phantoms(work: Path, patients: int, size: int) -> Path:
    """A dataset of phantoms drawn at this size, kept in the work folder; beside it the same images in `TENSORS`."""
    folder = work / f"phantoms-{patients}-{size}"
    return _made(folder, ["phantoms", "--patients", str(patients), "--size", str(size)])


def pngs(work: Path, count: int, size: int) -> Path:
    """A dataset of so many PNGs of 1024x1024, kept in the work folder; beside it the PNGs in ``release/images``."""
    folder = work / f"pngs-{count}-{size}"
    return _made(folder, ["pngs", "--count", str(count), "--size", str(size)])


def _made(folder: Path, what: list[str]) -> Path:
    if not (folder / _COMPLETE).exists():
        # Ray stays out of the process that measures.
        answer_of([script("train_data.py"), *what, "--out", str(folder)])
        (folder / _COMPLETE).touch()
    return folder


def shard_reader(dataset_uri: str, split: str) -> "ShardReader":
    """The reader that training has of a split: pixels, the paper's clinical numbers, labels."""
    from cxr_ray.clinical import fit_statistics
    from cxr_ray.dataset import Dataset
    from cxr_ray.presets import PRESETS
    from cxr_ray.records import clinical_columns, clinical_inputs
    from cxr_ray.shard_rows import ShardReader

    dataset, layout = Dataset(dataset_uri), PRESETS["multi-input"].layout
    metadata = dataset.read("train", list(clinical_columns(layout.encoding)))
    statistics = fit_statistics(clinical_inputs(metadata, layout.encoding))
    groups = tuple(dataset.row_groups(split))
    return ShardReader(dataset.filesystem, groups, dataset.require_pixels(), layout, statistics)


def _make_phantoms(patients: int, size: int, out: Path) -> None:
    from cxr_ray.ray_session import ray_session
    from ingest.nih import NihSettings, ingest_nih
    from ingest.phantom_release import PhantomSettings, make_release

    with ray_session():
        make_release(PhantomSettings(out=str(out / "release"), patients=patients, size=size))
        ingest_nih(NihSettings(release=str(out / "release"), out=str(out / "dataset"), size=size, val_fraction=0.15))
    splits = {name: _tensors(out / "dataset", name) for name in ("train", "val")}
    torch.save(splits, out / TENSORS)


def _make_pngs(count: int, size: int, out: Path) -> None:
    from bench_ingest import release

    from cxr_ray.ray_session import ray_session
    from ingest.nih import NihSettings, ingest_nih

    release(out / "release", count)
    with ray_session():
        ingest_nih(NihSettings(release=str(out / "release"), out=str(out / "dataset"), size=size))


def _tensors(dataset: Path, split: str) -> dict[str, torch.Tensor]:
    from cxr_ray.training_data import as_batch

    reader = shard_reader(str(dataset), split)
    rows = sum(group.rows for group in reader.groups)
    return dict(vars(as_batch(reader.read(np.arange(rows)))))


def main() -> None:
    """Make what the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["phantoms", "pngs"])
    parser.add_argument("--patients", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.what == "phantoms":
        _make_phantoms(given.patients, given.size, given.out)
    else:
        _make_pngs(given.count, given.size, given.out)
    print(json.dumps({"made": str(given.out)}))


if __name__ == "__main__":
    main()
