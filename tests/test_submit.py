"""Submitting: the job's command line is what was typed, and what is wrong is said in one line before anything is sent."""

import ast
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.submit import PACKAGES, SubmitError, _Log, absolute_paths, entrypoint, reach, runtime_environment

REPOSITORY = Path(__file__).resolve().parent.parent
HERE = Path("/work place")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}.0"
FORBIDDEN_IMPORTS = {
    "cxr_ray": {"ingest", "serve", "cluster"},
    "ingest": {"serve", "cluster"},
    "serve": {"cluster"},
    "cluster": {"cxr_ray", "ingest", "serve"},
}


def run_submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "cxr_ray", "submit", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_command_reaches_the_job_as_it_was_typed():
    typed = ["train", "--data", "s3://bucket/a b", "--out", "/runs/it's $HOME", "--workers", "2", "--gpu"]
    assert shlex.split(entrypoint(typed, HERE)) == ["python", "-P", "-m", "cxr_ray", *typed]


def test_relative_paths_become_absolute_and_uris_stay():
    typed = [
        "evaluate",
        "--bundle",
        "run/bundle",
        "--data=data",
        "--out",
        "../out",
        "--split",
        "test",
        "--config",
        "/etc/a.yaml",
    ]
    assert absolute_paths(typed, HERE) == [
        "evaluate",
        "--bundle",
        "/work place/run/bundle",
        "--data=/work place/data",
        "--out",
        "/work place/../out",
        "--split",
        "test",
        "--config",
        "/etc/a.yaml",
    ]
    assert absolute_paths(["--data", "s3://bucket/x", "--release=gs://y"], HERE) == [
        "--data",
        "s3://bucket/x",
        "--release=gs://y",
    ]


@pytest.mark.parametrize(
    ("given", "sent"),
    [("random", "random"), ("imagenet", "imagenet"), ("weights.safetensors", "/work place/weights.safetensors")],
)
def test_named_weights_are_no_paths(given, sent):
    assert absolute_paths(["train", "--init", given, f"--init={given}"], HERE) == ["train", "--init", sent, f"--init={sent}"]


def test_an_option_without_its_value_is_left_to_the_command():
    assert absolute_paths(["train", "--data"], HERE) == ["train", "--data"]


@pytest.mark.parametrize("command", [["serve"], ["rm", "-rf"], []])
def test_only_jobs_are_submitted(command):
    with pytest.raises(SubmitError, match="submit one of: ingest, train, evaluate, predict") as error:
        entrypoint(command, HERE)
    assert error.value.code == 2


def test_the_code_is_uploaded_and_nothing_else(tmp_path):
    environment = runtime_environment(tmp_path)
    assert [Path(module).name for module in environment["py_modules"]] == list(PACKAGES)
    assert environment["env_vars"] == {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    copied = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.suffix == ".py" or path.name == "py.typed" for path in copied)
    assert (tmp_path / "cxr_ray/presets/__init__.py").read_bytes() == (REPOSITORY / "cxr_ray/presets/__init__.py").read_bytes()


def test_a_log_that_is_read_again_is_not_printed_again():
    printed: list[str] = []
    log = _Log(printed.append)
    log.read("one\ntw", 0)
    log.read("one\n", 0)
    log.read("two\nthree\n", 4)
    assert "".join(printed) == "one\ntwo\nthree\n"


def test_an_unknown_command_exits_with_2():
    done = run_submit("trian", "--data", "x")
    assert done.returncode == 2
    assert done.stderr == "cxr-ray: command 'trian' does not run as a job; submit one of: ingest, train, evaluate, predict\n"


def test_help_names_the_requirements_and_an_example():
    text = " ".join(run_submit("--help").stdout.replace("│", " ").split())
    for said in ("--token-file", "cxr-ray submit --address http://head:8265", "shared storage", "same minor versions"):
        assert said in text


def test_a_closed_port_is_named_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        done = run_submit("--address", address, "train", "--data", "x")
    assert time.monotonic() - started < 15
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"cxr-ray: {address}: no answer (")
    assert "--address" in done.stderr


def test_a_server_that_never_answers_is_given_up_in_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        done = run_submit("train", RAY_API_SERVER_ADDRESS=address)
    assert time.monotonic() - started < 15
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"cxr-ray: {address}: no answer (")


def test_an_address_that_is_no_url_is_bad_usage():
    with pytest.raises(SubmitError, match="ray://head:10001: is no http") as error:
        reach("ray://head:10001", None)
    assert error.value.code == 2


@contextmanager
def dashboard(ray_version: str, python_version: str, token: str | None = None) -> Iterator[str]:
    """What a cluster's dashboard tells of its versions; for the versions that are not installed here."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            if token is not None and given != f"Bearer {token}":
                self.send_response(401 if given is None else 403)
                self.end_headers()
                return
            answers = {
                "/api/version": {"ray_version": ray_version},
                "/api/v0/cluster_metadata": {"result": True, "data": {"pythonVersion": python_version}},
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answers[self.path]).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_other_versions_are_refused():
    import ray

    with (
        dashboard("2.9.3", PYTHON) as address,
        pytest.raises(SubmitError, match=f"runs Ray 2.9.3, here is Ray {ray.__version__}"),
    ):
        reach(address, None)
    with (
        dashboard(ray.__version__, "3.9.1") as address,
        pytest.raises(SubmitError, match=r"runs Python 3\.9\.1, here is Python 3"),
    ):
        reach(address, None)
    with dashboard(ray.__version__, PYTHON) as address:
        assert reach(address, None).headers == {}


def test_the_token_is_found_where_ray_looks_and_sent_only_when_asked_for(tmp_path, monkeypatch):
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / "right").write_text("right\n")
    (tmp_path / "wrong").write_text("wrong\n")
    with dashboard(ray.__version__, PYTHON) as address:
        assert reach(address, tmp_path / "right").headers == {}
    with dashboard(ray.__version__, PYTHON, token="right") as address:
        with pytest.raises(SubmitError, match=r"wants a token, and .*/\.ray/auth_token cannot be read"):
            reach(address, None)
        (tmp_path / ".ray/auth_token").write_text("right\n")
        assert reach(address, None).headers == {"Authorization": "Bearer right"}
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "wrong"))
        with pytest.raises(SubmitError, match=r"refuses the token from .*/wrong"):
            reach(address, None)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert reach(address, None).headers == {"Authorization": "Bearer right"}
        with pytest.raises(SubmitError, match=r"refuses the token from .*/wrong"):
            reach(address, tmp_path / "wrong")
        found = reach(address, tmp_path / "right")
        stop = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={tmp_path}/right ray job stop x --address {address}"
        assert found.ray_command("job stop x") == stop


@pytest.mark.parametrize("package", FORBIDDEN_IMPORTS)
def test_imports_point_one_way(package):
    found = []
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            found += [(path.name, name) for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS[package]]
    assert found == []
