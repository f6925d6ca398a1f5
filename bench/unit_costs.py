"""The costs that docs/scaling.md multiplies: what one image, one checkpoint, one exchange of gradients and one start cost.

python bench/unit_costs.py reduce      under torchrun: seconds of one all-reduce of the gradients
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measuring import answer_of, origin, say, script
from pyarrow import fs
from train_data import pngs, shard_reader

_SIZE = 224
_FILES = 3000
_TRAIN_IMAGES = 86_524
_VALIDATION_IMAGES = 8_652
_PARAMETERS = 6_969_534
_WINDOW = 64 * 1024**2 // _SIZE**2


def print_unit_costs(work: Path, rounds: int, *, smoke: bool) -> None:
    """Print each cost and how it was taken; medians of `rounds`, files in the page cache."""
    data = pngs(work, 150 if smoke else _FILES, _SIZE)
    say(f"\n**Unit costs**, {_SIZE} px, one process. {origin(f'bench_train.py units --rounds {rounds}')}\n")
    say("| cost | value | taken as |\n|---|---|---|")
    for costs in (_of_images, _of_requests, _of_driver):
        _print(costs(data, rounds))
    _print(_of_order(rounds))
    _print(_of_scores(rounds))
    _print(_of_checkpoint(rounds))
    _print(_of_exchange())


def _print(costs: list[tuple[str, str, str]]) -> None:
    for name, value, how in costs:
        say(f"| {name} | {value} | {how} |")


def _seconds(run: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _of_images(data: Path, rounds: int) -> list[tuple[str, str, str]]:
    from cxr_ray.epoch_order import EpochOrder

    shards = list((data / "dataset").rglob("train-*.parquet"))
    reader = shard_reader(str(data / "dataset"), "train")
    images = sum(group.rows for group in reader.groups)
    order = EpochOrder(tuple(group.rows for group in reader.groups), seed=0, epoch=0, window=_WINDOW)
    rows = order.rows(1, 32, 0)[:_WINDOW]
    pa.set_cpu_count(1)
    rate = len(rows) / _seconds(lambda: reader.read(rows), max(rounds, 3))
    stored = sum(path.stat().st_size for path in shards) / images
    return [
        ("bytes an image", f"{stored:,.0f}", f"{images:,} images in {len(shards)} shards; {_SIZE**2:,} of them are pixels"),
        ("rows a group", f"{max(group.rows for group in reader.groups)}", "row groups of 8 MiB"),
        ("images/s of a reader", f"{rate:,.0f}", f"`ShardReader.read` of a window of {len(rows):,} rows, one core"),
    ]


class _Counted(fs.FileSystemHandler):
    """A local file system that counts what a remote one would be asked; pyarrow calls every name here."""

    def __init__(self) -> None:
        self.requests = 0

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.requests += 1
        return pa.PythonFile(_CountedFile(path, self), mode="r")

    def get_type_name(self) -> str:
        return "counted"

    def normalize_path(self, path: str) -> str:
        return path

    def _refuse(self, *_: object, **__: object) -> Any:
        raise NotImplementedError

    get_file_info = get_file_info_selector = create_dir = delete_dir = delete_dir_contents = _refuse
    delete_root_dir_contents = delete_file = move = copy_file = open_input_stream = _refuse
    open_output_stream = open_append_stream = _refuse


class _CountedFile:
    def __init__(self, path: str, counter: _Counted) -> None:
        self._file, self._counter = Path(path).open("rb"), counter  # noqa: SIM115 - pyarrow closes it

    def read(self, size: int = -1) -> bytes:
        self._counter.requests += 1
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _of_requests(data: Path, rounds: int) -> list[tuple[str, str, str]]:
    del rounds
    reader = shard_reader(str(data / "dataset"), "train")
    counter = _Counted()
    counted = replace(reader, filesystem=fs.PyFileSystem(counter))
    counted.read(np.arange(reader.groups[0].rows))
    return [
        ("requests a row group", f"{counter.requests}", "opening and reads of one group, on a file system that counts them")
    ]


def _of_driver(data: Path, rounds: int) -> list[tuple[str, str, str]]:
    from cxr_ray.dataset import Dataset
    from cxr_ray.presets import PRESETS
    from cxr_ray.records import clinical_columns

    dataset = Dataset(str(data / "dataset"))
    split = dataset.split("train")
    columns = [*clinical_columns(PRESETS["multi-input"].layout.encoding), "labels"]
    a_file = _seconds(lambda: dataset.read("train", columns), max(rounds, 3)) / len(split.shards)
    groups = dataset.row_groups("train")
    a_group = len(pickle.dumps(groups)) / len(groups)
    return [
        ("driver: seconds a shard at the start", f"{a_file:.4f}", f"labels and clinical columns of {len(split.shards)} shards"),
        ("driver: bytes a row group", f"{a_group:.0f}", "pickled list of row groups, which every reader gets once"),
    ]


def _of_order(rounds: int) -> list[tuple[str, str, str]]:
    from cxr_ray.epoch_order import EpochOrder

    group = 8 * 1024**2 // _SIZE**2
    rows = (group,) * (_TRAIN_IMAGES // group)
    order = EpochOrder(rows, seed=0, epoch=0, window=_WINDOW)
    taken = [(workers, _seconds(lambda: order.rows(workers, 32, 0), max(rounds, 3))) for workers in (1, 64)]  # noqa: B023
    return [
        (f"order of an epoch, {workers} workers", f"{seconds * 1000:.1f} ms", "one worker's rows") for workers, seconds in taken
    ]


def _of_scores(rounds: int) -> list[tuple[str, str, str]]:
    from cxr_ray.operating import choose
    from cxr_ray.scoring import auroc

    random = np.random.default_rng(0)
    scores = random.random((_VALIDATION_IMAGES, 14))
    labels = (random.random(scores.shape) < 0.05).astype(np.float32)
    seconds = _seconds(lambda: (auroc(scores, labels), choose(scores, labels)), max(rounds, 3))
    return [
        ("AUCs and thresholds", f"{seconds * 1000:.0f} ms", f"{_VALIDATION_IMAGES:,} images, as every worker computes them")
    ]


def _of_checkpoint(rounds: int) -> list[tuple[str, str, str]]:
    from cxr_ray import presets
    from cxr_ray.train_settings import TrainSettings
    from cxr_ray.train_state import RunPosition, Trained
    from cxr_ray.training import make_optimizer

    model = presets.build("multi-input")
    optimizer = make_optimizer(model, TrainSettings(data="", out=""))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    trained = Trained(model, optimizer, None)
    with tempfile.TemporaryDirectory() as folder:
        seconds = _seconds(lambda: trained.save(Path(folder), RunPosition(), None), max(rounds, 3))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return [("checkpoint", f"{size / 1e6:.1f} MB, {seconds:.2f} s", "weights and AdamW's moments, local disk, not synced")]


def _of_exchange() -> list[tuple[str, str, str]]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answer = answer_of([*launch, script("unit_costs.py"), "reduce"])
    value = f"{4 * _PARAMETERS / 1e6:.1f} MB, {answer['seconds'] * 1000:.0f} ms"
    return [("gradients, all-reduce", value, "gloo, two processes of one machine")]


def _reduce() -> None:
    torch.distributed.init_process_group("gloo")
    gradients = torch.ones(_PARAMETERS)
    torch.distributed.all_reduce(gradients)
    seconds = _seconds(lambda: torch.distributed.all_reduce(gradients), 10)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"seconds": seconds}), flush=True)
    torch.distributed.destroy_process_group()


def main() -> None:
    """The process that torchrun starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["reduce"])
    parser.parse_args()
    _reduce()


if __name__ == "__main__":
    main()
