"""Writing a dataset: images decoded and written where they are read, the manifest last.

One Ray Data task reads, decodes and writes one shard and sends back a few numbers, so that no pixel crosses the object store. A
task that is retried writes the same file again; what the manifest does not list does not exist.
"""

import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cxr_ray import __version__, storage
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import MANIFEST, Manifest, Quarantined, Shard, Split
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.pixels import PIXEL_RECIPE, Greyscale, ImageError, stored_square
from cxr_ray.progress import ProgressReport
from cxr_ray.records import SPLITS, from_fixed_lists, record_schema

MAX_SHARD_ROWS = 1024
Decoder = Callable[[bytes, str], Greyscale]


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from, as its manifest will say.

    Attributes
    ----------
    filesystem
        Where the `location` column of the records points.
    decode
        Turns a file's bytes into pixels; None for metadata only.
    root
        Folder that errors name files relative to; empty where the file's own name says enough.
    refused
        Files that are readable, but not wanted.
    unreadable
        Files that were found unreadable before any pixel was decoded; they count as quarantined.
    files
        Files that the limit of quarantined ones is a share of; None for as many as there are records.
    """

    kind: str
    filesystem: fs.FileSystem
    decode: Decoder | None
    metadata_sha256: str | None
    settings: dict[str, object]
    counts: dict[str, int]
    root: str = ""
    refused: tuple[Quarantined, ...] = ()
    unreadable: tuple[Quarantined, ...] = ()
    files: int | None = None


@dataclass(frozen=True)
class _ShardPlan:
    """What a task needs besides its rows."""

    uri: str
    run: str
    size: int | None
    filesystem: fs.FileSystem
    decode: Decoder | None
    root: str

    def path(self, split: str, number: int) -> str:
        return f"{self.run}/{split}-{number:05d}.parquet"


@dataclass
class _Written:
    """What the finished tasks have sent back."""

    shards: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    quarantined: list[Quarantined] = field(default_factory=list)
    images: int = 0


def claim(uri: str, *, overwrite: bool) -> None:
    """Check that a dataset may be written there, before any work is done.

    Raises
    ------
    CxrRayError
        If a dataset is there and `overwrite` is not set, or the place cannot be written.
    """
    filesystem, root = storage.resolve(uri)
    if storage.exists(filesystem, f"{root}/{MANIFEST}") and not overwrite:
        raise CxrRayError(f"--out {uri}: already holds a dataset; choose another place or give --overwrite")
    try:
        filesystem.create_dir(root, recursive=True)
    except OSError as error:
        raise CxrRayError(f"--out {uri}: cannot be written ({error}); choose another place") from None


def write_dataset(records: pa.Table, uri: str, source: Source, *, size: int | None, max_quarantined: float) -> Manifest:
    """Decode the images of `records` on Ray Data and write shards and manifest.

    Parameters
    ----------
    records
        The record columns without pixels, and ``location``, the path of each image in `source.filesystem`.
    size
        Edge of the stored square in pixels; None for metadata only.
    max_quarantined
        Share of the files that may be unreadable before the run stops, 0 to 1.

    Raises
    ------
    CxrRayError
        If no image is left, or too many are unreadable; nothing is then changed at `uri`.
    """
    if records.num_rows == 0:
        raise CxrRayError(f"no image to ingest ({source.counts}); check the folder of the images")
    filesystem, root = storage.resolve(uri)
    run = f"shards-{secrets.token_hex(4)}"
    plan = _ShardPlan(storage.absolute(uri), run, size, source.filesystem, source.decode, source.root)
    try:
        written = _run(records, plan, source, max_quarantined)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_dir(f"{root}/{plan.run}")
        raise
    manifest = _manifest(records, written, source, size)
    storage.write_atomically(filesystem, f"{root}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())
    _remove_other_runs(filesystem, root, plan.run)
    return manifest


def _shuffled_by_split(records: pa.Table) -> list[tuple[str, int, pa.Table]]:
    """Rows of each split in random order, cut into shards that keep every CPU busy."""
    splits = records["split"].to_numpy()
    rows_per_shard = int(np.clip(records.num_rows / (4 * available_cpus()), 32, MAX_SHARD_ROWS))
    pieces = []
    for split in SPLITS:
        rows = np.random.default_rng(0).permutation(np.flatnonzero(splits == split))
        for number, start in enumerate(range(0, len(rows), rows_per_shard)):
            pieces.append((split, number, records.take(rows[start : start + rows_per_shard])))
    return pieces


def check_quarantined(quarantined: Sequence[Quarantined], files: int, max_quarantined: float) -> None:
    """Stop a run whose source is broken.

    Raises
    ------
    CxrRayError
        If more than `max_quarantined` of `files` are quarantined.
    """
    if len(quarantined) > max_quarantined * files:
        raise CxrRayError(
            f"{len(quarantined)} of {files} images are unreadable, more than {max_quarantined:.1%} "
            f"(first: {quarantined[0].reason}); repair them or raise --max-quarantined"
        )


def _run(records: pa.Table, plan: _ShardPlan, source: Source, max_quarantined: float) -> _Written:
    import ray.data  # noqa: PLC0415 - takes a second that other commands need not pay

    filesystem, root = storage.resolve(plan.uri)
    filesystem.create_dir(f"{root}/{plan.run}", recursive=True)
    tables = [
        piece.append_column("shard", pa.array([plan.path(split, number)] * piece.num_rows))
        for split, number, piece in _shuffled_by_split(records)
    ]
    results = ray.data.from_arrow(tables).map_batches(
        _write_shard, fn_kwargs={"plan": plan}, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    written = _Written(quarantined=list(source.unreadable))
    files = records.num_rows if source.files is None else source.files
    with ProgressReport("ingest", records.num_rows, "images") as progress:
        for row in results.iter_rows():
            progress.advance(_collect(row, written))
            check_quarantined(written.quarantined, files, max_quarantined)
    if written.images == 0:
        raise CxrRayError("every image is unreadable; check the source")
    return written


def _collect(row: dict[str, object], written: _Written) -> int:
    shard = Shard(path=str(row["path"]), rows=int(str(row["rows"])))
    if shard.rows:
        written.shards[str(row["split"])].append(shard)
    reasons: list[str] = list(row["reasons"])  # type: ignore[call-overload]
    images: list[str] = list(row["images"])  # type: ignore[call-overload]
    written.quarantined += [Quarantined(image=image, reason=reason) for image, reason in zip(images, reasons, strict=True)]
    written.images += shard.rows
    return shard.rows + len(reasons)


def _write_shard(records: pa.Table, plan: _ShardPlan) -> pa.Table:
    path, split = records["shard"][0].as_py(), records["split"][0].as_py()
    kept = np.ones(records.num_rows, dtype=bool)
    images: list[str] = []
    reasons: list[str] = []
    columns = {name: records[name] for name in record_schema(None).names}
    if plan.size is not None and plan.decode is not None:
        squares = []
        for row, location in enumerate(records["location"].to_pylist()):
            try:
                squares.append(_read_square(plan, location))
            except ImageError as error:
                kept[row] = False
                images.append(records["image_id"][row].as_py())
                reasons.append(str(error))
        columns = {name: column.filter(pa.array(kept)) for name, column in columns.items()}
        if squares:
            columns["pixels"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(squares))
    rows = int(kept.sum())
    if rows:
        filesystem, root = storage.resolve(plan.uri)
        schema = record_schema(plan.size)
        table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        pq.write_table(table, f"{root}/{path}", filesystem=filesystem, use_dictionary=["split", "source", "sex", "view"])
    text_lists = pa.list_(pa.string())
    return pa.table(
        {
            "path": [path],
            "split": [split],
            "rows": [rows],
            "images": pa.array([images], type=text_lists),
            "reasons": pa.array([reasons], type=text_lists),
        }
    )


def _read_square(plan: _ShardPlan, location: str) -> np.ndarray:
    if plan.decode is None or plan.size is None:
        raise AssertionError("a metadata-only dataset has no squares")
    name = location.removeprefix(f"{plan.root}/") if plan.root else location.rsplit("/", 1)[-1]
    try:
        with plan.filesystem.open_input_stream(location) as stream:
            data = stream.read()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({str(error).splitlines()[0]}); check the file") from None
    return stored_square(plan.decode(data, name), plan.size, name)


def _manifest(records: pa.Table, written: _Written, source: Source, size: int | None) -> Manifest:
    left_out = pa.array([entry.image for entry in written.quarantined], type=pa.string())
    kept = records.filter(pa.compute.invert(pa.compute.is_in(records["image_id"], left_out)))
    splits = {split: _split(kept, split, written.shards[split]) for split in SPLITS}
    counts = dict(source.counts)
    counts |= {"ingested": kept.num_rows, "quarantined": len(written.quarantined), "refused": len(source.refused)}
    return Manifest(
        created=datetime.now(UTC),
        code_version=__version__,
        source=source.kind,
        metadata_sha256=source.metadata_sha256,
        settings=source.settings,
        findings=list(FINDINGS),
        size=size,
        pixel_recipe=None if size is None else dict(PIXEL_RECIPE),
        splits=splits,
        counts=counts,
        quarantined=[*written.quarantined, *source.refused],
    )


def _split(records: pa.Table, name: str, shards: list[Shard]) -> Split:
    rows = records.filter(pa.compute.equal(records["split"], name))
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


def _remove_other_runs(filesystem: fs.FileSystem, root: str, run: str) -> None:
    """Delete the shards of replaced and interrupted runs, which no manifest lists any more."""
    for info in filesystem.get_file_info(fs.FileSelector(root)):
        if info.type == fs.FileType.Directory and info.base_name.startswith("shards-") and info.base_name != run:
            filesystem.delete_dir(info.path)
