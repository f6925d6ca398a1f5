"""A study as people read it: its radiographs, what the model says of each and why, and what readers say."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from serve.graph_settings import DEFAULT_MODEL
from serve.http.access import Reader
from serve.http.answers import ClinicalUsed
from serve.http.disclosure import patient_names
from serve.http.problems import ApiProblem
from serve.http.services import Services, Serving
from serve.http.studies import Uid, looked_at
from serve.page.rendering import PageRoute, page
from serve.page.study_findings import ranked_of_instance, reason_in_words
from serve.store import Answer, InstanceView, StudyView

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/studies/{study_uid}")
async def study(
    request: Request, serving: Serving, actor: Reader, study_uid: Uid, image: Annotated[str, Query(max_length=64)] = ""
) -> Response:
    """The page of a study; `image` selects one of several by its SOP Instance UID."""
    view = await looked_at(serving, request, actor, study_uid, "read study")
    shown = _selected(view, image)
    return page(
        request,
        "study.html",
        actor=actor,
        may_review=actor.role != "read",
        study=view,
        names=await serving.from_store(lambda store: patient_names(view, actor, store)),
        shown=shown,
        reason=reason_in_words(shown),
        findings=ranked_of_instance(view, shown),
        clinical=dict.fromkeys(ClinicalUsed.model_fields) | (shown.answer.clinical if shown.answer else {}),
        other_model=shown.answer and await _other_model(serving, shown.answer),
    )


def _selected(view: StudyView, sop_uid: str) -> InstanceView:
    """The image that is asked for, else the first that was answered.

    Raises
    ------
    ApiProblem
        404.
    """
    if not sop_uid:
        return next((instance for instance in view.instances if instance.answer), view.instances[0])
    for instance in view.instances:
        if instance.sop_instance_uid == sop_uid:
            return instance
    raise ApiProblem(404, f"the study has no image {sop_uid!r}")


async def _other_model(serving: Services, answer: Answer) -> str | None:
    """Which model draws the heatmaps, where it is not the one that gave the answer."""
    try:
        model = await serving.answering.model(DEFAULT_MODEL).describe()
    except ApiProblem:
        # What is stored can be read while no network answers.
        return None
    return None if model.digest == answer.model_digest else f"{model.name} {model.version}"
