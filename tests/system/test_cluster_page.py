"""The ways that docs/cluster.md shows, command by command: two hosts with addresses of their own, a job on both, a bundle."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY

from cluster.hosts import Host, make_network, permitted, remove_network
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


def clean_environment() -> dict[str, str]:
    """That of a shell in which the commands are found and nothing of Ray is set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_every_command_of_the_page_does_what_it_says(nothing_left: None, tmp_path: Path) -> None:
    environment = clean_environment() | {"COLUMNS": "80"}
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


SUBNET = "10.97.0.0/24"
MOUNT = "/mnt/cxr"


@dataclass(frozen=True)
class Machine:
    """Where a command of the page is typed: a host, or this machine, with a home folder of its own."""

    home: Path
    host: Host | None

    @property
    def token(self) -> Path:
        return self.home / ".ray" / "auth_token"

    def run(self, command: str) -> str:
        # Ray's own folder would tell what starts on this machine later of a cluster that is gone.
        own = {"HOME": str(self.home), "RAY_TMPDIR": str(self.home), "RAY_USAGE_STATS_ENABLED": "0"}
        words = ["bash", "-c", command]
        # Not pipes: Ray's processes outlive the command and would keep them open.
        with (self.home / "said").open("w+") as said:
            done = subprocess.run(
                self.host.command(words) if self.host else words,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=clean_environment() | own,
                cwd=self.home,
                timeout=200,
                check=False,
            )
            said.seek(0)
            answer = said.read()
        assert done.returncode == 0, f"{command}\n{answer}"
        return answer


@pytest.fixture
def machines() -> Iterator[dict[str, Machine]]:
    """Two hosts that know nothing of each other, and this machine, by the names that the page's prompts have."""
    if reason := permitted():
        pytest.skip(f"no hosts of their own can be made here: {reason}")
    network = make_network("page", 2, SUBNET)
    # Short: sockets lie below it.
    homes = Path(tempfile.mkdtemp(prefix="cxr-page-"))
    made = dict(zip(("head", "node", "desk"), (*network.hosts, None), strict=True))
    try:
        for name in made:
            (homes / name / ".ray").mkdir(parents=True)
        yield {name: Machine(homes / name, host) for name, host in made.items()}
    finally:
        for process in {process for host in network.hosts for process in host.processes()}:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        remove_network(network)
        shutil.rmtree(homes, ignore_errors=True)


def test_ray_started_by_hand_on_two_machines_takes_a_job(machines: dict[str, Machine], tmp_path: Path) -> None:
    lines = re.findall(r"^(head|node|desk)\$ (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [name for name, _ in lines] == ["head", "head", "node", "head", "desk"]
    said: dict[str, str] = {}
    for name, command in lines:
        said[command] = machines[name].run(command.replace(MOUNT, str(tmp_path / "mount")))
        if "get-auth-token" in command:
            for other in ("node", "desk"):
                shutil.copy(machines["head"].token, machines[other].token)
    *_, listed, submitted = said.values()
    assert listed.count("ALIVE") == 2
    assert "40 patients" in submitted
    assert (tmp_path / "mount" / "release").is_dir()
