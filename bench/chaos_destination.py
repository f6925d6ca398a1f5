"""A destination that can be made to fail: a storage SCP in a process of its own, which keeps what it takes in a journal.

    python bench/chaos_destination.py --port N --title AE --journal FILE --met FILE --mode FILE

The file `--mode` holds a word and may be written at any time; the destination reads it before each answer, and notes in `--met`
whom a failure has met. An instance is in the journal, forced to disk, before it is answered 0x0000; where the connection is cut
after the request was read, half of them are kept and half are not, as it happens where a receiver dies. A line says whether the
instance was kept, and what of it the account needs: its UID, what it refers to, and a digest of its bytes.
"""

import argparse
import hashlib
import signal
import threading
import time
from enum import Enum
from io import BytesIO
from pathlib import Path

from chaos_journal import Journal
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
from pynetdicom.sop_class import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    SecondaryCaptureImageStorage,
    Verification,
)

_TAKES = (Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage, SecondaryCaptureImageStorage)
_LOOK_SECONDS = 0.05
_LONGEST_HANG_SECONDS = 60
_OUT_OF_RESOURCES = 0xA700
_FLOAT_PIXELS = 0x7FE00008


class Mode(Enum):
    """How it fails. That it is stopped is not among them: then there is no process."""

    WELL = "well"
    TRANSIENT = "rejects associations as transient"
    PERMANENT = "rejects associations as permanent"
    FULL = "answers 0xA700"
    HANGING = "does not answer"
    CUTTING = "cuts the connection after the request"


class Destination:
    """The storage SCP."""

    def __init__(self, title: str, journal: Journal, met: Journal, mode: Path) -> None:
        self._title, self._journal, self._met, self._mode_file = title, journal, met, mode
        self._cuts = 0

    def start(self, port: int) -> None:
        """Listen, in threads of its own."""
        ae = AE(self._title)
        ae.require_called_aet = True
        ae.add_supported_context(Verification)
        for sop_class in _TAKES:
            ae.add_supported_context(sop_class, ALL_TRANSFER_SYNTAXES)
        handlers = [(evt.EVT_REQUESTED, self._requested), (evt.EVT_C_STORE, self._store)]
        ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)

    @property
    def _mode(self) -> Mode:
        return Mode[self._mode_file.read_text().strip() or Mode.WELL.name]

    def _requested(self, event: evt.Event) -> None:
        # PS3.8 table 9-21: rejected transient, local limit exceeded; rejected permanent, called AE title not recognised.
        refusal = {Mode.TRANSIENT: (0x02, 0x03, 0x02), Mode.PERMANENT: (0x01, 0x01, 0x07)}.get(self._mode)
        if refusal:
            self._met.write(mode=self._mode.name)
            event.assoc.acse.send_reject(*refusal)
            event.assoc.kill()

    def _store(self, event: evt.Event) -> int:
        mode = self._mode
        if mode is not Mode.WELL:
            self._met.write(mode=mode.name)
        if mode is Mode.FULL:
            return _OUT_OF_RESOURCES
        hung_until = time.monotonic() + _LONGEST_HANG_SECONDS
        while self._mode is Mode.HANGING and time.monotonic() < hung_until:
            time.sleep(_LOOK_SECONDS)
        kept = True
        if mode is Mode.CUTTING:
            self._cuts += 1
            kept = self._cuts % 2 == 0
        self._journal.write(kept=kept, **described(event.request.DataSet.getvalue(), event.context.transfer_syntax))
        if mode is Mode.CUTTING:
            event.assoc.dul.socket.close()
        return 0x0000


def described(data: bytes, transfer_syntax: str) -> dict[str, object]:
    """What the account needs to know of a result."""
    syntax = UID(transfer_syntax)
    dataset = read_dataset(
        BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian, stop_when=lambda tag, *_: tag >= _FLOAT_PIXELS
    )
    return {**named(dataset), "digest": hashlib.sha256(data).hexdigest()}


def named(dataset: Dataset) -> dict[str, object]:
    """The names in a result: its own, its revision and what it refers to."""
    predecessors = _references(dataset.get("PredecessorDocumentsSequence", ()))
    references = _references([dataset])
    return {
        "sop_instance_uid": str(dataset.SOPInstanceUID),
        "sop_class_uid": str(dataset.SOPClassUID),
        "study_instance_uid": str(dataset.StudyInstanceUID),
        "revision": int(dataset.InstanceNumber),
        "references": sorted(references - predecessors),
        "predecessors": sorted(predecessors),
    }


def _references(items: object) -> set[str]:
    found: set[str] = set()
    for item in items:  # type: ignore[attr-defined]
        for element in item.iterall():
            if element.keyword == "ReferencedSOPInstanceUID":
                found.add(str(element.value))
    return found


def main() -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="TCP port on 127.0.0.1")
    parser.add_argument("--title", required=True, help="AE title")
    parser.add_argument("--journal", type=Path, required=True, help="what it took; added to")
    parser.add_argument("--met", type=Path, required=True, help="whom its failures met; added to")
    parser.add_argument("--mode", type=Path, required=True, help="file with the name of a mode")
    options = parser.parse_args()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    Destination(options.title, Journal(options.journal), Journal(options.met), options.mode).start(options.port)
    print("listening", flush=True)
    ended.wait()


if __name__ == "__main__":
    main()
