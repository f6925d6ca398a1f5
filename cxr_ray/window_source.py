"""What reads a training's windows: tasks of Ray Data, one a window.

Apart from `cxr_ray.training_data`: whoever unpickles a task or its settings imports this module, and readers need no torch,
which takes longer to import than to read a window.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data._internal.execution.backpressure_policy import BackpressurePolicy
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from cxr_ray.epoch_order import EpochOrder, windows
from cxr_ray.shard_rows import ShardReader

_SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class WorkerShare:
    """What one worker takes: of `workers` the one of this `rank`, `batch` images a step."""

    workers: int
    rank: int
    batch: int


class WindowDatasource(Datasource):
    """A worker's images over some epochs: one read task a window."""

    def __init__(self, reader: ShardReader, orders: list[EpochOrder], share: WorkerShare, withhold: float) -> None:
        super().__init__()
        self._reader, self._withhold = reader, withhold
        self._windows: list[tuple[EpochOrder, np.ndarray]] = []
        for order in orders:
            rows = order.rows(share.workers, share.batch, share.rank)
            self._windows.extend((order, window) for window in windows(rows, order.window))

    @property
    def tasks(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of the pixels."""
        edge = self._reader.size or 0
        return sum(len(rows) for _, rows in self._windows) * edge**2

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task a window; `parallelism` is asked to be their number."""
        # Put once: the list of all row groups goes with every task.
        reader = ray.put(self._reader)
        return [
            _read_task(reader, rows, self._withhold, (order.seed, order.epoch, int(rows[0]))) for order, rows in self._windows
        ]


class Rest(BackpressurePolicy):
    """Limits nothing, and lets Ray Data's scheduling loop rest each time that it looks.

    The loop runs in the process that trains. While a window is ready that nobody has room for, which is always so where reading
    outpaces training, it finds something to wait for done already and asks again at once: it then takes a core, and from the
    training the interpreter's lock. A window lasts for seconds, so that nothing is late.
    """

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """No limit, a moment later; called for each operator of a stream in turn."""
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        return None


def _read_task(reader: Any, rows: np.ndarray, withhold: float, seed: tuple[int, ...]) -> ReadTask:
    def read() -> list[Block]:
        return [ray.get(reader).read(rows, withhold=withhold, seed=seed)]

    return ReadTask(read, BlockMetadata(num_rows=len(rows), size_bytes=None, input_files=None, exec_stats=None))
