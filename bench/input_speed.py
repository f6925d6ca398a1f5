"""Training batches from shards, as a worker gets them, beside a DataLoader that decodes the PNGs of the same images.

    python bench/input_speed.py shards --data FOLDER --batch N --epochs N
    python bench/input_speed.py files --data FOLDER --batch N --processes N

Both hand over uint8 batches, shuffled, and no network reads them. Everything lies in the page cache.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from measuring import answer_of, median_and_range, origin, say, script
from torch.utils.data import DataLoader, Dataset
from train_data import pngs, shard_reader

_SIZE = 224
_BATCH = 32
_FILES = 3000
_EPOCHS = 24
_PROCESSES = 2


def compare_input(work: Path, rounds: int, *, smoke: bool) -> None:
    """Print images/s of both, in turns, and the CPU time that an image takes."""
    files, epochs = (150, 3) if smoke else (_FILES, _EPOCHS)
    data = pngs(work, files, _SIZE)
    _read_everything(data)
    shards, loader = [], []
    for _ in range(rounds):
        loader.append(_measured("files", data, "--processes", str(_PROCESSES)))
        shards.append(_measured("shards", data, "--epochs", str(epochs)))
    ratios = [one["rate"] / other["rate"] for one, other in zip(shards, loader, strict=True)]
    say(
        f"\n**Input**, {_SIZE} px, batches of {_BATCH}, everything in the page cache. "
        f"{origin(f'bench_train.py input --rounds {rounds}')}\n"
    )
    say("| | images/s | images/s a core of CPU time | images timed |\n|---|---|---|---|")
    name = f"DataLoader(num_workers={_PROCESSES}): PNG 1024x1024, OpenCV, {_SIZE} px"
    for title, runs in ((name, loader), (f"shards of {_SIZE} px through Ray Data, one worker's stream", shards)):
        rate, a_core = (statistics.median(run[key] for run in runs) for key in ("rate", "rate_a_core"))
        say(f"| {title} | {rate:,.0f} | {a_core:,.0f} | {runs[0]['images']:,} |")
    say(f"| ratio (range) | {median_and_range(ratios, 1)} | | |")


def _measured(what: str, data: Path, *more: str) -> dict[str, float]:
    return answer_of([script("input_speed.py"), what, "--data", str(data), "--batch", str(_BATCH), *more])


def _read_everything(folder: Path) -> None:
    for path in (*(folder / "dataset").rglob("*.parquet"), *(folder / "release" / "images").glob("*.png")):
        path.read_bytes()


class _Clock:
    """Counts images between the first and the last `margin` of them: what was read ahead neither helps nor harms.

    Parameters
    ----------
    images
        How many will come in all.
    """

    def __init__(self, images: int, margin: int) -> None:
        self._begin, self._end = margin, images - margin
        self._come = 0
        self._marks: list[tuple[int, float, float]] = []

    def count(self, batches: Iterable[Any]) -> dict[str, float]:
        """Take all batches."""
        for batch in batches:
            self._come += len(batch)
            begun, ended = bool(self._marks), len(self._marks) == 2
            if (not begun and self._come >= self._begin) or (begun and not ended and self._come >= self._end):
                self._marks.append((self._come, time.perf_counter(), _cpu_seconds(os.getpid())))
        (first, began, cpu_began), (last, ended_at, cpu_ended) = self._marks
        images = last - first
        return {"images": images, "rate": images / (ended_at - began), "rate_a_core": images / (cpu_ended - cpu_began)}


def _cpu_seconds(process: int) -> float:
    """CPU time of a process and of all that it started and that still runs."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        children = [
            child for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_cpu_seconds(int(child)) for child in children)


def _from_shards(data: Path, batch: int, epochs: int) -> dict[str, float]:
    from cxr_ray.epoch_order import EpochOrder
    from cxr_ray.ray_session import ray_session
    from cxr_ray.train_settings import TrainSettings
    from cxr_ray.training_data import stream
    from cxr_ray.window_source import WorkerShare

    reader = shard_reader(str(data / "dataset"), "train")
    rows = tuple(group.rows for group in reader.groups)
    window = TrainSettings(data="", out="").window * 1024**2 // reader.size**2
    orders = [EpochOrder(rows, seed=0, epoch=epoch, window=window) for epoch in range(epochs)]
    share = WorkerShare(workers=1, rank=0, batch=batch)
    images = sum(order.steps(1, batch) * batch for order in orders)
    with ray_session():
        # An epoch at each end: by the second, readers and object store are in the state in which they stay.
        return _Clock(images, images // epochs).count(stream(reader, orders, share))


class _Files(Dataset[torch.Tensor]):
    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        film = cv2.imread(self._paths[index], cv2.IMREAD_GRAYSCALE)
        return torch.from_numpy(cv2.resize(film, (_SIZE, _SIZE), interpolation=cv2.INTER_AREA))


def _from_files(data: Path, batch: int, processes: int) -> dict[str, float]:
    cv2.setNumThreads(1)
    paths = sorted(str(path) for path in (data / "release" / "images").glob("*.png"))
    paths = [paths[number] for number in np.random.default_rng(0).permutation(len(paths))]
    loader = DataLoader(_Files(paths), batch_size=batch, shuffle=True, num_workers=processes, drop_last=True)
    images = len(loader) * batch
    # Each process of a DataLoader prepares two batches ahead; they start one after the other.
    return _Clock(images, 2 * processes * batch if images > 8 * processes * batch else batch).count(loader)


def main() -> None:
    """Measure what the first argument names; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["shards", "files"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.what == "shards":
        print(json.dumps(_from_shards(given.data, given.batch, given.epochs)))
    else:
        print(json.dumps(_from_files(given.data, given.batch, given.processes)))


if __name__ == "__main__":
    main()
