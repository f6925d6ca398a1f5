"""Submitting: the job's command line is what was typed, and what is wrong is said in one line before anything is sent."""

import ast
import json
import os
import re
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
from typing import Literal, get_origin

import pytest
import yaml
from typer.main import get_command

from cluster.cli import submit
from cluster.command_line import COMMANDS, PATH_OPTIONS, CommandLine, absolute_paths, command_line
from cluster.connection import reach
from cluster.credentials import SECRET_OPTIONS, hidden, told_secret, told_secret_in
from cluster.errors import SubmitError
from cluster.job import _Log
from cluster.packing import PACKAGES, runtime_environment
from cxr_ray.console import command_app

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
    assert shlex.split(command_line(typed, HERE).entrypoint) == ["python", "-P", "-m", "cxr_ray", *typed]


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


def test_bundles_are_made_absolute_one_by_one():
    sent = absolute_paths(["compare", "--bundles", "ours=run/bundle,s3://bucket/b,other=s3://bucket/c"], HERE)
    assert sent[2] == "ours=/work place/run/bundle,s3://bucket/b,other=s3://bucket/c"


def test_bundles_are_told_from_paths_as_the_command_tells_them():
    sent = absolute_paths(["compare", "--bundles", "ours=a, ./lr=1/bundle,gone=b"], HERE)
    assert sent[2] == "ours=/work place/a,/work place/lr=1/bundle,gone=/work place/b"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("run/a,other=b", "/here/run/a,other=/here/b"),
        ({"ours": "run/a,b", "far": "s3://bucket/b"}, {"ours": "/here/run/a,b", "far": "s3://bucket/b"}),
        (["run/a", "ours=run/b", "far=s3://bucket/b"], ["/here/run/a", "ours=/here/run/b", "far=s3://bucket/b"]),
        (None, None),
    ],
)
def test_paths_in_lists_and_mappings_of_settings_are_made_absolute(given, sent, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"bundles": given, "epochs": 2}))
    made = command_line(["compare", "--config", str(tmp_path / "mine.yaml")], Path("/here"))
    assert yaml.safe_load(made.settings) == {"bundles": sent, "epochs": 2}


@pytest.mark.parametrize("second", [["--config", "b.yaml"], ["--config=b.yaml"]])
def test_a_second_settings_file_is_refused(second, tmp_path):
    (tmp_path / "a.yaml").write_text("data: d\n")
    with pytest.raises(SubmitError, match=r"--config .*/b.yaml: is the second settings file") as error:
        command_line(["train", "--config", "a.yaml", *second], tmp_path)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("uri", "shown", "secret"),
    [
        ("s3://AKIA:secret@bucket/d", "s3://***@bucket/d", True),
        ("s3://AKIA:sec/ret+@bucket/d", "s3://***@bucket/d", True),
        ("s3://bucket/d?region=eu&secret_key=ab%2F", "s3://bucket/d?region=eu&secret_key=***", True),
        ("abfs://:key@account.blob.core.windows.net/c", "abfs://***@account.blob.core.windows.net/c", True),
        ("https://token@mlflow/x", "https://***@mlflow/x", True),
        ("one=s3://b/c,two=https://u:pw@h/x", "one=s3://b/c,two=https://***@h/x", True),
        ("hdfs://user@host:9000/p", "hdfs://***@host:9000/p", False),
        ("abfs://container@account.dfs.core.windows.net/p", "abfs://***@account.dfs.core.windows.net/p", False),
        ("s3://bucket/a@b?region=eu", "s3://bucket/a@b?region=eu", False),
        ("http://head:8265/x@y", "http://head:8265/x@y", False),
        ("http://[::1]:8265/x@y", "http://[::1]:8265/x@y", False),
        ("/data/me@work", "/data/me@work", False),
    ],
)
def test_credentials_in_uris_are_found_and_hidden(uri, shown, secret):
    assert hidden(f"cp {uri} elsewhere") == f"cp {shown} elsewhere"
    assert (told_secret("data", {"nested": [uri]}) is not None) == secret
    assert (told_secret_in(["train", "--data", uri, "--out", "x"]) is not None) == secret
    assert str(SubmitError(f"{uri} cannot be used")) == f"{shown} cannot be used"


def test_what_storage_hides_is_hidden_here():
    from cxr_ray.storage import _SECRET_OPTIONS

    assert SECRET_OPTIONS.issuperset(_SECRET_OPTIONS)


def test_every_setting_that_names_a_file_is_made_absolute():
    """Settings say in their descriptions what they are; a new one that names a file has to be in the list."""
    from cxr_ray.compare_settings import CompareSettings
    from cxr_ray.evaluate_settings import EvaluateSettings
    from cxr_ray.train_settings import TrainSettings
    from cxr_ray.tune_settings import TuneSettings
    from ingest.dicom import DicomSettings
    from ingest.nih import NihSettings
    from ingest.phantom_release import PhantomSettings
    from serve.batch_settings import PredictSettings

    of_files = re.compile(r"\b(folder|file|files|URI|CSV|layout of)\b", re.IGNORECASE)
    for model in (
        CompareSettings,
        EvaluateSettings,
        TrainSettings,
        TuneSettings,
        DicomSettings,
        NihSettings,
        PhantomSettings,
        PredictSettings,
    ):
        for name, field in model.model_fields.items():
            # A share of files, a switch, and the address of a server are none; named weights may be.
            if of_files.search(field.description or "") and field.annotation not in (bool, float) and name != "mlflow":
                assert name.replace("_", "-") in PATH_OPTIONS or get_origin(field.annotation) is Literal, (model, name)


