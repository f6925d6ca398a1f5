"""How fast and in how much memory images become shards, beside the plain pool of processes that one would write instead.

    python bench/bench_ingest.py png | dicom | columns | memory | scaling | all     [--work FOLDER] [--rounds N]

Each comparison runs both sides in turns on the same files, which lie in the page cache. The pool does the least that gives the
same shards: OpenCV or pydicom decode, area resize, Parquet, one process a core; it checks and quarantines nothing and cannot
be resumed. Figures are printed as Markdown for RESULTS.md.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from cxr_ray.cpus import available_cpus
from cxr_ray.findings import FINDINGS
from cxr_ray.records import SPLITS, pixel_column

SIZE = 256
# A process that has run threads of OpenCV cannot be forked safely.
cv2.setNumThreads(1)
REAL_DATA = Path(os.environ.get("CXR_REAL_DATA", "../shared/data"))
HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,x\n"
ROWS_PER_SHARD = 128
CR = "1.2.840.10008.5.1.4.1.1.1"


def pngs() -> list[bytes]:
    """Real radiographs of 1024x1024 as the NIH encoded them where they are at hand, else drawn ones with a detector's noise."""
    found = sorted((REAL_DATA / "nih-1024").glob("*.png"))
    if found:
        return [path.read_bytes() for path in found]
    from ingest.phantom import simulate_patients
    from ingest.phantom_drawing import draw

    random = np.random.default_rng(0)
    drawn = [draw(visit, 1024).astype(np.float32) for visit in simulate_patients(3, 0)[:3]]
    contents = [io.BytesIO() for _ in drawn]
    for film, content in zip(drawn, contents, strict=True):
        Image.fromarray(np.clip(film + random.normal(0, 3, film.shape), 0, 255).astype(np.uint8)).save(content, format="PNG")
    return [content.getvalue() for content in contents]


