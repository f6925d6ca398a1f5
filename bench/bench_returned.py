"""How long a PACS waits for a study's results: from the end of the association to their storage in Orthanc, idle system.

    python bench/bench_returned.py [--studies N] [--smoke]

`cxr-ray serve` with the multi-input network at 256 pixels, `cxr-ray listen` with an Orthanc as its destination, and storescu,
which sends a film of 1024x1024 after the other, each a study of its own; all processes on this machine. The quiet time of a
study is set to nothing, so that its end is that of the association. The clock runs from the end of storescu, which has the
release of the association behind it, until Orthanc counts the report and the Secondary Capture. Goal: a median below 1.5 s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import yaml
from measuring import ROOT, environment, origin, say
from node_targets import free_port, peers_environment, process, program
from serve_targets import bundle, product

sys.path.insert(0, str(ROOT))

_PATIENCE_SECONDS = 60.0
_GOAL_SECONDS = 1.5
_SIZE = 256


def write_films(folder: Path, count: int) -> list[Path]:
    """Write so many films of 1024x1024, each of a study of its own."""
    from pydicom.uid import generate_uid

    from ingest.phantom import simulate_patients
    from ingest.phantom_drawing import draw
    from ingest.phantom_release import phantom_dicom

    visits = simulate_patients(count, 5)[:count]
    films = []
    for number, visit in enumerate(visits):
        film = phantom_dicom(visit, draw(visit, 1024))
        film.StudyInstanceUID, film.SeriesInstanceUID, film.SOPInstanceUID = (generate_uid() for _ in range(3))
        films.append(folder / f"{number}.dcm")
        film.save_as(films[-1], enforce_file_format=True)
    return films


def measure(studies: int, work: Path) -> dict[str, list[float]]:
    """Seconds from the end of each association to the first and to both of the results."""
    films = write_films(work, studies + 2)
    made = bundle(work, _SIZE, _SIZE)
    dicom_port, http_port, node_port = free_port(), free_port(), free_port()
    archive = {
        "StorageDirectory": str(work / "orthanc"),
        "IndexDirectory": str(work / "orthanc"),
        "Plugins": [],
        "HttpPort": http_port,
        "DicomPort": dicom_port,
        "DicomAet": "ORTHANC",
        "DicomAlwaysAllowStore": True,
        "AuthenticationEnabled": False,
        "RemoteAccessAllowed": False,
    }
    (work / "orthanc.json").write_text(json.dumps(archive))
    with product(made, work, "proxy") as server:
        destination = {"name": "archive", "kind": "dicom", "host": "127.0.0.1", "port": dicom_port, "called_ae": "ORTHANC"}
        node = {
            "spool": str(work / "spool"),
            "listener": {"port": node_port, "min_free_bytes": 0},
            "dispatch": {"service_url": server.url},
            "assembly": {"quiet_seconds": 0},
            "delivery": {"destinations": [destination]},
        }
        (work / "node.yaml").write_text(yaml.safe_dump(node))
        listen = [sys.executable, "-m", "cxr_ray", "listen", "--config", str(work / "node.yaml")]
        with (
            process([program("Orthanc"), str(work / "orthanc.json")], peers_environment(), dicom_port, work / "orthanc.log"),
            process(listen, environment(), node_port, work / "listen.log"),
            httpx.Client(base_url=f"http://127.0.0.1:{http_port}", trust_env=False, timeout=30) as rest,
        ):
            times = [_returned(film, node_port, rest) for film in films]
    # The first ones meet what is loaded once.
    first, both = zip(*times[2:], strict=True)
    return {"first result": list(first), "both results": list(both)}


def _returned(film: Path, port: int, rest: httpx.Client) -> tuple[float, float]:
    before = _count(rest)
    command = [program("storescu"), "-aec", "CXRRAY", "127.0.0.1", str(port), str(film)]
    subprocess.run(command, check=True, env=peers_environment(), capture_output=True)
    ended = time.perf_counter()
    first = 0.0
    while (found := _count(rest) - before) < 2:
        if found and not first:
            first = time.perf_counter() - ended
        if time.perf_counter() - ended > _PATIENCE_SECONDS:
            raise SystemExit(f"{film}: no results within {_PATIENCE_SECONDS:g} s; see the logs beside it")
        time.sleep(0.005)
    both = time.perf_counter() - ended
    # What is left of the study's work would be the next one's load.
    time.sleep(0.5)
    return first or both, both


def _count(rest: httpx.Client) -> int:
    return int(rest.get("/statistics").json()["CountInstances"])


def report(times: dict[str, list[float]], command: str) -> None:
    """Print the table."""
    say(origin(command))
    say("")
    say("| from the end of the association | median | 90 % | slowest |")
    say("|---|---|---|---|")
    for name, seconds in times.items():
        tenths = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
        say(f"| {name} stored in Orthanc | {statistics.median(seconds):.2f} s | {tenths[-1]:.2f} s | {max(seconds):.2f} s |")
    met = statistics.median(times["both results"]) < _GOAL_SECONDS
    say("")
    say(f"Goal, median below {_GOAL_SECONDS} s: {'met' if met else 'missed'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--smoke", action="store_true", help="three studies, to show that it works")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-returned-") as work:
        times = measure(3 if options.smoke else options.studies, Path(work))
    report(times, " ".join(["python", os.path.relpath(__file__, ROOT), *sys.argv[1:]]))


if __name__ == "__main__":
    main()
