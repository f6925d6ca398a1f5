"""Asking archives for earlier studies: real Orthanc by both roads, archives that hang, lie or fail, and the bounds on all."""

import itertools
import logging
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from archives import BadArchive, Orthanc, film, match_of, orthanc, report, until
from fastapi import FastAPI, Request, Response
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from radiographs import file_of

from serve.instance_names import instance_names
from serve.node.priors import Priors
from serve.node.priors_settings import PriorsSettings
from serve.node.spool import Origin, Spool, SpooledInstance
from serve.priors_outcome import PriorsOutcome

# What an answer within the budget may take longer on a machine that does other things too.
SLACK_SECONDS = 5.0


class Service:
    """Stands in for the service where only what it is told matters: its words are those of the real one's description."""

    def __init__(self) -> None:
        self.forget()
        app = FastAPI()

        async def known(request: Request) -> dict:
            self.questions.append(await request.json())
            return {"history_source": self.history_source, "studies": sorted(self.known)}

        async def results(request: Request) -> dict:
            self.results.append(await request.json())
            return {"kept": 1}

        async def instances(request: Request) -> Response:
            form = await request.form()
            assert form["origin"] == "archive"
            self.images.append(await form["image"].read())
            return Response("{}", self.status)

        for path, handler in (("priors/known", known), ("priors/results", results), ("instances", instances)):
            app.add_api_route(f"/v1/{path}", handler, methods=["POST"], response_model=None)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def forget(self) -> None:
        self.history_source, self.known, self.status = "both", set(), 200
        self.questions: list[dict] = []
        self.results: list[dict] = []
        self.images: list[bytes] = []

    def brought(self) -> list[str]:
        """The studies of the images that came, in their order."""
        return [instance_names(image).study_instance_uid for image in self.images]

    @contextmanager
    def running(self) -> Iterator["Service"]:
        self._thread.start()
        until(lambda: self._server.started, "the service's start")
        yield self
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5)


@pytest.fixture(scope="module")
def one_service() -> Iterator[Service]:
    with Service().running() as service:
        yield service


@pytest.fixture
def service(one_service: Service) -> Service:
    one_service.forget()
    return one_service


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc"), free_port) as running:
        yield running


@pytest.fixture
def spooled(tmp_path: Path) -> Callable[[Dataset], SpooledInstance]:
    spool = Spool(tmp_path / "spool")

    def put(instance: Dataset) -> SpooledInstance:
        data = file_of(instance)
        start = 132 + 12 + int.from_bytes(data[140:144], "little")
        origin = Origin(instance.SOPClassUID, instance.SOPInstanceUID, instance.file_meta.TransferSyntaxUID)
        before = set(spool.pending())
        spool.store(data[start:], origin)
        (name,) = set(spool.pending()) - before
        return spool.read(name)

    return put


def by_dicom(port: int, **settings: object) -> PriorsSettings:
    given = {"kind": "dicom", "host": "127.0.0.1", "port": port, "called_ae": "ORTHANC", "budget_seconds": 60}
    return PriorsSettings(**given | settings)


def by_web(url: str, **settings: object) -> PriorsSettings:
    return PriorsSettings(**{"kind": "dicomweb", "url": url, "budget_seconds": 60} | settings)


@pytest.fixture(params=["dicom", "dicomweb"])
def asked(request: pytest.FixtureRequest, archive: Orthanc, service: Service) -> Callable[..., Priors]:
    """Who asks Orthanc, by each road."""

    def build(**settings: object) -> Priors:
        road = by_dicom(archive.dicom_port, **settings) if request.param == "dicom" else by_web(archive.web, **settings)
        return Priors(road, service.url)

    return build


def patient() -> str:
    """A PatientID that no other test has."""
    return f"P{generate_uid()[-10:]}"


