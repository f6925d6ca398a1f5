"""What every benchmark of training needs: the origin of a table, children that answer, and medians with their range."""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LAST_LINES = 20


def origin(command: str) -> str:
    """Machine, versions, commit and command, as a line above a table of results."""
    installed = [f"{name} {_version(name)}" for name in ("torch", "ray") if _version(name)]
    return (
        f"{_processor()}, {_memory_gib():.0f} GiB, load {os.getloadavg()[0]:.1f} at the start; "
        f"Python {platform.python_version()}, {', '.join(installed)}; commit {commit()}; `{command}`."
    )


def commit() -> str:
    """The commit that was measured, and whether files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with changes" if changed else name


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    described = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in described.splitlines() if ":" in line)
    by_name = {name.strip(): value.strip() for name, value in fields.items()}
    flags = by_name.get("flags", "").split()
    extensions = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {by_name.get('model name', 'an unknown processor')} ({', '.join(extensions) or 'no bf16'})"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def environment() -> dict[str, str]:
    """The environment of a child: the package is found whether it is installed or not."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{ROOT}:{inherited}" if inherited else str(ROOT)}


def script(name: str) -> str:
    """The path of a file beside this one."""
    return str(Path(__file__).with_name(name))


def answer_of(command: Sequence[str], *, timeout: float | None = None) -> Any:
    """Run a Python program in a process of its own; its answer is the last line that it prints, as JSON.

    Raises
    ------
    RuntimeError
        With the end of what it wrote, if it fails or answers nothing.
    subprocess.TimeoutExpired
        If it takes longer than `timeout` seconds.
    """
    # A session of its own, so that what the child has started ends with it.
    child = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        printed, complained = child.communicate(timeout=timeout)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    answers = [line for line in printed.splitlines() if line.startswith("{")]
    if child.returncode or not answers:
        said = "\n".join((complained or printed).strip().splitlines()[-_LAST_LINES:])
        raise RuntimeError(f"{' '.join(Path(part).name for part in command[:2])} ended with {child.returncode}: {said}")
    return json.loads(answers[-1])


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """The median in bold, and the smallest and the largest value."""
    return f"**{statistics.median(values):.{digits}f}** ({min(values):.{digits}f} to {max(values):.{digits}f})"


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)
