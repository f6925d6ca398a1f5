"""Training steps and scoring of DenseNet-121 (multi-input) at 224 px on a CUDA device, each case in a process of its own.

    python bench/gpu_speed.py case NAME [--smoke]

A case that fails, hangs or runs out of memory is told in the results and costs no other. Results are written after each case,
so that an interruption leaves what was measured; started again on the same folder, what is there is not measured again. Needs
torch, torchvision, numpy, safetensors and PyYAML, neither Ray nor an installation: ``python3 bench/bench_train.py gpu`` from a
bare clone. With --smoke and without a GPU, everything but the figures works on the CPU.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_report import markdown
from measuring import answer_of, origin, say, script
from train_step import Arithmetic, drawn_batch, scoring, tf32, training, work_of

_SIZE = 224
_BATCH = 256
_SECONDS_A_CASE = 420.0
_SECONDS_A_REPETITION = 2.0
_REPETITIONS = 3
_KERNELS = 25
_PROFILED_STEPS = 3


@dataclass(frozen=True)
class Case:
    """One line of the results.

    Attributes
    ----------
    tf32
        Whether float32 may be rounded for the tensor cores.
    host
        Batches come from pinned memory of the host instead of lying on the device.
    autotune
        cuDNN tries its algorithms.
    freeze
        Inductor folds weights and batch normalisation into constants (scoring only).
    profile
        Write the table of kernels.
    """

    kind: str
    arithmetic: Arithmetic
    batch: int = _BATCH
    tf32: bool = False
    host: bool = False
    autotune: bool = False
    freeze: bool = False
    profile: bool = False

    @property
    def name(self) -> str:
        """As --only and the results have it."""
        how = self.arithmetic
        marks = [
            ("tf32", self.tf32),
            ("channels-last", how.layout == "channels_last"),
            (how.compile, bool(how.compile)),
            ("autotune", self.autotune),
            ("freeze", self.freeze),
            ("host", self.host),
        ]
        return "-".join([self.kind, how.precision, *(mark for mark, wanted in marks if wanted), str(self.batch)])


def cases() -> list[Case]:
    """All cases, those that matter most first."""
    plain, last = Arithmetic("float32", "contiguous"), Arithmetic("bf16")
    compiled = Arithmetic("bf16", compile="default")
    tuned = Arithmetic("bf16", compile="max-autotune-no-cudagraphs")
    graphs = Arithmetic("bf16", compile="reduce-overhead")
    first = [
        Case("training", last, profile=True),
        Case("training", compiled, profile=True),
        Case("training", plain, tf32=True),
        Case("training", plain),
        Case("scoring", last, profile=True),
        Case("scoring", compiled, profile=True),
        Case("scoring", graphs),
        Case("scoring", plain, tf32=True),
        Case("scoring", plain),
        Case("training", last, autotune=True),
        Case("scoring", Arithmetic("bf16-weights", compile="default"), freeze=True),
        Case("training", graphs),
        Case("training", compiled, host=True),
    ]
    batches = [
        *(Case("training", compiled, batch) for batch in (512, 128, 768, 64)),
        *(Case("scoring", compiled, batch) for batch in (1024, 64)),
    ]
    slow_to_compile = [
        Case("scoring", tuned),
        Case("scoring", Arithmetic("bf16-weights", compile="max-autotune-no-cudagraphs"), freeze=True),
        Case("training", tuned),
    ]
    return [*first, *batches, *slow_to_compile]


def measure_gpu(out: Path, *, only: str, minutes: float, smoke: bool) -> None:
    """Measure the cases whose name `only` finds; write ``results.json`` and ``results.md`` into `out`."""
    if not torch.cuda.is_available() and not smoke:
        sys.exit("gpu: torch finds no CUDA device")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results["origin"] = f"{_device_name()}; {origin('bench_train.py gpu')}"
    ends = time.monotonic() + minutes * 60
    wanted = ["limits", "work", *(case.name for case in cases() if re.search(only, case.name))]
    for name in wanted:
        if name in results and "error" not in results[name]:
            continue
        left = ends - time.monotonic()
        results[name] = (
            _told(name, min(left, _SECONDS_A_CASE), smoke=smoke) if left > 20 else {"error": "not run: no time left"}
        )
        shown = results[name].get("error") or {key: value for key, value in results[name].items() if key != "kernels"}
        say(f"{name}: {shown}")
        file.write_text(json.dumps(results, indent=1))
        (out / "results.md").write_text(markdown(results))
    say((out / "results.md").read_text())


def _told(name: str, timeout: float, *, smoke: bool) -> dict[str, Any]:
    started = time.monotonic()
    try:
        answer = answer_of([script("gpu_speed.py"), "case", name, *(["--smoke"] if smoke else [])], timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"ended after {timeout:.0f} s"}
    except RuntimeError as error:
        return {"error": str(error)[-1500:]}
    return answer | {"seconds_in_all": round(time.monotonic() - started, 1)}


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _run_case(case: Case, *, smoke: bool) -> dict[str, Any]:
    size, images = (64, 4) if smoke else (_SIZE, case.batch)
    device = _device()
    torch.backends.cudnn.benchmark = case.autotune
    if case.freeze:
        from torch._inductor import config as inductor

        inductor.freezing = True
    batch = drawn_batch(images, size, device, pinned=case.host and device.type == "cuda")
    make = training if case.kind == "training" else scoring
    with tf32(allowed=case.tf32):
        run = make(case.arithmetic, batch, device)
        started = time.perf_counter()
        for _ in range(1 if smoke else 3):
            run()
        _wait()
        begun = time.perf_counter() - started
        answer = _rates(run, images, 0.1 if smoke else _SECONDS_A_REPETITION)
        answer |= {"batch": images, "seconds_to_begin": round(begun, 1), "case": asdict(case)}
        if device.type == "cuda":
            answer["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            answer["waits"] = _waits(run)
        if case.profile:
            answer["kernels"] = _kernels(run)
    return answer


def _rates(run: Callable[[], None], images: int, seconds: float) -> dict[str, Any]:
    """Images/s over repetitions of about so many seconds, the device waited for at the end of each only."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    calls = max(1, round(seconds / (time.perf_counter() - started)))
    rates = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        _wait()
        rates.append(images * calls / (time.perf_counter() - started))
    return {"rate": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def _waits(run: Callable[[], None]) -> list[str]:
    """Where one call makes the host wait for the device, as far as CUDA's allocator and copies tell."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(each.filename).name}:{each.lineno}" for each in told if "synchroniz" in str(each.message)]
    return sorted(set(found))


def _kernels(run: Callable[[], None]) -> dict[str, Any]:
    """The kernels (without a GPU, the operators) that take most time: name, calls and milliseconds a step."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(_PROFILED_STEPS):
            run()
        _wait()
    found = [
        (each.key, each.count / _PROFILED_STEPS, _own_microseconds(each, on_gpu=on_gpu) / 1000 / _PROFILED_STEPS)
        for each in profiler.key_averages()
        if not on_gpu or each.device_type == torch.autograd.DeviceType.CUDA
    ]
    found.sort(key=lambda row: -row[2])
    rows = [{"name": name, "calls": calls, "ms": ms} for name, calls, ms in found[:_KERNELS]]
    return {"rows": rows, "ms": sum(row[2] for row in found), "kinds": len(found)}


def _own_microseconds(event: Any, *, on_gpu: bool) -> float:
    if not on_gpu:
        return float(event.self_cpu_time_total)
    return float(getattr(event, "self_device_time_total", None) or getattr(event, "self_cuda_time_total", 0.0))


def _limits(*, smoke: bool) -> dict[str, float]:
    """What this device can do at best: bytes/s of a copy (read and written) and operations/s of bf16 and TF32 products."""
    device = _device()
    count, edge = (2**20, 256) if smoke else (2**30, 8192)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"bytes_per_second": 2 * count / _best(lambda: target.copy_(source))}
    for name, dtype, allowed in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
        left = torch.randn(edge, edge, device=device).to(dtype)
        with tf32(allowed=allowed):
            found[f"{name}_operations_per_second"] = 2 * edge**3 / _best(lambda: left @ left)  # noqa: B023
    return found


def _best(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(5):
        _wait()
        started = time.perf_counter()
        for _ in range(10):
            run()
        _wait()
        taken.append((time.perf_counter() - started) / 10)
    return min(taken)


def _work(*, smoke: bool) -> dict[str, dict[str, float]]:
    """Bytes and operations an image, of training and scoring in each arithmetic that is not compiled."""
    size, images = (64, 2) if smoke else (_SIZE, 128)
    device = _device()
    batch = drawn_batch(images, size, device)
    found = {}
    for precision, layout in (("float32", "contiguous"), ("bf16", "channels_last")):
        arithmetic = Arithmetic(precision, layout)
        for kind, make in (("training", training), ("scoring", scoring)):
            run = make(arithmetic, batch, device)
            # The optimiser makes its state in the first step.
            run()
            done = work_of(run)
            found[f"{kind}-{precision}"] = {"bytes": done.bytes / images, "operations": done.operations / images}
    return found


def main() -> None:
    """The process of one case; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["case"])
    parser.add_argument("name")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.name in ("limits", "work"):
        answer: dict[str, Any] = (_limits if given.name == "limits" else _work)(smoke=given.smoke)
    else:
        answer = _run_case(next(case for case in cases() if case.name == given.name), smoke=given.smoke)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
