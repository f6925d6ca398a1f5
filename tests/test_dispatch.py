"""The dispatcher against a real HTTP server that answers as scripted: answers, refusals, patience, kills at any point.

The server stands in for the service here only: it shows statuses that the real one seldom does.
"""

import asyncio
import hashlib
import inspect
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path

import pydicom
import pytest
import uvicorn
from conftest import require_program, run_peer
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from cxr_ray.errors import UsageError
from serve.node.dispatch import Dispatcher, DispatchSettings
from serve.node.spool import Origin, Spool
from serve.store import Store

ROOT = Path(__file__).resolve().parents[1]
CR = "1.2.840.10008.5.1.4.1.1.1"
GOOD = {
    "model": {"name": "multi-input", "version": "1.0", "digest": "m1"},
    "findings": [
        {"name": f"Finding {number}", "probability": number / 20, "threshold": 0.5, "positive": number > 10}
        for number in range(14)
    ],
    "clinical": {"age": 61, "sex": "F", "view": "PA", "history": [], "missing": ["history"]},
    "warnings": ["no history"],
}
Script = Callable[[int], Response | Awaitable[Response]]


def good() -> Response:
    return JSONResponse(GOOD)


def problem(status: int, **headers: str) -> Response:
    content = {"title": "no", "status": status, "detail": "lateral view: send a frontal one"}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


class Service:
    """Answers the n-th request for an instance with ``script(n)``; remembers when and what was asked."""

    def __init__(self) -> None:
        self.forget()
        app = FastAPI()

        async def predict(request: Request) -> Response:
            form = await request.form()
            image = form["image"]
            assert image.content_type == "application/dicom"
            turns = self.asked.setdefault(image.filename, [])
            turns.append(time.monotonic())
            self.order.append(image.filename)
            self.bodies[image.filename] = await image.read()
            self.authorization.add(request.headers.get("authorization"))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                answer = self.script(len(turns))
                return await answer if inspect.isawaitable(answer) else answer
            finally:
                self.at_once -= 1

        app.add_api_route("/v1/predict", predict, methods=["POST"], response_model=None)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._app = app
        self.url = f"http://127.0.0.1:{self.port}"

    def forget(self) -> None:
        self.script: Script = lambda _: good()
        self.asked: dict[str, list[float]] = {}
        self.bodies: dict[str, bytes] = {}
        self.authorization: set[str | None] = set()
        self.order: list[str] = []
        self.at_once = self.most_at_once = 0

    def start(self) -> None:
        config = uvicorn.Config(self._app, host="127.0.0.1", port=self.port, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5)

    @property
    def count(self) -> int:
        return sum(map(len, self.asked.values()))


@pytest.fixture(scope="module")
def running():
    service = Service()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def service(running: Service) -> Service:
    running.forget()
    return running


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def store(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path / 'results.db'}")
    yield store
    store.close()


@pytest.fixture
def dispatch(service: Service, spool: Spool, store: Store):
    started: list[Dispatcher] = []

    def start(**settings: object) -> Dispatcher:
        defaults = {"service_url": service.url, "first_retry_seconds": 0.05, "poll_seconds": 0.05, "jitter": 0}
        started.append(Dispatcher(DispatchSettings(**{**defaults, **settings}), spool, store))
        started[-1].start()
        return started[-1]

    yield start
    for dispatcher in started:
        dispatcher.stop()


def put(spool: Spool, uid: str | None = None, patient: str = "P1") -> str:
    uid = uid or generate_uid()
    content = Dataset()
    content.SOPClassUID, content.SOPInstanceUID = CR, uid
    content.StudyInstanceUID, content.SeriesInstanceUID = "1.2", "1.2.3"
    content.PatientName, content.PatientID = "Doe^Jane", patient
    encoded = pydicom.filebase.DicomBytesIO()
    encoded.is_implicit_VR, encoded.is_little_endian = False, True
    pydicom.filewriter.write_dataset(encoded, content)
    before = set(spool.pending())
    spool.store(encoded.getvalue(), Origin(CR, uid, str(ExplicitVRLittleEndian), "PACS"))
    (name,) = set(spool.pending()) - before
    return name


