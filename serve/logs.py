"""Log lines: one an event, JSON for machines or text for people, each with the id of the request that it belongs to.

No identifier of a patient gets into them. What is logged here are templates of routes, never paths, and statuses, never the
details that clients read. Of an exception they keep its type and where it was raised: its text may quote a file. What goes
with a line besides its words travels as `fields`.
"""

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

from serve.trace import FinishedRequest, current_request_id

LogFormat = Literal["auto", "json", "text"]
LogLevel = Literal["debug", "info", "warning"]
OWN_LOGGERS = ("serve", "cxr_ray", "ingest")
# These quote what they read, and clients' libraries the paths they ask for.
_QUOTING_LOGGERS = ("pydicom", "pynetdicom", "PIL", "httpx", "httpcore", "uvicorn.access")
_MOST_FRAMES = 12
_FILE_BYTES, _OLD_FILES = 64 * 1024**2, 3
_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

_log = logging.getLogger(__name__)


def fields(**values: object) -> dict[str, object]:
    """What a line says besides its words: ``log.info("answered", extra=fields(status=200))``."""
    return {"fields": values}


def log_request(request: FinishedRequest) -> None:
    """The one line of a request: what was asked, how it ended, how long each stage took."""
    trace = request.trace
    said: dict[str, object] = {
        "method": request.method,
        "route": request.route,
        "status": request.status,
        "ms": _milliseconds(request.seconds),
        "bytes": trace.received,
    }
    for name, seconds in trace.stages:
        # Several images go through the stages beside each other: the longest is what the request waited for.
        said[f"{name}_ms"] = max(_milliseconds(seconds), float(str(said.get(f"{name}_ms", 0.0))))
    if trace.batches:
        said |= {"images": len(trace.batches), "batch": max(trace.batches)}
    if trace.models:
        said["model"] = ",".join(sorted(digest[:12] for digest in trace.models))
    if trace.refusals:
        said["refused"] = trace.refusals
    # Who watches over the service asks every few seconds.
    level = logging.DEBUG if request.route in {"/healthz", "/readyz"} and request.status < 400 else logging.INFO
    _log.log(level, "request", extra=fields(request_id=trace.request_id, **said))


def log_to_stderr(form: LogFormat, level: LogLevel) -> bool:
    """Write this process's lines on standard error; "auto" is text on a terminal and JSON elsewhere.

    Returns
    -------
    bool
        Whether they are JSON.
    """
    as_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines({}) if as_json else TextLines())
    _log_to(handler, level)
    return as_json


def log_to_file(file: Path, level: LogLevel, always: Mapping[str, str]) -> None:
    """Write this process's lines into a file as JSON, a new one after 64 MiB; three old ones are kept.

    Parameters
    ----------
    always
        What every line of this process says.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(file, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8")
    handler.setFormatter(JsonLines(always))
    _log_to(handler, level)


def _log_to(handler: logging.Handler, level: LogLevel) -> None:
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
    for name in _QUOTING_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")


def raised_at(error: BaseException) -> list[str]:
    """Where an exception came from, innermost last, as ``file:line function``; nothing of what it says."""
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_FRAMES:]
    return [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in frames]


def line_of(record: logging.LogRecord) -> dict[str, object]:
    """A record as the keys and values of its line."""
    said: dict[str, object] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "message": record.getMessage(),
    }
    given: dict[str, object] = getattr(record, "fields", {})
    if "request_id" not in given and (request_id := current_request_id()):
        said["request_id"] = request_id
    said |= given
    if record.name.partition(".")[0] not in OWN_LOGGERS:
        said["logger"] = record.name
    info: _ErrorInfo | None = record.exc_info if isinstance(record.exc_info, tuple) else None
    if info and info[1] is not None:
        said |= {"error": type(info[1]).__name__, "at": raised_at(info[1])}
    return said


class JsonLines(logging.Formatter):
    """A line a record, a JSON object; `always` goes with each."""

    def __init__(self, always: Mapping[str, str]) -> None:
        super().__init__()
        self._always = dict(always)

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return json.dumps(line_of(record) | self._always, default=str)


class TextLines(logging.Formatter):
    """A line a record, for people."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return as_text(line_of(record))


def as_text(line: Mapping[str, object]) -> str:
    """A line's keys and values for people: time, level, words, then the others as ``key=value``."""
    leading = ("time", "level", "message")
    head = f"{str(line.get('time', ''))[:23]} {str(line.get('level', '')).upper():<7} {line.get('message', '')}"
    return " ".join([head, *(f"{key}={value}" for key, value in line.items() if key not in leading)])


def write_line(stream: TextIO, text: str) -> None:
    """Write a line at once, that those of several threads do not mix."""
    stream.write(f"{text}\n")
    stream.flush()


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 1)
