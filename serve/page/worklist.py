"""The worklist: studies as they came, the newest first, as a page and as the rows that keep it up to date."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated
from urllib.parse import unquote, urlencode

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import BeforeValidator

from cxr_ray.findings import FINDINGS
from serve.http.access import Actor, Reader
from serve.http.disclosure import check_filter, knows_patients, patient_names
from serve.http.moments import Day
from serve.http.services import Services, Serving, audited
from serve.http.studies import study_filter
from serve.page.rendering import PageRoute, page, render
from serve.page.study_findings import ShownFinding, ranked, reason_in_words
from serve.store import Status, Store, StudyFilter, StudyView

router = APIRouter(include_in_schema=False, route_class=PageRoute)
# For the script, which wants a status and not a page.
rows_router = APIRouter(include_in_schema=False)
ROWS_A_PAGE = 25
_TOP_FINDINGS = 3


@dataclass(frozen=True)
class Row:
    """A study on the worklist; `more` counts positive findings beyond the `top` ones."""

    study_uid: str
    patient: str | None
    study_date: str | None
    received_at: datetime
    images: int
    state: str
    reason: str | None
    top: tuple[ShownFinding, ...]
    more: int


@dataclass(frozen=True)
class Asked:
    """What part of the worklist is asked for."""

    filter: StudyFilter
    number: int

    @property
    def query(self) -> dict[str, str]:
        """The filter as it stands in an address, where no patient's identifier belongs."""
        wanted = self.filter
        given = {
            "status": wanted.status,
            "finding": wanted.finding,
            "date_from": wanted.study_date_from,
            "date_to": wanted.study_date_to,
        }
        return {name: str(value) for name, value in given.items() if value is not None}

    def address(self, number: int) -> str:
        """The query string of another page of the same list."""
        query = self.query | ({"page": str(number)} if number > 1 else {})
        return f"?{urlencode(query)}" if query else ""


@dataclass(frozen=True)
class Listed:
    """A page of the worklist."""

    rows: tuple[Row, ...]
    has_older: bool


# A form sends a field that nobody filled in as an empty one.
_OrNothing = BeforeValidator(lambda value: value or None)


def _asked(
    status: Annotated[Status | None, _OrNothing, Query()] = None,
    finding: Annotated[str | None, _OrNothing, Query()] = None,
    date_from: Annotated[Day | None, _OrNothing, Query()] = None,
    date_to: Annotated[Day | None, _OrNothing, Query()] = None,
    page: Annotated[int, Query(ge=1, le=100_000)] = 1,
    x_patient_id: Annotated[str | None, Header(max_length=600)] = None,
) -> Asked:
    patient = unquote(x_patient_id).strip()[:64] if x_patient_id else None
    filter = study_filter(patient or None, None, date_from, date_to, finding, status)
    return Asked(filter, page)


Part = Annotated[Asked, Depends(_asked)]


@router.get("/")
async def worklist(request: Request, serving: Serving, actor: Reader, asked: Part) -> Response:
    """The page."""
    check_filter(asked.filter, actor)
    await audited(serving, request, actor, "list studies", patient_id=asked.filter.patient_id)
    listed = await _listed(serving, actor, asked)
    rows, tag = _rendered(request, listed, asked)
    return page(
        request,
        "worklist.html",
        actor=actor,
        knows_patients=knows_patients(actor),
        rows=rows,
        tag=tag,
        asked=asked,
        findings=FINDINGS,
    )


@rows_router.get("/worklist/rows")
async def worklist_rows(
    request: Request, serving: Serving, actor: Reader, asked: Part, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """The list's HTML, or 304 where it is what the page has: who sees nothing new does not look again."""
    check_filter(asked.filter, actor)
    listed = await _listed(serving, actor, asked)
    rows, tag = _rendered(request, listed, asked)
    if tag == if_none_match:
        return Response(status_code=304, headers={"ETag": tag})
    await audited(serving, request, actor, "list studies", patient_id=asked.filter.patient_id)
    return Response(rows, media_type="text/html", headers={"ETag": tag})


def _rendered(request: Request, listed: Listed, asked: Asked) -> tuple[str, str]:
    html = render(request, "rows.html", listed=listed, asked=asked)
    return html, f'"{hashlib.sha256(html.encode()).hexdigest()[:32]}"'


async def _listed(serving: Services, actor: Actor, asked: Asked) -> Listed:
    def look(store: Store) -> Listed:
        views = store.studies(ROWS_A_PAGE + 1, (asked.number - 1) * ROWS_A_PAGE, asked.filter)
        rows = tuple(_row(view, patient_names(view, actor, store).patient) for view in views[:ROWS_A_PAGE])
        return Listed(rows, len(views) > ROWS_A_PAGE)

    return await serving.from_store(look)


def _row(view: StudyView, patient: str | None) -> Row:
    findings = ranked(view)
    reasons = [reason_in_words(instance) for instance in view.instances if instance.reason]
    return Row(
        study_uid=view.study_instance_uid,
        patient=patient,
        study_date=view.study_date,
        received_at=view.received_at,
        images=len(view.instances),
        state="reviewed" if view.reviews else view.status,
        reason=reasons[0] if view.status == "refused" and reasons else None,
        top=findings[:_TOP_FINDINGS],
        more=sum(finding.positive for finding in findings[_TOP_FINDINGS:]),
    )
