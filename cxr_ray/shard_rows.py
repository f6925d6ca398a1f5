"""Chosen rows of a split, read from its shards in a chosen order and packed for a network."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cxr_ray import clinical
from cxr_ray.clinical import ClinicalLayout, ClinicalStatistics
from cxr_ray.epoch_order import RowGroup
from cxr_ray.errors import CxrRayError
from cxr_ray.records import clinical_columns, clinical_inputs, from_fixed_lists, packed, pixel_array, pixel_column


@dataclass(frozen=True)
class ShardReader:
    """Reads rows of a split by their positions.

    Attributes
    ----------
    groups
        All row groups of the split, in the order of the manifest.
    size
        Pixels an edge of the stored square; None leaves the pixels out.
    """

    filesystem: fs.FileSystem
    groups: tuple[RowGroup, ...]
    size: int | None
    layout: ClinicalLayout
    statistics: ClinicalStatistics

    def read(self, rows: np.ndarray, *, withhold: float = 0.0, seed: Sequence[int] = ()) -> pa.Table:
        """What the network needs of the rows at these positions (int64, shape (N,)), in this order.

        Parameters
        ----------
        withhold
            Share of the clinical values that are made unknown, see `clinical.partly_withheld`.
        seed
            Seed of the choice of these.

        Returns
        -------
        pyarrow.Table
            ``row``, the position; ``clinical``, K x float32 as bytes, where the layout has any; ``labels``, 14 x float32 as
            bytes, NaN where unknown; ``pixels``, where `size` is not None.

        Raises
        ------
        CxrRayError
            If a shard is absent, damaged, or not the one that the manifest lists.
        """
        squares = None if self.size is None else np.empty((len(rows), self.size, self.size), dtype=np.uint8)
        metadata = self._gather(rows, [*clinical_columns(self.layout.encoding), "labels"], squares)
        columns: dict[str, pa.Array] = {"row": pa.array(rows), "labels": packed(from_fixed_lists(metadata["labels"]))}
        if self.layout.width:
            inputs = clinical_inputs(metadata, self.layout.encoding)
            if withhold:
                inputs = clinical.partly_withheld(inputs, withhold, np.random.default_rng(seed))
            columns["clinical"] = packed(clinical.encode(inputs, self.statistics, self.layout))
        if squares is not None:
            columns["pixels"] = pixel_column(squares)
        return pa.table(columns)

    def image_ids(self, rows: np.ndarray) -> list[str]:
        """The image ids at these positions."""
        return self._gather(rows, ["image_id"])["image_id"].to_pylist()

    def _gather(self, rows: np.ndarray, names: list[str], squares: np.ndarray | None = None) -> pa.Table:
        """These columns of the rows; `squares`, shape (N, size, size), are filled with their pixels."""
        return read_rows(self.filesystem, self.groups, rows, names, squares)


def read_rows(
    filesystem: fs.FileSystem,
    groups: Sequence[RowGroup],
    rows: np.ndarray,
    names: list[str],
    squares: np.ndarray | None = None,
) -> pa.Table:
    """Columns of the rows at these positions of a split, in this order.

    Parameters
    ----------
    groups
        All row groups of the split, as `Dataset.row_groups` gives them.
    rows
        int64, shape (N,), at least one.
    squares
        uint8, shape (N, size, size); filled with the pixels of the rows.

    Raises
    ------
    CxrRayError
        If a shard is absent, damaged, or not the one that the manifest lists.
    """
    wanted = names if squares is None else [*names, "pixels"]
    parts, places = [], []
    for group, chosen, place in _by_group(groups, rows):
        table = read_group(filesystem, group, wanted)
        if squares is not None:
            squares[place] = pixel_array(table["pixels"])[chosen]
        parts.append(table.select(names).take(chosen))
        places.append(place)
    return pa.concat_tables(parts).combine_chunks().take(np.argsort(np.concatenate(places)))


def _by_group(groups: Sequence[RowGroup], rows: np.ndarray) -> list[tuple[RowGroup, np.ndarray, np.ndarray]]:
    """The rows by their group: which of its rows, and the places they go to."""
    owner = np.searchsorted([group.first for group in groups], rows, side="right") - 1
    order = np.argsort(owner, kind="stable")
    owners, starts = np.unique(owner[order], return_index=True)
    return [
        (groups[int(number)], rows[place] - groups[int(number)].first, place)
        for number, place in zip(owners, np.split(order, starts[1:]), strict=True)
    ]


def read_group(filesystem: fs.FileSystem, group: RowGroup, names: list[str]) -> pa.Table:
    """Columns of one row group.

    Raises
    ------
    CxrRayError
        If the shard is absent, damaged, or not the one that the manifest lists.
    """
    try:
        with pq.ParquetFile(group.path, filesystem=filesystem) as file:
            table = file.read_row_group(group.index, columns=names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise CxrRayError(f"{group.path}: cannot be read ({str(error).splitlines()[0]}); ingest again") from None
    if table.num_rows != group.rows:
        raise CxrRayError(
            f"{group.path}: row group {group.index} has {table.num_rows} rows instead of {group.rows}; ingest again"
        )
    return table
