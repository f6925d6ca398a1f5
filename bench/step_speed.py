"""Training steps of DenseNet-121 (multi-input) on the CPU: float32, channels last, and bfloat16 by autocast. Needs no Ray."""

import statistics
import time
from collections.abc import Callable

import torch
from measuring import median_and_range, origin, say
from train_step import Arithmetic, drawn_batch, training

from cxr_ray.cpus import available_cpus

_BATCH = 16
_CASES = {
    "eager float32": Arithmetic("float32", "contiguous"),
    "float32 channels last": Arithmetic("float32"),
    "bf16 channels last": Arithmetic("bf16"),
}
# Edge to steps a round: about as many seconds at each.
_STEPS = {64: 10, 224: 2}


def compare_precision(rounds: int, *, smoke: bool) -> None:
    """Print images/s of each case, in turns, and bf16 channels last beside eager float32."""
    torch.set_num_threads(available_cpus())
    say(f"\n**Precision on the CPU**, batch {_BATCH}. {origin(f'bench_train.py precision --rounds {rounds}')}\n")
    say(f"| px | {' | '.join(_CASES)} | bf16 channels last / eager float32 (range) |\n|---|{'---|' * (len(_CASES) + 1)}")
    for size, steps in ({64: 1} if smoke else _STEPS).items():
        rates = _rates(size, steps, rounds, 4 if smoke else _BATCH)
        eager, *_, bf16 = rates.values()
        ratios = [fast / slow for fast, slow in zip(bf16, eager, strict=True)]
        shown = " | ".join(f"{statistics.median(values):.1f}" for values in rates.values())
        say(f"| {size} | {shown} | {median_and_range(ratios)} |")


def _rates(size: int, steps: int, rounds: int, images: int) -> dict[str, list[float]]:
    device = torch.device("cpu")
    batch = drawn_batch(images, size, device)
    runs = {name: training(arithmetic, batch, device) for name, arithmetic in _CASES.items()}
    for run in runs.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(images * steps / _seconds(run, steps))
    return rates


def _seconds(run: Callable[[], None], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        run()
    return time.perf_counter() - started
