"""How fast the node receives, beside Orthanc and DCMTK's storescp in the same run.

    python bench/bench_node.py [--rounds N] [--smoke]

DCMTK's storescu sends objects of 1 MB and of 10 MB over 1 and over 8 associations, each of them to: `cxr-ray`'s listener,
whose success means bytes, name and folder forced to disk; Orthanc with SQLite and its default fsync; storescp with its
defaults, which forces nothing to disk; and storescp with a process an association and the largest PDUs. All of them, and the
senders, run with TCP_NODELAY, and all receivers write to the same disk. Every object of a round has a UID of its own. What a
round sends is made before its clock starts; what the receiver then has on its disk is counted. Rounds go through all
receivers in turns, so that a machine which changes its speed does so for each. Goal: at each point 1.2 times the faster of
Orthanc and storescp. What cannot be undercut is measured beside them: the same bytes, names and folder forced to disk by as
many threads as there are associations, without a network. Figures are printed as Markdown for RESULTS.md. --smoke takes
times that show that it works.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from measuring import ROOT, median_and_range, origin, say
from node_targets import (
    Receiver,
    listener,
    orthanc,
    peers_environment,
    program,
    storescp,
    storescp_forking,
)

sys.path.insert(0, str(ROOT))

_ASSOCIATIONS = (1, 8)
_MEGABYTES = (1, 10)
# Objects a round: enough that starting storescu, a tenth of a second each, is little of it.
_OBJECTS = {(1, 1): 400, (1, 8): 480, (10, 1): 48, (10, 8): 64}
_GOAL = 1.2
_DISK = "disk alone"


def write_objects(folder: Path, megabytes: int, count: int, associations: int) -> list[Path]:
    """Write so many instances, dealt out to a folder an association."""
    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    side = int((megabytes * 1_000_000 / 2) ** 0.5)
    pixels = np.random.default_rng(0).integers(0, 4096, (side, side), dtype=np.uint16).tobytes()
    study, series = generate_uid(), generate_uid()
    for number in range(count):
        instance = Dataset()
        instance.SOPClassUID, instance.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
        instance.StudyInstanceUID, instance.SeriesInstanceUID = study, series
        instance.PatientID, instance.PatientName, instance.Modality = "BENCH", "Bench", "DX"
        instance.Rows = instance.Columns = side
        instance.SamplesPerPixel, instance.PhotometricInterpretation = 1, "MONOCHROME2"
        instance.BitsAllocated, instance.BitsStored, instance.HighBit, instance.PixelRepresentation = 16, 12, 11, 0
        instance.PixelData = pixels
        instance.file_meta = FileMetaDataset()
        instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        target = folder / f"{number % associations}"
        target.mkdir(parents=True, exist_ok=True)
        instance.save_as(target / f"{number}.dcm", enforce_file_format=True)
    return [folder / f"{number}" for number in range(associations)]


def send(receiver: Receiver, folders: list[Path]) -> float:
    """Send every folder over an association of its own, all at once; returns seconds."""
    command = [program("storescu"), "-xe", "-aec", receiver.title, "+sd", "127.0.0.1", str(receiver.port)]
    started = time.perf_counter()
    senders = [
        subprocess.Popen([*command, str(folder)], env=peers_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for folder in folders
    ]
    said = [sender.communicate()[0] for sender in senders]
    seconds = time.perf_counter() - started
    for sender, words in zip(senders, said, strict=True):
        if sender.returncode:
            raise SystemExit(f"storescu to {receiver.name} ended with {sender.returncode}: {words.decode()[-500:]}")
    return seconds


def write_durably(target: Path, folders: list[Path]) -> float:
    """Write what is in memory as a receiver that keeps its word has to, a thread a folder; returns seconds."""
    ready = target / "ready"
    ready.mkdir(parents=True)
    contents = [[(file.name, file.read_bytes()) for file in sorted(folder.iterdir())] for folder in folders]

    def write(files: list[tuple[str, bytes]]) -> None:
        for name, content in files:
            with (target / name).open("xb", buffering=0) as file:
                file.write(content)
                os.fsync(file.fileno())
            (target / name).rename(ready / name)
            descriptor = os.open(ready, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    started = time.perf_counter()
    with ThreadPoolExecutor(len(contents)) as threads:
        list(threads.map(write, contents))
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    os.sync()
    return seconds


def measure(rounds: int, *, smoke: bool) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Objects a second by (megabytes, associations) and receiver, a value a round."""
    rates: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="bench-node-", dir=os.environ.get("BENCH_FOLDER")) as name:
        for turn in range(rounds):
            for megabytes in _MEGABYTES:
                for associations in _ASSOCIATIONS:
                    count = associations if smoke else _OBJECTS[megabytes, associations]
                    folder = Path(name) / "objects"
                    folders = write_objects(folder, megabytes, count, associations)
                    os.sync()
                    for make in (listener, orthanc, storescp, storescp_forking):
                        rate = _one(make, Path(name) / "receiver", folders, count)
                        rates[megabytes, associations][rate[0]].append(rate[1])
                        say(f"round {turn + 1}: {megabytes} MB, {associations} associations, {rate[0]}: {rate[1]:.1f}/s")
                    rates[megabytes, associations][_DISK].append(count / write_durably(Path(name) / "written", folders))
                    shutil.rmtree(folder)
    return rates


def _one(make, folder: Path, folders: list[Path], count: int) -> tuple[str, float]:  # noqa: ANN001
    folder.mkdir()
    try:
        with ExitStack() as stack:
            receiver = stack.enter_context(make(folder))
            seconds = send(receiver, folders)
            stored = receiver.received()
            if stored != count:
                raise SystemExit(f"{receiver.name} has {stored} objects of {count}")
            return receiver.name, count / seconds
    finally:
        shutil.rmtree(folder)
        os.sync()


def report(rates: dict[tuple[int, int], dict[str, list[float]]], command: str) -> None:
    """Print the table."""
    say(f"\n{origin(command)}\n")
    columns = ("cxr-ray", "Orthanc", "storescp", "storescp --fork", _DISK)
    say(f"| objects | associations | {' | '.join(f'{name} /s' for name in columns)} | ratio to the faster |")
    say("|---|---|---|---|---|---|---|---|")
    for (megabytes, associations), by_name in rates.items():
        medians = {name: statistics.median(values) for name, values in by_name.items()}
        ratio = medians["cxr-ray"] / max(medians["Orthanc"], medians["storescp"])
        cells = [median_and_range(by_name[name], 0) for name in columns]
        met = "" if ratio >= _GOAL else f" (goal {_GOAL})"
        say(f"| {megabytes} MB | {associations} | {' | '.join(cells)} | **{ratio:.2f}**{met} |")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    rates = measure(1 if given.smoke else given.rounds, smoke=given.smoke)
    report(rates, "python bench/bench_node.py " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
