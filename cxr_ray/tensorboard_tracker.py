"""TensorBoard's event files of a run.

They are written here and now, without the thread and the queue of the usual writer: a full disk would end the thread, and the
full queue would then hold up the training.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from cxr_ray import __version__, storage
from cxr_ray.errors import CxrRayError
from cxr_ray.settings import as_yaml, without_credentials
from cxr_ray.tracked_figures import (
    Say,
    epoch_figures,
    final_figures,
    reason,
    say_on_stderr,
    step_figures,
)
from cxr_ray.train_events import TrainEvent
from cxr_ray.train_settings import TrainSettings

EVENT_FILES = "tensorboard"


class TensorBoard:
    """Event files in ``OUT/tensorboard``; on an object store they appear and grow with each epoch.

    A resumed run, or an attempt that begins anew, adds a file to the folder and says in it from which step on the earlier ones
    no longer count.

    Parameters
    ----------
    uri
        OUT, the run's folder, at any pyarrow filesystem URI.
    say
        Takes the line that tells, once, what could not be written.
    """

    def __init__(self, uri: str, say: Say = say_on_stderr) -> None:
        self._filesystem, root = storage.resolve(uri)
        self._folder = f"{root}/{EVENT_FILES}"
        self._say = say
        self._complained = False
        self._last_images = 0
        self._writer: EventsWriter | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def start(self, settings: TrainSettings, first_epoch: int) -> None:
        """Make the folder; the file begins with the first event, which tells how many images an epoch has.

        Raises
        ------
        CxrRayError
            If the folder cannot be made.
        """
        self._close()
        self._settings, self._first_epoch = settings, first_epoch
        try:
            self._filesystem.create_dir(self._folder, recursive=True)
        except OSError as error:
            raise CxrRayError(f"{self._folder}: cannot be made ({reason(error)}); mend it or choose another --out") from None

    def step(self, event: TrainEvent) -> None:
        """Write the figures of a step."""
        self._write(event, step_figures(event))

    def epoch(self, event: TrainEvent) -> None:
        """Write the figures of an epoch."""
        self._write(event, epoch_figures(event))
        self._upload()

    def finish(self, metrics: dict[str, float], bundle_uri: str | None, failure: str | None) -> None:
        """Write the figures of the whole run at its last step, and close the file."""
        with self._complaining():
            self._add(Event(step=self._last_images, summary=_scalars(final_figures(metrics))))
        self._close()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _write(self, event: TrainEvent, figures: dict[str, float]) -> None:
        with self._complaining():
            if self._writer is None:
                self._open(event)
            self._last_images = event.images
            self._add(Event(step=event.images, summary=_scalars(figures)))

    def _open(self, event: TrainEvent) -> None:
        # Without the suffix, two files of the same second would have one name; readers take files in the order of their names.
        self._writer = EventsWriter(str(self._local() / "events"), f".{time.time_ns()}")
        images_before = (self._first_epoch - 1) * event.images_total // self._settings.epochs
        # The figures of the last epoch before stand at that very step, and stay.
        first_step = min(images_before + 1, event.images) if images_before else 0
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._add(Event(step=first_step, summary=summary.text("settings", _as_text(self._settings))))

    def _add(self, event: Event) -> None:
        if self._writer is not None:
            event.wall_time = time.time()
            self._writer.write_event(event)
            self._writer.flush()

    def _local(self) -> Path:
        if isinstance(self._filesystem, fs.LocalFileSystem):
            return Path(self._folder)
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="tensorboard-")
        return Path(self._temporary.name)

    def _upload(self) -> None:
        if self._temporary is None:
            return
        with self._complaining():
            for path in self._local().iterdir():
                storage.write_atomically(self._filesystem, f"{self._folder}/{path.name}", path.read_bytes())

    def _close(self) -> None:
        if self._writer is None:
            return
        with self._complaining():
            self._writer.close()
        self._writer = None
        self._upload()

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                self._complained = True
                self._say(f"{self._folder}: cannot be written ({reason(error)}); the training goes on without it")


def _scalars(figures: dict[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in figures.items()])


def _as_text(settings: TrainSettings) -> str:
    """The settings as a block of code in Markdown, which is what TensorBoard shows texts as."""
    shown = as_yaml(without_credentials(settings))
    return "".join(f"    {line}\n" for line in [f"# cxr-ray {__version__}", *shown.splitlines()])