def release(folder: Path, count: int) -> Path:
    """A release of `count` PNGs of 1024x1024, in 3,000 files at most; the rest are links to those."""
    if (folder / "Data_Entry.csv").exists():
        return folder
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    base = pngs()
    names = [f"{number // 3:08d}_{number % 3:03d}.png" for number in range(count)]
    for number, name in enumerate(names):
        if number < 3000:
            (images / name).write_bytes(base[number % len(base)])
        else:
            os.link(images / names[number % 3000], images / name)
    rows = [f"{name},{FINDINGS[number % 14]},{number % 3},{number // 3},50,M,PA," for number, name in enumerate(names)]
    for part, chosen in (("test", 0), ("train_val", 1)):
        listed = [name for number, name in enumerate(names) if (number // 3 % 5 > 0) == bool(chosen)]
        (folder / f"{part}_list.txt").write_text("\n".join(listed))
    (folder / "Data_Entry.csv").write_text(HEADER + "\n".join(rows) + "\n")
    return folder


def archive(folder: Path, plain: int, packed: int) -> Path:
    """`plain` uncompressed and `packed` JPEG 2000 radiographs of 2500x2048 pixels of 12 bits."""
    if (folder / "complete").exists():
        return folder / "files"
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    films = [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) for png in pngs()]
    base = [cv2.resize(film, (2048, 2500), interpolation=cv2.INTER_CUBIC).astype(np.float32) * 16 for film in films]
    deep = [np.clip(film + random.normal(0, 20, film.shape), 0, 4095).astype(np.uint16) for film in base]
    templates = {"plain": [_instance(film, ExplicitVRLittleEndian) for film in deep]}
    templates["packed"] = [_instance(film, JPEG2000Lossless) for film in deep]
    for kind, count in (("plain", plain), ("packed", packed)):
        for number in range(count):
            own = templates[kind][number % len(deep)].replace(
                b"1.2.3.900000", f"1.2.3.{900000 - number - plain * (kind == 'packed')}".encode()
            )
            (files / f"{kind}-{number:05d}.dcm").write_bytes(own)
    (folder / "complete").touch()
    return files


def _instance(film: np.ndarray, syntax: str) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID, dataset.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CR
    dataset.SOPInstanceUID = dataset.StudyInstanceUID = dataset.SeriesInstanceUID = "1.2.3.900000"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.900000"
    dataset.SOPClassUID, dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = CR, "CR", "CHEST", "PA"
    dataset.PatientID, dataset.PatientAge, dataset.PatientSex, dataset.StudyDate = "1.2.3.900000", "050Y", "M", "20200101"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = *film.shape, 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = film.tobytes()
    if syntax == JPEG2000Lossless:
        dataset.compress(syntax, generate_instance_uid=False)
    content = io.BytesIO()
    pydicom.dcmwrite(content, dataset, enforce_file_format=True)
    return content.getvalue()


def png_square(path: str) -> np.ndarray:
    film = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    return cv2.resize(film, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def dicom_square(path: str) -> np.ndarray:
    dataset = pydicom.dcmread(path)
    low, width = float(dataset.WindowCenter) - 0.5 - (float(dataset.WindowWidth) - 1) / 2, float(dataset.WindowWidth) - 1
    shown = np.clip((dataset.pixel_array.astype(np.float32) - low) * (255 / width), 0, 255)
    return np.rint(cv2.resize(shown, (SIZE, SIZE), interpolation=cv2.INTER_AREA)).astype(np.uint8)


def _pool_shard(work: tuple[Callable[[str], np.ndarray], list[str], Path, int]) -> int:
    from ingest.shard_tasks import parquet_bytes

    square, paths, out, number = work
    cv2.setNumThreads(1)
    names = [path.rsplit("/", 1)[-1] for path in paths]
    table = pa.table({"image_id": names, "pixels": pixel_column(np.stack([square(path) for path in paths]))})
    (out / f"{number}.parquet").write_bytes(parquet_bytes(table, SIZE))
    return len(paths)


def pool(square: Callable[[str], np.ndarray], folder: Path, out: Path) -> float:
    """Seconds that a pool of processes takes from its start to its end."""
    fresh(out).mkdir(parents=True)
    paths = [str(path) for path in sorted(folder.iterdir())]
    paths = [paths[number] for number in np.random.default_rng(0).permutation(len(paths))]
    work = [(square, paths[start : start + ROWS_PER_SHARD], out, start) for start in range(0, len(paths), ROWS_PER_SHARD)]
    started = time.perf_counter()
    processes = multiprocessing.get_context("fork").Pool(available_cpus())
    try:
        done = sum(processes.imap_unordered(_pool_shard, work))
    finally:
        processes.close()
        processes.join()
    assert done == len(paths)
    return time.perf_counter() - started


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def ours(kind: str, source: Path, out: Path, *, warm: bool) -> dict[str, float]:
    """The ingest in a process of its own: seconds within its Ray, seconds of the whole process, and memory.

    Where `warm`, Ray Data has run something before, as on a cluster that is in use: its actors are there and the workers have
    imported what they need, as the pool's have by forking.
    """
    fresh(out)
    started = time.perf_counter()
    command = [sys.executable, __file__, "run", "--kind", kind, "--source", str(source), "--out", str(out)]
    command += ["--warm"] if warm else []
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(answer.stdout.splitlines()[-1]) | {"whole": time.perf_counter() - started}


def run(kind: str, source: str, out: str, *, warm: bool) -> None:
    """What `cxr-ray ingest` does, with a clock; prints JSON."""
    from cxr_ray.ray_session import ray_session

    if kind == "nih":
        from ingest.nih import NihSettings, ingest_nih

        def work() -> object:
            return ingest_nih(NihSettings(release=source, out=out, size=SIZE))
    else:
        from ingest.dicom import DicomSettings, ingest_dicom

        os.environ["CXR_RAY_PATIENT_KEY"] = "of the benchmark alone"

        def work() -> object:
            return ingest_dicom(DicomSettings(source=source, out=out, size=SIZE))

    with ray_session(), _Memory() as memory:
        if warm:
            import ray.data

            ray.data.range(8, override_num_blocks=8).map_batches(_idle, batch_size=None).materialize()
        started = time.perf_counter()
        manifest = work()
        seconds = time.perf_counter() - started
    images = sum(manifest.splits[split].images for split in SPLITS)
    print(json.dumps({"seconds": seconds, "images": images, "rate": manifest.images_per_second} | memory.peaks))


def _idle(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time.sleep(0.3)
    return batch


class _Memory:
    """Peaks of the driver's resident memory and of the object store, in MiB, sampled ten times a second."""

    def __enter__(self) -> "_Memory":
        self.peaks = {"driver": 0.0, "store": 0.0, "both": 0.0, "workers": 0.0}
        self._shared_before = _shared_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            driver = _resident(os.getpid(), "VmRSS") - _resident(os.getpid(), "RssShmem")
            store, workers = _shared_memory() - self._shared_before, 0.0
            for process in _descendants(os.getpid()):
                name = _name(process)
                if name.startswith(("ray::", "python")):
                    workers += _resident(process, "RssAnon")
            found = {"driver": driver, "store": store, "both": driver + store, "workers": workers}
            self.peaks = {key: round(max(self.peaks[key], value), 1) for key, value in found.items()}


def _shared_memory() -> float:
    """MiB in use of the file system that holds Ray's object store, and the decoders' images with it."""
    held = os.statvfs("/dev/shm")
    return (held.f_blocks - held.f_bfree) * held.f_frsize / 2**20


def _resident(process: int, field: str) -> float:
    try:
        return int(Path(f"/proc/{process}/status").read_text().partition(f"{field}:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0].decode().rsplit("/", 1)[-1]
    except OSError:
        return ""


def _descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found.append(child)
            found += _descendants(child) if Path(f"/proc/{child}/task").exists() else []
    return found


def compare(
    title: str, kind: str, source: Path, folder: Path, square: Callable[[str], np.ndarray], work: Path, rounds: int
) -> None:
    """Print both sides' images/s and their ratio over the rounds."""
    ratios: dict[str, list[float]] = {"pool": [], "ingest": [], "ratio": [], "cold": [], "command": []}
    for path in sorted(folder.iterdir()):
        path.read_bytes()
    for _ in range(rounds):
        pool_seconds = pool(square, folder, work / "pool")
        taken = ours(kind, source, work / "out", warm=True)
        cold = ours(kind, source, work / "out", warm=False)
        images = taken["images"]
        ratios["pool"].append(images / pool_seconds)
        ratios["ingest"].append(images / taken["seconds"])
        ratios["ratio"].append(pool_seconds / taken["seconds"])
        ratios["cold"].append(pool_seconds / cold["seconds"])
        ratios["command"].append(pool_seconds / cold["whole"])
    shown = {name: statistics.median(values) for name, values in ratios.items()}
    span = f"{min(ratios['ratio']):.2f} to {max(ratios['ratio']):.2f}"
    rates = f"{shown['pool']:.3g} | {shown['ingest']:.3g}"
    print(
        f"| {title} | {rates} | **{shown['ratio']:.2f}** ({span}) | {shown['cold']:.2f} | {shown['command']:.2f} |", flush=True
    )


def compare_png(work: Path, rounds: int) -> None:
    source = release(work / "png-3000", 3000)
    compare("3,000 PNG 1024x1024", "nih", source, source / "images", png_square, work, rounds)


def compare_dicom(work: Path, rounds: int) -> None:
    for title, plain, packed in (
        ("400 DICOM 2500x2048, 12 bit, uncompressed", 400, 0),
        ("100 DICOM 2500x2048, JPEG 2000", 0, 100),
    ):
        source = archive(work / f"dicom-{plain}-{packed}", plain, packed)
        compare(title, "dicom", source, source, dicom_square, work, rounds)


def measure_memory(work: Path) -> None:
    """Print the peak memory of driver and object store at 3,000 and 12,000 images."""
    print("\n| images | driver MiB | object store MiB | both at once MiB | workers and decoders MiB |\n|---|---|---|---|---|")
    for count in (3000, 12_000):
        taken = ours("nih", release(work / f"png-{count}", count), work / "out", warm=False)
        print(
            f"| {count:,} | {taken['driver']:.0f} | {taken['store']:.0f} | **{taken['both']:.0f}** | {taken['workers']:.0f} |",
            flush=True,
        )


def measure_scaling(work: Path, picture: Path) -> None:
    """Print and plot the time against the number of images."""
    counts = (1000, 3000, 10_000)
    seconds = [ours("nih", release(work / f"png-{count}", count), work / "out", warm=True)["seconds"] for count in counts]
    slope, start = np.polyfit(counts, seconds, 1)
    print("\n| images | seconds | line | off by |\n|---|---|---|---|")
    for count, taken in zip(counts, seconds, strict=True):
        print(f"| {count:,} | {taken:.1f} | {start + slope * count:.1f} | {taken / (start + slope * count) - 1:+.1%} |")
    print(f"\n{1 / slope:.0f} images/s and {start:.1f} s to start", flush=True)
    _plot(counts, seconds, slope, start, picture)


def _plot(counts: tuple[int, ...], seconds: list[float], slope: float, start: float, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    ends = np.array([0, max(counts)])
    axes.plot(ends, start + slope * ends, color="0.6", label=f"{1 / slope:.0f} images/s and {start:.1f} s to start")
    axes.plot(counts, seconds, "o", color="#0072B2", label="measured")
    axes.set(
        xlabel="PNG files of 1024x1024", ylabel="seconds", title="Ingest: time against files", xlim=(0, None), ylim=(0, None)
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(picture, dpi=120)


def compare_columns() -> None:
    """Print how fast one core reads 1,024 squares of 256x256 from Parquet, stored as an Arrow tensor and as bytes."""
    from ingest.shard_tasks import parquet_bytes

    films = [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) for png in pngs()]
    small = [cv2.resize(film, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for film in films]
    squares = np.stack([np.roll(small[number % len(small)], number * 7, axis=1) for number in range(1024)])
    tensor = pa.BufferOutputStream()
    pq.write_table(pa.table({"pixels": pa.FixedShapeTensorArray.from_numpy_ndarray(squares)}), tensor, row_group_size=128)
    written = {
        "Arrow fixed-shape tensor, as pyarrow writes it": tensor.getvalue(),
        "bytes, as shards have them": parquet_bytes(pa.table({"pixels": pixel_column(squares)}), SIZE),
    }
    print("\n| pixels | images/s | KiB an image |\n|---|---|---|")
    for name, content in written.items():
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            pq.read_table(pa.BufferReader(content), use_threads=False)
            seconds.append(time.perf_counter() - started)
        print(f"| {name} | {len(squares) / min(seconds):,.0f} | {content.size / len(squares) / 1024:.0f} |", flush=True)


def main() -> None:
    """Run what the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["png", "dicom", "columns", "memory", "scaling", "all", "run"])
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/cxr-ray-bench"), help="folder of the files, 11 GB, kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind")
    parser.add_argument("--source")
    parser.add_argument("--out")
    parser.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    if given.what == "run":
        run(given.kind, given.source, given.out, warm=given.warm)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    if given.what in ("png", "dicom", "all"):
        print("| | pool images/s | ingest images/s | ratio (range) | in a Ray just started | whole command |")
        print("|---|---|---|---|---|---|")
    if given.what in ("png", "all"):
        compare_png(given.work, given.rounds)
    if given.what in ("dicom", "all"):
        compare_dicom(given.work, given.rounds)
    if given.what in ("columns", "all"):
        compare_columns()
    if given.what in ("memory", "all"):
        measure_memory(given.work)
    if given.what in ("scaling", "all"):
        measure_scaling(given.work, Path(__file__).with_name("ingest-scaling.png"))


if __name__ == "__main__":
    main()
