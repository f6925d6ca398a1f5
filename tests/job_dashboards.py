"""A dashboard that takes jobs and answers as scripted, over HTTP or TLS: what a real cluster does only when it breaks."""

import asyncio
import json
import ssl
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from aiohttp import WSCloseCode, web

LOG = "the log of the job\n"


@dataclass
class JobDashboard:
    """A context that serves; its attributes may be changed meanwhile.

    Attributes
    ----------
    states
        State of each job from its submission on, one after the other; the last one stays.
    nodes
        CPUs of the nodes.
    grows
        Whether an autoscaler may add others.
    fails
        Status, other than those of versions, that all is answered with; 0 for a connection that is reset.
    loses
        What becomes of the next submission: ``answer`` (taken, and nobody hears of it) or ``job`` (not even taken).
    """

    tls: tuple[Path, Path] | None = None
    token: str | None = None
    states: list[str] = field(default_factory=lambda: ["SUCCEEDED"])
    nodes: tuple[float, ...] = (4,)
    grows: bool = False
    fails: int | None = None
    loses: str | None = None
    port: int = 0
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> "JobDashboard":
        self._streams: set[web.WebSocketResponse] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def forget(self) -> None:
        """Be another one, as a head is that was started anew."""
        self.jobs.clear()
        self._run(self._close_streams())

    def break_streams(self) -> None:
        """Close what is followed."""
        self._run(self._close_streams())

    def add(self, submission_id: str, entrypoint: str, state: str = "RUNNING", message: str | None = None, **more: Any) -> None:
        self.jobs[submission_id] = {
            "type": "SUBMISSION",
            "submission_id": submission_id,
            "status": state,
            "entrypoint": entrypoint,
            "message": message,
            "start_time": 1_700_000_000_000 + len(self.jobs),
            "metadata": {},
            **more,
        }

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._first], client_max_size=64 * 1024**2)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/v0/cluster_metadata", self._metadata),
                web.get("/api/v0/nodes", self._nodes),
                web.get("/api/cluster_status", self._status),
                web.get("/api/packages/{protocol}/{name}", self._found),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._job),
                web.get("/api/jobs/{id}/logs", self._log),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
                web.post("/api/jobs/{id}/stop", self._end),
            ]
        )
        context = None
        if self.tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*self.tls)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        await self._close_streams()
        await self._runner.cleanup()

    async def _close_streams(self) -> None:
        for stream in list(self._streams):
            await stream.close(code=WSCloseCode.GOING_AWAY)

    @web.middleware
    async def _first(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        given = request.headers.get("Authorization")
        if self.token is not None and given != f"Bearer {self.token}":
            return web.Response(status=401 if given is None else 403)
        if self.fails is not None and request.path.startswith("/api/jobs"):
            if not self.fails:
                request.transport.abort()
            return web.Response(status=self.fails or 500, text="Traceback (most recent call last):\nKeyError: 'agent'")
        if (known := request.match_info.get("id")) is not None and known not in self.jobs:
            return web.Response(status=404, text=f"Job {known} does not exist")
        return await handler(request)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})

    async def _metadata(self, _: web.Request) -> web.Response:
        version = f"{sys.version_info.major}.{sys.version_info.minor}.0"
        return web.json_response({"result": True, "data": {"pythonVersion": version}})

    async def _nodes(self, _: web.Request) -> web.Response:
        found = [{"node_id": f"{k}", "state": "ALIVE", "resources_total": {"CPU": cpus}} for k, cpus in enumerate(self.nodes)]
        found.append({"node_id": "gone", "state": "DEAD", "resources_total": {"CPU": 1000.0}})
        return web.json_response({"result": True, "data": {"result": {"total": len(found), "result": found}}})

    async def _status(self, _: web.Request) -> web.Response:
        kinds = {f"{k}": "worker" if self.grows else f"node_{k}" for k in range(len(self.nodes))}
        return web.json_response({"data": {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": kinds}}}})

    async def _found(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        sent = await request.json()
        name, loses = sent["submission_id"], self.loses
        self.loses = None
        if loses == "job":
            request.transport.abort()
            return web.Response()
        if name in self.jobs:
            return web.Response(status=500, text=f"ValueError: Job with submission_id {name} already exists.")
        self.add(name, sent["entrypoint"], self.states[0], metadata=sent["metadata"])
        if len(self.states) > 1:
            self.states.pop(0)
        if loses == "answer":
            request.transport.abort()
        return web.json_response({"job_id": name, "submission_id": name})

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["id"]])

    async def _log(self, _: web.Request) -> web.Response:
        return web.Response(text=json.dumps({"logs": LOG}), content_type="application/json")

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        self._streams.add(stream)
        name = request.match_info["id"]
        if self.jobs[name]["status"] != "PENDING":
            await stream.send_str(LOG)
        while not stream.closed and self.jobs.get(name, {}).get("status") in ("PENDING", "RUNNING"):
            await asyncio.sleep(0.05)
        self._streams.discard(stream)
        return stream

    async def _end(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["id"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})
