"""Training batches from shards, through Ray Data.

Each worker has a stream of its own over all epochs that are left: tasks, which run wherever the cluster has CPUs, read the
windows of its order one after the other, shuffled and ready, and hand them over through the object store. A stream that does
not end with the epoch reads the next one's first windows while the network is validated.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data.collate_fn import ArrowBatchCollateFn

from cxr_ray.epoch_order import EpochOrder
from cxr_ray.records import pixel_array, unpacked
from cxr_ray.shard_rows import ShardReader
from cxr_ray.training import Batch
from cxr_ray.window_source import Rest, WindowDatasource, WorkerShare

# Windows that are read ahead of the one in use, and the logical CPUs that reading one takes: it is copying, not decoding.
_READ_AT_ONCE = 2
_CPUS_A_READ = 0.5
_BATCHES_AHEAD = 4


def stream(reader: ShardReader, orders: list[EpochOrder], share: WorkerShare, *, withhold: float = 0.0) -> Iterator[Batch]:
    """The batches of one worker over the given epochs, one after the other, each epoch whole.

    Parameters
    ----------
    orders
        The epochs that are left; the first may have done segments.
    withhold
        Share of the clinical values that are made unknown, see `clinical.partly_withheld`.
    """
    source = WindowDatasource(reader, orders, share, withhold)
    images = ray.data.read_datasource(
        source,
        override_num_blocks=source.tasks,
        concurrency=_READ_AT_ONCE,
        num_cpus=_CPUS_A_READ,
    )
    images.context.execution_options.preserve_order = True
    images.context.op_resource_reservation_enabled = False
    images.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Rest])
    # A window is one block, so that a batch that lies in it is cut out without a copy.
    images.context.target_max_block_size = None
    batches = images.iter_torch_batches(
        batch_size=share.batch,
        prefetch_batches=_BATCHES_AHEAD,
        collate_fn=BatchCollate(),
    )
    for tensors in batches:
        yield Batch(**tensors)


@dataclass(frozen=True)
class BatchCollate(ArrowBatchCollateFn):
    """What `ShardReader.read` gave, as tensors; runs in Ray Data's threads."""

    def __call__(self, batch: pa.Table) -> dict[str, torch.Tensor]:
        """A batch of tensors that own their memory."""
        return dict(vars(as_batch(batch)))


def as_batch(table: pa.Table) -> Batch:
    """What `ShardReader.read` gave, as tensors that own their memory; what it left out has the width 0."""
    rows = table.num_rows
    held = set(table.column_names)
    pixels = pixel_array(table["pixels"]) if "pixels" in held else np.empty((rows, 0, 0), dtype=np.uint8)
    numbers = unpacked(table["clinical"], np.float32) if "clinical" in held else np.empty((rows, 0), dtype=np.float32)
    return Batch(
        pixels=torch.from_numpy(np.array(pixels)),
        clinical=torch.from_numpy(np.array(numbers)),
        labels=torch.from_numpy(np.array(unpacked(table["labels"], np.float32))),
        rows=torch.from_numpy(table["row"].to_numpy().copy()),
    )
