"""The command line as a user meets it: real processes, exit codes, and what is imported before it answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_ray import __version__
from cxr_ray.console import COMMANDS, command_app

HEAVY = {"torch", "ray", "pandas", "pyarrow", "pydantic", "typer", "numpy"}
WATCHED_HELP = """
import runpy, sys
sys.argv = ["cxr-ray", *sys.argv[1:]]
try:
    runpy.run_module("cxr_ray", run_name="__main__")
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "cxr_ray", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"NO_COLOR": "1", "COLUMNS": "200"},
        cwd=cwd,
        check=False,
    )


@pytest.mark.parametrize("flag", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands_and_loads_nothing_heavy(flag):
    ran = subprocess.run([sys.executable, "-c", WATCHED_HELP, *flag], capture_output=True, text=True, timeout=60, check=True)
    first_words = [line.split()[0] for line in ran.stdout.splitlines() if line.startswith("  ")]
    assert first_words == list(COMMANDS)
    for _, summary in COMMANDS.values():
        assert summary in ran.stdout
    loaded = {name.split(".")[0] for name in ran.stderr.split()}
    assert "cxr_ray" in loaded
    assert not loaded & (HEAVY | {"ingest", "serve", "cluster"})


def test_version():
    ran = call("--version")
    assert (ran.returncode, ran.stdout) == (0, f"cxr-ray {__version__}\n")


def test_unknown_command():
    ran = call("trian", "--data", "x")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.splitlines() == [f"cxr-ray: command 'trian' is not known; use one of: {', '.join(COMMANDS)}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_called(name):
    assert callable(command_app(name))


def test_help_of_commands_needs_neither_torch_nor_ray():
    """Options have to be readable at once; what a command works with is loaded when it works."""
    commands = [
        ["ingest", "nih"],
        ["train"],
        ["evaluate"],
        ["compare"],
        ["bundle", "verify"],
        ["token", "add"],
        ["history", "import"],
    ]
    for command in commands:
        ran = subprocess.run(
            [sys.executable, "-c", WATCHED_HELP, *command, "--help"], capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 0, ran.stderr[-500:]
        assert "Usage: cxr-ray" in ran.stdout
        assert not {"torch", "ray"} & set(ran.stderr.split())


def test_failed_work_is_one_line_and_exit_code_1(tmp_path):
    ran = call("train", "--data", tmp_path / "nonexistent", "--out", tmp_path / "run", cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stdout == ""
    lines = ran.stderr.splitlines()
    settings = [line for line in lines if not line.startswith("cxr-ray: ")]
    assert settings[0] == "# cxr-ray train"
    assert f"data: {tmp_path / 'nonexistent'}" in settings
    assert "epochs: 10" in settings
    (error,) = lines[len(settings) :]
    assert str(tmp_path / "nonexistent") in error
    assert "cxr-ray ingest" in error
    # All that stands before the error is settings.
    assert all(line.split(":")[0].isidentifier() for line in settings[1:]), settings
    assert not (tmp_path / "run").exists()


def test_a_value_of_the_wrong_type_is_exit_code_2(tmp_path):
    ran = call("train", "--data", tmp_path, "--out", tmp_path / "run", "--epochs", "zero")
    assert ran.returncode == 2
    assert ran.stderr.startswith("cxr-ray: setting 'epochs' is 'zero': Input should be a valid integer")
    assert len(ran.stderr.splitlines()) == 1


def test_a_value_out_of_range_is_one_line_and_exit_code_2(tmp_path):
    ran = call("ingest", "nih", "--release", tmp_path, "--out", tmp_path / "d", "--size", "8")
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == ["cxr-ray: setting 'size' is 8: Input should be greater than or equal to 16"]


def test_a_missing_setting_is_one_line_and_exit_code_2():
    ran = call("ingest", "nih")
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("cxr-ray: setting 'release'")


def test_a_bad_config_file_is_exit_code_2(tmp_path):
    (tmp_path / "c.yaml").write_text("release: [")
    ran = call("ingest", "nih", "--config", tmp_path / "c.yaml")
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert str(tmp_path / "c.yaml") in line


def test_bundle_verify_of_nothing_is_one_line_and_exit_code_1(tmp_path):
    ran = call("bundle", "verify", tmp_path / "none")
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert str(tmp_path / "none") in line
