"""Delivery to real peers: order, patience, dead letters, and what is told of them."""

import logging
import os
import shutil
import time
from datetime import UTC, datetime, timedelta

from delivering import deliver, outbox, queue, scp, uids
from prometheus_client import CollectorRegistry, generate_latest
from result_peers import TIMEOUTS, StorageScp, WebServer, destination, open_descriptors, parcel, silent_server, stored, until

from serve.node.destinations import PatienceSettings
from serve.node.outbox import DestinationQueue, Outbox
from serve.node.parcels import Item, Parcel, ParcelState, StudyOrigin
from serve.node.patience import pause_seconds

__all__ = ["deliver", "outbox", "queue", "scp"]

SMALL = parcel().items[0].read()


def test_what_lies_in_the_outbox_and_what_is_added_arrives_once(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    outbox.add(parcel("1"))
    before = open_descriptors()
    deliver(destination(scp.port), poll_seconds=60)
    until(queue.receipts)
    # Noticed at once, not with the next look.
    for name in "234":
        outbox.add(parcel(name, study=f"1.{name}"))
    until(lambda: len(queue.receipts()) == 4)
    assert scp.times == uids(*"1234")
    until(lambda: queue.waiting() == [])
    assert queue.dead_letters() == []
    kept = queue.receipt(parcel("1").id)
    assert (kept.attempts, kept.remote_status, kept.committed, kept.items) == (1, "0x0000", False, ("sr.dcm", "sc.dcm"))
    assert not outbox.add(parcel("1"))
    until(lambda: open_descriptors() <= before + 3)


def test_destination_that_hangs_holds_nobody_up(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    with silent_server() as port:
        for name in "12":
            outbox.add(parcel(name, "stuck", name))
            outbox.add(parcel(name, "pacs", name))
        deliver(destination(port, "stuck"), destination(scp.port))
        until(lambda: len(queue.receipts()) == 2)
        assert len(outbox.queue("stuck").waiting()) == 2


def test_passing_trouble_is_waited_out_and_told_once(deliver, outbox: Outbox, queue, free_port, caplog) -> None:
    server = StorageScp(port=free_port())
    for name in "12345":
        outbox.add(parcel(name, study=name))
    with caplog.at_level(logging.INFO):
        deliver(destination(server.port))
        until(lambda: sum(queue.state(name).attempts for name in queue.waiting()) >= 5)
        server.start()
        until(lambda: sum(record.message.endswith(": delivered") for record in caplog.records) == 5)
    assert server.times == uids(*"12345")
    told = [record.message for record in caplog.records if record.name.startswith("serve.node.destination")]
    assert sum("waiting; no association: it cannot be reached" in line for line in told) == 1
    assert sum("takes results again" in line for line in told) == 1
    # While it is away one parcel asks for all.
    assert sorted(queue.receipt(name).attempts for name in queue.receipts())[:4] == [1, 1, 1, 1]
    server.stop()


def test_of_a_study_the_later_waits_for_the_earlier(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    scp.script = lambda uid, turn: 0xA700 if uid == "1.2.1.1" and turn < 4 else 0x0000
    for name, sequence in (("3", 3), ("2", 2), ("1", 1)):
        outbox.add(parcel(name, sequence=sequence))
    outbox.add(parcel("9", study="9"))
    deliver(destination(scp.port))
    until(lambda: len(queue.receipts()) == 4)
    of_study = [uid for uid in scp.order if not uid.startswith("1.2.9.")]
    assert of_study == ["1.2.1.1", "1.2.1.2", "1.2.2.1", "1.2.2.2", "1.2.3.1", "1.2.3.2"]
    assert scp.order.index("1.2.9.1") < scp.order.index("1.2.1.1")


def test_later_revision_goes_when_the_earlier_is_dead(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    scp.script = lambda uid, _: 0xC000 if uid == "1.2.1.1" else 0x0000
    outbox.add(parcel("1", sequence=1))
    outbox.add(parcel("2", sequence=2))
    deliver(destination(scp.port))
    until(lambda: queue.receipts() == [parcel("2").id])
    (dead,) = queue.dead_letters()
    assert dead.letter.reason == "sr.dcm: refused with 0xC000, cannot be understood"
    # The one that was not refused is there all the same.
    assert scp.times["1.2.1.2"] == 1


def test_poisoned_parcels_do_not_keep_the_others(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    poisoned = {f"1.2.{name}.1" for name in "1234"}
    scp.script = lambda uid, _: 0x0110 if uid in poisoned else 0x0000
    for number in range(1, 13):
        outbox.add(parcel(str(number), study=str(number)))
    deliver(destination(scp.port))
    until(lambda: sorted(queue.waiting()) == sorted(parcel(name).id for name in "1234"))
    assert len(queue.receipts()) == 8
    until(lambda: all(queue.state(name).attempts >= 3 for name in queue.waiting()))
    assert queue.state(parcel("1").id).last_error == "sr.dcm: refused with 0x0110, processing failure"


def test_many_failures_in_a_row_slow_the_whole_destination_down(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    scp.script = lambda *_: 0xA700
    for number in range(200):
        outbox.add(parcel(str(number), study=str(number), items=(Item("sr.dcm", SMALL),)))
    deliver(destination(scp.port), patience={"first_retry_seconds": 0.2, "max_retry_seconds": 60})
    until(lambda: sum(scp.times.values()) >= 5)
    time.sleep(1)
    # Pauses of 0.2, 0.4, 0.8 ... s: without them all 200 would have been tried by now.
    assert sum(scp.times.values()) < 12
    scp.script = lambda *_: 0x0000
    until(lambda: len(queue.receipts()) == 200)


def test_refusal_for_good_is_a_dead_letter_at_once_and_can_be_replayed(deliver, outbox: Outbox, queue, scp, caplog) -> None:
    outbox.add(parcel())
    with caplog.at_level(logging.INFO):
        delivery = deliver(destination(scp.port, called_ae="OTHER"))
        until(queue.dead_letters)
    (dead,) = queue.dead_letters()
    assert (dead.letter.reason, dead.letter.attempts) == (
        "association rejected permanently: called AE title not recognised",
        1,
    )
    assert not outbox.add(parcel())
    until(lambda: "dead letter; association rejected" in caplog.text)
    delivery.stop()
    deliver(destination(scp.port))
    queue.replay(dead.id)
    until(lambda: queue.receipts() == [dead.id])
    assert scp.times == uids("1")


def test_partly_sent_parcel_goes_on_where_it_was_after_a_restart(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    scp.script = lambda uid, _: 0xA700 if uid == "1.2.1.2" else 0x0000
    outbox.add(parcel())
    delivery = deliver(destination(scp.port))
    until(lambda: queue.state(parcel().id).attempts >= 2)
    delivery.stop()
    assert queue.state(parcel().id).confirmed == ("sr.dcm",)
    scp.script = lambda *_: 0x0000
    deliver(destination(scp.port))
    until(queue.receipts)
    assert scp.times["1.2.1.1"] == 1
    assert queue.receipt(parcel().id).attempts > 2


def test_receipt_that_cannot_be_written_sends_nothing_twice(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    outbox.add(parcel())
    receipts = queue.root / "delivered"
    receipts.rename(queue.root / "aside")
    receipts.write_text("in the way")
    deliver(destination(scp.port))
    until(lambda: queue.state(parcel().id).attempts >= 2)
    assert queue.waiting() == [parcel().id]
    receipts.unlink()
    (queue.root / "aside").rename(receipts)
    until(queue.receipts)
    assert scp.times == uids("1")


def test_crash_between_receipt_and_end_sends_nothing_twice(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    outbox.add(parcel("1"))
    delivery = deliver(destination(scp.port))
    until(queue.receipts)
    delivery.stop()
    kept = (queue.root / "delivered" / f"{parcel('1').id}.json").read_bytes()
    (queue.root / "delivered" / f"{parcel('1').id}.json").unlink()
    outbox.add(parcel("1"))
    (queue.root / "delivered" / f"{parcel('1').id}.json").write_bytes(kept)
    outbox.add(parcel("2"))
    deliver(destination(scp.port))
    until(lambda: queue.waiting() == [])
    assert scp.times == uids("1", "2")


def test_unreadable_parcel_is_a_dead_letter(deliver, outbox: Outbox, queue, scp: StorageScp) -> None:
    outbox.add(parcel("1"))
    (queue.root / "waiting" / parcel("1").id / "parcel.json").write_text("{")
    outbox.add(parcel("2"))
    outbox.add(parcel("3"))
    (queue.root / "waiting" / parcel("3").id / "sr.dcm").unlink()
    deliver(destination(scp.port))
    # What was taken away from under it is not given up: whoever did it may put it back.
    until(lambda: queue.dead_letters() and queue.waiting() == [parcel("3").id])
    assert "parcel.json cannot be read" in queue.dead_letters()[0].letter.reason
    assert queue.receipts() == [parcel("2").id]
    until(lambda: queue.state(parcel("3").id).last_error == "disk: No such file or directory")
    shutil.rmtree(queue.root / "waiting" / parcel("3").id)
    outbox.add(parcel("4"))
    until(lambda: parcel("4").id in queue.receipts())


def test_parcel_is_given_up_only_when_asked_for(deliver, outbox: Outbox, queue, free_port) -> None:
    outbox.add(parcel("1", created_at=datetime.now(UTC) - timedelta(days=400)))
    outbox.add(parcel("2", study="2"))
    delivery = deliver(destination(free_port()))
    until(lambda: queue.state(parcel("1").id).attempts >= 2)
    delivery.stop()
    assert queue.count_dead() == 0
    deliver(destination(free_port()), patience={"give_up_days": 30})
    until(queue.count_dead)
    (dead,) = queue.dead_letters()
    assert dead.id == parcel("1").id
    assert dead.letter.reason.startswith("given up after 30 days: no association")
    assert queue.waiting() == [parcel("2").id]


def test_second_delivery_waits_and_takes_over(deliver, outbox: Outbox, queue, scp: StorageScp, caplog) -> None:
    with caplog.at_level(logging.INFO):
        first = deliver(destination(scp.port))
        outbox.add(parcel("1"))
        until(queue.receipts)
        deliver(destination(scp.port))
        until(lambda: "holds delivery.lock" in caplog.text)
    first.stop()
    outbox.add(parcel("2"))
    until(lambda: len(queue.receipts()) == 2)
    assert scp.times == uids("1", "2")


def test_stop_does_not_wait_for_a_peer_that_hangs(deliver, outbox: Outbox, queue) -> None:
    with silent_server() as port:
        outbox.add(parcel())
        patient = dict.fromkeys(TIMEOUTS, 600)
        delivery = deliver(destination(port, timeouts=patient | {"response_seconds": 3600}))
        time.sleep(0.3)
        begun = time.monotonic()
        delivery.stop()
        assert time.monotonic() - begun < 20
    assert queue.waiting() == [parcel().id]


def test_orphans_are_told_of_and_kept(deliver, outbox: Outbox, scp: StorageScp, caplog) -> None:
    outbox.add(parcel(destination="old"))
    with caplog.at_level(logging.INFO):
        deliver(destination(scp.port))
        until(lambda: "destination old is not in the settings: 1 parcels are kept for it" in caplog.text)
    assert outbox.queue("old").waiting() == [parcel(destination="old").id]
    assert outbox.orphaned() == ["old"]


def test_sender_that_is_away_does_not_hold_up_another(deliver, outbox: Outbox, scp: StorageScp, free_port) -> None:
    queue = outbox.queue("sender")
    for name, title in (("1", "AWAY"), ("2", "AWAY"), ("3", "PACS")):
        outbox.add(parcel(name, "sender", name, origin=StudyOrigin(calling_ae=title, address="127.0.0.1")))
    peers = {"AWAY": free_port(), "PACS": scp.port}
    deliver(
        {"kind": "sender", "peers": peers, "timeouts": TIMEOUTS}, patience={"first_retry_seconds": 30, "max_retry_seconds": 30}
    )
    until(lambda: queue.receipts() == [parcel("3", "sender").id])
    assert scp.times == uids("3")


def returned(name: str, title: str, study: str, sequence: int = 1) -> Parcel:
    """A parcel for whoever sent a study under a title."""
    return parcel(name, "sender", study, sequence, origin=StudyOrigin(calling_ae=title, address="127.0.0.1"))


def test_of_a_study_each_sender_gets_its_own_in_order(deliver, outbox: Outbox, scp: StorageScp, free_port) -> None:
    queue = outbox.queue("sender")
    # The one that is away has the lower ids, and was there first.
    for name, title, sequence in (("1", "AWAY", 1), ("2", "AWAY", 2), ("4", "PACS", 2), ("3", "PACS", 1)):
        outbox.add(returned(name, title, "1.2.3", sequence))
    away = StorageScp(titles=["AWAY"], port=free_port())
    deliver({"kind": "sender", "peers": {"AWAY": away.port, "PACS": scp.port}, "timeouts": TIMEOUTS})
    until(lambda: len(queue.receipts()) == 2)
    assert scp.order == ["1.2.3.1", "1.2.3.2", "1.2.4.1", "1.2.4.2"]
    away.start()
    until(lambda: queue.waiting() == [])
    assert away.order == ["1.2.1.1", "1.2.1.2", "1.2.2.1", "1.2.2.2"]
    away.stop()


def test_sender_that_hangs_does_not_hold_up_another(deliver, outbox: Outbox, scp: StorageScp) -> None:
    queue = outbox.queue("sender")
    with silent_server() as port:
        outbox.add(returned("1", "STUCK", "1.2.3"))
        deliver({"kind": "sender", "peers": {"STUCK": port, "PACS": scp.port}, "timeouts": dict.fromkeys(TIMEOUTS, 60)})
        time.sleep(0.3)
        begun = time.monotonic()
        for name in "234":
            outbox.add(returned(name, "PACS", "1.2.3", int(name)))
        until(lambda: len(queue.receipts()) == 3)
        assert time.monotonic() - begun < 15
        until(lambda: queue.waiting() == [returned("1", "STUCK", "1.2.3").id])


def test_many_senders_that_hang_hold_up_another_no_longer_than_their_time(deliver, outbox: Outbox, scp: StorageScp) -> None:
    queue = outbox.queue("sender")
    titles = [f"STUCK{number}" for number in range(20)]
    for number, title in enumerate(titles):
        outbox.add(returned(str(number), title, str(number)))
    with silent_server() as port:
        peers = {**dict.fromkeys(titles, port), "PACS": scp.port}
        timeouts = {**TIMEOUTS, "negotiation_seconds": 0.5}
        deliver({"kind": "sender", "peers": peers, "timeouts": timeouts}, patience={"first_retry_seconds": 2})
        time.sleep(0.2)
        outbox.add(returned("99", "PACS", "99"))
        until(queue.receipts, 15)
        assert scp.times == uids("99")


def test_sender_has_one_association_at_a_time(deliver, outbox: Outbox, scp: StorageScp) -> None:
    queue, most = outbox.queue("sender"), []

    def script(_uid: str, _turn: int) -> int:
        if scp.open_associations() > 1:
            # One that was released a moment ago is still ending.
            time.sleep(0.5)
        most.append(scp.open_associations())
        return 0x0000

    scp.script, scp.answers_in = script, 0.01
    for number in range(40):
        outbox.add(returned(str(number), "PACS", str(number)))
    deliver({"kind": "sender", "peers": {"PACS": scp.port}, "timeouts": TIMEOUTS})
    until(lambda: len(queue.receipts()) == 40)
    assert set(most) == {1}
    # It gives way to other peers now and then, and comes back.
    assert scp.associations > 1
    assert set(scp.times.values()) == {1}


def test_web_service_that_asks_for_a_pause_gets_it(deliver, outbox: Outbox) -> None:
    web, queue = WebServer(), outbox.queue("hook")
    times: list[float] = []

    def script(_request: object, turn: int) -> tuple[int, dict[str, str], bytes]:
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, b"") if turn == 1 else (200, {}, b"")

    web.script = script
    for name in "12":
        outbox.add(parcel(name, "hook", name, items=(Item("summary.json", b"{}"),)))
    deliver({"kind": "webhook", "name": "hook", "url": web.url})
    until(lambda: len(queue.receipts()) == 2)
    assert times[1] - times[0] >= 1
    assert len({request.headers["idempotency-key"] for request in web.requests}) == 2
    web.stop()


def test_web_service_that_is_none_of_stow_keeps_the_results_waiting(deliver, outbox: Outbox) -> None:
    web, queue = WebServer(), outbox.queue("cloud")
    page = (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>")
    web.script = lambda *_: page
    outbox.add(parcel(destination="cloud"))
    deliver({"kind": "stow", "name": "cloud", "url": web.url})
    until(lambda: queue.state(parcel(destination="cloud").id).attempts >= 2)
    (name,) = queue.waiting()
    assert queue.state(name).last_error == "answered 200 with text/html, which does not say what was stored; check the URL"
    # The URL is mended, or the proxy has gone: it goes without anybody replaying it.
    web.script = stored
    until(queue.receipts)
    web.stop()


def test_metrics_tell_what_waits_and_what_became_of_the_rest(deliver, outbox: Outbox, queue, scp, free_port) -> None:
    scp.script = lambda uid, _: 0xC000 if uid.startswith("1.2.2.") else 0x0000
    for name in "12":
        outbox.add(parcel(name, study=name))
    outbox.add(parcel("1", "away"))
    os.utime(outbox.queue("away").root / "waiting" / parcel("1", "away").id / "parcel.json", (time.time() - 90,) * 2)
    registry = CollectorRegistry()
    delivery = deliver(destination(scp.port), destination(free_port(), "away"), metrics=registry)
    pacs, away = delivery.counts["pacs"], delivery.counts["away"]
    until(lambda: pacs["delivered"] and pacs["dead"] and away["failed"])
    value = lambda name, of: registry.get_sample_value(f"cxr_delivery_{name}", {"destination": of})  # noqa: E731
    assert (value("delivered_total", "pacs"), value("delivered_total", "away")) == (1, 0)
    assert (value("waiting", "pacs"), value("waiting", "away")) == (0, 1)
    assert (value("oldest_seconds", "pacs"), 80 < value("oldest_seconds", "away") < 600) == (0, True)
    assert (value("dead_letters", "pacs"), value("given_up_total", "pacs")) == (1, 1)
    assert value("failed_attempts_total", "away") >= 1
    assert b"cxr_delivery_waiting" in generate_latest(registry)
    delivery.stop()
    assert generate_latest(registry) == b""


def test_pauses_double_up_to_the_longest_and_respect_what_is_asked_for() -> None:
    settings = PatienceSettings(first_retry_seconds=1, max_retry_seconds=900, jitter=0)
    assert [pause_seconds(settings, failures) for failures in (1, 2, 3, 10, 11, 10_000)] == [1, 2, 4, 512, 900, 900]
    assert pause_seconds(settings, 1, 120) == 120
    assert pause_seconds(settings, 1, 1e9) == 24 * 3600
    spread = [pause_seconds(PatienceSettings(jitter=0.5), 3) for _ in range(200)]
    assert 4 <= min(spread) < 4.5
    assert 5.5 < max(spread) <= 6


def test_state_of_an_older_version_is_read(queue: DestinationQueue, outbox: Outbox) -> None:
    put: Parcel = parcel()
    outbox.add(put)
    (queue.root / "waiting" / put.id / "state.json").write_text('{"attempts": 4, "something_else": 1}')
    assert queue.state(put.id) == ParcelState(attempts=4)