def test_earlier_films_are_fetched_newest_first_and_brought_oldest_first(asked, archive, service, spooled) -> None:
    who = patient()
    old, middle, young = (film(who, day) for day in ("20180101", "20190101", "20190601"))
    same_day, later, other = film(who, "20200131"), film(who, "20210101"), film(f"{who}0", "20190101")
    lateral = film(who, "20190301", ViewPosition="LL")
    knee = film(who, "20190302", BodyPartExamined="KNEE", StudyDescription="Knee two views")
    archive.keep(old, middle, young, same_day, later, other, lateral, knee)
    outcome = asked(max_studies=3).before(spooled(film(who)))
    # The lateral one is of the newest three, the oldest not: what a study holds is known when it was looked at.
    assert service.brought() == [middle.StudyInstanceUID, young.StudyInstanceUID]
    assert (outcome.asked, outcome.outcome, outcome.studies, outcome.used) == (True, "found", 3, 2)
    assert outcome.warnings() == ["priors: not every earlier study could be used; predicted with 2 of 3 earlier studies"]
    assert service.questions == [{"patient_id": who, "before": "2020-01-31"}]
    (sent,) = [image for image in service.images if instance_names(image).study_instance_uid == young.StudyInstanceUID]
    assert instance_names(sent).patient_id == who


def test_own_result_is_told_and_its_films_are_not_fetched(asked, archive, service, spooled) -> None:
    who = patient()
    first, second = film(who, "20180101"), film(who, "20190101")
    foreign = report(first, ("Hernia",), manufacturer="Somebody else")
    revised = report(second, ("Mass", "Effusion"), ContentTime="130000")
    archive.keep(first, second, foreign, report(second, ("Edema",)), revised)
    outcome = asked().before(spooled(film(who)))
    assert (outcome.outcome, outcome.studies, outcome.used, outcome.warnings()) == ("found", 2, 2, [])
    assert service.brought() == [first.StudyInstanceUID]
    (told,) = service.results
    expected = {"study_instance_uid": second.StudyInstanceUID, "study_date": "2019-01-01", "findings": ["Effusion", "Mass"]}
    assert told == {"patient_id": who, "results": [expected]}


@pytest.mark.parametrize(("use", "images", "results"), [("images", 1, 0), ("results", 0, 1)])
def test_only_what_is_wanted_is_fetched(asked, archive, service, spooled, use, images, results) -> None:
    who = patient()
    earlier = film(who, "20190101")
    archive.keep(earlier, report(earlier, ("Mass",)))
    outcome = asked(use=use).before(spooled(film(who)))
    assert (outcome.outcome, outcome.used) == ("found", 1)
    assert (len(service.images), len(service.results)) == (images, results)


def test_nobody_earlier_is_no_warning(asked, service, spooled) -> None:
    outcome = asked().before(spooled(film(patient())))
    assert (outcome.asked, outcome.outcome, outcome.warnings()) == (True, "none", [])


def test_what_the_service_knows_is_not_fetched(asked, archive, service, spooled) -> None:
    who = patient()
    known, unknown = film(who, "20180101"), film(who, "20190101")
    archive.keep(known, unknown)
    service.known = {str(known.StudyInstanceUID)}
    outcome = asked().before(spooled(film(who)))
    assert service.brought() == [unknown.StudyInstanceUID]
    assert (outcome.studies, outcome.used) == (2, 2)


def test_an_identifier_beyond_ascii_is_found(archive, service, spooled) -> None:
    # By C-FIND: Orthanc's QIDO-RS (1.7) finds none.
    who = f"Müller-{patient()}"
    archive.keep(film(who, "20190101", SpecificCharacterSet="ISO_IR 192"))
    outcome = Priors(by_dicom(archive.dicom_port), service.url).before(spooled(film(who, SpecificCharacterSet="ISO_IR 192")))
    assert (outcome.outcome, outcome.used) == ("found", 1), outcome


def test_bytes_are_bounded(asked, archive, service, spooled) -> None:
    who = patient()
    noise = film(who, "20190601", Rows=400, Columns=400, PixelData=b"\7" * 160_000)
    archive.keep(noise, film(who, "20190101"))
    outcome = asked(max_bytes=100_000).before(spooled(film(who)))
    assert (outcome.outcome, outcome.studies, outcome.used) == ("found", 2, 0)
    assert service.images == []


