"""What the commands that talk to a cluster have in common: the options that name it, and how they say things."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cluster.credentials import hidden
from cluster.errors import SubmitError

Address = Annotated[
    str | None, typer.Option(help="URL of the cluster's dashboard [RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265].")
]
TokenFile = Annotated[Path | None, typer.Option(help="File with the cluster's token.")]
CaFile = Annotated[
    Path | None,
    typer.Option(help="PEM file with the authority of an https:// address's certificate [CXR_RAY_CA_FILE, else known ones]."),
]


@contextmanager
def in_one_line() -> Iterator[None]:
    """End with what went wrong as one line, whatever it was."""
    try:
        yield
    except SubmitError as error:
        notice(str(error))
        raise SystemExit(error.code) from None


def write(text: str) -> None:
    """Print a result, or a part of one, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def notice(text: str) -> None:
    """Say a line on standard error, without the credentials of its URIs."""
    sys.stderr.write(f"cxr-ray: {hidden(text)}\n")
    sys.stderr.flush()