def until(condition: Callable[[], object], seconds: float = 8) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def settled(spool: Spool) -> Callable[[], bool]:
    return lambda: spool.pending() == []


def done(spool: Spool) -> list[str]:
    return sorted(path.name for path in (spool.root / "done").iterdir())


def test_instance_is_answered_stored_and_done(dispatch, service: Service, spool: Spool, store: Store) -> None:
    name = put(spool, "1.2.3.4")
    sent = spool.path(name).read_bytes()
    dispatch(token="secret\n")
    until(settled(spool))
    assert done(spool) == [name]
    assert service.bodies == {name: sent}
    assert service.authorization == {"Bearer secret"}
    study = store.study("1.2")
    (instance,) = study.instances
    assert (instance.status, instance.sop_instance_uid, instance.calling_ae) == ("answered", "1.2.3.4", "PACS")
    assert study.patient_id == "P1"
    answer = instance.answer
    assert (answer.model_name, answer.model_version, answer.model_digest) == ("multi-input", "1.0", "m1")
    assert [finding.probability for finding in answer.findings] == [number / 20 for number in range(14)]
    assert (answer.clinical, answer.warnings) == (GOOD["clinical"], ("no history",))


def test_notification_cuts_the_poll_short(dispatch, service: Service, spool: Spool) -> None:
    dispatcher = dispatch(poll_seconds=60)
    time.sleep(0.2)
    put(spool)
    dispatcher.notify()
    until(settled(spool), 3)


def test_oldest_first_and_not_more_at_once_than_set(dispatch, service: Service, spool: Spool) -> None:
    names = [put(spool) for _ in range(6)]
    for age, name in enumerate(names):
        os.utime(spool.path(name), (1000 - age, 1000 - age))
    dispatch(concurrency=1)
    until(settled(spool))
    assert service.order == names[::-1]
    assert service.most_at_once == 1


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_permanent_refusal_is_recorded_and_can_be_replayed(
    dispatch, service: Service, spool: Spool, store: Store, status: int
) -> None:
    service.script = lambda turn: problem(status) if turn == 1 else good()
    name = put(spool, "1.2.3.4")
    dispatch()
    until(spool.dead_letters)
    (letter,) = spool.dead_letters()
    assert (letter.name, letter.status, letter.attempts) == (name, status, 1)
    assert letter.reason == "lateral view: send a frontal one"
    assert (letter.sop_instance_uid, letter.study_instance_uid) == ("1.2.3.4", "1.2")
    (instance,) = store.study("1.2").instances
    assert (instance.status, instance.reason) == ("refused", letter.reason)
    spool.replay(name)
    until(lambda: done(spool) == [name])
    (instance,) = store.study("1.2").instances
    assert (instance.status, instance.reason) == ("answered", None)
    assert service.count == 2


@pytest.mark.parametrize("status", [301, 401, 403, 404, 429, 500, 502, 503, 504])
def test_passing_trouble_keeps_the_instance_until_it_is_over(
    dispatch, service: Service, spool: Spool, store: Store, status: int, caplog
) -> None:
    service.script = lambda turn: problem(status) if turn < 4 else good()
    name = put(spool)
    with caplog.at_level(logging.INFO):
        dispatch()
        until(lambda: service.count >= 2)
        assert spool.pending() == [name]
        until(lambda: f"{name}: answered" in caplog.text)
    assert done(spool) == [name]
    assert spool.dead_letters() == []
    assert service.count == 4
    # One line for the change to waiting, one for the answer; none per attempt.
    assert [record.message for record in caplog.records if name in record.message] == [
        f"{name}: waiting; the service answers {status}",
        f"{name}: answered",
    ]
    assert "Doe" not in caplog.text


