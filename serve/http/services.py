"""What the routes need, put together once a replica."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from cxr_ray.errors import CxrRayError
from serve.answering import Answering
from serve.graph_settings import GraphSettings
from serve.http.access import Actor, Guard
from serve.http.problems import ApiProblem, overloaded
from serve.intake import Intake
from serve.spooled_intake import SpooledIntake
from serve.store import OtherContentError, Store
from serve.trace import stage

Found = TypeVar("Found")


@dataclass(frozen=True)
class Services:
    """Settings, store, and what answers; `spooled` takes what comes by STOW-RS where it goes through a node's spool."""

    settings: GraphSettings
    store: Store
    answering: Answering
    intake: Intake
    guard: Guard
    spooled: SpooledIntake | None = None

    async def from_store(self, question: Callable[[Store], Found]) -> Found:
        """Ask the store in a thread.

        Raises
        ------
        ApiProblem
            409 for another content under a known UID; 503 where the store does not answer.
        """
        try:
            with stage("store"):
                return await run_in_threadpool(question, self.store)
        except OtherContentError as error:
            raise ApiProblem(409, str(error)) from None
        except CxrRayError as error:
            raise overloaded(str(error)) from None


async def audited(
    serving: Services,
    request: Request,
    actor: Actor,
    action: str,
    study_uid: str | None = None,
    patient_id: str | None = None,
) -> None:
    """Put on record that somebody looked."""
    request_id = request.state.request_id
    await serving.from_store(lambda store: store.record_access(actor.name, action, study_uid, patient_id, request_id))


def _services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


Serving = Annotated[Services, Depends(_services)]
