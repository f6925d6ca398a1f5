"""A short chaos campaign as `make chaos` runs it, and the accounts of campaigns that went wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import REPOSITORY, require_program

sys.path.insert(0, str(REPOSITORY / "bench"))

from chaos_account import Account, DeadResult, Kept, Record, Result, Sent, balance

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

SEED = 7


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict, Record]:
    """24 studies, every fault once: what was printed, the figures, and the record that was counted."""
    for program in ("Orthanc", "storescu"):
        require_program(program)
    folder = tmp_path_factory.mktemp("chaos")
    options = ["--studies", "24", "--kills", "4", "--seed", str(SEED), "--store", "sqlite", "--out", str(folder / "out")]
    command = [sys.executable, str(REPOSITORY / "bench" / "chaos.py"), *options, "--json", str(folder / "figures.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert ran.returncode in {0, 1}, ran.stdout[-4000:] + ran.stderr[-4000:]
    (figures,) = json.loads((folder / "figures.json").read_text())
    return ran, figures, Record.from_json((folder / "out" / "sqlite-record.json").read_text())


def test_the_account_of_a_short_campaign_balances(campaign) -> None:
    ran, figures, record = campaign
    assert not any(figures["problems"].values()), ran.stdout[-6000:]
    assert ran.returncode == 0
    assert "The account balances." in ran.stdout
    assert {len(line) for line in ran.stdout.splitlines() if line.startswith("│")} == {80}
    assert figures["kills"] == 4
    assert {"association cut in mid-PDU", "sender gone before the answer"} <= set(figures["faults"])
    assert figures["counts"]["studies"] == 24
    assert figures["counts"]["images answered 0x0000"] > 20
    assert figures["counts"]["of them: kept aside as conflicts"] == 1
    assert figures["counts"]["of them: dead letters"] >= 1
    assert balance(record).counts == figures["counts"]


def test_every_fault_happened_or_says_why_not(campaign) -> None:
    from chaos_faults import KILLS, Kind

    ran, figures, _ = campaign
    outages = {kind.value for kind in Kind if kind not in KILLS}
    assert outages == outages & (set(figures["faults"]) | set(figures["skipped"])), ran.stdout
    assert set(figures["faults"]) & {kind.value for kind in KILLS}


def test_the_record_of_a_campaign_shows_what_was_lost_or_doubled(campaign) -> None:
    _, _, record = campaign
    report = next(result for result in record.results if result.destination == "archive" and result.kind == "sr")
    without = replace(record, results=[result for result in record.results if result != report])
    (lost,) = balance(without).problems["lost"]
    assert report.references[0] in lost
    doubled = replace(record, results=[*record.results, replace(report, sop_instance_uid="2.25.1")])
    (twice,) = balance(doubled).problems["twice"]
    assert report.sop_instance_uid in twice


IMAGE = Sent("1.1", 1, "1", "SINGLE", "STORESCU", attempts=2, successes=1)
LATE = replace(IMAGE, sop_instance_uid="1.2")
REPORT = Result("archive", "9.1", "sr", "1", 1, ("1.1",), ())
REVISED = Result("archive", "9.2", "sr", "1", 2, ("1.1", "1.2"), ("9.1",))


def good() -> Record:
    return Record(
        sent=[IMAGE, LATE],
        kept=[Kept("1.1", 1, "done"), Kept("1.2", 1, "done")],
        rows={"1.1": 1, "1.2": 1},
        results=[REPORT, REVISED],
        wanted={"archive": ("sr",)},
    )


def test_a_study_with_a_late_image_balances() -> None:
    account = balance(good())
    assert account.balances, account.problems
    assert account.counts["archive: SR objects"] == 2
    assert account.counts["archive: of them revisions"] == 1
    assert balance(Record.from_json(good().as_json())) == account


def test_an_image_that_was_never_promised_may_be_absent_but_not_half_there() -> None:
    unpromised = replace(LATE, successes=0)
    absent = replace(good(), sent=[IMAGE, unpromised], kept=good().kept[:1], rows={"1.1": 1}, results=[REPORT])
    assert balance(absent).balances
    half = replace(absent, kept=good().kept, rows=good().rows)
    assert balance(half).problems["lost"] == ["image 1.2 is answered, and archive has no SR of it"]


def test_a_dead_letter_is_an_end_of_an_image_and_of_a_result() -> None:
    dead = replace(good(), sent=[IMAGE], kept=[Kept("1.1", 1, "dead")], rows={}, results=[])
    assert balance(dead).balances
    assert balance(dead).counts["of them: dead letters"] == 1
    undelivered = replace(good(), results=[], dead_results=[DeadResult("archive", "p", "1")])
    assert balance(undelivered).balances
    other = replace(good(), results=[], dead_results=[DeadResult("archive", "p", "2")])
    assert len(balance(other).problems["lost"]) == 2


def changed(**fields: object) -> Callable[[], Record]:
    return lambda: replace(good(), **fields)


@pytest.mark.parametrize(
    ("doctored", "kind", "said"),
    [
        (changed(kept=good().kept[:1]), "lost", "image 1.2 version 1 was answered 0x0000 and is nowhere"),
        (changed(rows={"1.1": 1}), "lost", "the service's store has no result of it"),
        (changed(results=[REPORT]), "lost", "image 1.2 is answered, and archive has no SR of it"),
        (changed(results=[]), "lost", "image 1.1 is answered, and archive has no SR of it"),
        (changed(kept=[*good().kept, Kept("1.1", 1, "done")]), "twice", "is in the spool 2 times: done, done"),
        (changed(kept=[*good().kept, Kept("1.1", 1, "dead")]), "twice", "is in the spool 2 times: dead, done"),
        (changed(rows={"1.1": 2, "1.2": 1}), "twice", "image 1.1 has 2 results in the service's store"),
        (
            changed(results=[REPORT, REVISED, replace(REVISED, sop_instance_uid="9.3")]),
            "twice",
            "archive has 2 SR of revision 2 of study 1: 9.2, 9.3",
        ),
        (changed(results=[REPORT, replace(REVISED, digests=("a", "b"))]), "twice", "2 different objects under UID 9.2"),
        (
            changed(results=[REPORT, replace(REVISED, references=("1.1",))]),
            "wrong",
            "revision 2 holds no image that 1 did not",
        ),
        (changed(results=[REPORT, replace(REVISED, predecessors=())]), "wrong", "does not name revision 1 as its predecessor"),
        (changed(results=[REVISED]), "wrong", "has the revisions 2"),
        (changed(results=[*good().results, replace(REPORT, kind="sc")]), "wrong", "of a kind that was not asked for"),
        (
            changed(results=[REPORT, replace(REVISED, references=("1.1", "1.2", "7"))]),
            "wrong",
            "which is no image of its study",
        ),
        (changed(kept=[Kept("1.1", 1, "done"), Kept("1.2", 1, "dead")]), "wrong", "refers to 1.2, which was not answered"),
        (changed(kept=[*good().kept, Kept("5", 1, "done")]), "wrong", "image 5 version 1 is in the spool, and nobody sent it"),
        (changed(kept=[Kept("1.1", 1, "done"), Kept("1.2", 1, "ready")]), "unfinished", "image 1.2 version 1 is in ready/"),
        (changed(leftovers=["incoming/x in the spool"]), "left over", "incoming/x"),
    ],
)
def test_what_is_wrong_is_noticed(doctored: Callable[[], Record], kind: str, said: str) -> None:
    account: Account = balance(doctored())
    assert not account.balances
    assert any(said in problem for problem in account.problems[kind]), account.problems
