"""How fast training is, part by part, beside what one would write without this package.

    python bench/bench_train.py loop | ddp | input | precision | units | gpu | all     [--rounds N] [--work FOLDER] [--smoke]

- loop: one Ray Train worker beside a bare PyTorch loop over tensors in memory (`bare_loop`); goal 0.95 of its images/s.
- ddp: two Ray Train workers beside torchrun with DDP and gloo on the same loop; goal 0.95.
- input: shards to batches beside a DataLoader that decodes the PNGs (`input_speed`); goal 10 times its images/s.
- precision: the step in float32 and bf16, channels last or not, without Ray (`step_speed`); goal 1.8 for bf16 at 224 px.
- units: the costs that docs/scaling.md multiplies (`unit_costs`).
- gpu: training and inference on a CUDA device, without Ray (`gpu_speed`); results go to --out.
- all: everything but gpu.

Figures are printed as Markdown for RESULTS.md. --smoke takes sizes that show that a part works, and nothing else.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import ROOT, answer_of, median_and_range, origin, say, script

# The parts import the package, which need not be installed on a machine that only lends its GPU.
sys.path.insert(0, str(ROOT))

_EPOCHS = 2


@dataclass(frozen=True)
class Comparison:
    """A run of the product and the bare loop that does the same; `batch` images a step over all workers."""

    size: int
    batch: int
    workers: int
    patients: int
    threads: int = 0

    @property
    def title(self) -> str:
        """As the first column of the table has it."""
        workers = f"{self.workers} workers, " if self.workers > 1 else ""
        threads = f", {self.threads} thread" if self.threads else ", a thread a core"
        return f"{workers}{self.size} px, batch {self.batch}{threads}"


# About 2.7 training images a patient: epochs of some tens of steps. With a thread a core nothing is left to Ray's own
# processes, with a thread less one core is, as on a node whose GPU computes.
_LOOP = (Comparison(64, 32, 1, 360), Comparison(64, 32, 1, 360, threads=1), Comparison(224, 16, 1, 60, threads=1))
_DDP = (Comparison(64, 32, 2, 360),)
_SMOKE_LOOP = (Comparison(64, 8, 1, 24),)
_SMOKE_DDP = (Comparison(64, 8, 2, 24),)


def compare_loop(work: Path, rounds: int, *, smoke: bool) -> None:
    """One worker through Ray Train, and a bare loop."""
    say(f"\n**One worker** beside a bare PyTorch loop. {origin(f'bench_train.py loop --rounds {rounds}')}\n")
    _compare(_SMOKE_LOOP if smoke else _LOOP, "bare loop", work, rounds)


def compare_ddp(work: Path, rounds: int, *, smoke: bool) -> None:
    """Two workers through Ray Train, and torchrun."""
    say(f"\n**Two workers** beside torchrun, DDP, gloo. {origin(f'bench_train.py ddp --rounds {rounds}')}\n")
    _compare(_SMOKE_DDP if smoke else _DDP, "torchrun", work, rounds)


def _compare(comparisons: tuple[Comparison, ...], other: str, work: Path, rounds: int) -> None:
    say(
        f"| | {other} images/s | Ray Train images/s | ratio (range) | waiting for data "
        f"| train and validate: {other} | Ray Train | ratio (range) | s of validation: {other}, Ray Train "
        "| s until a checkpoint is safe |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|")
    for comparison in comparisons:
        say(_row(comparison, work, rounds))


def _row(comparison: Comparison, work: Path, rounds: int) -> str:
    """Both sides in turns; each run of the product is divided by the mean of the bare runs before and after it."""
    from train_data import phantoms

    data = phantoms(work, comparison.patients, comparison.size)
    settings: dict[str, Any] = {
        "data": str(data / "dataset"),
        "out": str(work / "run"),
        "workers": comparison.workers,
        "epochs": _EPOCHS,
        "batch_size": comparison.batch,
        "threads": comparison.threads,
    }
    bare, product = [_bare(settings, data, comparison.workers)], []
    for _ in range(rounds):
        product.append(_product(settings, work))
        bare.append(_bare(settings, data, comparison.workers))
    images = bare[0]["images"]

    def beside(value: Callable[[dict[str, float]], float]) -> tuple[float, float, list[float]]:
        one, other = [value(run) for run in bare], [value(run) for run in product]
        ratios = [2 * rate / (one[number] + one[number + 1]) for number, rate in enumerate(other)]
        return statistics.median(one), statistics.median(other), ratios

    trained = beside(lambda run: run["images_per_second"])
    whole = beside(lambda run: images / run["seconds"])
    waiting = statistics.median(run["waiting"] for run in product)
    besides = [
        statistics.median(run["seconds"] - images / run["images_per_second"] for run in runs) for runs in (bare, product)
    ]
    return (
        f"| {comparison.title} | {trained[0]:.1f} | {trained[1]:.1f} | {median_and_range(trained[2])} | {waiting:.1%} "
        f"| {whole[0]:.1f} | {whole[1]:.1f} | {median_and_range(whole[2])} | {besides[0]:.1f}, {besides[1]:.1f} "
        f"| {statistics.median(run['checkpoint'] for run in product):.1f} |"
    )


def _bare(settings: dict[str, Any], data: Path, workers: int) -> dict[str, float]:
    from train_data import TENSORS

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
    return answer_of([*launch, script("bare_loop.py"), "--settings", json.dumps(settings), "--tensors", str(data / TENSORS)])


def _product(settings: dict[str, Any], work: Path) -> dict[str, float]:
    shutil.rmtree(work / "run", ignore_errors=True)
    return answer_of([script("bench_train.py"), "product", "--settings", json.dumps(settings)])


def train_once(settings_json: str) -> None:
    """What `cxr-ray train` does, without its picture in the terminal; prints the last epoch's figures as JSON."""
    from cxr_ray.distributed import train
    from cxr_ray.ray_session import ray_session
    from cxr_ray.train_events import EpochResult, TrainEvent
    from cxr_ray.train_settings import TrainSettings

    results: list[tuple[float, EpochResult]] = []

    def watch(event: TrainEvent) -> None:
        if event.result is not None:
            results.append((time.monotonic(), event.result))

    with ray_session():
        train(TrainSettings.model_validate_json(settings_json), watch)
    (previous, _), (told, last) = results[-2:]
    # An epoch is told when its checkpoint is safe; its own seconds end before that.
    print(json.dumps(asdict(last) | {"checkpoint": told - previous - last.seconds}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loop", "ddp", "input", "precision", "units", "gpu", "all", "product"])
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/cxr-ray-bench"), help="folder of the data, 2 GB, kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that a part works, measures nothing")
    parser.add_argument("--settings", help="of the part product, which the others call")
    parser.add_argument("--out", type=Path, default=Path("/var/tmp/cxr-ray-bench/gpu"), help="folder of the results of gpu")
    parser.add_argument("--only", default="", help="gpu: the cases whose name this regular expression finds")
    parser.add_argument("--minutes", type=float, default=25.0, help="gpu: what would start later is told as not run")
    return parser.parse_args()


def main() -> None:
    """Run what the first argument names."""
    given = _arguments()
    if given.what == "product":
        train_once(given.settings)
        return
    if given.what == "gpu":
        from gpu_speed import measure_gpu

        measure_gpu(given.out, only=given.only, minutes=given.minutes, smoke=given.smoke)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    rounds = 1 if given.smoke else given.rounds
    parts = ("precision", "input", "units", "loop", "ddp") if given.what == "all" else (given.what,)
    failed = [part for part in parts if not _ran(part, given.work, rounds, smoke=given.smoke)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _ran(part: str, work: Path, rounds: int, *, smoke: bool) -> bool:
    """One part; what it lacks must not cost the others."""
    try:
        if part == "loop":
            compare_loop(work, rounds, smoke=smoke)
        elif part == "ddp":
            compare_ddp(work, rounds, smoke=smoke)
        elif part == "input":
            from input_speed import compare_input

            compare_input(work, rounds, smoke=smoke)
        elif part == "precision":
            from step_speed import compare_precision

            compare_precision(rounds, smoke=smoke)
        else:
            from unit_costs import print_unit_costs

            print_unit_costs(work, rounds, smoke=smoke)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        say(f"\n{part}: {error}")
        return False
    return True


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