def test_a_service_that_uses_no_earlier_answers_costs_no_question(archive, service, spooled, caplog) -> None:
    caplog.set_level(logging.INFO, "serve")
    service.history_source = "confirmed"
    who = patient()
    archive.keep(film(who, "20190101"))
    priors = Priors(by_dicom(archive.dicom_port), service.url)
    outcome = priors.before(spooled(film(who)))
    priors.before(spooled(film(patient())))
    assert (outcome.asked, outcome.outcome, service.images) == (False, "off", [])
    assert "history_source is confirmed" in outcome.warnings()[0]
    assert caplog.text.count("start it with predicted or both") == 1


def test_a_study_is_asked_about_once_and_a_patient_within_a_while(archive, service, spooled) -> None:
    who = patient()
    archive.keep(film(who, "20190101"))
    priors = Priors(by_dicom(archive.dicom_port), service.url)
    new = film(who)
    again = film(who, StudyInstanceUID=new.StudyInstanceUID)
    instances = [spooled(instance) for instance in (new, again, film(who))]
    outcomes: list[PriorsOutcome | None] = []
    threads = [threading.Thread(target=lambda each=each: outcomes.append(priors.before(each))) for each in instances[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes.append(priors.before(instances[2]))
    assert [outcome.outcome for outcome in outcomes] == ["found"] * 3
    assert (len(service.questions), len(service.images)) == (1, 1)
    # Another day has other studies before it.
    assert priors.before(spooled(film(who, "20180101"))).outcome == "none"
    assert len(service.questions) == 2


def test_without_service_nothing_is_said_and_nothing_asked(spooled, free_port) -> None:
    port = free_port()
    priors = Priors(by_dicom(1, budget_seconds=0.5), f"http://127.0.0.1:{port}")
    new = spooled(film())
    assert priors.before(new) is None
    assert priors.before(new) is None


def test_a_service_that_hangs_is_not_the_archives_fault(spooled) -> None:
    with Peer(silent).running() as port:
        priors = Priors(by_dicom(1, budget_seconds=0.5, failures=1), f"http://127.0.0.1:{port}")
        for _ in range(2):
            said = priors.before(spooled(film(patient())))
            assert (said.asked, said.outcome) == (False, "off")
            assert said.reason == "the service did not say in time what it knows"


class Peer:
    """A TCP server whose manners a test chooses; it lets every connection live until it is stopped."""

    def __init__(self, manners: Callable[[socket.socket, threading.Event], None]) -> None:
        self._manners, self._stop = manners, threading.Event()
        self.connections = 0

    def _serve(self, listening: socket.socket) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._treat, args=(connection,), daemon=True).start()

    def _treat(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._manners(connection, self._stop)
        except OSError:
            pass

    @contextmanager
    def running(self) -> Iterator[int]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            threading.Thread(target=self._serve, args=(listening,), daemon=True).start()
            yield int(listening.getsockname()[1])
            self._stop.set()


def silent(_connection: socket.socket, stop: threading.Event) -> None:
    stop.wait()


def dripping(connection: socket.socket, stop: threading.Event) -> None:
    """Half of a PDU that promises 64 KB, byte by byte; for a web client, an answer's body that never ends."""
    first = connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n[" if first[:3] == b"GET" else b"\2\0\0\0\xff\xff")
    while not stop.wait(0.05):
        connection.sendall(b" ")


def dawdling(connection: socket.socket, stop: threading.Event) -> None:
    """A web answer whose header has no end; for DICOM, a peer that takes what it is sent and says nothing."""
    first = connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nA: " if first[:3] == b"GET" else b"")
    while not stop.wait(0.05):
        connection.sendall(b"a" if first[:3] == b"GET" else b"")


def dropping(connection: socket.socket, _stop: threading.Event) -> None:
    connection.recv(65536)


def flooding(connection: socket.socket, stop: threading.Event) -> None:
    """A PDU of 4 GB, or a web page of as much, as fast as it goes."""
    first = connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[" if first[:3] == b"GET" else b"\2\0\xff\xff\xff\xff")
    while not stop.is_set():
        connection.sendall(b" " * 65536)


@pytest.mark.parametrize("road", ["dicom", "dicomweb"])
@pytest.mark.parametrize(
    ("manners", "outcome"),
    [(silent, "timeout"), (dripping, "timeout"), (dawdling, "timeout"), (dropping, "failed"), (flooding, "failed")],
)
def test_a_hostile_peer_costs_no_more_than_the_budget(service, spooled, road, manners, outcome, caplog) -> None:
    caplog.set_level(logging.INFO, "serve")
    new = film(patient())
    with Peer(manners).running() as port:
        settings = {"budget_seconds": 1.0, "failures": 100}
        road = by_dicom(port, **settings) if road == "dicom" else by_web(f"http://127.0.0.1:{port}/dicom-web", **settings)
        priors, begun = Priors(road, service.url), time.monotonic()
        said = priors.before(spooled(new))
        assert time.monotonic() - begun < 1.0 + SLACK_SECONDS
        # Nothing goes on behind the answer, though the peer does.
        running = {"priors", "priors-release"}
        until(lambda: not [each for each in threading.enumerate() if each.name in running], "the threads' end")
    assert (said.asked, said.outcome, said.used) == (True, outcome, 0)
    assert "predicted without its studies" in said.warnings()[0]
    assert new.PatientID not in caplog.text
    assert new.PatientID not in said.model_dump_json()


def test_nobody_listens(service, spooled, free_port) -> None:
    for road in (by_dicom(free_port()), by_web(f"http://127.0.0.1:{free_port()}")):
        said = Priors(road, service.url).before(spooled(film(patient())))
        assert (said.asked, said.outcome) == (True, "failed")


def test_an_archive_that_does_not_know_the_node_has_failed(archive, service, spooled) -> None:
    priors = Priors(by_dicom(archive.dicom_port, calling_ae="STRANGER"), service.url)
    said = priors.before(spooled(film(patient())))
    assert (said.asked, said.outcome) == (True, "failed"), said
    unauthorised = Priors(by_web(f"{archive.web}/nowhere"), service.url).before(spooled(film(patient())))
    assert (unauthorised.outcome, unauthorised.reason) == ("failed", "HTTP 404")


def test_an_archive_that_fails_is_left_alone_for_a_while(service, spooled) -> None:
    peer = Peer(dropping)
    with peer.running() as port:
        priors = Priors(by_dicom(port, failures=2, pause_seconds=1.5), service.url)
        said = [priors.before(spooled(film(patient()))) for _ in range(4)]
        assert [each.outcome for each in said] == ["failed", "failed", "off", "off"]
        assert "left alone" in said[-1].warnings()[0]
        assert peer.connections == 2
        until(lambda: priors.before(spooled(film(patient()))).outcome == "failed", "another try")
        assert peer.connections == 3


@pytest.fixture
def bad() -> Iterator[tuple[BadArchive, int]]:
    archive = BadArchive()
    with archive.running() as port:
        yield archive, port


def scripted(studies: list[Dataset], series: list[Dataset]) -> Callable[[object], Iterator[tuple[int, Dataset | None]]]:
    def find(event) -> Iterator[tuple[int, Dataset | None]]:
        for match in studies if event.identifier.QueryRetrieveLevel == "STUDY" else series:
            yield 0xFF00, match
        yield 0x0000, None

    return find


def series_of(instance: Dataset, **changes: object) -> Dataset:
    return match_of(instance, SeriesInstanceUID=instance.SeriesInstanceUID, Modality="CR", **changes)


def test_pending_for_ever_ends_with_the_budget(bad, service, spooled) -> None:
    archive, port = bad

    def find(_event) -> Iterator[tuple[int, Dataset | None]]:
        while not archive.stopping.wait(0.05):
            yield 0xFF00, match_of(film("P1", "20190101"))

    archive.find = find
    begun = time.monotonic()
    said = Priors(by_dicom(port, called_ae="ARCHIVE", budget_seconds=1), service.url).before(spooled(film("P1")))
    assert time.monotonic() - begun < 1 + SLACK_SECONDS
    assert (said.outcome, said.used) == ("timeout", 0)


def test_too_many_matches_are_no_answer(bad, service, spooled) -> None:
    archive, port = bad
    match = match_of(film("P1", "20190101"))
    archive.find = lambda _: itertools.repeat((0xFF00, match))
    said = Priors(by_dicom(port, called_ae="ARCHIVE", max_matches=50), service.url).before(spooled(film("P1")))
    assert (said.outcome, said.reason) == ("failed", "C-FIND has more than 50 matches")
    assert archive.gotten == 0


def test_who_was_not_asked_for_is_not_taken(bad, service, spooled) -> None:
    archive, port = bad
    other, born, issued = film("P2", "20190101"), film("P1", "20190102"), film("P1", "20190103")
    same_day, undated, right = film("P1", "20200131"), film("P1", ""), film("P1", "20190104")
    matches = [
        *(match_of(other), match_of(born, PatientBirthDate="19990101"), match_of(issued, IssuerOfPatientID="elsewhere")),
        *(match_of(same_day), match_of(undated), match_of(right, PatientBirthDate="", IssuerOfPatientID="")),
    ]
    archive.find = scripted(matches, [series_of(right)])
    # What is sent for the one that counts: of another patient, of another study, of another day, and what was asked for.
    study = {"StudyInstanceUID": right.StudyInstanceUID}
    archive.films = [film("P2", "20190104", **study), film("P1", "20190104"), film("P1", "20190105", **study), right]
    new = film("P1", PatientBirthDate="19500101", IssuerOfPatientID="here")
    said = Priors(by_dicom(port, called_ae="ARCHIVE"), service.url).before(spooled(new))
    assert (said.outcome, said.studies, said.used) == ("found", 1, 1), said
    assert [instance_names(image).sop_instance_uid for image in service.images] == [right.SOPInstanceUID]
    asked = archive.asked[0]
    assert (asked.PatientID, asked.StudyDate) == ("P1", "-20200130")


def test_an_archive_that_refuses_to_look_has_failed(bad, service, spooled) -> None:
    archive, port = bad
    archive.find = lambda _: iter([(0xA700, None)])
    said = Priors(by_dicom(port, called_ae="ARCHIVE"), service.url).before(spooled(film("P1")))
    assert (said.outcome, said.reason) == ("failed", "C-FIND answered 0xa700")


def test_an_archive_that_aborts_has_failed(bad, service, spooled) -> None:
    archive, port = bad

    def find(event) -> Iterator[tuple[int, Dataset | None]]:
        event.assoc.abort()
        yield 0xFF00, None

    archive.find = find
    said = Priors(by_dicom(port, called_ae="ARCHIVE"), service.url).before(spooled(film("P1")))
    assert (said.outcome, said.used) == ("failed", 0)


@pytest.mark.parametrize("name", ["", "*", "P?", "A\\B", "P*1"])
def test_an_identifier_that_could_find_others_is_not_asked(name, service, spooled) -> None:
    instance = film()
    # As a peer may send it; pydicom itself takes a backslash for two values.
    instance.PatientID = name.split("\\") if "\\" in name else name
    priors = Priors(by_dicom(1), service.url)
    said = priors.before(spooled(instance))
    assert (said.asked, said.outcome) == (False, "off")
    assert "was not asked (the film" in said.warnings()[0]
    assert service.questions == []


def test_no_study_date_is_not_asked(service, spooled) -> None:
    said = Priors(by_dicom(1), service.url).before(spooled(film("P1", "")))
    assert (said.asked, said.reason) == (False, "the film has no study date")


def test_what_is_not_answered_asks_nothing(service, spooled) -> None:
    priors = Priors(by_dicom(1), service.url)
    for unusable in (film("P1", ViewPosition="LL"), film("P1", BodyPartExamined="KNEE"), film("P1", Modality="CT")):
        assert priors.before(spooled(unusable)) is None
    assert service.questions == []


def test_archive_over_tls(tmp_path: Path, service: Service, spooled) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=archive -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, capture_output=True, check=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    archive = BadArchive()
    earlier = film("P1", "20190101")
    archive.find, archive.films = scripted([match_of(earlier)], [series_of(earlier)]), [earlier]
    with archive.running(context) as port:
        known = by_dicom(port, called_ae="ARCHIVE", tls=True, tls_ca=tmp_path / "cert.pem")
        assert Priors(known, service.url).before(spooled(film("P1"))).used == 1
        for stranger in (by_dicom(port, called_ae="ARCHIVE", tls=True), by_dicom(port, called_ae="ARCHIVE", budget_seconds=2)):
            said = Priors(stranger, service.url).before(spooled(film("P1")))
            assert (said.outcome in {"failed", "timeout"}, said.used) == (True, 0)
