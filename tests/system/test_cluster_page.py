"""The way that docs/cluster.md shows, command by command: two hosts with addresses of their own, a job on both, a bundle."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from cluster.hosts import permitted
from cluster.local import default_folder, find, take_down

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(900)]

PAGE = REPOSITORY / "docs" / "cluster.md"


@pytest.fixture
def nothing_left() -> Iterator[None]:
    folder = default_folder("dev")
    if reason := permitted():
        pytest.skip(f"no hosts of their own can be made here: {reason}")
    if folder.exists():
        pytest.skip(f"{folder} holds somebody's cluster")
    yield
    if folder.exists():
        take_down(find(folder))


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_every_command_of_the_page_does_what_it_says(nothing_left: None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80"}
    said: dict[str, str] = {}
    for command in commands():
        if exported := re.fullmatch(r"export (\w+)=(\S+)", command):
            environment[exported[1]] = exported[2]
            continue
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said[command.partition(" --")[0]] = done.stdout
    up = said["cxr-ray cluster up"]
    assert "2 of 2 nodes alive" in up
    for exported in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        assert environment[exported] in up
    assert "10.97.0.2" in up
    assert "10.97.0.3" in up
    assert re.search(r"train: training, 2 workers", said["cxr-ray submit train"])
    assert (tmp_path / "shared/run/bundle/bundle.json").exists()
    assert said["cxr-ray jobs list"].count("succeeded") == 3
    assert "mean" in said["cxr-ray evaluate"]
    assert said["cxr-ray cluster down"] == "2 nodes ended\n"
    assert not default_folder("dev").exists()
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "cxr-dev" not in namespaces
