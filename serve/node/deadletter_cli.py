"""`cxr-ray deadletter` and `cxr-ray deliveries`: what the node could not answer or send, and what waits to be sent."""

import json as json_text
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.terminal import command_group, console, print_json, single_command, table
from serve.node.spool_place import DEFAULT_SPOOL, SPOOL_VARIABLE

if TYPE_CHECKING:
    from serve.node.outbox import Outbox
    from serve.node.spool import Spool

# As much of a name as a table shows; commands take any beginning that only one name has.
_SHOWN = 12
_INSTANCE, _CONFLICT = "instance", "conflict"

SpoolFolder = Annotated[Path, typer.Option(envvar=SPOOL_VARIABLE, help="Folder of the node's spool.")]
DestinationName = Annotated[str | None, typer.Option(help="Only results for this destination.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]

deadletter = command_group("Instances that got no answer and results that a destination refused for good.")


@dataclass(frozen=True)
class _Letter:
    """One line of the list: an instance, a conflict, or results for a destination."""

    kind: str
    name: str
    when: datetime
    reason: str
    detail: str = ""
    status: int | None = None
    attempts: int = 0
    study: str | None = None


@deadletter.command("list")
def list_dead_letters(spool: SpoolFolder = DEFAULT_SPOOL, destination: DestinationName = None, json: AsJson = False) -> None:
    """List dead letters with their reasons, the oldest first."""
    letters = sorted(_letters(spool, destination), key=lambda letter: (letter.when, letter.name))
    if json:
        print_json([_as_json(letter) for letter in letters])
        return
    columns = [("of", False), ("when (UTC)", True), ("name", True), ("reason", False)]
    shown = table(f"{len(letters)} dead letters in {spool}", columns)
    for letter in letters:
        shown.add_row(letter.kind, f"{letter.when:%Y-%m-%d %H:%M}", letter.name[:_SHOWN], letter.reason)
    console.print(shown)


@deadletter.command("show")
def show_dead_letter(
    name: Annotated[str, typer.Argument(help="Name, or a beginning of it that no other has.")],
    spool: SpoolFolder = DEFAULT_SPOOL,
    destination: DestinationName = None,
    json: AsJson = False,
) -> None:
    """Show everything that is known of a dead letter; the destination's own words may quote the patient's data."""
    letter = _one(list(_letters(spool, destination)), name)
    known = _as_json(letter) | {"folder": str(_place(spool, letter))}
    record = None
    if letter.kind not in {_INSTANCE, _CONFLICT}:
        record = _outbox(spool).queue(letter.kind).dead_letter(letter.name).record
    if record is not None:
        known |= {"sequence": record.sequence, "items": list(record.items), "created_at": record.created_at.isoformat()}
    if json:
        print_json(known)
        return
    shown = table("", [("", True), ("", False)])
    for key, value in known.items():
        if value is not None and value != "":
            shown.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    console.print(shown)


@deadletter.command("replay")
def replay_dead_letters(
    names: Annotated[list[str] | None, typer.Argument(help="Names, or beginnings of them that no other has.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All; with --destination, all of that one.")] = False,
    spool: SpoolFolder = DEFAULT_SPOOL,
    destination: DestinationName = None,
) -> None:
    """Put dead letters back: instances are answered again, results sent again, without what was taken of them."""
    if bool(names) == everything:
        raise UsageError("replay: give names, or --all, and not both; 'cxr-ray deadletter list' shows them")
    known = [letter for letter in _letters(spool, destination) if letter.kind != _CONFLICT or not everything]
    chosen = known if everything else [_one(known, name) for name in names or []]
    for letter in chosen:
        if letter.kind == _CONFLICT:
            raise UsageError(f"{letter.name}: is a conflict, and stays one; decide which file is right and send it anew")
        if letter.kind == _INSTANCE:
            _spool(spool).replay(letter.name)
        else:
            _outbox(spool).queue(letter.kind).replay(letter.name)
        console.print(f"{letter.name}: waiting again")
    if not chosen:
        console.print("nothing to replay")


def _deliveries(spool: SpoolFolder = DEFAULT_SPOOL, json: AsJson = False) -> None:
    """Show for each destination what waits, since when and why, what was delivered and what is dead."""
    outbox = _outbox(spool)
    rows = [_row(outbox, name) for name in outbox.destinations()]
    if json:
        print_json(rows)
        return
    numbers = ("waiting", "oldest", "delivered", "dead")
    shown = table(f"deliveries in {spool}", [("to", False), *((name, True) for name in numbers), ("last error", False)])
    for row in rows:
        why = "; ".join(filter(None, ["not in the settings" if row["orphaned"] else "", str(row["last_error"])]))
        values = {**row, "oldest": _age(float(str(row["oldest_seconds"])))}
        shown.add_row(str(row["destination"]), *(str(values[name]) for name in numbers), why)
    console.print(shown)


deliveries = single_command(_deliveries)


def _row(outbox: "Outbox", name: str) -> dict[str, object]:
    queue = outbox.queue(name)
    waiting = queue.waiting()
    states = [queue.state(parcel) for parcel in waiting]
    tried = [state for state in states if state.last_attempt_at is not None]
    last = max(tried, key=lambda state: str(state.last_attempt_at), default=None)
    added = queue.waiting_since()
    now = datetime.now(UTC).timestamp()
    return {
        "destination": name,
        "orphaned": name in outbox.orphaned(),
        "waiting": len(waiting),
        "oldest_seconds": round(max(now - min(added), 0.0), 1) if added else 0.0,
        "attempts": sum(state.attempts for state in states),
        "awaiting_commitment": sum(state.asked_at is not None for state in states),
        "delivered": len(queue.receipts()),
        "dead": queue.count_dead(),
        "last_error": last.last_error if last else "",
    }


def _letters(folder: Path, destination: str | None) -> Iterator[_Letter]:
    outbox = _outbox(folder)
    if destination is not None and destination not in outbox.destinations():
        known = ", ".join(outbox.destinations()) or "none"
        raise UsageError(f"--destination {destination}: has no folder in {outbox.root}; there are: {known}")
    for name in outbox.destinations():
        if destination not in {None, name}:
            continue
        for dead in outbox.queue(name).dead_letters():
            letter = dead.letter
            study = dead.record.study_key if dead.record else None
            yield _Letter(name, dead.id, letter.when, letter.reason, letter.detail, None, letter.attempts, study)
    if destination is not None:
        return
    for instance in _spool(folder).dead_letters():
        study = instance.study_instance_uid
        yield _Letter(_INSTANCE, instance.name, instance.when, instance.reason, "", instance.status, instance.attempts, study)
    yield from _conflicts(folder / "conflicts")


def _conflicts(folder: Path) -> Iterator[_Letter]:
    """What the listener put aside: ``<name>.dcm``, and ``<name>.dcm.json`` with what is known of it."""
    for path in sorted(folder.glob("*.dcm")):
        said: dict[str, object] = {}
        with suppress(OSError, ValueError, TypeError):
            said = dict(json_text.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8")))
        try:
            when = datetime.fromisoformat(str(said.pop("when", "")))
        except ValueError:
            when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        reason = str(said.pop("reason", "other bytes under a UID that is known"))
        detail = ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)
        yield _Letter(_CONFLICT, path.name, when, reason, detail)


def _one(letters: list[_Letter], name: str) -> _Letter:
    found = [letter for letter in letters if letter.name == name] or [
        letter for letter in letters if name and letter.name.startswith(name)
    ]
    if not found:
        raise CxrRayError(f"{name}: is no dead letter here; 'cxr-ray deadletter list' names them")
    if len(found) > 1:
        raise UsageError(f"{name}: is the beginning of {len(found)} names; write more of it, or name the --destination")
    return found[0]


def _place(folder: Path, letter: _Letter) -> Path:
    if letter.kind == _CONFLICT:
        return folder / "conflicts" / letter.name
    return (folder if letter.kind == _INSTANCE else folder / "outbox" / letter.kind) / "dead" / letter.name


def _as_json(letter: _Letter) -> dict[str, object]:
    return {**vars(letter), "when": letter.when.isoformat()}


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds else ""


def _spool(folder: Path) -> "Spool":
    from serve.node.spool import Spool  # noqa: PLC0415 - takes half a second, --help need not wait

    _check(folder)
    return Spool(folder)


def _outbox(folder: Path) -> "Outbox":
    from serve.node.outbox import Outbox  # noqa: PLC0415 - as above

    _check(folder)
    return Outbox(folder / "outbox")


def _check(folder: Path) -> None:
    if not (folder / "ready").is_dir():
        raise CxrRayError(
            f"--spool {folder}: is no spool; give the one that 'cxr-ray listen' or 'serve' uses, or set {SPOOL_VARIABLE}"
        )
