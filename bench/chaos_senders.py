"""Sends the studies of a campaign, several at once, and writes down what was promised.

A line of the journal is an attempt with one image: written before the attempt, and again with what came of it. So an image
that was answered is known to be, whatever happens to the campaign itself.
"""

import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_clients import SUCCESS, Send, cut_association
from chaos_journal import Journal
from chaos_plan import Client, Course, Image, Study
from chaos_processes import CampaignError

_PAUSE_SECONDS = (0.2, 2.0)
_AGAIN = (1, 3)
_LONGEST_SECONDS = 600


class Senders:
    """Threads that send.

    Parameters
    ----------
    clients
        Those who send, by name.
    title
        AE title of the node.
    port
        Returns a port to send to, of any of its listeners.
    gate
        Called before each study; may wait.
    """

    def __init__(
        self,
        clients: dict[Client, Send],
        title: str,
        port: Callable[[], int],
        journal: Journal,
        gate: Callable[[], None],
        begun: Callable[[Study], None],
    ) -> None:
        self._clients, self._title, self._port, self._journal = clients, title, port, journal
        self._gate, self._begun = gate, begun
        self.stopping = threading.Event()
        self.failures: list[BaseException] = []

    def run(self, studies: Sequence[Study], threads: int) -> None:
        """Send all of them; returns when the last one is answered, or given up by its own course."""
        waiting: queue.SimpleQueue[Study] = queue.SimpleQueue()
        for study in studies:
            waiting.put(study)
        workers = [threading.Thread(target=self._work, args=(waiting,), daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.5)
        if self.failures:
            raise self.failures[0]

    def _work(self, waiting: "queue.SimpleQueue[Study]") -> None:
        try:
            while not self.stopping.is_set():
                self._gate()
                study = waiting.get_nowait()
                self._begun(study)
                with tempfile.TemporaryDirectory() as folder:
                    _Sending(self, study, Path(folder)).run()
        except queue.Empty:
            return
        # Raised again by the thread that waits.
        except BaseException as failure:  # noqa: BLE001
            self.failures.append(failure)
            self.stopping.set()

    def attempt(self, study: Study, images: Sequence[Image], send: Callable[[int], list[str]]) -> list[str]:
        """One attempt with some images, written down."""
        for image in images:
            self._write(study, image, None)
        told = send(self._port())
        for image, status in zip(images, told, strict=True):
            self._write(study, image, status)
        return told

    def by_client(self, study: Study, files: Sequence[Path]) -> Callable[[int], list[str]]:
        """The client's way to send some files."""
        return lambda port: self._clients[study.client](files, port)

    def by_cut(self, study: Study, file: Path) -> Callable[[int], list[str]]:
        """The way to send a file in part."""
        return lambda port: [cut_association(file, self._title, port, study.cut)]

    def _write(self, study: Study, image: Image, status: str | None) -> None:
        self._journal.write(
            sop_instance_uid=image.sop_instance_uid,
            version=image.version,
            study_instance_uid=image.study_instance_uid,
            course=study.course.name,
            client=study.client.name,
            persistent=study.persistent,
            lateral=image.lateral,
            status=status,
        )


class _Sending:
    """One study on its way."""

    def __init__(self, senders: Senders, study: Study, folder: Path) -> None:
        self._senders, self._study, self._folder = senders, study, folder
        self._chance = random.Random(study.number)

    def run(self) -> None:
        study = self._study
        first, last = study.images[0], study.images[-1]
        if study.course in {Course.CUT, Course.UNREAD}:
            file = first.write(self._folder)
            self._senders.attempt(study, [first], self._senders.by_cut(study, file))
            if study.persistent:
                self._bring([first])
        elif study.course is Course.LATE:
            self._bring([first])
            time.sleep(study.pause)
            self._bring([last])
        elif study.course is Course.CONFLICT:
            # Otherwise there would be nothing that it is in conflict with, or nobody could say which.
            if self._bring([first]):
                time.sleep(study.pause)
                self._bring([last])
        elif self._bring(study.images) and study.course is Course.AGAIN:
            for _ in range(self._chance.randint(*_AGAIN)):
                time.sleep(self._chance.uniform(*_PAUSE_SECONDS))
                self._bring(study.images)

    def _bring(self, images: Sequence[Image]) -> bool:
        """Send images in one association; a persistent sender sends again what was not answered 0x0000. Whether all were."""
        files = {image: image.write(self._folder) for image in images}
        left = list(images)
        deadline = time.monotonic() + _LONGEST_SECONDS
        while left and not self._senders.stopping.is_set():
            if time.monotonic() > deadline:
                raise CampaignError(f"nobody has taken an image of {self._study.course.value} for {_LONGEST_SECONDS} s")
            told = self._senders.attempt(self._study, left, self._senders.by_client(self._study, [files[i] for i in left]))
            left = [image for image, status in zip(left, told, strict=True) if status != SUCCESS]
            if not self._study.persistent:
                break
            if left:
                time.sleep(self._chance.uniform(*_PAUSE_SECONDS))
        return not left
