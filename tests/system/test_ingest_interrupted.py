"""`cxr-ray ingest` killed at random moments and started again: the same rows, once each."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cxr_ray.dataset import Dataset
from cxr_ray.records import SPLITS

pytestmark = pytest.mark.system

# Large enough that the ingest takes seconds, so that a kill finds it at work.
IMAGES, EDGE, SIZE = 320, 600, 64
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the layout of the NIH release: 80 patients with four visits each, every fifth of the test."""
    folder = tmp_path_factory.mktemp("release")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    lines, lists = [HEADER], {"train_val": [], "test": []}
    for number in range(IMAGES):
        patient, visit = divmod(number, 4)
        name = f"{patient:08d}_{visit:03d}.png"
        Image.fromarray(random.integers(0, 256, (EDGE, EDGE), dtype=np.uint8)).save(folder / "images" / name)
        labels = ("No Finding", "Mass", "Effusion|Hernia")[number % 3]
        lines.append(f"{name},{labels},{visit},{patient},{40 + visit},{'MF'[patient % 2]},PA,1,1,0.1,0.1")
        lists["test" if patient % 5 == 0 else "train_val"].append(name)
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    for part, names in lists.items():
        (folder / f"{part}_list.txt").write_text("\n".join(names))
    return folder


def start(release: Path, out: Path) -> "subprocess.Popen[str]":
    """The command in a session of its own, so that all of it can be killed at once."""
    command = [str(Path(sys.executable).with_name("cxr-ray")), "ingest", "nih"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*command, "--release", str(release), "--out", str(out), "--size", str(SIZE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(release: Path, out: Path) -> str:
    process = start(release, out)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return printed


def rows(out: Path) -> list[dict]:
    dataset = Dataset(str(out))
    tables = [dataset.read(split, dataset_columns(dataset)) for split in SPLITS]
    return pa.concat_tables(tables).sort_by("image_id").to_pylist()


def dataset_columns(dataset: Dataset) -> list[str]:
    from cxr_ray.records import record_schema

    return record_schema(dataset.manifest.size).names


def outcomes(out: Path) -> int:
    return len(list(out.glob("shards-*/outcomes/*.json")))


def kill_at(release: Path, out: Path, outcomes_there: int, delay: float) -> None:
    """Kill the command, with SIGKILL, a moment after so many shards are finished; its Ray ends by itself."""
    process = start(release, out)
    until = time.monotonic() + 100
    while outcomes(out) < outcomes_there and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(delay)
    assert process.poll() is None, "the ingest ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def everything(out: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.long
def test_three_kills_change_no_row(release: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(20)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(release, whole)
    for _ in range(3):
        # Each attempt gets at least one shard further.
        kill_at(release, cut, outcomes(cut) + 1, float(random.uniform(0, 0.15)))
        assert not (cut / "manifest.json").exists()
    left = outcomes(cut)
    finish(release, cut)

    found = rows(cut)
    assert left > 0
    assert len(found) == IMAGES == len({row["image_id"] for row in found})
    assert found == rows(whole)
    manifest = Dataset(str(cut)).manifest
    assert manifest.run == Dataset(str(whole)).manifest.run
    listed = {shard.path for split in manifest.splits.values() for shard in split.shards}
    assert {str(path.relative_to(cut)) for path in cut.rglob("*.parquet")} == listed
    assert not list(cut.rglob("*.partial"))

    before = everything(cut)
    finish(release, cut)
    assert everything(cut) == before