def test_a_settings_file_is_read_here_and_travels(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: shards\nout: s3://bucket/run\ninit: imagenet\nepochs: 3\n")
    made = command_line(["train", "--config", "mine.yaml", "--epochs", "5"], tmp_path)
    assert made.arguments == ("train", "--config", "settings.yaml", "--epochs", "5")
    sent = {"data": f"{tmp_path}/shards", "out": "s3://bucket/run", "init": "imagenet", "epochs": 3}
    assert yaml.safe_load(made.settings) == sent
    environment = runtime_environment(tmp_path / "packed", made.settings)
    assert yaml.safe_load((Path(environment["working_dir"]) / "settings.yaml").read_text()) == sent
    assert command_line(["train", f"--config={tmp_path}/mine.yaml"], HERE).arguments == ("train", "--config=settings.yaml")
    with pytest.raises(SubmitError, match=r"--config .*/absent.yaml: .*No such file") as error:
        command_line(["train", "--config", "absent.yaml"], tmp_path)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--data", "x", "--out", "y", "--epochs", "0"], "setting 'epochs' is '0'"),
        (["train", "--dat", "x"], "No such option: --dat"),
        (["ingest", "nih", "--size", "many"], "Invalid value for '--size'"),
        (["evaluate", "--data", "x"], "setting 'bundle'"),
        (["predict", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_what_the_command_would_refuse_is_refused_before_anything_is_sent(command, said):
    done = run_submit("--address", "http://127.0.0.1:9", *command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def test_a_failed_training_goes_on_where_it_failed_and_others_are_run_again():
    assert CommandLine(("train", "--out", "x")).again().arguments == ("train", "--out", "x", "--resume")
    assert CommandLine(("train", "--resume")).again().arguments == ("train", "--resume")
    assert CommandLine(("compare", "--out", "x")).again().arguments == ("compare", "--out", "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-wait", "--retries", "2", "train"], "leave out --retries or --no-wait"),
        (["--attach", "x", "train"], "--attach x: follows a job that runs already; leave out 'train'"),
    ],
)
def test_options_that_contradict_each_other_are_bad_usage(arguments, said):
    import ray

    with dashboard(ray.__version__, PYTHON) as address:
        done = run_submit("--address", address, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--data", "x", "--out", "y"], 0, "train: options and settings are valid"),
        (["listen", "--port", "70000"], 2, "setting 'listener.port' is 70000"),
        (["bundle", "show", "x"], 2, "check bundle: check one of: ingest, train"),
        ([], 2, "check one of"),
    ],
)
def test_check_goes_as_far_as_the_settings(arguments, code, said, tmp_path):
    command = [sys.executable, "-m", "cxr_ray", "check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_option_without_its_value_is_left_to_the_command():
    assert absolute_paths(["train", "--data"], HERE) == ["train", "--data"]


@pytest.mark.parametrize("command", [["serve"], ["rm", "-rf"], []])
def test_only_jobs_are_submitted(command):
    with pytest.raises(SubmitError, match="submit one of: ingest, train, tune, evaluate, compare, predict") as error:
        command_line(command, HERE)
    assert error.value.code == 2


def test_the_code_is_uploaded_and_nothing_else(tmp_path):
    environment = runtime_environment(tmp_path, None)
    assert [Path(module).name for module in environment["py_modules"]] == list(PACKAGES)
    assert environment["env_vars"] == {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    copied = [path for path in tmp_path.rglob("*") if path.is_file()]
    suffixes = {".py", ".html", ".css", ".js", ".mako"}
    assert all(path.suffix in suffixes or path.name == "py.typed" for path in copied)
    # Code, and what it reads beside itself.
    for part in ("cxr_ray/presets/__init__.py", "cxr_ray/templates/report.html", "serve/store/migrations/script.py.mako"):
        assert (tmp_path / "packages" / part).read_bytes() == (REPOSITORY / part).read_bytes()
    assert "working_dir" not in environment
    assert sum(path.stat().st_size for path in copied) < 5_000_000


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
    assert (
        done.stderr
        == "cxr-ray: command 'trian' does not run as a job; submit one of: ingest, train, tune, evaluate, compare, predict\n"
    )


def test_help_names_the_requirements_and_an_example():
    text = " ".join(run_submit("--help").stdout.replace("│", " ").split())
    for said in ("--token-file", "cxr-ray submit train --data /shared/nih", "shared storage", "same minor versions"):
        assert said in text


def test_options_of_submit_are_taken_wherever_they_stand_and_no_command_has_such():
    options = {option for parameter in get_command(submit).params for option in parameter.opts} - {"command"}
    assert "--address" in options
    for command in COMMANDS:
        found = get_command(command_app(command))
        for each in getattr(found, "commands", {command: found}).values():
            assert not options & {option for parameter in each.params for option in parameter.opts}
    done = run_submit("--adress", "http://head:8265", "train")
    assert done.stderr == "cxr-ray: No such option: --adress ('cxr-ray submit --help' lists the options)\n"
    done = run_submit("train", "--data", "x", "--num-cpus", "lots", "--out", "y")
    assert "Invalid value for '--num-cpus'" in done.stderr


@pytest.mark.parametrize("is_last", [False, True])
def test_a_closed_port_is_named_at_once(is_last):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        named, command = ["--address", address], ["train", "--data", "x", "--out", "y"]
        done = run_submit(*(command + named if is_last else named + command))
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
        done = run_submit("train", "--data", "x", "--out", "y", RAY_API_SERVER_ADDRESS=address)
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
        assert found.options == f" --address {address} --token-file {tmp_path}/right"


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
