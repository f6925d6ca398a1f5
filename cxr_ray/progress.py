"""Progress of work that takes longer than a moment: a bar on a terminal, a line now and then in a log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Counts `unit` up to `total`, with rate, time left and a note such as the current loss.

    On a terminal it draws a bar on standard error; elsewhere it prints a line every ten seconds and one at the end.
    """

    def __init__(self, task: str, total: int, unit: str) -> None:
        self._task, self._total, self._unit = task, total, unit
        self._done = self._printed_done = 0
        self._note = ""
        self._known_rate: float | None = None
        self._started = self._printed = time.monotonic()
        self._console = Console(stderr=True, markup=False)
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar_task = self._bar.add_task(task, total=total, note="")

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._done != self._printed_done:
            self._known_rate = None
            self._print_line()

    def set_total(self, total: int) -> None:
        """Set the total once it is known."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._bar_task, total=total)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(f"{self._task}: {line}", highlight=False, soft_wrap=True)

    def advance(self, count: int, note: str = "") -> None:
        """Add `count` units that are done."""
        self.move_to(self._done + count, note)

    def move_to(self, done: int, note: str = "", rate: float | None = None) -> None:
        """Set the units that are done; work that is repeated after a failure moves back.

        Parameters
        ----------
        rate
            Units a second, where the caller knows it better than the mean since the start.
        """
        self._done, self._note, self._known_rate = done, note, rate
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=done, note=f"{self._rate():.0f} {self._unit}/s  {note}")
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _rate(self) -> float:
        if self._known_rate is not None:
            return self._known_rate
        return self._done / max(time.monotonic() - self._started, 1e-6)

    def _print_line(self) -> None:
        self._printed, self._printed_done = time.monotonic(), self._done
        if not self._done:
            return
        left = (self._total - self._done) / max(self._rate(), 1e-6)
        remaining = f", {left:.0f} s left" if self._done < self._total else f" in {self._printed - self._started:.1f} s"
        note = f", {self._note}" if self._note else ""
        rate = f"{self._rate():.0f} {self._unit}/s"
        self._console.print(
            f"{self._task}: {self._done}/{self._total} {self._unit}, {rate}{note}{remaining}",
            highlight=False,
            soft_wrap=True,
        )
