"""The results of a study's revision, made for every destination and put into the outbox, once each."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol, cast, get_args

from pydicom.dataset import Dataset

from serve.node.destinations import Destination, DicomDestination, SenderDestination, StowDestination, WebhookDestination
from serve.node.parcels import Item, Parcel, StudyOrigin
from serve.node.results.json_summary import json_summary
from serve.node.results.result_uids import ResultUids, result_uids
from serve.node.results.secondary_capture import secondary_capture
from serve.node.results.settings import ResultSettings
from serve.node.results.structured_report import structured_report
from serve.node.results.study_answer import Predecessor, ResultType, StudyAnswer
from serve.node.spool import Spool
from serve.node.study_ledger import Plan, Reference
from serve.node.study_record import Drawings, read_image

_CAPTURE: ResultType = "secondary-capture"
_KNOWN: frozenset[str] = frozenset(get_args(ResultType))

_log = logging.getLogger(__name__)


class TakesParcels(Protocol):
    """What keeps parcels until they are delivered."""

    def add(self, parcel: Parcel) -> bool:
        """See `serve.node.outbox.Outbox.add`."""
        ...


@dataclass(frozen=True)
class Made:
    """A revision's results: DICOM objects by kind, and the summary."""

    objects: dict[ResultType, Dataset]
    summary: bytes


class StudyResults:
    """Makes what the destinations want of a study, and hands it over.

    Parameters
    ----------
    spool
        Where answered instances lie.
    drawings
        The pictures that the service draws.
    outbox
        Takes the parcels.
    destinations
        Where results go.
    settings
        What results say of this deployment.
    """

    def __init__(
        self,
        spool: Spool,
        drawings: Drawings,
        outbox: TakesParcels,
        destinations: Sequence[Destination],
        settings: ResultSettings,
    ) -> None:
        self._spool, self._drawings, self._outbox = spool, drawings, outbox
        self._destinations, self._settings = tuple(destinations), settings

    def hand_over(self, study: str, plan: Plan, predecessors: dict[str, Reference]) -> dict[str, Reference]:
        """See `serve.node.assembly.ResultMaker.hand_over`."""
        made = self._make(plan, predecessors)
        encoded = {kind: _encoded(dataset) for kind, dataset in made.objects.items()}
        origins = self._origins(plan)
        # All is made before anything is handed over: what cannot be made leaves nothing half sent.
        for destination in self._destinations:
            items = _items(destination, encoded, made.summary)
            addressees = _addressees(destination, origins)
            for origin in addressees:
                self._outbox.add(_parcel(destination.name, study, plan.revision, items, origin))
            if not addressees:
                words = "study %s: none of its images came by C-STORE: destination %s has nobody to return its results to"
                _log.info(words, study, destination.name)
        replaced = {kind: reference for kind, reference in predecessors.items() if kind not in made.objects}
        return {**replaced, **{str(kind): _reference(dataset) for kind, dataset in made.objects.items()}}

    def _make(self, plan: Plan, predecessors: dict[str, Reference]) -> Made:
        answer = StudyAnswer(
            images=tuple(read_image(self._spool, name) for name in plan.instances),
            revision=plan.revision,
            predecessors={
                cast(ResultType, kind): Predecessor(**reference.model_dump())
                for kind, reference in predecessors.items()
                if kind in _KNOWN
            },
        )
        wanted = self._wanted()
        objects = {kind: self._object(answer, kind) for kind in wanted}
        uids: dict[ResultType, ResultUids] = {kind: result_uids(answer, kind) for kind in wanted}
        summary = json.dumps(json_summary(answer, uids), ensure_ascii=False, sort_keys=True)
        return Made(objects, summary.encode())

    def _wanted(self) -> list[ResultType]:
        """The kinds of objects that destinations want, each once."""
        kinds: dict[ResultType, None] = {}
        for destination in self._destinations:
            if not isinstance(destination, WebhookDestination):
                kinds.update(dict.fromkeys(_kinds(destination).values()))
        return list(kinds)

    def _object(self, answer: StudyAnswer, kind: ResultType) -> Dataset:
        if kind != "secondary-capture":
            return structured_report(answer, kind, self._settings)
        leading = answer.leading
        radiograph = self._drawings.radiograph(leading.image.header)
        heatmap = self._drawings.heatmap(leading.image.header, leading.answer.name)
        return secondary_capture(answer, radiograph, heatmap, leading.answer.name, self._settings)

    def _origins(self, plan: Plan) -> list[StudyOrigin]:
        """Who sent the images of a revision, each once; a client that brought them over HTTP is no application entity."""
        found: dict[StudyOrigin, None] = {}
        for name in plan.instances:
            instance = self._spool.answers.instance(name)
            if instance.peer_address and instance.peer_scheme == "dicom":
                found[StudyOrigin(calling_ae=instance.calling_ae or "", address=instance.peer_address)] = None
        return list(found)


def _kinds(destination: DicomDestination | StowDestination | SenderDestination) -> dict[str, ResultType]:
    """What a destination wants, by the names that its settings have for it."""
    kinds: dict[str, ResultType] = {"sr": destination.sr_class, "sc": _CAPTURE}
    return {result: kinds[result] for result in destination.results}


def _addressees(destination: Destination, origins: list[StudyOrigin]) -> list[StudyOrigin | None]:
    """To whom a destination's parcels go: each peer gets one, from however many addresses it sent."""
    if not isinstance(destination, SenderDestination):
        return [None]
    peers: dict[object, StudyOrigin | None] = {}
    for origin in origins:
        place = destination.port_of(origin.calling_ae, origin.address)
        peers.setdefault((origin.calling_ae, place), origin)
    return list(peers.values())


def _items(destination: Destination, encoded: dict[ResultType, bytes], summary: bytes) -> tuple[Item, ...]:
    if isinstance(destination, WebhookDestination):
        return (Item("summary.json", summary),)
    return tuple(Item(f"{result}.dcm", encoded[kind]) for result, kind in _kinds(destination).items())


def _parcel(destination: str, study: str, revision: int, items: tuple[Item, ...], origin: StudyOrigin | None) -> Parcel:
    # What a study's revision is made of is planned once, so that these name it.
    parts = [destination, study, str(revision), *((origin.calling_ae, origin.address) if origin else ())]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return Parcel(name, destination, study, revision, items, origin)


def _encoded(dataset: Dataset) -> bytes:
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _reference(dataset: Dataset) -> Reference:
    return Reference(
        sop_class_uid=str(dataset.SOPClassUID),
        sop_instance_uid=str(dataset.SOPInstanceUID),
        series_instance_uid=str(dataset.SeriesInstanceUID),
        study_instance_uid=str(dataset.StudyInstanceUID),
    )
