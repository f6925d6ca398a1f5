"""The task that writes shards: files read, decoded and written where the task runs, and only numbers sent back.

A task is a list of rows. It writes a shard as soon as it holds enough rows of one split, and after each shard a small file that
says which rows are in it and which were left out and why: the shard's *outcome*. A shard counts from the moment its outcome is
there. So a task that is run again, after its process, its machine or the whole run was lost, goes on behind the last outcome.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from cxr_ray import storage
from cxr_ray.decoder_process import decoder_of_process
from cxr_ray.decoding import Format
from cxr_ray.pixels import ImageError
from cxr_ray.records import pixel_column, record_schema
from ingest.files import read_files

OUTCOMES = "outcomes"
# A training batch is some tens of rows: a reader that takes a row group at a time then holds a few megabytes.
_ROW_GROUP_BYTES = 8 * 1024**2
_METADATA_ROW_GROUP = 16384
_DICTIONARY_COLUMNS = [
    "sex",
    "view",
    "split",
    "source",
    "history_last_view",
    "history_last_2_view",
    "history_last_3_view",
]


@dataclass(frozen=True)
class ShardPlan:
    """What a task needs besides its rows.

    Attributes
    ----------
    uri
        The dataset; an absolute path or a URI.
    run
        Folder of the run's shards in it.
    rows
        Rows a shard.
    """

    uri: str
    run: str
    rows: int
    size: int | None
    filesystem: fs.FileSystem
    format: Format | None


@dataclass(frozen=True)
class Outcome:
    """One shard and what was left out since the shard before, or, with an empty path, only the latter.

    Attributes
    ----------
    images
        `image_id` of the shard's rows.
    left_out
        `image_id` and reason of each image that could not be read.
    fresh
        False where an earlier attempt wrote it.
    """

    task: int
    part: int
    split: str
    path: str
    images: list[str]
    left_out: list[list[str]]
    fresh: bool = True

    def to_arrow(self) -> pa.Table:
        """One row, as a Ray Data task hands it back."""
        return pa.table({"outcome": [json.dumps(asdict(self))]})

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Outcome":
        """Read what `to_arrow` wrote."""
        return cls(**json.loads(row["outcome"]))


def write_shards(records: pa.Table, plan: ShardPlan) -> Iterator[pa.Table]:
    """Write the shards of one task, whose rows share a number in the column ``task``; yields `Outcome` rows."""
    writer = _TaskWriter(int(records["task"][0].as_py()), plan)
    done: set[str] = set()
    for outcome in writer.earlier_outcomes():
        done.update(outcome.images, (image for image, _ in outcome.left_out))
        yield outcome.to_arrow()
    if done:
        records = records.filter(pc.invert(pc.is_in(records["image_id"], pa.array(sorted(done)))))
    for outcome in writer.write(records):
        yield outcome.to_arrow()


class _OpenShard:
    """Rows of one split that do not fill a shard yet."""

    def __init__(self, plan: ShardPlan) -> None:
        self.rows: list[int] = []
        shape = (0, 0, 0) if plan.size is None else (plan.rows, plan.size, plan.size)
        self._squares = np.empty(shape, dtype=np.uint8)

    def add(self, row: int, square: np.ndarray | None) -> None:
        if square is not None:
            self._squares[len(self.rows)] = square
        self.rows.append(row)

    def squares(self) -> np.ndarray:
        return self._squares[: len(self.rows)]


class _TaskWriter:
    def __init__(self, task: int, plan: ShardPlan) -> None:
        self._task, self._plan = task, plan
        self._filesystem, self._root = storage.resolve(plan.uri)
        self._part = 0
        self._left_out: list[list[str]] = []

    def earlier_outcomes(self) -> Iterator[Outcome]:
        while storage.exists(self._filesystem, self._outcome_path()):
            content = json.loads(storage.read_bytes(self._filesystem, self._outcome_path()))
            yield Outcome(**content | {"fresh": False})
            self._part += 1

    def write(self, records: pa.Table) -> Iterator[Outcome]:
        splits = records["split"].to_pylist()
        images = records["image_id"].to_pylist()
        open_shards: dict[str, _OpenShard] = {}
        for row, square in _decoded(records, self._plan):
            if isinstance(square, ImageError):
                self._left_out.append([images[row], str(square)])
                continue
            split = splits[row]
            if split not in open_shards:
                open_shards[split] = _OpenShard(self._plan)
            open_shards[split].add(row, square)
            if len(open_shards[split].rows) == self._plan.rows:
                yield self._write_shard(records, split, open_shards.pop(split))
        for split, shard in open_shards.items():
            yield self._write_shard(records, split, shard)
        if self._left_out:
            yield self._commit("", "", [])

    def _write_shard(self, records: pa.Table, split: str, shard: _OpenShard) -> Outcome:
        plan = self._plan
        rows = records.take(pa.array(shard.rows))
        columns = {name: rows[name] for name in record_schema(None).names}
        if plan.size is not None:
            columns["pixels"] = pixel_column(shard.squares())
        schema = record_schema(plan.size)
        table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        path = f"{plan.run}/{split}-{self._task:05d}-{self._part:03d}.parquet"
        storage.write_atomically(self._filesystem, f"{self._root}/{path}", parquet_bytes(table, plan.size))
        return self._commit(split, path, rows["image_id"].to_pylist())

    def _commit(self, split: str, path: str, images: list[str]) -> Outcome:
        outcome = Outcome(self._task, self._part, split, path, images, self._left_out)
        storage.write_atomically(self._filesystem, self._outcome_path(), json.dumps(asdict(outcome)).encode())
        self._left_out = []
        self._part += 1
        return outcome

    def _outcome_path(self) -> str:
        return f"{self._root}/{self._plan.run}/{OUTCOMES}/{self._task:05d}-{self._part:03d}.json"


def _decoded(records: pa.Table, plan: ShardPlan) -> Iterator[tuple[int, np.ndarray | ImageError | None]]:
    """Each row's stored square, what is wrong with it, or None where only metadata is wanted."""
    if plan.size is None or plan.format is None:
        yield from ((row, None) for row in range(records.num_rows))
        return
    yield from decoder_of_process(plan.format, plan.size).squares(read_files(plan.filesystem, records["location"].to_pylist()))


def parquet_bytes(table: pa.Table, size: int | None) -> pa.Buffer:
    """The shard's bytes; radiographs hardly compress losslessly, and a reader in a hurry should not have to unpack them."""
    others = [name for name in table.column_names if name != "pixels"]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=_METADATA_ROW_GROUP if size is None else max(16, _ROW_GROUP_BYTES // size**2),
        compression={name: "none" if name == "pixels" else "zstd" for name in table.column_names},
        use_dictionary=_DICTIONARY_COLUMNS,
        write_statistics=others,
    )
    return sink.getvalue()
