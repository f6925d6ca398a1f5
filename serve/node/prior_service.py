"""The service as the asker of priors meets it: what is known of a patient, and where priors are brought."""

import ssl
from typing import Self

import httpx
from pydantic import BaseModel, ValidationError

from serve.node.deadline import Deadline
from serve.node.prior_query import EarlierStudy, Question
from serve.node.prior_results import ReadResult

_OK = 200


class ServiceAwayError(Exception):
    """The service does not answer now: the film itself has to wait for it, so nothing is said of its priors yet."""


class Known(BaseModel):
    """What the service knows of a patient's earlier studies, and whether it would use more."""

    history_source: str
    studies: frozenset[str]

    @property
    def uses_predictions(self) -> bool:
        """Whether earlier answers make a difference to the next."""
        return self.history_source in {"predicted", "both"}


class PriorService:
    """Brings priors to the service.

    Parameters
    ----------
    url
        Root of the service.
    token
        Bearer token of role write; None sends none.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token.strip()}"} if token else {},
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    def known(self, question: Question, deadline: Deadline) -> Known:
        """What is known before the archive is asked.

        Raises
        ------
        ServiceAwayError
            When the service does not say.
        DeadlineError
            When it does not say it in time.
        """
        asked = {"patient_id": question.patient_id, "before": question.before.isoformat()}
        try:
            response = self._client.post("/v1/priors/known", json=asked, timeout=self._left(deadline))
            response.raise_for_status()
            return Known.model_validate_json(response.content)
        except (httpx.HTTPError, ValidationError):
            deadline.check()
            raise ServiceAwayError from None

    def tell_result(self, question: Question, study: EarlierStudy, result: ReadResult, deadline: Deadline) -> bool:
        """Tell an earlier result of this software; True if the service has it now."""
        told = {
            "study_instance_uid": study.study_uid,
            "study_date": study.day.isoformat(),
            "findings": list(result.positive),
        }
        body = {"patient_id": question.patient_id, "results": [told]}
        return self._taken(deadline, "/v1/priors/results", json=body)

    def bring_image(self, image: bytes, deadline: Deadline) -> bool:
        """Bring an earlier film; True if the service has answered it."""
        files = {"image": ("prior.dcm", image, "application/dicom")}
        return self._taken(deadline, "/v1/instances", files=files, data={"origin": "archive"})

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _taken(self, deadline: Deadline, path: str, **request: object) -> bool:
        try:
            response = self._client.post(path, timeout=self._left(deadline), **request)  # type: ignore[arg-type]
        except httpx.HTTPError:
            deadline.check()
            return False
        return response.status_code == _OK

    def _left(self, deadline: Deadline) -> float:
        deadline.check()
        return deadline.left()
