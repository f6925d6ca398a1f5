"""The order of an epoch: which image comes when, and on which worker, from nothing but seed and epoch.

Shards are read by row groups, so an order that can be read fast keeps to them: the groups of the whole split are shuffled,
the images within each group are shuffled, and the sequence is dealt to the workers in equal parts. Each part is then shuffled
again within windows of many groups. Every image comes at most once an epoch, and what is left out, less than a batch, is
different each time.

Because the order follows from seed, epoch and number of workers, a run that was interrupted goes on with the very images that
were next. Where it goes on with another number of workers in the middle of an epoch, the images that the epoch still lacks are
dealt again: a `Segment` tells how far it had come.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowGroup:
    """A row group of a shard.

    Attributes
    ----------
    first
        Position of its first row in the split, all groups in the order of the manifest.
    """

    path: str
    index: int
    rows: int
    first: int


@dataclass(frozen=True)
class Segment:
    """A stretch of an epoch with one number of workers: each of them took `steps` batches of `batch` images."""

    workers: int
    batch: int
    steps: int

    @property
    def images(self) -> int:
        """Images that all workers took together."""
        return self.workers * self.batch * self.steps


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch, from the end of the `done` segments on.

    Attributes
    ----------
    group_rows
        Rows of each group, in the order of the manifest.
    window
        Images that are shuffled together.
    """

    group_rows: tuple[int, ...]
    seed: int
    epoch: int
    window: int
    done: tuple[Segment, ...] = ()

    def steps(self, workers: int, batch: int) -> int:
        """Steps that the rest of the epoch has for so many workers, each taking `batch` images a step."""
        return self._left() // (workers * batch)

    def rows(self, workers: int, batch: int, rank: int) -> np.ndarray:
        """Positions in the split (int64, shape (steps * batch,)) in the order in which worker `rank` takes them."""
        if self.done:
            return self._of_pool(self._rest(), workers, batch, rank, len(self.done))
        begin, end = self._share(workers, batch, rank, self._left())
        return self._within_windows(self._sequence(begin, end), (0, rank))

    def _left(self) -> int:
        return sum(self.group_rows) - sum(part.images for part in self.done)

    @staticmethod
    def _share(workers: int, batch: int, rank: int, images: int) -> tuple[int, int]:
        share = images // (workers * batch) * batch
        return rank * share, (rank + 1) * share

    def _sequence(self, begin: int, end: int) -> np.ndarray:
        """Positions `begin` to `end` of the epoch's sequence of shuffled groups; only the groups that it needs are drawn."""
        rows = np.asarray(self.group_rows, dtype=np.int64)
        first = np.concatenate([[0], np.cumsum(rows)[:-1]])
        order = np.random.default_rng([self.seed, self.epoch, 0]).permutation(len(rows))
        ends = np.cumsum(rows[order])
        parts = [np.empty(0, dtype=np.int64)]
        for place in range(int(np.searchsorted(ends, begin, side="right")), len(order)):
            group = int(order[place])
            starts_at = int(ends[place]) - int(rows[group])
            if starts_at >= end:
                break
            within = np.random.default_rng([self.seed, self.epoch, 1, group]).permutation(int(rows[group]))
            parts.append(first[group] + within[max(begin - starts_at, 0) : end - starts_at])
        return np.concatenate(parts)

    def _within_windows(self, rows: np.ndarray, stage: tuple[int, int]) -> np.ndarray:
        shuffled = rows.copy()
        for number, begin in enumerate(range(0, len(rows), self.window)):
            rng = np.random.default_rng([self.seed, self.epoch, 2, *stage, number])
            rng.shuffle(shuffled[begin : begin + self.window])
        return shuffled

    def _rest(self) -> np.ndarray:
        """The epoch's sequence without what the segments took."""
        rest = self._sequence(0, sum(self.group_rows))
        for stage, part in enumerate(self.done):
            taken = [
                self._of_pool(rest, part.workers, part.batch, rank, stage)[: part.steps * part.batch]
                for rank in range(part.workers)
            ]
            rest = rest[~np.isin(rest, np.concatenate(taken))]
        return rest

    def _of_pool(self, pool: np.ndarray, workers: int, batch: int, rank: int, stage: int) -> np.ndarray:
        begin, end = self._share(workers, batch, rank, len(pool))
        return self._within_windows(pool[begin:end], (stage, rank))


def windows(rows: np.ndarray, window: int) -> Sequence[np.ndarray]:
    """A worker's rows, cut where its windows end."""
    return [rows[begin : begin + window] for begin in range(0, len(rows), window)]
