"""Files of the spool: what lies beside an instance, how one moves from folder to folder, and what it says of itself."""

import json
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from serve.instance_names import instance_names
from serve.node.arrival import Arrival
from serve.node.durable import sync_folder
from serve.node.file_meta import read_meta
from serve.node.spool_records import SpooledInstance


def beside(file: Path) -> Path:
    """Where it is written what is said about an instance."""
    return file.with_name(f"{file.name}.json")


def move_durably(name: str, source: Path, target: Path) -> bool:
    """Move a file from one folder to another; tells whether it was there.

    Raises
    ------
    OSError
        When the disk fails.
    """
    moved = True
    try:
        (source / name).rename(target / name)
    except FileNotFoundError:
        # Moved before a crash, perhaps: then only the trace on disk is missing.
        moved = False
    # The new entry first: a crash between the two leaves two names, never none.
    sync_folder(target)
    sync_folder(source)
    return moved


def read_instance(path: Path) -> SpooledInstance:
    """Read an instance's identifiers, without its pixels.

    Raises
    ------
    CxrRayError
        When the file is no DICOM Part 10 file or names no study, series or instance.
    OSError
        When it cannot be read.
    """
    scheme, address = _peer_in(path)
    return SpooledInstance(
        path=path,
        name=path.name,
        content_digest=path.stem.rpartition("-")[2],
        received_at=datetime.fromtimestamp(path.stat().st_mtime, UTC),
        peer_scheme=scheme,
        peer_address=address,
        **vars(instance_names(path, path.name)),
    )


def write_through(incoming: Path, path: Path, content: bytes) -> None:
    """Write a file whole or not at all; what a crash leaves lies in ``incoming/``, where leftovers are removed.

    Raises
    ------
    OSError
        When it cannot be made durable.
    """
    with Arrival(incoming, content) as file:
        file.flush()
        file.sync()
        file.rename(path)
    sync_folder(path.parent)


def letter(reason: str, status: int | None, attempts: int, instance: SpooledInstance | None) -> bytes:
    """Why an instance is given up, as it is written beside it."""
    said = {
        "reason": reason,
        "status": status,
        "when": datetime.now(UTC).isoformat(),
        "attempts": attempts,
        "sop_instance_uid": instance.sop_instance_uid if instance else None,
        "study_instance_uid": instance.study_instance_uid if instance else None,
    }
    return json.dumps(said).encode()


def _peer_in(path: Path) -> tuple[str | None, str | None]:
    try:
        address = urlsplit(read_meta(path).source_address)
        return address.scheme or None, address.hostname
    except ValueError:
        return None, None
