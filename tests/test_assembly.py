"""Studies gathered from answered instances: when they are complete, what a late image makes, and what a crash cannot change."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from phantom_films import VISITS, dicom
from pydicom.uid import generate_uid
from waiting import until

from serve.node.assembly import Assembler, AssemblySettings, ServiceAwayError
from serve.node.spool import Origin, Spool
from serve.node.study_ledger import Plan, Reference, StudyLedger, study_digest

CR = "1.2.840.10008.5.1.4.1.1.1"
QUICK = AssemblySettings(quiet_seconds=0.1, first_retry_seconds=0.01, max_retry_seconds=0.02, attempts=3)


@dataclass
class Maker:
    """Notes what it is asked to hand over, and fails when told to."""

    failing: list[Exception] = field(default_factory=list)
    handed: list[tuple[str, Plan, dict[str, Reference]]] = field(default_factory=list)
    asked: int = 0

    def hand_over(self, study: str, plan: Plan, predecessors: dict[str, Reference]) -> dict[str, Reference]:
        self.asked += 1
        if self.failing:
            raise self.failing.pop(0)
        self.handed.append((study, plan, predecessors))
        return {"sr": reference(plan.revision)}


def reference(revision: int) -> Reference:
    return Reference(
        sop_class_uid="1.2", sop_instance_uid=f"1.2.{revision}", series_instance_uid="1.3", study_instance_uid="1.4"
    )


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def assemble(spool: Spool) -> Iterator[Callable[..., Assembler]]:
    with ExitStack() as stack:

        def start(maker: Maker, settings: AssemblySettings = QUICK) -> Assembler:
            return stack.enter_context(Assembler(settings, spool, maker))

        yield start


def received(spool: Spool, study: str) -> str:
    """Put an instance of a study into ``ready/``; returns its name."""
    before = set(spool.pending())
    uid = generate_uid()
    file = dicom(VISITS[0], StudyInstanceUID=study, SOPInstanceUID=uid)
    length = int.from_bytes(file[140:144], "little")
    spool.store(file[144 + length :], Origin(CR, uid, "1.2.840.10008.1.2.1"))
    (name,) = set(spool.pending()) - before
    return name


def answered(spool: Spool, study: str) -> str:
    name = received(spool, study)
    spool.answers.keep(name, b"{}")
    return name


def folder(spool: Spool, name: str) -> str | None:
    # Folder after folder: what moves meanwhile is met twice or not at all, and in one place at the next look.
    for _ in range(3):
        places = [path.parent.name for path in spool.root.glob(f"*/{name}")]
        if len(places) == 1:
            break
    assert len(places) == 1, places
    return places[0]


def test_a_study_is_handed_over_once_it_is_quiet_and_its_images_are_done(spool, assemble):
    study = generate_uid()
    names = sorted(answered(spool, study) for _ in range(2))
    maker = Maker()
    assemble(maker)
    until(lambda: {folder(spool, name) for name in names} == {"done"})
    ((digest, plan, predecessors),) = maker.handed
    assert (digest, plan.revision, sorted(plan.instances), predecessors) == (study_digest(study), 1, names, {})
    assert [spool.answers.answer(name) for name in names] == [b"{}", b"{}"]
    assert StudyLedger(spool.root).planned() == set()


def test_studies_do_not_mix(spool, assemble):
    studies = [generate_uid() for _ in range(3)]
    names = {study_digest(study): {answered(spool, study), answered(spool, study)} for study in studies}
    maker = Maker()
    assemble(maker)
    until(lambda: len(maker.handed) == 3)
    assert {study: set(plan.instances) for study, plan, _ in maker.handed} == names


def test_a_late_image_makes_a_revision_of_the_whole_study_that_names_its_predecessor(spool, assemble):
    study = generate_uid()
    first, maker = answered(spool, study), Maker()
    assemble(maker)
    until(lambda: folder(spool, first) == "done")
    late = answered(spool, study)
    until(lambda: folder(spool, late) == "done")
    _, plan, predecessors = maker.handed[1]
    assert (plan.revision, set(plan.instances), predecessors) == (2, {first, late}, {"sr": reference(1)})
    assert len(maker.handed) == 2


def test_what_was_swept_is_missing_from_a_late_revision_which_then_takes_nothing_over(spool, assemble):
    study, maker = generate_uid(), Maker()
    first = answered(spool, study)
    assemble(maker)
    until(lambda: folder(spool, first) == "done")
    assert spool.sweep(keep_done_seconds=0, keep_done_count=0) == 1
    assert not list(spool.root.glob(f"done/{first}*"))
    late = answered(spool, study)
    until(lambda: len(maker.handed) == 2)
    assert maker.handed[1][1:] == (Plan(revision=2, instances=(late,)), {})


def test_a_study_waits_for_its_unanswered_images_and_its_open_associations(spool, assemble):
    study, maker, sender = generate_uid(), Maker(), spool.senders.begin()
    first, second = answered(spool, study), received(spool, study)
    sender.add(first)
    assemble(maker)
    other = answered(spool, generate_uid())
    until(lambda: folder(spool, other) == "done")
    assert len(maker.handed) == 1
    spool.answers.keep(second, b"{}")
    another = answered(spool, generate_uid())
    until(lambda: folder(spool, another) == "done")
    assert len(maker.handed) == 2
    sender.close()
    until(lambda: len(maker.handed) == 3)
    assert set(maker.handed[2][1].instances) == {first, second}


def test_nothing_holds_a_study_longer_than_the_longest_wait(spool, assemble):
    study, maker = generate_uid(), Maker()
    first, stuck = answered(spool, study), received(spool, study)
    assemble(maker, AssemblySettings(quiet_seconds=0.05, longest_wait_seconds=0.4))
    until(lambda: folder(spool, first) == "done")
    assert maker.handed[0][1].instances == (first,)
    assert folder(spool, stuck) == "ready"


def test_a_service_that_is_away_is_waited_for_without_end(spool, assemble):
    name = answered(spool, generate_uid())
    maker = Maker(failing=[ServiceAwayError("away")] * 8)
    assemble(maker)
    until(lambda: folder(spool, name) == "done")
    assert (maker.asked, len(maker.handed)) == (9, 1)


def test_results_that_cannot_be_made_make_dead_letters_of_the_new_images_alone(spool, assemble):
    study, maker = generate_uid(), Maker()
    good = answered(spool, study)
    assemble(maker)
    until(lambda: folder(spool, good) == "done")
    maker.failing += [ValueError("broken")] * QUICK.attempts
    bad = answered(spool, study)
    until(lambda: folder(spool, bad) == "dead")
    (letter,) = spool.dead_letters()
    assert (letter.name, letter.study_instance_uid) == (bad, study)
    assert "cannot be made (ValueError)" in letter.reason
    assert folder(spool, good) == "done"
    spool.replay(bad)
    spool.answers.keep(bad, b"{}")
    until(lambda: folder(spool, bad) == "done")
    assert [plan.revision for _, plan, _ in maker.handed] == [1, 2]


def test_a_plan_comes_out_the_same_after_a_crash_whatever_arrived_meanwhile(spool, assemble):
    study = generate_uid()
    planned, late = answered(spool, study), answered(spool, study)
    # Killed after the plan was fixed and before anything of it was recorded.
    StudyLedger(spool.root).plan(study_digest(study), Plan(revision=1, instances=(planned,)))
    maker = Maker()
    assemble(maker)
    until(lambda: folder(spool, late) == "done")
    assert [plan for _, plan, _ in maker.handed] == [
        Plan(revision=1, instances=(planned,)),
        Plan(revision=2, instances=(planned, late)),
    ]


@pytest.mark.parametrize("plan_left", [True, False])
def test_what_was_recorded_before_a_crash_is_not_handed_over_again(spool, assemble, plan_left):
    from serve.node.study_ledger import Issue

    study = generate_uid()
    names = sorted(answered(spool, study) for _ in range(2))
    ledger = StudyLedger(spool.root)
    ledger.issue(study_digest(study), Issue(revision=1, instances=tuple(names), results={}))
    if plan_left:
        ledger.plan(study_digest(study), Plan(revision=1, instances=tuple(names)))
    spool.answers.settle(names[0])
    maker = Maker()
    assemble(maker)
    until(lambda: {folder(spool, name) for name in names} == {"done"})
    assert maker.asked == 0
    assert ledger.planned() == set()


def test_a_film_that_a_plan_names_is_not_swept(spool, assemble):
    study = generate_uid()
    old, late = answered(spool, study), answered(spool, study)
    spool.answers.settle(old)
    ledger = StudyLedger(spool.root)
    ledger.plan(study_digest(study), Plan(revision=2, instances=(old, late)))
    assert spool.sweep(-1, needed=frozenset(ledger.needed())) == 0
    maker = Maker()
    assemble(maker)
    until(lambda: folder(spool, late) == "done")
    assert maker.handed[0][1].instances == (old, late)
    assert ledger.needed() == set()
    assert spool.sweep(-1, needed=frozenset(ledger.needed())) == 2


def test_a_plan_whose_film_is_gone_ends_in_dead_letters_and_not_in_waiting(spool, assemble):
    study = generate_uid()
    late = answered(spool, study)
    ledger = StudyLedger(spool.root)
    ledger.plan(study_digest(study), Plan(revision=2, instances=("gone", late)))
    maker = Maker(failing=[FileNotFoundError(2, "No such file or directory")] * QUICK.attempts)
    assemble(maker)
    until(lambda: folder(spool, late) == "dead")
    assert ledger.planned() == set()
    spool.replay(late)
    spool.answers.keep(late, b"{}")
    until(lambda: folder(spool, late) == "done")
    assert maker.handed[0][1].instances == (late,)


@pytest.mark.parametrize("torn", ["plans", "studies"])
def test_what_is_told_of_a_study_and_cannot_be_read_holds_up_no_other(spool, assemble, torn):
    study = generate_uid()
    name = answered(spool, study)
    StudyLedger(spool.root)
    (spool.root / torn / f"{study_digest(study)}.json").write_text('{"revision": 1, "of": "a later version"}')
    maker = Maker()
    assemble(maker)
    other = answered(spool, generate_uid())
    until(lambda: folder(spool, other) == "done")
    until(lambda: folder(spool, name) == "dead")
    (letter,) = spool.dead_letters()
    assert "cannot be made (ValidationError)" in letter.reason


def test_what_was_sent_of_a_study_is_forgotten_after_its_time(spool, assemble):
    study, maker = generate_uid(), Maker()
    first = answered(spool, study)
    assemble(maker)
    until(lambda: folder(spool, first) == "done")
    ledger = StudyLedger(spool.root)
    assert ledger.forget(60) == 0
    assert ledger.forget(-1) == 1
    assert ledger.last(study_digest(study)) is None


def test_an_association_of_another_process_is_waited_for_and_ends_with_it(spool, assemble):
    """A listener that shares the spool has an association open; then it is killed."""
    study, maker = generate_uid(), Maker()
    name = received(spool, study)
    program = (
        "import sys, time; from pathlib import Path; from serve.node.spool import Spool\n"
        "sender = Spool(Path(sys.argv[1])).senders.begin(); sender.add(sys.argv[2]); print('open', flush=True); time.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, spool.root, name], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "open\n"
        spool.answers.keep(name, b"{}")
        assemble(maker)
        beside = answered(spool, generate_uid())
        until(lambda: folder(spool, beside) == "done")
        time.sleep(4 * QUICK.quiet_seconds)
        assert folder(spool, name) == "answered"
    finally:
        other.kill()
        other.wait()
    until(lambda: folder(spool, name) == "done")
    assert list((spool.root / "receiving").iterdir()) == []


def test_one_assembler_works_and_the_next_takes_over(spool, assemble):
    first, second = Maker(), Maker()
    one = assemble(first)
    name = answered(spool, generate_uid())
    until(lambda: folder(spool, name) == "done")
    assemble(second)
    one.stop()
    name = answered(spool, generate_uid())
    until(lambda: folder(spool, name) == "done")
    assert (len(first.handed), len(second.handed)) == (1, 1)
    assert threading.active_count() < 50
