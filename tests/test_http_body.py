"""The frame of every request, before a real server: bodies that are too large, too slow, cut off or too many."""

import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from serve.http.body import BodyLimits, RequestFrame
from serve.http.problems import ApiProblem, on_http_error

LIMITS = BodyLimits(most_bytes=1000, seconds=1.0, bytes_at_once=2500, requests_at_once=3, waiting_seconds=1e9)


class Server:
    """An application that counts what reaches it, behind the frame."""

    def __init__(self, limits: BodyLimits = LIMITS) -> None:
        app = FastAPI(exception_handlers={HTTPException: on_http_error})
        self.release = threading.Event()
        self.release.set()

        @app.post("/echo")
        async def echo(request: Request) -> dict[str, object]:
            body = await request.body()
            while not self.release.is_set():
                await _soon()
            return {"bytes": len(body), "id": request.state.request_id}

        @app.get("/quick")
        async def quick() -> str:
            return "here"

        @app.get("/broken/{patient}")
        async def broken(patient: str) -> str:
            raise ValueError(f"no film of {patient}")

        @app.get("/cut/{patient}")
        async def cut(patient: str) -> StreamingResponse:
            async def begun() -> AsyncIterator[bytes]:
                yield b"begun"
                raise ValueError(f"no more of {patient}")

            return StreamingResponse(begun())

        app.add_middleware(RequestFrame, limits=limits, stranger=self.stranger)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    async def stranger(self, headers: Headers) -> ApiProblem | None:
        return ApiProblem(401, "who are you?") if headers.get("authorization") == "Bearer wrong" else None

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(5)


async def _soon() -> None:
    import asyncio

    await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


def post(server: Server, content: object, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/echo", content=content, headers=headers, timeout=10, trust_env=False)


def chunks(*sizes: int, pause: float = 0.0) -> Iterator[bytes]:
    for size in sizes:
        yield b"x" * size
        time.sleep(pause)


def test_what_fits_passes_and_the_answer_is_framed(server: Server) -> None:
    answer = post(server, b"x" * 1000, **{"X-Request-ID": "from-the-ris.7"})
    assert answer.json() == {"bytes": 1000, "id": "from-the-ris.7"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert post(server, chunks(400, 600)).json()["bytes"] == 1000


@pytest.mark.parametrize("given", ["", "a" * 65, "two words", "<script>"])
def test_a_request_id_that_does_not_belong_in_a_log_is_replaced(server: Server, given: str) -> None:
    said = post(server, b"", **{"X-Request-ID": given}).headers["x-request-id"]
    assert len(said) == 32
    assert set(said) <= set("0123456789abcdef")


@pytest.mark.parametrize("content", [b"x" * 1001, "chunks"], ids=["announced", "streamed"])
def test_too_large(server: Server, content: object) -> None:
    answer = post(server, chunks(600, 600, 600) if content == "chunks" else content)
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
    assert answer.json()["detail"] == "the request has more than 0.001 MB; send a smaller file, or fewer at once"


def test_who_is_not_known_uploads_nothing(server: Server) -> None:
    large = BodyLimits(most_bytes=10_000, seconds=5.0, bytes_at_once=50_000, requests_at_once=3, waiting_seconds=1e9)
    other = Server(large)
    for content in (b"x" * 9000, chunks(3000, 3000, 3000)):
        answer = post(other, content, Authorization="Bearer wrong")
        assert (answer.status_code, answer.json()["detail"]) == (401, "who are you?")
    assert post(other, b"x" * 9000).status_code == 200
    # A login's form is smaller.
    assert post(other, b"x" * 300, Authorization="Bearer wrong").status_code == 200
    other.stop()


def test_too_slow(server: Server) -> None:
    answer = post(server, chunks(*[100] * 8, pause=0.4))
    assert (answer.status_code, answer.json()["title"]) == (408, "Request Timeout")


def test_a_cut_upload_frees_its_room(server: Server) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\nabc")
    deadline = time.monotonic() + 5
    while (answer := post(server, b"x" * 900)).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.json()["bytes"] == 900


@pytest.mark.parametrize(("size", "fit"), [(100, 3), (900, 2)], ids=["requests", "bytes"])
def test_more_than_there_is_room_for_is_shed_and_what_needs_none_is_answered(server: Server, size: int, fit: int) -> None:
    server.release.clear()
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(post(server, b"x" * size))) for _ in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 5
    while len(answers) < 5 - fit:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert httpx.get(f"{server.url}/quick", trust_env=False).json() == "here"
    server.release.set()
    for thread in threads:
        thread.join()
    shed = [answer for answer in answers if answer.status_code == 503]
    assert [answer.headers["retry-after"] for answer in shed] == ["2"] * (5 - fit)
    assert [answer.status_code for answer in answers if answer not in shed] == [200] * fit


def test_what_fails_is_told_by_type_and_place_alone(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="httpx"):
        answer = httpx.get(f"{server.url}/broken/DOE", headers={"X-Request-ID": "r-1"}, trust_env=False)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{server.url}/cut/DOE", headers={"X-Request-ID": "r-2"}, trust_env=False)
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "r-1" in answer.json()["detail"]
    assert "DOE" not in answer.text
    assert "DOE" not in caplog.text
    failures = [record.fields for record in caplog.records if record.message == "request failed"]
    assert [(said["error"], said["at"][-1].rpartition(" ")[2]) for said in failures] == [
        ("ValueError", "broken"),
        ("ValueError", "begun"),
    ]
