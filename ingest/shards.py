"""Writing a dataset: images decoded and written where they are read, exactly once, the manifest last.

What is to be written is known before the first image is decoded: rows, their splits and their files, and a digest of all of
it names the run. Tasks write shards into the run's folder (see `ingest.shard_tasks`). A run that is started again finds its
own folder by that digest and goes on; one that finds its finished dataset leaves it alone. The manifest is written last, and
what it does not list does not exist.
"""

import csv
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from cxr_ray import __version__, storage
from cxr_ray.cluster_growth import await_cpu, cpus, cpus_at_most, nodes_there
from cxr_ray.dataset import MANIFEST, Dataset, LeftOutImage, Manifest, Shard, Split
from cxr_ray.decoding import Format
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.pixels import PIXEL_RECIPE
from cxr_ray.progress import ProgressReport
from cxr_ray.ray_session import without_reservations
from cxr_ray.records import SPLITS, from_fixed_lists
from ingest.contact_sheet import CONTACT_SHEET, contact_sheet
from ingest.files import archive_and_member, is_tar
from ingest.shard_tasks import OUTCOMES, Outcome, ShardPlan, write_shards

LEFT_OUT = "left-out.csv"
MAX_SHARD_BYTES = 64 * 1024**2
MAX_SHARD_ROWS, MIN_SHARD_ROWS = 1024, 32
_METADATA_SHARD_ROWS = 16384
# Enough that the last of them keep all CPUs busy to the end.
_TASKS_PER_CPU = 8
_LAYOUT = "layout.json"


