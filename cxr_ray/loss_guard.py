"""Watches the losses of all workers for one that is no finite number, without making the device wait at every step."""

import time

import numpy as np
import torch

# Looking makes the device and the other workers wait for each other: once in some seconds is often enough to stop.
_SECONDS_BETWEEN_CHECKS = 5.0
_MOST_STEPS = 200
_NEVER = 2**62


class LossGuard:
    """Keeps the losses since the last check, and which images they came from.

    All workers have to take the same steps and check at the same ones, which `due` tells them.
    """

    def __init__(self, workers: int, device: torch.device) -> None:
        self._workers, self._device = workers, device
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._checked = time.monotonic()
        self._interval = 1

    def add(self, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep the loss (a scalar on the device) of a step and the positions of its images (int64, shape (N,))."""
        self._kept.append((loss, rows))

    def due(self) -> bool:
        """Whether it is time to check; the same on all workers."""
        return len(self._kept) >= self._interval

    def check(self) -> np.ndarray | None:
        """Whether all losses were finite.

        Returns
        -------
        numpy.ndarray or None
            None where they were; else the positions of this worker's images in the first step whose loss was not: none of
            them, where only another worker's was.
        """
        losses = torch.stack([loss for loss, _ in self._kept])
        bad = torch.nonzero(~torch.isfinite(losses)).flatten()
        own = int(bad[0]) if len(bad) else _NEVER
        first, self._interval = self._agree(own, self._wanted_interval())
        rows = self._kept[first][1].cpu().numpy() if first == own and own != _NEVER else np.empty(0, dtype=np.int64)
        self._kept.clear()
        self._checked = time.monotonic()
        return None if first == _NEVER else rows

    def _wanted_interval(self) -> int:
        seconds = max(time.monotonic() - self._checked, 1e-6) / len(self._kept)
        return int(np.clip(round(_SECONDS_BETWEEN_CHECKS / seconds), 1, _MOST_STEPS))

    def _agree(self, first: int, interval: int) -> tuple[int, int]:
        if self._workers == 1:
            return first, interval
        both = torch.tensor([first, interval], dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MIN)
        return int(both[0]), int(both[1])
