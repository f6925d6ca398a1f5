"""The account of a campaign: what was promised against what is there. Pure: a record goes in, what is wrong with it comes out.

The promise, image by image: what was answered 0x0000 is in one place of the spool. Where that is ``done/``, every destination
has it in exactly one result object of each kind for each revision of its study that holds it; where it is ``dead/`` or
``conflicts/``, no destination has it. What was never answered 0x0000 may have come through whole or not at all.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

_SETTLED = ("done", "dead", "conflicts")


@dataclass(frozen=True)
class Sent:
    """One image as its sender knows it; `version` tells other bytes under the same UID apart.

    Of the `attempts`, so many were answered 0x0000, and so many otherwise; the rest got no answer.
    """

    sop_instance_uid: str
    version: int
    study_instance_uid: str
    course: str
    client: str
    attempts: int
    successes: int
    refusals: int = 0


@dataclass(frozen=True)
class Kept:
    """A file of the spool that holds an image."""

    sop_instance_uid: str
    version: int
    folder: str


@dataclass(frozen=True)
class Result:
    """A result object at a destination; `digests` of its bytes, one where it always came alike."""

    destination: str
    sop_instance_uid: str
    kind: str
    study_instance_uid: str
    revision: int
    references: tuple[str, ...]
    predecessors: tuple[str, ...]
    times: int = 1
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeadResult:
    """A parcel of results that a destination would not have, for good."""

    destination: str
    name: str
    study_instance_uid: str


@dataclass
class Record:
    """All that is known after a campaign.

    Attributes
    ----------
    rows
        How many results the service's store has for each SOP Instance UID.
    wanted
        The kinds of result objects that each destination is to have.
    leftovers
        What should be gone, in words.
    """

    sent: list[Sent] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    dead_results: list[DeadResult] = field(default_factory=list)
    wanted: dict[str, tuple[str, ...]] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        """The record as a text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """The record that `as_json` wrote."""
        read: dict[str, Any] = json.loads(text)
        return cls(
            sent=[Sent(**entry) for entry in read["sent"]],
            kept=[Kept(**entry) for entry in read["kept"]],
            rows=read["rows"],
            results=[
                Result(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})
                for entry in read["results"]
            ],
            dead_results=[DeadResult(**entry) for entry in read["dead_results"]],
            wanted={name: tuple(kinds) for name, kinds in read["wanted"].items()},
            leftovers=read["leftovers"],
        )


@dataclass(frozen=True)
class Account:
    """The counts of a campaign, and each thing that is wrong, in words; it balances where there is none."""

    counts: dict[str, int]
    problems: dict[str, list[str]]

    @property
    def balances(self) -> bool:
        """Whether nothing is lost, nothing twice and nothing left over."""
        return not any(self.problems.values())


def balance(record: Record) -> Account:
    """Count, and find what is wrong."""
    places: dict[tuple[str, int], list[str]] = defaultdict(list)
    for kept in record.kept:
        places[kept.sop_instance_uid, kept.version].append(kept.folder)
    problems = {
        "lost": [*_lost_images(record, places), *_lost_results(record, places)],
        "twice": [*_images_twice(record, places), *_results_twice(record)],
        "wrong": [*_wrong(record, places), *_revisions_wrong(record)],
        "unfinished": [f"image {uid} version {version} is in {'/, '.join(found)}/" for (uid, version), found in places.items()
                       if not set(found) <= set(_SETTLED)],
        "left over": list(record.leftovers),
    }  # fmt: skip
    return Account(_counts(record, places), problems)


def _counts(record: Record, places: dict[tuple[str, int], list[str]]) -> dict[str, int]:
    promised = [sent for sent in record.sent if sent.successes]
    ends = Counter(places[sent.sop_instance_uid, sent.version][0] for sent in promised if places.get(_key(sent)))
    unpromised = [sent for sent in record.sent if not sent.successes]
    there = sum(bool(places.get(_key(sent))) for sent in unpromised)
    counts = {
        "studies": len({sent.study_instance_uid for sent in record.sent}),
        "images sent": len(record.sent),
        "attempts": sum(sent.attempts for sent in record.sent),
        "of them: refused by a status": sum(sent.refusals for sent in record.sent),
        "of them: without an answer": sum(sent.attempts - sent.successes - sent.refusals for sent in record.sent),
        "images answered 0x0000": len(promised),
        "of them: answered by the service": ends["done"],
        "of them: dead letters": ends["dead"],
        "of them: kept aside as conflicts": ends["conflicts"],
        "images never answered 0x0000": len(unpromised),
        "of them: there all the same, whole": there,
    }
    for destination, kinds in record.wanted.items():
        here = [result for result in record.results if result.destination == destination]
        for kind in kinds:
            counts[f"{destination}: {kind.upper()} objects"] = sum(result.kind == kind for result in here)
        counts[f"{destination}: of them revisions"] = sum(result.revision > 1 for result in here)
        # Only a journal knows; an archive shows each object once.
        if any(result.digests for result in here):
            counts[f"{destination}: identical ones sent again"] = sum(result.times - 1 for result in here)
        counts[f"{destination}: dead letters"] = sum(dead.destination == destination for dead in record.dead_results)
    return counts


