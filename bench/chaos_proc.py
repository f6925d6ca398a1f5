"""Processes of this machine as /proc tells of them."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_GONE = "Z"


@dataclass(frozen=True)
class Seen:
    """A process that lives; `began` tells it from another that gets its number later."""

    pid: int
    parent: int
    began: int

    @property
    def title(self) -> str:
        """Its command line, or what it has put in its place."""
        with suppress(OSError):
            return (_PROC / str(self.pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:120]
        return ""

    def carries(self, name: str, value: str) -> bool:
        """Whether it was started with a variable in its environment."""
        with suppress(OSError):
            return f"{name}={value}".encode() in (_PROC / str(self.pid) / "environ").read_bytes().split(b"\0")
        return False

    def kill(self) -> None:
        """Kill it, if it lives still."""
        with suppress(OSError):
            if _stat(self.pid)[2] == self.began:
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Holdings:
    """What a process holds: descriptors, threads, and memory in MiB (PSS)."""

    descriptors: int
    threads: int
    memory_mib: float


def living() -> list[Seen]:
    """All processes; what has ended and waits for its parent is none."""
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                pid = int(folder.name)
                state, parent, began = _stat(pid)
                if state != _GONE:
                    found.append(Seen(pid, parent, began))
    return found


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and time of start (proc(5))."""
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def descendants(pid: int) -> list[Seen]:
    """All processes below one."""
    processes = living()
    found: list[Seen] = []
    parents = {pid}
    while parents:
        children = [process for process in processes if process.parent in parents]
        found += children
        parents = {process.pid for process in children}
    return found


def holdings(pid: int) -> Holdings:
    """What a process holds now."""
    folder = _PROC / str(pid)
    memory = [int(line.split()[1]) for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")]
    return Holdings(len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")), sum(memory) / 1024)  # noqa: PTH208


def holds_open(pid: int, folder: Path) -> bool:
    """Whether a process has a file of a folder open."""
    with suppress(OSError), os.scandir(_PROC / str(pid) / "fd") as descriptors:
        for descriptor in descriptors:
            with suppress(OSError):
                # The kernel's own text: what it names may be gone already.
                if os.readlink(descriptor.path).startswith(f"{folder}/"):  # noqa: PTH115
                    return True
    return False


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock (flock) of a file; None where nobody does, or nobody says."""
    with suppress(OSError):
        inode, device = path.stat().st_ino, path.stat().st_dev
        wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
        for line in (_PROC / "locks").read_text().splitlines():
            parts = line.split()
            if "->" not in parts and parts[1] == "FLOCK" and parts[5] == wanted:
                return int(parts[4])
    return None


def titles(processes: Iterable[Seen]) -> list[str]:
    """Processes in words."""
    return [f"{process.pid} {process.title or '?'}" for process in processes]
