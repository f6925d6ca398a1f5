"""Log lines: what is in one, what never is, and how the lines of files that change reach whoever follows them."""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

import pytest

from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.ray_session import ray_session
from serve.log_files import LogFollower
from serve.logs import JsonLines, TextLines, as_text, fields, line_of
from serve.service import check_metrics_port
from serve.trace import Trace, current


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    made = logging.getLogger("serve.test_logs")
    made.setLevel(logging.INFO)
    made.propagate = False
    yield made
    for handler in list(made.handlers):
        made.removeHandler(handler)
        handler.close()


@pytest.fixture
def written(logger: logging.Logger, tmp_path: Path) -> Callable[[], list[dict]]:
    handler = logging.FileHandler(tmp_path / "lines")
    handler.setFormatter(JsonLines({"deployment": "Ingress"}))
    logger.addHandler(handler)
    return lambda: [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]


def fail(patient: str) -> None:
    raise ValueError(f"value of {patient}")


def test_exception_is_a_type_and_a_place_and_not_what_it_says(logger: logging.Logger, written) -> None:
    try:
        fail("DOE^JANE")
    except ValueError:
        logger.exception("decoding failed\nover two lines")
    (line,) = written()
    assert "DOE" not in json.dumps(line)
    assert (line["level"], line["message"], line["error"]) == ("error", "decoding failed\nover two lines", "ValueError")
    assert [place.partition(" ")[2] for place in line["at"]] == [
        "test_exception_is_a_type_and_a_place_and_not_what_it_says",
        "fail",
    ]
    assert line["at"][-1].startswith("tests/test_logs.py:")


def test_a_line_has_the_id_of_its_request_in_its_threads_too(logger: logging.Logger, written) -> None:
    import contextvars

    before = current.set(Trace("one"))
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(logger.info, "beside"))
    thread.start()
    thread.join()
    logger.info("here")
    logger.info("of another", extra=fields(request_id="two", batch=3))
    current.reset(before)
    logger.info("of none")
    lines = {line["message"]: line for line in written()}
    assert [lines[said].get("request_id") for said in ("beside", "here", "of another", "of none")] == [
        "one",
        "one",
        "two",
        None,
    ]
    assert lines["of another"]["batch"] == 3
    assert all(line["deployment"] == "Ingress" for line in lines.values())


def test_text_says_what_json_says() -> None:
    record = logging.LogRecord("serve.x", logging.WARNING, "x.py", 1, "full after %d", (3,), None)
    record.fields = {"status": 503}
    assert TextLines().format(record) == as_text(json.loads(JsonLines({}).format(record)))
    assert TextLines().format(record).endswith(" WARNING full after 3 status=503")
    assert line_of(record)["time"].endswith("+00:00")


def test_every_line_is_followed_once_over_changes_of_files(tmp_path: Path, logger: logging.Logger) -> None:
    (tmp_path / "cxr-ray-Old-1.jsonl").write_text('{"message": "of a service before"}\n')
    told: list[dict[str, object]] = []
    numbers = range(300)
    with LogFollower(tmp_path, told.append):
        # Every file holds a third of the lines, and the follower looks in between.
        handler = RotatingFileHandler(tmp_path / "cxr-ray-New-1.jsonl", maxBytes=15_000, backupCount=5)
        handler.setFormatter(JsonLines({}))
        logger.addHandler(handler)
        for number in numbers:
            logger.info("line", extra=fields(number=number))
            if number % 60 == 0:
                threading.Event().wait(0.6)
        with (tmp_path / "cxr-ray-Old-1.jsonl").open("a") as old:
            old.write('{"message": "half')
            old.flush()
            threading.Event().wait(0.6)
            old.write(' a line"}\nno JSON\n{"message": "after it"}\n')
    assert [line["number"] for line in told if line["message"] == "line"] == list(numbers)
    assert [line["message"] for line in told if line["message"] != "line"] == ["half a line", "after it"]
    assert len(list(tmp_path.glob("cxr-ray-New-1.jsonl*"))) > 1


def test_a_metrics_port_is_refused_where_ray_runs_or_something_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CxrRayError, match="cannot be listened on"):
        check_metrics_port(taken.getsockname()[1])
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UsageError, match="ray start --metrics-export-port"), ray_session(metrics_port=9000):
        pytest.fail("it was joined")
