"""Instances and answers for those who try the results store."""

from dataclasses import replace
from datetime import datetime, timedelta, timezone

from serve.store import Answer, Finding, ReceivedInstance

RECEIVED = datetime(2026, 3, 1, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
FIRST = ReceivedInstance(
    "1.2.3.1",
    "1.2",
    "1.2.3",
    "aaaa",
    RECEIVED,
    calling_ae="PACS",
    patient_id="P1",
    accession_number="A1",
    study_date="20260301",
)
SECOND = replace(FIRST, sop_instance_uid="1.2.3.2", content_digest="bbbb")


def answer(probability: float, digest: str = "m1", finding: str = "Mass", view: str | None = "PA") -> Answer:
    """`finding` is positive from 0.5 on, and Hernia never is."""
    return Answer(
        "multi-input",
        "1.0",
        digest,
        (Finding(finding, probability, 0.5, probability >= 0.5), Finding("Hernia", 0.01, 0.3, False)),
        {"age": 61, "sex": "F", "view": view, "history": ["Mass"], "missing": []},
        ("no history",),
    )


def of_study(number: int, **changes: object) -> ReceivedInstance:
    """The only instance of another study."""
    return replace(FIRST, sop_instance_uid=f"9.{number}", study_instance_uid=f"1.{number}", **changes)
