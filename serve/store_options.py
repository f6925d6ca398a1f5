"""The option by which commands name the results store, and how they open it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve.store import Store

DEFAULT_STORE = "sqlite:///cxr-ray-results.sqlite"
StoreUrl = Annotated[str, typer.Option("--store", help="SQLAlchemy URL of the results store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@contextmanager
def opened(url: str) -> "Iterator[Store]":
    """The store, open for as long as the command needs it."""
    from serve.store import Store  # noqa: PLC0415 - --help need not wait

    store = Store(url)
    try:
        yield store
    finally:
        store.close()
