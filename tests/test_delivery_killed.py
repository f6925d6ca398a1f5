"""Delivery in processes that are killed, at random and at the worst moments: nothing is lost, and little is sent twice."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from delivering import CommittingScp, committing, deliver, outbox, queue, scp, settings_of, uids
from result_peers import StorageScp, destination, parcel, until

from serve.node.destinations import DeliverySettings
from serve.node.outbox import DestinationQueue, Outbox
from serve.node.storage_commitment import CommitmentRegistry

__all__ = ["committing", "deliver", "outbox", "queue", "scp"]

ROOT = Path(__file__).resolve().parents[1]
DELIVERER = """
import sys, time
from pathlib import Path
from serve.node.delivery import Delivery
from serve.node.destinations import DeliverySettings
from serve.node.outbox import Outbox
settings = DeliverySettings.model_validate_json(sys.argv[2])
with Delivery(settings, Outbox(Path(sys.argv[1]))):
    time.sleep(120)
"""


def killed_at_random(outbox: Outbox, settings: DeliverySettings, seed: int) -> int:
    """Run delivery in processes that are killed a moment after each has delivered something, until nothing waits."""
    chance, kills, queue = random.Random(seed), 0, outbox.queue("pacs")
    command = [sys.executable, "-c", DELIVERER, outbox.root, settings.model_dump_json()]
    while queue.waiting():
        before = len(queue.receipts())
        process = subprocess.Popen(command, cwd=ROOT)
        until(lambda: len(queue.receipts()) > before or not queue.waiting())  # noqa: B023
        time.sleep(chance.random() / 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    return kills


@pytest.mark.system
def test_killed_again_and_again_it_loses_nothing(outbox: Outbox, queue, scp: StorageScp) -> None:
    # Now and then the peer is short of something, too; each instance takes a while, so that kills hit all stages.
    scp.answers_in = 0.01
    scp.script = lambda uid, turn: 0xA700 if turn == 1 and uid.endswith("7.1") else 0x0000
    names = [str(number) for number in range(60)]
    for name in names:
        outbox.add(parcel(name, study=str(int(name) // 2), sequence=int(name) % 2 + 1))
    settings = settings_of(destination(scp.port))
    kills = killed_at_random(outbox, settings, 7)
    assert kills >= 3
    assert set(queue.receipts()) == {parcel(name).id for name in names}
    assert queue.count_dead() == 0
    assert set(scp.order) == set(uids(*names))
    # What was under way when the process died may come twice, under the same UID; nothing else does.
    again = sum(scp.order.count(uid) - 1 for uid in set(scp.order))
    assert again <= kills
    for study in range(30):
        first, second = (f"1.2.{2 * study + place}.2" for place in (0, 1))
        assert scp.order.index(first) < scp.order.index(second)
    DestinationQueue(queue.root)
    assert list((queue.root / "incoming").iterdir()) == []


STEPS = ["confirmed", "receipt", "letter", "asked"]


@pytest.mark.system
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_the_worst_moment(outbox: Outbox, queue, committing: CommittingScp, step: str, deliver) -> None:
    """The process dies between two steps, each in turn; the next one finishes what was begun."""
    before = {
        "confirmed": "DestinationQueue.keep_state",
        "receipt": "DestinationQueue.let_go",
        "letter": "DestinationQueue._move",
        "asked": "DestinationLoop._note",
    }[step]
    if step == "letter":
        committing.script = lambda *_: 0xC000
    commitment = True if step == "asked" else None
    settings = settings_of(destination(committing.port, commitment=commitment))
    dying = f"""
import os
import serve.node.destination_loop
from serve.node.outbox import DestinationQueue
from serve.node.destination_loop import DestinationLoop
calls = 0
def die(*arguments, **options):
    global calls
    calls += 1
    if {step!r} != "asked" or "asked_at" in options:
        os.kill(os.getpid(), 9)
    return kept(*arguments, **options)
kept = {before}
{before} = die
"""
    outbox.add(parcel())
    process = subprocess.run(
        [sys.executable, "-c", dying + DELIVERER, outbox.root, settings.model_dump_json()], cwd=ROOT, timeout=60, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert queue.waiting() == [parcel().id]
    registry = CommitmentRegistry(outbox)
    deliver(destination(committing.port, commitment=commitment), registry=registry)
    if step == "letter":
        until(queue.dead_letters)
        assert queue.waiting() == []
        return
    if step == "asked":
        until(lambda: len(committing.questions) == 2)
        assert registry.report(*committing.questions[0], [])
    until(queue.receipts)
    until(lambda: queue.waiting() == [])
    wanted = {"confirmed": {"1.2.1.1": 2, "1.2.1.2": 1}}.get(step, uids("1"))
    assert committing.times == wanted
