"""`cxr-ray deadletter` and `cxr-ray deliveries` on a real spool: instances, results and conflicts in one list."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from result_peers import dead_instance, digest, parcel

from cxr_ray.errors import CxrRayError, UsageError
from serve.node.deadletter_cli import deadletter, deliveries
from serve.node.outbox import Outbox
from serve.node.parcels import Letter, ParcelState
from serve.node.spool import Spool

ROOT = Path(__file__).resolve().parents[1]
LATER = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A spool with a dead instance, dead results for two destinations, one that waits, and a conflict."""
    root = tmp_path / "spool"
    spool = Spool(root)
    dead_instance(spool)
    outbox = Outbox(root / "outbox")
    for number, destination in enumerate(("pacs", "pacs", "archive")):
        dead = parcel(str(number), destination)
        outbox.add(dead)
        reason = "association rejected permanently: called AE title not recognised"
        letter = Letter(reason=reason, detail="in its words", when=LATER + timedelta(hours=number), attempts=2)
        outbox.queue(destination).dead(dead.id, letter)
    waiting = parcel("9", "pacs")
    outbox.add(waiting)
    state = ParcelState(attempts=3, last_error="no association: it cannot be reached", last_attempt_at=LATER)
    outbox.queue("pacs").keep_state(waiting.id, state)
    old = time.time() - 7300
    os.utime(outbox.queue("pacs").root / "waiting" / waiting.id / "parcel.json", (old, old))
    outbox.keep_current(["pacs"])
    conflicts = root / "conflicts"
    conflicts.mkdir(exist_ok=True)
    (conflicts / "abc-1.dcm").write_bytes(b"x")
    (conflicts / "abc-1.dcm.json").write_text(json.dumps({"reason": "taken", "when": LATER.isoformat(), "first": "abc-0.dcm"}))
    (conflicts / "abd-1.dcm").write_bytes(b"x")
    return root


def run(app: typer.Typer, *arguments: object) -> None:
    app(args=[str(argument) for argument in arguments], prog_name="cxr-ray", standalone_mode=False)


def listed(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    run(deadletter, "list", "--json", "--spool", folder, *arguments)
    return json.loads(capsys.readouterr().out)


def test_list_holds_all_kinds_the_oldest_first(folder: Path, capsys) -> None:
    letters = listed(folder, capsys)
    assert sorted(letter["kind"] for letter in letters) == ["archive", "conflict", "conflict", "instance", "pacs", "pacs"]
    assert [letter["when"] for letter in letters] == sorted(letter["when"] for letter in letters)
    of_kind = {letter["kind"]: letter for letter in letters}
    assert (of_kind["instance"]["status"], of_kind["instance"]["reason"]) == (422, "lateral view: send a frontal one")
    assert (of_kind["archive"]["attempts"], of_kind["archive"]["study"]) == (2, digest("1.2.3"))
    assert {letter["name"]: letter["reason"] for letter in letters if letter["kind"] == "conflict"} == {
        "abc-1.dcm": "taken",
        "abd-1.dcm": "other bytes under a UID that is known",
    }
    assert [letter["kind"] for letter in listed(folder, capsys, "--destination", "archive")] == ["archive"]


def test_show_tells_everything(folder: Path, capsys) -> None:
    name = parcel("2", "archive").id
    conflict = listed(folder, capsys)[-1]["name"]
    run(deadletter, "show", name[:8], "--spool", folder, "--json")
    known = json.loads(capsys.readouterr().out)
    assert (known["name"], known["kind"], known["detail"], known["sequence"]) == (name, "archive", "in its words", 1)
    assert known["items"] == ["sr.dcm", "sc.dcm"]
    assert Path(known["folder"]).is_dir()
    for start in ("abc", name, conflict):
        run(deadletter, "show", start, "--spool", folder)
    assert "first abc-0.dcm" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show", "replay"])
def test_name_that_says_nothing_or_too_much_is_refused(folder: Path, command: str) -> None:
    with pytest.raises(CxrRayError, match="zzz: is no dead letter here"):
        run(deadletter, command, "zzz", "--spool", folder)
    with pytest.raises(UsageError, match="ab: is the beginning of 2 names"):
        run(deadletter, command, "ab", "--spool", folder)
    with pytest.raises(UsageError, match=r"--destination fax: has no folder .*: archive, pacs"):
        run(deadletter, command, "ab", "--spool", folder, "--destination", "fax")
    with pytest.raises(CxrRayError, match="is no spool"):
        run(deadletter, command, "ab", "--spool", folder / "nowhere")


def test_replay_puts_back_what_is_named(folder: Path, capsys) -> None:
    instance = next(letter["name"] for letter in listed(folder, capsys) if letter["kind"] == "instance")
    run(deadletter, "replay", instance[:10], parcel("0").id[:10], "--spool", folder)
    assert Spool(folder).pending() == [instance]
    queue = Outbox(folder / "outbox").queue("pacs")
    assert set(queue.waiting()) == {parcel("0").id, parcel("9").id}
    assert [dead.id for dead in queue.dead_letters()] == [parcel("1").id]


def test_replay_of_all_or_of_a_destination(folder: Path, capsys) -> None:
    outbox = Outbox(folder / "outbox")
    run(deadletter, "replay", "--all", "--destination", "pacs", "--spool", folder)
    assert (outbox.queue("pacs").count_dead(), outbox.queue("archive").count_dead()) == (0, 1)
    assert Spool(folder).pending() == []
    run(deadletter, "replay", "--all", "--spool", folder)
    assert outbox.queue("archive").count_dead() == 0
    assert len(Spool(folder).pending()) == 1
    capsys.readouterr()
    assert [letter["kind"] for letter in listed(folder, capsys)] == ["conflict", "conflict"]
    run(deadletter, "replay", "--all", "--spool", folder)
    assert capsys.readouterr().out == "nothing to replay\n"
    for wrong in ([], ["abc", "--all"]):
        with pytest.raises(UsageError, match="give names, or --all"):
            run(deadletter, "replay", *wrong, "--spool", folder)
    with pytest.raises(UsageError, match="is a conflict, and stays one"):
        run(deadletter, "replay", "abc", "--spool", folder)


def test_deliveries_tell_what_waits_and_why(folder: Path, capsys) -> None:
    run(deliveries, "--spool", folder, "--json")
    archive, pacs = json.loads(capsys.readouterr().out)
    assert (archive["destination"], archive["orphaned"], archive["waiting"], archive["dead"]) == ("archive", False, 0, 1)
    assert (pacs["waiting"], pacs["dead"], pacs["delivered"], pacs["attempts"]) == (1, 2, 0, 3)
    assert 7200 < pacs["oldest_seconds"] < 20_000
    assert pacs["last_error"] == "no association: it cannot be reached"


@pytest.mark.system
def test_tables_fit_eighty_columns(folder: Path) -> None:
    Outbox(folder / "outbox").add(parcel("5", "archive"))
    for app, arguments in (("deadletter", ["list"]), ("deadletter", ["show", parcel("1").id]), ("deliveries", [])):
        code = f"from serve.node.deadletter_cli import {app}; {app}(args={[*arguments, '--spool', str(folder)]!r})"
        environment = {**os.environ, "COLUMNS": "80"}
        shown = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        body = [line for line in shown.stdout.splitlines() if str(folder) not in line]
        assert max(map(len, body)) <= 80, shown.stdout
        sys.stdout.write(shown.stdout)
    assert "not in the settings" in shown.stdout
    assert "2 h" in shown.stdout
