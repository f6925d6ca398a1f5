"""A dataset on disk: Parquet shards and the manifest that names them.

``manifest.json`` is the commit point. It is written last and lists every shard file, so that what it does not list (a run that
was interrupted, one that was replaced) is not part of the dataset, whatever lies in the folder.
"""

import hashlib
from datetime import datetime
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError

from cxr_ray import storage
from cxr_ray.epoch_order import RowGroup
from cxr_ray.errors import CxrRayError

MANIFEST = "manifest.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Model):
    """One Parquet file, its path relative to the dataset."""

    path: str
    rows: int


class Split(_Model):
    """One split: how many images and patients, how common each finding is among labelled images, and its files."""

    images: int
    patients: int
    labelled: int
    prevalence: dict[str, float]
    shards: list[Shard]


class LeftOutImage(_Model):
    """An image that was left out, and why; `refused` where it was readable but not wanted."""

    image: str
    reason: str
    refused: bool


class Manifest(_Model):
    """What a dataset holds and where it comes from.

    `run` is a digest of everything that decides the rows: two datasets with the same `run` hold the same rows.
    `metadata_sha256` is the digest of the source's table of labels, `counts` what the source was found to hold,
    `images_per_second` the rate at which the last run that added to the dataset decoded and wrote.
    """

    schema_version: Literal[2] = 2
    run: str
    created: datetime
    code_version: str
    source: str
    metadata_sha256: str | None
    settings: dict[str, object]
    findings: list[str]
    size: int | None
    pixel_recipe: dict[str, object] | None
    splits: dict[str, Split]
    counts: dict[str, int]
    images_per_second: float | None
    warnings: list[str]
    left_out: list[LeftOutImage]


class Dataset:
    """A dataset opened for reading.

    Raises
    ------
    CxrRayError
        If there is no manifest, or it is damaged or of another schema version.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.shown(uri)
        self.filesystem, self.root = storage.resolve(uri)
        path = f"{self.root}/{MANIFEST}"
        if not storage.exists(self.filesystem, path):
            raise CxrRayError(f"{self.uri}: holds no {MANIFEST}; make a dataset with 'cxr-ray ingest'")
        content = storage.read_bytes(self.filesystem, path)
        try:
            self.manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CxrRayError(f"{path}: {where}: {first['msg']}; run 'cxr-ray ingest' again") from None
        self.digest = hashlib.sha256(content).hexdigest()

    def split(self, name: str) -> Split:
        """A split that must hold images.

        Raises
        ------
        CxrRayError
            If it is absent or empty.
        """
        split = self.manifest.splits.get(name)
        if split is None or split.images == 0:
            held = ", ".join(f"{key} ({value.images})" for key, value in self.manifest.splits.items())
            raise CxrRayError(f"{self.uri}: split {name!r} holds no images, only {held}; ingest images of that split")
        return split

    def paths(self, name: str) -> list[str]:
        """The files of a split, as paths of `filesystem`."""
        return [f"{self.root}/{shard.path}" for shard in self.split(name).shards]

    def read(self, name: str, columns: list[str]) -> pa.Table:
        """Columns of a split, in memory; meant for metadata.

        Raises
        ------
        CxrRayError
            If a file is absent, or the rows are not as many as the manifest says.
        """
        tables = [read_shard(self.filesystem, path, columns) for path in self.paths(name)]
        table = pa.concat_tables(tables)
        if table.num_rows != self.split(name).images:
            raise CxrRayError(
                f"{self.uri}: split {name} has {table.num_rows} rows, the manifest says {self.split(name).images}; ingest again"
            )
        return table

    def row_groups(self, name: str) -> list[RowGroup]:
        """The row groups of a split.

        All groups of a dataset have the same number of rows but the last of each file, so one file's footer tells them all.

        Raises
        ------
        CxrRayError
            If that file is absent or damaged.
        """
        shards = self.split(name).shards
        rows = _group_rows(self.filesystem, f"{self.root}/{max(shards, key=lambda shard: shard.rows).path}")
        groups: list[RowGroup] = []
        first = 0
        for shard in shards:
            for index, begin in enumerate(range(0, shard.rows, rows)):
                count = min(rows, shard.rows - begin)
                groups.append(RowGroup(f"{self.root}/{shard.path}", index, count, first))
                first += count
        return groups

    def require_pixels(self) -> int:
        """The pixel size.

        Raises
        ------
        CxrRayError
            If the dataset holds metadata only.
        """
        if self.manifest.size is None:
            raise CxrRayError(f"{self.uri}: holds metadata only; ingest without --metadata-only to train on images")
        return self.manifest.size


def _group_rows(filesystem: fs.FileSystem, path: str) -> int:
    try:
        return int(pq.read_metadata(path, filesystem=filesystem).row_group(0).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise CxrRayError(f"{path}: cannot be read ({str(error).splitlines()[0]}); ingest again") from None


def read_shard(filesystem: fs.FileSystem, path: str, columns: list[str]) -> pa.Table:
    """Columns of one shard.

    Raises
    ------
    CxrRayError
        If the file is absent or damaged.
    """
    try:
        return pq.read_table(path, columns=columns, filesystem=filesystem, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise CxrRayError(f"{path}: cannot be read ({str(error).splitlines()[0]}); ingest again") from None
