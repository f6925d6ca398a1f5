"""An S3 server of a test's own with a bucket in it: real sockets, and nothing of it left afterwards."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from orthanc import running
from waiting import until

from cxr_ray import storage

USER, SECRET, REGION, BUCKET = "reader", "a-secret-of-the-server", "us-east-1", "radiographs"


@contextmanager
def s3_server(port: int, address: str = "127.0.0.1") -> Iterator[Callable[[str], str]]:
    """A server with an empty bucket; yields what gives the URI of a path in it, as this machine reaches it."""
    program = Path(sys.executable).with_name("moto_server")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running([program, "-H", address, "-p", str(port)], log, os.environ) as process:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                with suppress(httpx.TransportError):
                    return httpx.get(f"http://127.0.0.1:{port}/moto-api/", timeout=2, trust_env=False).is_success
                return False

            until(answers, "the S3 server")
            options = f"endpoint_override=127.0.0.1%3A{port}&scheme=http&region={REGION}&allow_bucket_creation=true"

            def uri(path: str) -> str:
                return f"s3://{USER}:{SECRET}@{BUCKET}/{path}?{options}"

            filesystem, _ = storage.resolve(uri(""))
            filesystem.create_dir(BUCKET)
            yield uri


@pytest.fixture(scope="module")
def bucket(free_port: Callable[[], int]) -> Iterator[Callable[[str], str]]:
    """URI of a path in the bucket of a server that runs for the tests of a file."""
    with s3_server(free_port()) as uri:
        yield uri


def upload(folder: Path, uri: str) -> None:
    """Copy the files below a folder."""
    filesystem, root = storage.resolve(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            with filesystem.open_output_stream(f"{root}/{path.relative_to(folder)}", compression=None) as stream:
                stream.write(path.read_bytes())