def test_pauses_double_up_to_the_longest(dispatch, service: Service, spool: Spool) -> None:
    service.script = lambda turn: problem(500) if turn < 6 else good()
    name = put(spool)
    dispatch(first_retry_seconds=0.1, max_retry_seconds=0.4, poll_seconds=5)
    until(settled(spool))
    times = service.asked[name]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    for pause, wanted in zip(pauses, (0.1, 0.2, 0.4, 0.4, 0.4), strict=True):
        assert wanted <= pause < wanted + 0.25


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(dispatch, service: Service, spool: Spool, form: str) -> None:
    value = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2.5), usegmt=True)
    service.script = lambda turn: problem(503, **{"Retry-After": value}) if turn == 1 else good()
    name = put(spool)
    dispatch()
    until(settled(spool))
    first, second = service.asked[name]
    assert second - first >= 1.0


def test_one_that_waits_does_not_hold_up_the_others(dispatch, service: Service, spool: Spool, store: Store) -> None:
    first = put(spool)
    os.utime(spool.path(first), (1000, 1000))
    service.script = lambda _: problem(500) if service.order[-1] == first else good()
    for _ in range(5):
        put(spool)
    dispatch(concurrency=1)
    until(lambda: spool.pending() == [first])
    assert len(done(spool)) == 5


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        JSONResponse({**GOOD, "findings": []}).body,
        JSONResponse({**GOOD, "findings": [{**GOOD["findings"][0], "probability": 1.5}]}).body,
    ],
)
def test_malformed_answer_is_the_services_fault(dispatch, service: Service, spool: Spool, body: bytes) -> None:
    service.script = lambda turn: Response(body, 200) if turn < 3 else good()
    name = put(spool)
    dispatch()
    until(settled(spool))
    assert done(spool) == [name]


def test_service_that_is_down_or_slow_is_waited_for(dispatch, spool: Spool, store: Store) -> None:
    async def late() -> Response:
        await asyncio.sleep(1)
        return good()

    service = Service()
    name = put(spool)
    dispatch(service_url=service.url, timeout_seconds=0.3, max_retry_seconds=0.2)
    time.sleep(0.5)
    assert spool.pending() == [name]
    service.script = lambda turn: late() if turn < 3 else good()
    service.start()
    until(settled(spool))
    assert done(spool) == [name]
    assert service.count == 3
    assert len(store.study("1.2").instances) == 1
    service.stop()


def test_other_bytes_under_an_answered_uid_are_a_dead_letter(dispatch, service: Service, spool: Spool, store: Store) -> None:
    service.script = lambda turn: problem(500) if turn < 3 else good()
    first, second = put(spool, "1.2.3.4"), put(spool, "1.2.3.4", patient="P2")
    os.utime(spool.path(first), (1000, 1000))
    dispatch(concurrency=2)
    until(settled(spool))
    # Though the first had to wait, the second did not overtake it, nor was it ever sent.
    assert list(service.asked) == [first]
    assert done(spool) == [first]
    (letter,) = spool.dead_letters()
    assert letter.name == second
    assert letter.reason == "instance 1.2.3.4 was received before with other bytes"
    assert store.content_digest("1.2.3.4") == first[33:49]


def test_unreadable_file_is_a_dead_letter(dispatch, service: Service, spool: Spool) -> None:
    spool.path("broken.dcm").write_bytes(b"no DICOM")
    dispatch()
    until(spool.dead_letters)
    assert "not readable as DICOM" in spool.dead_letters()[0].reason
    assert service.count == 0


def test_crash_after_commit_needs_no_second_question(dispatch, service: Service, spool: Spool) -> None:
    name = put(spool)
    dispatcher = dispatch()
    until(settled(spool))
    dispatcher.stop()
    (spool.root / "done" / name).rename(spool.path(name))
    dispatch()
    until(settled(spool))
    assert service.count == 1
    assert done(spool) == [name]


def test_store_that_fails_loses_nothing(service: Service, spool: Spool, tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'fragile.db'}")
    with sqlite3.connect(tmp_path / "fragile.db") as raw:
        raw.execute("alter table result rename to hidden")
    name = put(spool)
    settings = DispatchSettings(service_url=service.url, first_retry_seconds=0.05, max_retry_seconds=0.1)
    with Dispatcher(settings, spool, store):
        until(lambda: service.count >= 2)
        assert spool.pending() == [name]
        with sqlite3.connect(tmp_path / "fragile.db") as raw:
            raw.execute("alter table hidden rename to result")
        until(settled(spool))
    assert len(store.study("1.2").instances) == 1
    store.close()


