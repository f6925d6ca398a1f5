"""Whether the service runs, and whether it can answer."""

from fastapi import APIRouter

from serve.graph_settings import DEFAULT_MODEL
from serve.http.problems import problems
from serve.http.services import Serving

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Whether the service runs")
async def healthz() -> dict[str, str]:
    """Answers as long as this process runs."""
    return {"status": "ok"}


@router.get("/readyz", responses=problems(503), summary="Whether the service can answer")
async def readyz(serving: Serving) -> dict[str, str]:
    """Answers once the network is loaded and warm and the store can be read."""
    model = await serving.answering.model(DEFAULT_MODEL).describe()
    await serving.from_store(lambda store: store.studies(limit=1))
    return {"status": "ready", "model": model.digest}
