"""`cxr-ray deploy --keep` on Ray's own dashboard: an application comes back to a head that was killed and started again."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from host_site import until
from local_cluster import LocalCluster, free_ports, watched

pytestmark = [pytest.mark.system, pytest.mark.cluster, pytest.mark.timeout(900)]

# Cannot be built before the file is there, as the service cannot before its database is.
APPLICATION = """
from pathlib import Path
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Greeting:
    async def __call__(self, request) -> str:
        return "good morning"

def application(arguments):
    Path(arguments["needed"]).read_text()
    return Greeting.bind()
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    (tmp_path / "greeting_of_tests.py").write_text(APPLICATION)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    with LocalCluster() as made:
        yield made


def test_an_application_comes_back_to_a_head_that_was_killed(cluster: LocalCluster, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    needed = tmp_path / "needed"
    application = {
        "name": "greeting",
        "route_prefix": "/",
        "import_path": "greeting_of_tests:application",
        "args": {"needed": str(needed)},
    }
    configuration = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(configuration))

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/", timeout=5, trust_env=False).text == "good morning"
        except httpx.HTTPError:
            return False

    where = ["--address", cluster.address, "--token-file", str(cluster.token_file)]
    head = cluster.start_head(2)
    with watched([sys.executable, "-m", "cxr_ray", "deploy", "--keep", *where, str(tmp_path / "serve.yaml")]) as keeping:
        keeping.wait_for("greeting put on .*: greeting was not there", 240)
        keeping.wait_for("greeting put on .*: greeting had failed", 240)
        needed.write_text("there")
        until(answers, "the first answer", 240)
        cluster.kill(head)
        assert not answers()
        cluster.start_head(2)
        keeping.wait_for("greeting put on .*: greeting was not there", 240)
        until(answers, "an answer of the head that was started again", 240)
