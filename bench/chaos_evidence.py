"""What is there after a campaign: in the spool, in the store, at the destinations, and what should have gone."""

import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from chaos_account import DeadResult, Kept, Record, Result, gathered
from chaos_destination import named
from chaos_journal import entries
from chaos_processes import CampaignError, product
from chaos_site import ARCHIVE, SECOND, WANTED, Site
from chaos_stores import result_rows

_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Where images are, or wait; what was filed unread is none of them.
_IMAGE_FOLDERS = ("incoming", "ready", "answered", "done", "dead", "conflicts")
_HEADER_BYTES = 64 * 1024


def record(site: Site, leftovers: list[str]) -> Record:
    """All that the account needs; the service and the archive have to run."""
    sent = gathered(entries(site.sent))
    return Record(
        sent=sent,
        kept=list(_kept(site.spool)),
        rows=result_rows(site.store.url),
        results=[*_archived(site), *_taken(site)],
        dead_results=list(dead_results(site)),
        wanted=WANTED,
        leftovers=[*leftovers, *_leftover_files(site)],
    )


def _kept(spool: Path) -> Iterator[Kept]:
    for folder in _IMAGE_FOLDERS:
        for path in (spool / folder).glob("*.dcm"):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            yield Kept(str(header.SOPInstanceUID), int(header.InstanceNumber), folder)


def _archived(site: Site) -> Iterator[Result]:
    for identifier in site.archive_http.get("/instances").json():
        with site.archive_http.stream("GET", f"/instances/{identifier}/file") as answer:
            # What is asked for stands before the pixels.
            head = b"".join(_first(answer.iter_bytes(_HEADER_BYTES)))
        yield _result(ARCHIVE, named(pydicom.dcmread(BytesIO(head), stop_before_pixels=True)))


def _first(chunks: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        yield chunk
        size += len(chunk)
        if size >= _HEADER_BYTES:
            return


def _taken(site: Site) -> Iterator[Result]:
    times: Counter[str] = Counter()
    digests: dict[str, set[str]] = defaultdict(set)
    first: dict[str, dict[str, Any]] = {}
    for line in entries(site.taken):
        uid = line["sop_instance_uid"]
        times[uid] += 1
        digests[uid].add(line["digest"])
        if line["kept"]:
            first.setdefault(uid, line)
    for uid, line in first.items():
        yield _result(SECOND, line, times[uid], tuple(sorted(digests[uid])))


def _result(destination: str, said: dict[str, Any], times: int = 1, digests: tuple[str, ...] = ()) -> Result:
    return Result(
        destination=destination,
        sop_instance_uid=said["sop_instance_uid"],
        kind="sc" if said["sop_class_uid"] == _CAPTURE else "sr",
        study_instance_uid=said["study_instance_uid"],
        revision=said["revision"],
        references=tuple(said["references"]),
        predecessors=tuple(said["predecessors"]),
        times=times,
        digests=digests,
    )


def dead_results(site: Site) -> Iterator[DeadResult]:
    """Parcels that are dead letters."""
    for folder in sorted((site.spool / "outbox").glob("*/dead/*")):
        item = next(folder.glob("*.dcm"), None)
        study = str(pydicom.dcmread(item, stop_before_pixels=True).StudyInstanceUID) if item else ""
        yield DeadResult(folder.parent.parent.name, folder.name, study)


def replay(site: Site) -> None:
    """Put the dead results of every destination back, by the command."""
    for destination in WANTED:
        command = product("deadletter", "replay", "--all", "--destination", destination, "--spool", site.spool)
        ran = subprocess.run([*map(str, command)], env=site.family.environment(), capture_output=True, text=True, check=False)
        if ran.returncode:
            raise CampaignError(f"deadletter replay ended with {ran.returncode}: {ran.stdout[-500:]}{ran.stderr[-500:]}")


def _leftover_files(site: Site) -> Iterator[str]:
    """Files that nobody needs any more; the listeners have to be stopped."""
    spool = site.spool
    for folder in ("incoming", "ready", "answered"):
        yield from (f"{folder}/{path.name} in the spool" for path in (spool / folder).iterdir())
    for folder in ("incoming", "waiting"):
        yield from (f"{path.relative_to(spool)} in the spool" for path in (spool / "outbox").glob(f"*/{folder}/*"))
    yield from (f"{path.relative_to(spool)} in the spool" for path in spool.rglob(".*"))
    yield from (f"plans/{path.name} in the spool" for path in (spool / "plans").glob("*.json"))
    for folder in ("done", "dead", "conflicts"):
        for path in (spool / folder).iterdir():
            partner = path.name.removesuffix(".json") if path.name.endswith(".json") else f"{path.name}.json"
            if not (spool / folder / partner).exists():
                yield f"{folder}/{path.name} in the spool without {partner}"
    yield from (f"{path} in the listeners' temporary folder" for path in (site.folder / "tmp-node").rglob("*"))


def letters(spool: Path) -> Counter[str]:
    """Why images are dead letters: how many for each status."""
    found: Counter[str] = Counter()
    for path in (spool / "dead").glob("*.json"):
        with suppress(OSError, ValueError):
            found[str(json.loads(path.read_text())["status"])] += 1
    return found