def test_second_dispatcher_waits_and_takes_over(dispatch, service: Service, spool: Spool, caplog) -> None:
    with caplog.at_level(logging.INFO):
        first = dispatch()
        until(first._thread.is_alive)
        put(spool)
        until(settled(spool))
        dispatch()
        until(lambda: "waiting for its lock" in caplog.text)
    first.stop()
    put(spool)
    until(settled(spool))
    assert service.count == 2


def test_bad_url_is_named(spool: Spool, store: Store) -> None:
    with pytest.raises(UsageError, match="service_url 'http://a:b:c'"):
        Dispatcher(DispatchSettings(service_url="http://a:b:c"), spool, store).start()
    with pytest.raises(ValueError, match="service_url"):
        DispatchSettings(service_url="localhost:8000")


LISTENER = """
import sys, time
from itertools import pairwise
from pathlib import Path
from serve.node.listener import Listener, ListenerSettings
from serve.node.spool import Spool
with Listener(ListenerSettings(port=0, min_free_bytes=0), Spool(Path(sys.argv[1]))) as listener:
    print(listener.port, flush=True)
    time.sleep(60)
"""
DISPATCHER = """
import sys, time
from itertools import pairwise
from pathlib import Path
from serve.node.dispatch import Dispatcher, DispatchSettings
from serve.node.spool import Spool
from serve.store import Store
settings = DispatchSettings(service_url=sys.argv[3], poll_seconds=0.05, concurrency=4, first_retry_seconds=0.05)
with Dispatcher(settings, Spool(Path(sys.argv[1])), Store(sys.argv[2])):
    time.sleep(60)
"""


@pytest.mark.system
def test_killed_between_promise_and_answer_is_answered_once(
    dispatch, service: Service, spool: Spool, store: Store, tmp_path: Path
) -> None:
    require_program("storescu")
    paths = []
    for _ in range(5):
        content = Dataset()
        content.SOPClassUID, content.SOPInstanceUID = CR, generate_uid()
        content.StudyInstanceUID, content.SeriesInstanceUID = "1.2", "1.2.3"
        content.file_meta = FileMetaDataset()
        content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(tmp_path / f"{content.SOPInstanceUID}.dcm")
        content.save_as(paths[-1], enforce_file_format=True)
    listener = subprocess.Popen([sys.executable, "-c", LISTENER, spool.root], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    port = listener.stdout.readline().strip()
    run_peer("storescu", "-aec", "CXRRAY", "127.0.0.1", port, *paths).check_returncode()
    listener.send_signal(signal.SIGKILL)
    listener.wait()
    dispatch()
    until(settled(spool))
    assert {instance.sop_instance_uid for instance in store.study("1.2").instances} == {path.stem for path in paths}
    assert service.count == 5
    assert len(done(spool)) == 5


@pytest.mark.system
def test_dispatcher_killed_again_and_again_answers_each_once(
    service: Service, spool: Spool, store: Store, tmp_path: Path
) -> None:
    names = {put(spool) for _ in range(40)}
    command = [sys.executable, "-c", DISPATCHER, spool.root, f"sqlite:///{tmp_path / 'results.db'}", service.url]
    kills = 0
    while spool.pending():
        before = service.count
        process = subprocess.Popen(command, cwd=ROOT)
        # Killed while it works, at another point each time.
        until(lambda: service.count >= before + 8 + kills or not spool.pending())  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert set(done(spool)) == names
    instances = store.study("1.2").instances
    assert len(instances) == 40
    assert {instance.status for instance in instances} == {"answered"}
    known = {hashlib.sha256(instance.sop_instance_uid.encode()).hexdigest()[:32] for instance in instances}
    assert known == {re.split("-", name)[0] for name in names}
