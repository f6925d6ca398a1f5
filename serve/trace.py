"""What becomes of one request on its way: its id, how long each stage took, what its images came to.

The way goes through the body's arrival, decoders, store and network. A trace goes with it, in a context variable that tasks
and threads of the request inherit, so that none of the stages has to be handed one; it is read once, when the request is over.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol

Stage = Literal["receive", "decode", "history", "network", "store"]
current: ContextVar["Trace | None"] = ContextVar("cxr_ray_trace", default=None)


@dataclass
class Trace:
    """A request under way.

    Attributes
    ----------
    stages
        Seconds of each stage that an image, or the request, went through; several images go through a stage several times.
    batches
        Images of each batch that one of the request's was computed in.
    models
        Digests of the bundles that answered.
    refusals
        HTTP status by which each refused image was refused.
    received
        Bytes of the body.
    """

    request_id: str
    stages: list[tuple[Stage, float]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    refusals: list[int] = field(default_factory=list)
    received: int = 0


@dataclass(frozen=True)
class FinishedRequest:
    """A request that is over: its route's template (never its path, in which identifiers stand), status and seconds."""

    route: str
    method: str
    status: int
    seconds: float
    trace: Trace


class RequestWatch(Protocol):
    """Who wants to know of requests."""

    def started(self) -> None:
        """One has begun."""

    def finished(self, request: FinishedRequest) -> None:
        """One is over; its answer has been sent."""


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """Time a stage of the request that is under way, if one is."""
    trace = current.get()
    if trace is None:
        yield
        return
    started = time.perf_counter()
    try:
        yield
    finally:
        trace.stages.append((name, time.perf_counter() - started))


def refused(status: int) -> None:
    """Count an image as refused by this HTTP status."""
    trace = current.get()
    if trace is not None:
        trace.refusals.append(status)


def current_request_id() -> str:
    """The id of the request that is under way; empty where none is."""
    trace = current.get()
    return "" if trace is None else trace.request_id
