"""What clients send beside images: form fields, each said once."""

from typing import Annotated, Literal

from fastapi import Depends, Form, Request, UploadFile
from pydantic import ValidationError

from cxr_ray import findings
from cxr_ray.errors import CxrRayError
from serve.http.moments import Day
from serve.http.problems import ApiProblem
from serve.priors_outcome import PriorsOutcome
from serve.store.records import tomorrow
from serve.uploads import Stated


def parse_history(text: str | None) -> list[str] | None:
    """Findings of earlier visits as a form sends them: ``Mass|Nodule``, ``No Finding`` if there were none, None if unknown.

    Raises
    ------
    ApiProblem
        400, naming the finding that is not known.
    """
    if text is None or not text.strip():
        return None
    try:
        return findings.names(findings.parse(text))
    except CxrRayError as error:
        raise ApiProblem(400, f"history: {error}") from None


async def stated(
    request: Request,
    age: Annotated[float | None, Form(ge=0, le=120, description="Years; overrides the DICOM header")] = None,
    sex: Annotated[Literal["M", "F"] | None, Form()] = None,
    view: Annotated[Literal["PA", "AP"] | None, Form()] = None,
    history: Annotated[
        str | None,
        Form(
            description="Findings of earlier visits, 'Mass|Nodule', or 'No Finding' if none; leave out if unknown, "
            "and what the service knows of the patient counts"
        ),
    ] = None,
    patient_id: Annotated[
        str | None, Form(max_length=64, description="Whose stored history counts; overrides the DICOM header")
    ] = None,
    study_date: Annotated[
        Day | None, Form(description="Only what is strictly earlier counts; overrides the DICOM header")
    ] = None,
) -> Stated:
    """Form fields beside the image."""
    form = await request.form()
    for field in ("age", "sex", "view", "history", "patient_id", "study_date"):
        values = list(dict.fromkeys(str(value) for value in form.getlist(field)))
        if len(values) > 1:
            raise ApiProblem(400, f"{field} was sent {len(values)} times with different values; send it once")
    if study_date is not None and study_date > tomorrow():
        raise ApiProblem(400, f"study_date {study_date} is in the future; send the day of the examination")
    return Stated(age, sex, view, parse_history(history), patient_id, study_date)


def parse_priors(text: str | None) -> PriorsOutcome | None:
    """What came of asking an archive, as the node's form says it; None where it says nothing.

    Raises
    ------
    ApiProblem
        400, naming the field that is wrong.
    """
    if text is None or not text.strip():
        return None
    try:
        return PriorsOutcome.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(["priors", *map(str, first["loc"])])
        raise ApiProblem(400, f"{where[:80]}: {first['msg']}; send the JSON that /openapi.json calls PriorsOutcome") from None


Patient = Annotated[Stated, Depends(stated)]


async def uploaded(image: UploadFile, name: str) -> bytes:
    """The bytes of an upload.

    Raises
    ------
    ApiProblem
        400 if there are none.
    """
    data = await image.read()
    if not data:
        raise ApiProblem(400, f"image: {name} is empty (0 bytes); send a PNG, JPEG or DICOM file")
    return data


async def multipart_only(request: Request) -> None:
    """Refuse bodies that are no form.

    Raises
    ------
    ApiProblem
        415.
    """
    kind = request.headers.get("content-type", "")
    # The other kind of form holds no file, which is then what is missing.
    if kind.partition(";")[0].strip().lower() not in {"multipart/form-data", "application/x-www-form-urlencoded"}:
        raise ApiProblem(415, f"the content type is {kind[:60]!r}; send multipart/form-data with the file in the field image")
