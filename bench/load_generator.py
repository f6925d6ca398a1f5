"""A closed loop of clients in a process of its own: each posts a file, waits for the answer, and posts again.

    python bench/load_generator.py --url URL --file FILE --clients N (--seconds S | --requests R) [--settle S] [--shed retry]

The request is built once and every client keeps its connection, so that the load costs little of the machine that it measures;
what it costs is part of the answer: one line of JSON with the seconds from the first byte sent to the last byte read of each
accepted request, the statuses, and the CPU seconds of this process. Requests begun in the first `--settle` seconds open
connections and are not counted.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=120)
_BOUNDARY = "a-boundary-that-no-image-holds"
_OK, _SHED = 200, 503


def multipart(path: Path) -> bytes:
    """The body of a form with the file as its field `image`."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
    return (
        f"{head}Content-Type: application/octet-stream\r\n\r\n".encode()
        + path.read_bytes()
        + f"\r\n--{_BOUNDARY}--\r\n".encode()
    )


class Load:
    """What the clients share: how long they go on, and what they have met."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.url, self.body, self.shed = given.url, multipart(given.file), given.shed
        self.settled = time.perf_counter() + given.settle
        self.end = self.settled + given.seconds if given.seconds else float("inf")
        self.left = given.requests or float("inf")
        self.seconds: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.unexplained = 0
        self.last = self.settled

    async def client(self, session: aiohttp.ClientSession) -> None:
        """One client, until time or requests are up."""
        while self.left > 0 and time.perf_counter() < self.end:
            self.left -= 1
            begun = time.perf_counter()
            status, retry_after = await self._ask(session)
            ended = time.perf_counter()
            if begun >= self.settled:
                self.last = max(self.last, ended)
                self.statuses[status] += 1
                if status == str(_OK):
                    self.seconds.append(ended - begun)
                if status == str(_SHED) and retry_after is None:
                    self.unexplained += 1
            if status == str(_SHED) and self.shed == "wait":
                await asyncio.sleep(float(retry_after or 0))

    async def _ask(self, session: aiohttp.ClientSession) -> tuple[str, str | None]:
        headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
        try:
            async with session.post(self.url, data=self.body, headers=headers) as answer:
                await answer.read()
                return str(answer.status), answer.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__, None


async def run(given: argparse.Namespace) -> dict[str, object]:
    """All clients at once."""
    load = Load(given)
    connections = aiohttp.TCPConnector(limit=given.clients)
    async with aiohttp.ClientSession(connector=connections, timeout=_TIMEOUT) as session:
        await asyncio.gather(*(load.client(session) for _ in range(given.clients)))
    return {
        "seconds": load.seconds,
        "elapsed": load.last - load.settled,
        "statuses": load.statuses,
        "without_retry_after": load.unexplained,
        "cpu": time.process_time(),
    }


def main() -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--settle", type=float, default=0.0)
    parser.add_argument("--shed", choices=["wait", "retry"], default="wait", help="after 503: as told, or again at once")
    print(json.dumps(asyncio.run(run(parser.parse_args()))), flush=True)


if __name__ == "__main__":
    main()
