"""The whole HTTP application: routes, errors, limits."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser

from cxr_ray import __version__
from serve.graph_settings import GraphSettings
from serve.http import dicomweb, health, patients, predict, priors, studies
from serve.http.body import BodyLimits, RequestFrame
from serve.http.problems import on_http_error, on_invalid
from serve.http.services import Services
from serve.page import assets, sessions, study, worklist
from serve.trace import RequestWatch

_MEGABYTE = 1_000_000


def create_api() -> FastAPI:
    """The routes and their description, without anything that answers."""
    # Images of patients are not spooled to a temporary folder; how many may lie in memory is limited elsewhere.
    MultiPartParser.spool_max_size = 2**40
    api = FastAPI(
        title="cxr-ray",
        version=__version__,
        summary="Probabilities of fourteen findings from a frontal chest radiograph. Research use only.",
        exception_handlers={RequestValidationError: on_invalid, HTTPException: on_http_error},
    )
    for module in (predict, studies, patients, priors, dicomweb, health):
        api.include_router(module.router)
    for router in (worklist.router, worklist.rows_router, study.router, sessions.router, sessions.watch, assets.router):
        api.include_router(router)
    return api


def serving_api(services: Services, watch: RequestWatch) -> FastAPI:
    """The application as a replica runs it; `watch` is told of each request."""
    api = create_api()
    api.state.services = services
    stranger = services.guard.stranger
    api.add_middleware(RequestFrame, limits=_limits(services.settings), stranger=stranger, watch=watch)
    return api


def _limits(settings: GraphSettings) -> BodyLimits:
    return BodyLimits(
        most_bytes=settings.max_upload_mb * _MEGABYTE,
        seconds=settings.upload_seconds,
        bytes_at_once=settings.max_memory_mb * _MEGABYTE,
        requests_at_once=settings.max_queued,
        waiting_seconds=settings.max_wait_seconds,
    )
