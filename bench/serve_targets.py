"""What `bench_serve` puts under load: a bundle and files made on the fly, and the servers as processes of their own."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from measuring import answer_of, environment, script

# Carried by every process that a server starts, however far from it in the tree of processes.
_MARK = "CXR_RAY_BENCH_SERVER"
_SECONDS_TO_START = 180
_SECONDS_TO_STOP = 60


def bundle(folder: Path, size: int, input_size: int) -> Path:
    """A bundle of the multi-input network with random weights."""
    import torch

    from cxr_ray import presets
    from cxr_ray.bundle import describe, write_bundle
    from cxr_ray.clinical import ClinicalStatistics
    from cxr_ray.findings import FINDINGS
    from cxr_ray.input_profile import InputProfile

    network = presets.options(presets.find("multi-input"))
    torch.manual_seed(0)
    description = describe(
        preset="multi-input",
        network=network,
        size=size,
        input_size=input_size,
        statistics=asdict(ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * len(FINDINGS))),
        thresholds=dict.fromkeys(FINDINGS, 0.5),
        other_thresholds={},
        validation={"auc": 0.5, "epoch": 1, "images": 100},
        settings={},
        dataset_digest="0" * 64,
        training_inputs=InputProfile(),
    )
    path = folder / f"bundle-{size}-{input_size}"
    write_bundle(str(path), presets.build("multi-input", network).eval(), description)
    return path


def files(folder: Path) -> dict[str, Path]:
    """A radiograph as a PNG of 1024x1024, the same as a DICOM file of 10 MB, and a small PNG of 256x256."""
    from bench_ingest import archive, pngs

    png, small = folder / "film.png", folder / "small.png"
    png.write_bytes(pngs()[0])
    film = cv2.imread(str(png), cv2.IMREAD_GRAYSCALE)
    small.write_bytes(cv2.imencode(".png", cv2.resize(film, (256, 256), interpolation=cv2.INTER_AREA))[1].tobytes())
    return {"PNG": png, "DICOM": next(archive(folder / "archive", 1, 0).glob("plain-*.dcm")), "small": small}


@dataclass(frozen=True)
class Server:
    """A server that answers; `mark` is what its processes carry in their environment."""

    url: str
    mark: str

    def processes(self) -> list[Path]:
        """Folders below /proc of all its processes."""
        wanted = f"{_MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            # Processes come and go while they are listed.
            with suppress(OSError):
                if folder.name.isdecimal() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(folder)
        return found

    def memory_mib(self) -> float:
        """Memory of all processes, what several share counted once: the sum of their proportional set sizes."""
        total = 0
        for folder in self.processes():
            with suppress(OSError):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def cpu_seconds(self) -> float:
        """CPU time that its living processes have taken."""
        ticks = 0
        for folder in self.processes():
            with suppress(OSError):
                ticks += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def product(bundle_path: Path, work: Path, front: str) -> Iterator[Server]:
    """`cxr-ray serve`, as a user starts it."""
    store = work / "results.sqlite"
    store.unlink(missing_ok=True)
    command = ["-m", "cxr_ray", "serve", "--bundle", str(bundle_path), "--store", f"sqlite:///{store}", "--front", front]
    with _running(command, work / "serve.log") as server:
        yield server


@contextmanager
def plain(bundle_path: Path, work: Path) -> Iterator[Server]:
    """`plain_server`."""
    with _running([script("plain_server.py"), "--bundle", str(bundle_path)], work / "plain.log") as server:
        yield server


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", secrets.token_hex(8))
    with log.open("wb") as said:
        child = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment() | {_MARK: server.mark},
            start_new_session=True,
        )
    try:
        _wait_until_ready(child, server, log)
        yield server
    finally:
        _stop(child, server)


def _wait_until_ready(child: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    end = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < end and child.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/readyz", timeout=30, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{server.url} did not become ready; it said: {log.read_text(errors='replace')[-2000:]}")


def _stop(child: subprocess.Popen[bytes], server: Server) -> None:
    child.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_SECONDS_TO_STOP)
    for folder in server.processes():
        with suppress(ProcessLookupError):
            os.kill(int(folder.name), signal.SIGKILL)
    child.wait()


class EngineAlone:
    """`engine_alone`, asked line by line."""

    def __init__(self, bundle_path: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, script("engine_alone.py"), "--bundle", str(bundle_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        self.device = str(self._answer()["device"])

    def __enter__(self) -> "EngineAlone":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    def engine(self, batch: int, seconds: float) -> tuple[int, list[float]]:
        """The batch that was run, and the seconds of each."""
        answer = self._ask(batch=batch, seconds=seconds)
        return answer["batch"], answer["seconds"]

    def decoder(self, file: Path, seconds: float) -> list[float]:
        """Seconds of each decoding."""
        return list(self._ask(file=str(file), seconds=seconds)["seconds"])

    def _ask(self, **question: object) -> Any:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(question) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("the engine alone ended before it answered; see what it wrote above")
        return json.loads(line)


def load(server: Server, file: Path, clients: int, **given: object) -> Any:
    """What `load_generator` met; `given` are its options."""
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [script("load_generator.py"), "--url", f"{server.url}/v1/predict", "--file", str(file), "--clients", str(clients)]
    return answer_of([*command, *options])


def percentile_ms(seconds: Sequence[float], q: float) -> float:
    """A percentile of some times, in milliseconds; NaN of none."""
    return float(np.percentile(seconds, q)) * 1000 if len(seconds) else float("nan")