@dataclass(frozen=True)
class LeftOut:
    """A file that is no row of the dataset.

    Attributes
    ----------
    file
        Its name, relative to the source.
    image
        What the manifest calls it: the image's identifier, or a keyed hash of the name.
    reason
        What is wrong and what to do, without the file's name.
    refused
        True where the file is readable but not wanted; False where it is unreadable, which counts towards the limit.
    """

    file: str
    image: str
    reason: str
    refused: bool


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from, as its manifest will say.

    Attributes
    ----------
    filesystem
        Where the `location` column of the records points.
    format
        What the files are; None for metadata only.
    root
        Folder that files are named relative to.
    left_out
        What was left out before any pixel was decoded.
    files
        Files that the limit of unreadable ones is a share of; None for as many as there are records.
    """

    kind: str
    filesystem: fs.FileSystem
    format: Format | None
    metadata_sha256: str | None
    settings: dict[str, object]
    counts: dict[str, int]
    root: str = ""
    left_out: tuple[LeftOut, ...] = ()
    files: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass
class _Written:
    """What the tasks have done so far."""

    shards: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    unreadable: dict[str, str] = field(default_factory=dict)
    images: int = 0
    fresh: int = 0
    seconds: float = 0.0

    def rate(self) -> float | None:
        return self.fresh / self.seconds if self.fresh and self.seconds else None


def claim(uri: str, settings: dict[str, object], *, overwrite: bool) -> None:
    """Check that a dataset may be written there, before any work is done.

    Raises
    ------
    CxrRayError
        If a dataset made with other settings is there and `overwrite` is not set, or the place cannot be written.
    """
    filesystem, root = storage.resolve(uri)
    if storage.exists(filesystem, f"{root}/{MANIFEST}") and not overwrite:
        held = _held(uri).settings
        differing = [name for name, value in _kept(settings).items() if held.get(name) != value]
        if differing:
            was = ", ".join(f"{name} {held.get(name)!r}" for name in differing)
            raise CxrRayError(
                f"--out {storage.shown(uri)}: holds a dataset made with {was}; choose another place or give --overwrite"
            )
    try:
        filesystem.create_dir(root, recursive=True)
    except OSError as error:
        raise CxrRayError(f"--out {storage.shown(uri)}: cannot be written ({error}); choose another place") from None


def warm_up() -> None:
    """Let Ray's workers import what the tasks will need, a second's work, while the source is being read.

    Of a cluster that grows, this asks for its first node.
    """
    import ray  # noqa: PLC0415 - takes a second that other commands need not pay

    if ray.is_initialized():
        import_modules = ray.remote(_import_modules)
        for _ in range(max(1, int(cpus(nodes_there())))):
            import_modules.remote()


def _import_modules() -> None:
    import ray.data  # noqa: F401, PLC0415


def _held(uri: str) -> Manifest:
    """The manifest of the dataset that is there."""
    try:
        return Dataset(uri).manifest
    except CxrRayError as error:
        problem = str(error).rpartition("; ")[0]
        raise CxrRayError(
            f"--out {storage.shown(uri)}: holds a dataset that cannot be read ({problem}); "
            "choose another place or give --overwrite"
        ) from None


def _kept(settings: dict[str, object]) -> dict[str, object]:
    """Settings as the manifest keeps them: those that decide the rows, without secrets."""
    kept = {name: value for name, value in settings.items() if name not in ("out", "overwrite", "max_quarantined")}
    return {name: storage.shown(value) if isinstance(value, str) else value for name, value in kept.items()}


def check_quarantined(unreadable: int, files: int, max_quarantined: float, first: str) -> None:
    """Stop a run whose source is broken.

    Raises
    ------
    CxrRayError
        If more than `max_quarantined` of `files` are unreadable; `first` is the reason of the first.
    """
    if unreadable > max_quarantined * files:
        raise CxrRayError(
            f"{unreadable} of {files} images are unreadable, more than {max_quarantined:.1%} "
            f"(first: {first}); repair them or raise --max-quarantined"
        )


def write_dataset(
    records: pa.Table, uri: str, source: Source, *, size: int | None, max_quarantined: float, overwrite: bool
) -> Manifest:
    """Decode the images of `records` on Ray Data and write shards, contact sheet, list of left-out files and manifest.

    Parameters
    ----------
    records
        The record columns without pixels, and ``location``, where each image is (see `ingest.files`), and ``stamp``, which
        changes when the file does; both null for metadata only.
    size
        Edge of the stored square in pixels; None for metadata only.
    max_quarantined
        Share of the files that may be unreadable before the run stops, 0 to 1.

    Returns
    -------
    Manifest
        Of the dataset; the one that was there, where the same run has finished before.

    Raises
    ------
    CxrRayError
        If no image is left, too many are unreadable, or another dataset is there and `overwrite` is not set. The shards
        written so far stay for the next attempt; the dataset that was there before is unchanged.
    """
    if records.num_rows == 0:
        raise CxrRayError(f"no image to ingest ({source.counts}); check the folder of the images")
    filesystem, root = storage.resolve(uri)
    run = _digest(records, source, size)
    if storage.exists(filesystem, f"{root}/{MANIFEST}") and not overwrite:
        held = _held(uri)
        if held.run == run:
            _remove_leftovers(filesystem, root, f"shards-{run[:12]}")
            return held
        raise CxrRayError(
            f"--out {storage.shown(uri)}: holds a dataset of other rows; choose another place or give --overwrite"
        )
    plan = _plan(records, uri, source, size, f"shards-{run[:12]}")
    written = _run(records, plan, source, max_quarantined)
    left_out = [*source.left_out, *_unreadable(records, written, source)]
    manifest = _manifest(records, written, source, left_out, size=size, run=run)
    storage.write_atomically(filesystem, f"{root}/{LEFT_OUT}", _left_out_csv(left_out))
    if size is not None:
        storage.write_atomically(filesystem, f"{root}/{CONTACT_SHEET}", contact_sheet(manifest, filesystem, root))
    storage.write_atomically(filesystem, f"{root}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())
    _remove_leftovers(filesystem, root, plan.run)
    return manifest


def _digest(records: pa.Table, source: Source, size: int | None) -> str:
    """Digest of everything that decides what the dataset will hold."""
    decisive = [__version__, size, PIXEL_RECIPE, FINDINGS, source.kind, source.metadata_sha256]
    digest = hashlib.sha256(json.dumps(decisive).encode())
    names = ("image_id", "patient_key", "split", "location", "stamp")
    columns = [records[name].cast(pa.string()).fill_null("") for name in names]
    for row in pc.binary_join_element_wise(*columns, records["visit"].cast(pa.string()), "\x1f").to_pylist():
        digest.update(f"{row}\n".encode())
    for entry in source.left_out:
        digest.update(f"{entry}\n".encode())
    return digest.hexdigest()


def _plan(records: pa.Table, uri: str, source: Source, size: int | None, run: str) -> ShardPlan:
    """The plan of a run; one that was begun before, perhaps on another number of CPUs, keeps its rows a shard."""
    filesystem, root = storage.resolve(uri)
    filesystem.create_dir(f"{root}/{run}/{OUTCOMES}", recursive=True)
    layout = f"{root}/{run}/{_LAYOUT}"
    if storage.exists(filesystem, layout):
        rows = int(json.loads(storage.read_bytes(filesystem, layout))["rows"])
    else:
        largest = _METADATA_SHARD_ROWS if size is None else min(MAX_SHARD_ROWS, MAX_SHARD_BYTES // size**2)
        rows = int(np.clip(records.num_rows / (_TASKS_PER_CPU * cpus_at_most()), min(MIN_SHARD_ROWS, largest), largest))
        storage.write_atomically(filesystem, layout, json.dumps({"rows": rows}).encode())
    return ShardPlan(storage.absolute(uri), run, rows, size, source.filesystem, source.format)


def _tasks(records: pa.Table, rows: int) -> list[pa.Table]:
    """Rows of each split in random order, cut into tasks of one shard each; a tape archive is one task, read in one go."""
    archives = np.array([_tape(location) for location in records["location"].to_pylist()], dtype=object)
    splits = records["split"].to_numpy()
    pieces: list[np.ndarray] = []
    for split in SPLITS:
        chosen = np.random.default_rng(0).permutation(np.flatnonzero((splits == split) & (archives == "")))
        pieces += [chosen[start : start + rows] for start in range(0, len(chosen), rows)]
    pieces += [np.flatnonzero(archives == archive) for archive in sorted(set(archives) - {""})]
    return [
        records.take(pa.array(piece)).append_column("task", pa.array([number] * len(piece), type=pa.int32()))
        for number, piece in enumerate(pieces)
    ]


def _tape(location: str | None) -> str:
    """The archive of a location that can only be read from its beginning; empty for every other file."""
    parts = archive_and_member(location) if location else None
    return parts[0] if parts and is_tar(parts[0]) else ""


def _run(records: pa.Table, plan: ShardPlan, source: Source, max_quarantined: float) -> _Written:
    import ray.data  # noqa: PLC0415 - takes a second that other commands need not pay

    await_cpu()
    tasks = without_reservations(ray.data.from_arrow(_tasks(records, plan.rows)))
    # An outcome is handed on when it is there, not when a block is full of them.
    tasks.context.target_max_block_size = 1
    results = tasks.map_batches(
        write_shards, fn_kwargs={"plan": plan}, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    written = _Written()
    found_unreadable = [entry.reason for entry in source.left_out if not entry.refused]
    files = records.num_rows if source.files is None else source.files
    started = time.monotonic()
    with ProgressReport("ingest", records.num_rows, "images") as progress:
        for row in results.iter_rows():
            _collect(Outcome.from_row(row), written)
            written.seconds = time.monotonic() - started
            progress.move_to(written.images + len(written.unreadable), rate=written.rate() or 0.0)
            reasons = found_unreadable or list(written.unreadable.values())
            unreadable = len(found_unreadable) + len(written.unreadable)
            check_quarantined(unreadable, files, max_quarantined, reasons[0] if reasons else "")
    if written.images == 0:
        raise CxrRayError("every image is unreadable; check the source")
    return written


def _collect(outcome: Outcome, written: _Written) -> None:
    if outcome.path:
        written.shards[outcome.split].append(Shard(path=outcome.path, rows=len(outcome.images)))
    written.unreadable.update((image, reason) for image, reason in outcome.left_out)
    written.images += len(outcome.images)
    written.fresh += len(outcome.images) if outcome.fresh else 0


def _unreadable(records: pa.Table, written: _Written, source: Source) -> list[LeftOut]:
    if not written.unreadable:
        return []
    rows = records.filter(pc.is_in(records["image_id"], pa.array(list(written.unreadable))))
    return [
        LeftOut(location.removeprefix(f"{source.root}/"), image, written.unreadable[image], refused=False)
        for image, location in zip(rows["image_id"].to_pylist(), rows["location"].to_pylist(), strict=True)
    ]


def _left_out_csv(left_out: Sequence[LeftOut]) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "image", "outcome", "reason"])
    rows.writerows([entry.file, entry.image, "refused" if entry.refused else "unreadable", entry.reason] for entry in left_out)
    return text.getvalue().encode()


def _manifest(
    records: pa.Table, written: _Written, source: Source, left_out: Sequence[LeftOut], *, size: int | None, run: str
) -> Manifest:
    unreadable = pa.array(list(written.unreadable), type=pa.string())
    kept = records.filter(pc.invert(pc.is_in(records["image_id"], unreadable)))
    refused = sum(entry.refused for entry in left_out)
    counts = dict(source.counts)
    counts |= {"ingested": kept.num_rows, "quarantined": len(left_out) - refused, "refused": refused}
    rate = written.rate()
    return Manifest(
        run=run,
        created=datetime.now(UTC),
        code_version=__version__,
        source=source.kind,
        metadata_sha256=source.metadata_sha256,
        settings=_kept(source.settings),
        findings=list(FINDINGS),
        size=size,
        pixel_recipe=None if size is None else dict(PIXEL_RECIPE),
        splits={split: _split(kept, split, written.shards[split]) for split in SPLITS},
        counts=counts,
        images_per_second=None if rate is None else round(rate, 1),
        warnings=list(source.warnings),
        left_out=[LeftOutImage(image=entry.image, reason=entry.reason, refused=entry.refused) for entry in left_out],
    )


def _split(records: pa.Table, name: str, shards: list[Shard]) -> Split:
    rows = records.filter(pc.equal(records["split"], name))
    labels = from_fixed_lists(rows["labels"]) if rows.num_rows else np.zeros((0, len(FINDINGS)), dtype=np.float32)
    labelled = labels[np.isfinite(labels).all(axis=1)]
    prevalence = labelled.mean(axis=0) if len(labelled) else np.zeros(0)
    return Split(
        images=rows.num_rows,
        patients=len(Counter(rows["patient_key"].to_pylist())),
        labelled=len(labelled),
        prevalence={finding: round(float(share), 6) for finding, share in zip(FINDINGS, prevalence, strict=False)},
        shards=sorted(shards, key=lambda shard: shard.path),
    )


def _remove_leftovers(filesystem: fs.FileSystem, root: str, run: str) -> None:
    """Delete what only an unfinished run needs, and the shards of replaced and abandoned runs, which no manifest lists."""
    if storage.exists(filesystem, f"{root}/{run}/{OUTCOMES}"):
        filesystem.delete_dir(f"{root}/{run}/{OUTCOMES}")
    if storage.exists(filesystem, f"{root}/{run}/{_LAYOUT}"):
        filesystem.delete_file(f"{root}/{run}/{_LAYOUT}")
    for info in filesystem.get_file_info(fs.FileSelector(root)):
        if info.type == fs.FileType.Directory and info.base_name.startswith("shards-") and info.base_name != run:
            filesystem.delete_dir(info.path)