def _lost_images(record: Record, places: dict[tuple[str, int], list[str]]) -> Iterator[str]:
    for sent in record.sent:
        if sent.successes and not places.get(_key(sent)):
            yield f"image {sent.sop_instance_uid} version {sent.version} was answered 0x0000 and is nowhere ({_told(sent)})"


def _lost_results(record: Record, places: dict[tuple[str, int], list[str]]) -> Iterator[str]:
    referring: Counter[tuple[str, str, str]] = Counter()
    for result in record.results:
        for uid in result.references:
            referring[result.destination, result.kind, uid] += 1
    study = {sent.sop_instance_uid: sent.study_instance_uid for sent in record.sent}
    dead = {(dead.destination, dead.study_instance_uid) for dead in record.dead_results}
    for uid in sorted({uid for (uid, _), found in places.items() if "done" in found}):
        if not record.rows.get(uid):
            yield f"image {uid} is answered, and the service's store has no result of it"
        for destination, kinds in record.wanted.items():
            for kind in kinds:
                if not referring[destination, kind, uid] and (destination, study.get(uid)) not in dead:
                    yield f"image {uid} is answered, and {destination} has no {kind.upper()} of it"


def _images_twice(record: Record, places: dict[tuple[str, int], list[str]]) -> Iterator[str]:
    for (uid, version), found in places.items():
        if len(found) > 1:
            yield f"image {uid} version {version} is in the spool {len(found)} times: {', '.join(sorted(found))}"
    for uid, rows in record.rows.items():
        if rows > 1:
            yield f"image {uid} has {rows} results in the service's store"


def _results_twice(record: Record) -> Iterator[str]:
    same: dict[tuple[str, str, str, int], list[Result]] = defaultdict(list)
    for result in record.results:
        same[result.destination, result.study_instance_uid, result.kind, result.revision].append(result)
    for (destination, study, kind, revision), found in same.items():
        if len(found) > 1:
            uids = ", ".join(sorted(result.sop_instance_uid for result in found))
            yield f"{destination} has {len(found)} {kind.upper()} of revision {revision} of study {study}: {uids}"
    for result in record.results:
        if len(result.digests) > 1:
            yield f"{result.destination} was sent {len(result.digests)} different objects under UID {result.sop_instance_uid}"


def _wrong(record: Record, places: dict[tuple[str, int], list[str]]) -> Iterator[str]:
    """Results of what should have none, and what nobody sent."""
    known = {sent.sop_instance_uid: sent.study_instance_uid for sent in record.sent}
    sent = {_key(image) for image in record.sent}
    answered = {uid for (uid, _), found in places.items() if "done" in found}
    for uid, version in places.keys() - sent:
        yield f"image {uid} version {version} is in the spool, and nobody sent it"
    for result in record.results:
        where = f"{result.destination}: {result.kind.upper()} {result.sop_instance_uid}"
        if result.kind not in record.wanted.get(result.destination, ()):
            yield f"{where} is of a kind that was not asked for"
        if not result.references:
            yield f"{where} refers to no image"
        for uid in result.references:
            if known.get(uid) != result.study_instance_uid:
                yield f"{where} refers to {uid}, which is no image of its study"
            elif uid not in answered:
                yield f"{where} refers to {uid}, which was not answered"


def _revisions_wrong(record: Record) -> Iterator[str]:
    """Each revision holds what the one before it held and more; a report names its predecessor."""
    series: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in record.results:
        series[result.destination, result.study_instance_uid, result.kind].append(result)
    for (destination, study, kind), found in series.items():
        where = f"{destination}: {kind.upper()} of study {study}"
        ordered = sorted(found, key=lambda result: result.revision)
        if [result.revision for result in ordered] != list(range(1, len(ordered) + 1)):
            yield f"{where} has the revisions {', '.join(str(result.revision) for result in ordered)}"
        for earlier, later in pairwise(ordered):
            if not set(earlier.references) < set(later.references):
                yield f"{where}: revision {later.revision} holds no image that {earlier.revision} did not, or lacks one of it"
            if kind == "sr" and later.predecessors != (earlier.sop_instance_uid,):
                yield f"{where}: revision {later.revision} does not name revision {earlier.revision} as its predecessor"


def _key(sent: Sent) -> tuple[str, int]:
    return sent.sop_instance_uid, sent.version


def _told(sent: Sent) -> str:
    return f"{sent.successes} of {sent.attempts} attempts, {sent.course}, {sent.client}"


def gathered(journal: Iterable[dict[str, Any]]) -> list[Sent]:
    """What the senders know, from the lines of their journal."""
    attempts: Counter[tuple[str, int]] = Counter()
    successes: Counter[tuple[str, int]] = Counter()
    refusals: Counter[tuple[str, int]] = Counter()
    about: dict[tuple[str, int], dict[str, Any]] = {}
    for line in journal:
        key = line["sop_instance_uid"], line["version"]
        about.setdefault(key, line)
        attempts[key] += line["status"] is None
        successes[key] += line["status"] == "0x0000"
        refusals[key] += line["status"] not in {None, "0x0000", "none"}
    return [
        Sent(
            sop_instance_uid=key[0],
            version=key[1],
            study_instance_uid=line["study_instance_uid"],
            course=line["course"],
            client=line["client"],
            attempts=attempts[key],
            successes=successes[key],
            refusals=refusals[key],
        )
        for key, line in about.items()
    ]
