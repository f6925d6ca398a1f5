"""compose.yaml, the Dockerfile and what `ray up` reads: accepted by their own tools, and of one mind with Kubernetes."""

import fnmatch
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import require_program, run_peer
from dicom_peers import instance, listener_process, part10, until
from manifests import (
    CLUSTER,
    DASHBOARD,
    DICOM,
    HTTP,
    KUBERAY,
    NODE_METRICS,
    PROJECT,
    RAY_METRICS,
    REPOSITORY,
    Document,
    documents,
)
from orthanc import running_orthanc

from cluster.connection import DEFAULT_ADDRESS
from cluster.local import DASHBOARD_PORT, GCS_PORT, KEEPALIVE, SERVE_VARIABLES
from cxr_ray.settings import load_settings
from serve.deployment import serve_config
from serve.node.destinations import DicomDestination
from serve.node.node import ListenSettings
from serve.service import ServeSettings

COMPOSE = CLUSTER / "compose.yaml"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
# Of everything that compose.yaml is filled in with; none may have a value that anybody could guess.
VARIABLES = dict(
    line.split("=", 1) for line in (CLUSTER / "env.example").read_text().splitlines() if line and not line.startswith("#")
)
SECRETS = {"CXR_RAY_TOKEN", "RAY_AUTH_TOKEN", "PGPASSWORD", "GRAFANA_PASSWORD"}


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """compose.yaml as docker-compose reads it: merged, filled in, and found to be right."""
    variables = tmp_path_factory.mktemp("compose") / "env"
    variables.write_text("".join(f"{name}={value or 'filled-in'}\n" for name, value in VARIABLES.items()))
    done = run_compose("--env-file", variables, "config")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def run_compose(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [require_program("docker-compose"), "-f", COMPOSE, *map(str, arguments)],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def own(compose: Document) -> dict[str, Document]:
    return {name: service for name, service in compose["services"].items() if "cxr-ray" in service["image"]}


def test_one_server_has_every_part(compose: Document) -> None:
    assert set(own(compose)) == {"head", "worker", "deploy", "node"}
    assert set(compose["services"]) - set(own(compose)) == {"postgresql", "orthanc", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert "test" in service["healthcheck"] or name == "deploy", name
        assert service["image"].partition(":")[2] not in {"", "latest"}, name


def test_everything_comes_back_after_a_reboot_the_service_too(compose: Document) -> None:
    assert {name: service["restart"] for name, service in compose["services"].items()} == dict.fromkeys(
        compose["services"], "unless-stopped"
    )
    deploy = compose["services"]["deploy"]
    *command, configuration = deploy["command"]
    assert command == ["cxr-ray", "deploy", "--keep", "--address", f"http://head:{DASHBOARD}"]
    assert f"{CLUSTER / 'compose/serve-deploy.yaml'}:{configuration}:ro" in deploy["volumes"]


def test_secrets_have_to_be_filled_in(tmp_path: Path) -> None:
    assert {name for name, value in VARIABLES.items() if not value} == SECRETS | {"CXR_RAY_NODE_TOKEN"}
    for absent in sorted(SECRETS):
        (tmp_path / "env").write_text("".join(f"{name}={'' if name == absent else 'x'}\n" for name in VARIABLES))
        refused = run_compose("--env-file", tmp_path / "env", "config")
        assert refused.returncode != 0
        assert "cluster/.env" in refused.stderr
    assert "/.env" in (CLUSTER / ".gitignore").read_text().splitlines()


def test_containers_may_do_nothing_that_they_need_not(compose: Document) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        writable = {volume.split(":")[1] for volume in service.get("volumes", [])}
        writable |= {mount.split(":")[0] for mount in service.get("tmpfs", [])}
        assert "/tmp" in writable or name == "prometheus", name
    assert {service["user"] for service in own(compose).values()} == {"1000:1000"}


def test_only_the_dicom_port_can_be_reached_from_elsewhere(compose: Document) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    outside = {name for name, ports in published.items() for port in ports if not str(port).startswith("127.0.0.1:")}
    assert not outside
    text = COMPOSE.read_text()
    assert '"${CXR_RAY_DICOM_ADDRESS:-127.0.0.1}:11112:11112"' in text
    assert VARIABLES["CXR_RAY_DICOM_ADDRESS"] == "127.0.0.1"


def test_the_development_cluster_has_the_environment_of_the_others_but_for_its_niceness() -> None:
    lines = (KUBERAY / "base/config/serve.env").read_text().splitlines()
    everywhere = dict(line.split("=") for line in lines if "=" in line)
    del everywhere["RAY_worker_niceness"]
    assert everywhere == SERVE_VARIABLES
    pods = (KUBERAY / "base/config/cluster.env").read_text().splitlines()
    assert {f"{name}={value}" for name, value in KEEPALIVE.items()} <= set(pods)
    for configuration in (CLUSTER / "ray-up").glob("*.yaml"):
        options = configuration.read_text()
        assert all(f"--env {name}={value}\n" in options for name, value in KEEPALIVE.items()), configuration
    head = COMPOSE.read_text()
    assert f"--port={GCS_PORT}" in head
    assert f"--dashboard-port={DASHBOARD_PORT}" in head


def test_ports_names_and_environment_are_those_of_kubernetes(compose: Document) -> None:
    head, worker, node = (compose["services"][name] for name in ("head", "worker", "node"))
    assert f"--dashboard-port={DASHBOARD}" in head["command"]
    assert f":{DASHBOARD}" in DEFAULT_ADDRESS
    for each in (head, worker):
        assert f"--metrics-export-port={RAY_METRICS}" in each["command"]
        assert each["environment"]["RAY_AUTH_MODE"] == "token"
    given = dict(line.split("=") for line in (KUBERAY / "base/config/serve.env").read_text().splitlines() if "=" in line)
    for name in ("head", "worker", "deploy"):
        environment = {key: str(value) for key, value in compose["services"][name]["environment"].items()}
        assert (given | KEEPALIVE).items() <= environment.items()
    assert f"127.0.0.1:{HTTP}:{HTTP}/tcp" in head["ports"]
    assert f"127.0.0.1:{DICOM}:{DICOM}/tcp" in node["ports"]
    settings = load_settings(ListenSettings, CLUSTER / "compose/node.yaml", {})
    on_kubernetes = load_settings(ListenSettings, KUBERAY / "base/config/node.yaml", {})
    assert settings.listener.ae_title == on_kubernetes.listener.ae_title
    assert settings.listener.port == on_kubernetes.listener.port == DICOM
    assert settings.listener.metrics_port == on_kubernetes.listener.metrics_port == NODE_METRICS
    assert settings.spool == on_kubernetes.spool
    assert any(settings.spool.is_relative_to(volume.split(":")[1]) for volume in node["volumes"])
    (subnet,) = compose["networks"]["inside"]["ipam"]["config"]
    assert [str(network) for network in settings.listener.allowed_networks] == [subnet["subnet"]]
    assert settings.dispatch.service_url == f"http://head:{HTTP}"
    (destination,) = settings.delivery.destinations
    orthanc = json.loads((CLUSTER / "compose/orthanc.json").read_text())
    assert isinstance(destination, DicomDestination)
    assert (destination.host, destination.port, destination.called_ae) == ("orthanc", orthanc["DicomPort"], orthanc["DicomAet"])
    assert orthanc["DicomModalities"]["cxr-ray"] == [settings.listener.ae_title, "node", DICOM]


def test_serve_config_is_what_the_command_writes(compose: Document, tmp_path: Path) -> None:
    written = CLUSTER / "compose/serve-deploy.yaml"
    settings = load_settings(ServeSettings, CLUSTER / "compose/serve.yaml", {})
    assert yaml.safe_load(written.read_text()) == serve_config(settings, settings.host, settings.port)
    # Letter by letter, once: the files beside the manifests are made by the same function.
    made = tmp_path / "serve-deploy.yaml"
    command = [sys.executable, "-m", "cxr_ray", "serve", "--config", CLUSTER / "compose/serve.yaml", "--write-config", made]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert made.read_text() == written.read_text()
    postgresql = compose["services"]["postgresql"]["environment"]
    assert settings.store == f"postgresql+psycopg://{postgresql['POSTGRES_USER']}@postgresql/{postgresql['POSTGRES_DB']}"
    on_kubernetes = load_settings(ServeSettings, KUBERAY / "base/config/serve.yaml", {})
    shape = re.compile(r"@[^/]+/")
    assert shape.sub("@host/", settings.store) == shape.sub("@host/", on_kubernetes.store)
    data = {volume.split(":")[1] for volume in compose["services"]["worker"]["volumes"]}
    assert any(Path(settings.bundle).is_relative_to(folder) for folder in data)


def test_everything_that_is_mounted_is_there(compose: Document) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or source == VARIABLES["CXR_RAY_DATA"] or Path(source).exists(), volume


def test_the_dockerfile_is_without_complaint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_of_this_version_and_runs_as_nobody() -> None:
    stages = {stage: base for base, stage in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    assert stages["cpu"] == stages["cuda"] == "runtime"
    assert all("-c constraints.txt" in line for line in re.findall(r"pip install .*", DOCKERFILE))
    python = re.search(r"Python (\d+\.\d+)", (REPOSITORY / "constraints.txt").read_text())
    assert python is not None
    assert f"FROM python:{python[1]}-slim-" in DOCKERFILE
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in DOCKERFILE
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["1000:1000"]
    assert re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE) == [
        f"{HTTP} {DICOM} {DASHBOARD} 6379 {RAY_METRICS} {NODE_METRICS}"
    ]
    for text in (DOCKERFILE, COMPOSE.read_text(), *(path.read_text() for path in (CLUSTER / "ray-up").glob("*.yaml"))):
        assert set(re.findall(r"registry\.example/cxr-ray:([^\s-]+)-(?:cpu|cuda)", text)) == {PROJECT["version"]}


def test_the_image_is_made_of_files_that_are_sent_to_it() -> None:
    rules = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [source for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert copied
    for source in copied:
        assert (REPOSITORY / source).exists()
        assert any(fnmatch.fnmatch(source, rule) or rule.startswith(f"{source}/") for rule in sent), source
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    packages = {path.split("/")[0] for path in tracked if path.endswith("/__init__.py") and path.count("/") == 1}
    assert packages - {"tests"} <= set(copied)


@pytest.mark.parametrize("name", ["aws", "on-premises"])
def test_ray_up_takes_its_configurations(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (given,) = documents(CLUSTER / "ray-up" / f"{name}.yaml")
    prepared = prepare_config(given)
    validate_config(prepared)
    with pytest.raises(Exception, match="headnode"):
        validate_config({**prepared, "headnode": "head"})
    head, worker = (given[f"{part}_start_ray_commands"][-1] for part in ("head", "worker"))
    assert f"--metrics-export-port={RAY_METRICS}" in head
    assert f"--metrics-export-port={RAY_METRICS}" in worker
    assert f"--dashboard-port={DASHBOARD}" in head
    assert "--env RAY_AUTH_MODE=token" in given["docker"]["run_options"]
    (token,) = given["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={token}" in given["docker"]["run_options"]


# Debian's /etc/profile, for users other than root.
LOGIN_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"


def test_the_image_has_what_ray_up_calls(tmp_path: Path) -> None:
    """Ray runs its commands in a login shell, for which Debian's profile replaces PATH, and goes to workers by ssh."""
    from ray.autoscaler._private.command_runner import _with_interactive

    (installed,) = re.findall(r"apt-get install -y --no-install-recommends (.*) \\\n", DOCKERFILE)
    assert {"bash", "openssh-client", "procps", "rsync"} <= set(installed.split())
    (script,) = re.findall(r"^RUN echo '(.*)' > /etc/profile\.d/\w[\w.-]*\.sh$", DOCKERFILE, re.MULTILINE)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ray").write_text('#!/bin/sh\necho "ray of the image: $1"\n')
    (folder / "ray").chmod(0o755)
    (tmp_path / ".bash_profile").write_text(f"PATH={LOGIN_PATH}\n{script.replace('/opt/cxr-ray/bin', str(folder))}\n")
    assert f"{folder}:" in (tmp_path / ".bash_profile").read_text()
    done = login(" ".join(_with_interactive("ray stop")), tmp_path, f"{folder}:{LOGIN_PATH}")
    assert (done.returncode, done.stdout) == (0, "ray of the image: stop\n"), done.stderr
    (tmp_path / ".bash_profile").write_text(f"PATH={LOGIN_PATH}\n")
    assert login(" ".join(_with_interactive("ray stop")), tmp_path, f"{folder}:{LOGIN_PATH}").returncode == 127


def login(command: str, home: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Run what Ray sends; its shells are interactive, and may not take the terminal of the tests."""
    bash = require_program("bash", "/usr/bin:/bin")
    return subprocess.run(
        [bash, "-c", command],
        env={"HOME": str(home), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )


def test_the_token_can_be_read_in_the_containers_on_premises(tmp_path: Path) -> None:
    """It lies there as the SSH user's, for nobody else to read, and that user is seldom the image's."""
    from ray.autoscaler._private.command_runner import _with_interactive
    from ray.autoscaler._private.docker import docker_start_cmds
    from ray.autoscaler.sdk import get_docker_host_mount_location

    (given,) = documents(CLUSTER / "ray-up/on-premises.yaml")
    (token,) = given["file_mounts"]
    place = f"{get_docker_host_mount_location(given['cluster_name'])}{token}"
    (made_readable,) = [command for command in given["initialization_commands"] if place in command]
    copied = tmp_path / "cluster.token"
    copied.write_text("secret")
    copied.chmod(0o600)
    # On the host, between the copying of files and the start of the container.
    done = login(" ".join(_with_interactive(made_readable.replace(place, str(copied)))), tmp_path, LOGIN_PATH)
    assert done.returncode == 0, done.stderr
    assert (copied.stat().st_mode & 0o777, copied.stat().st_gid) == (0o640, os.getgid())
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    docker = given["docker"]
    start = docker_start_cmds(
        "ssh-user", docker["image"], {token: ""}, "name", docker["run_options"], "cluster", "/tmp", str(tmp_path / "docker")
    )
    options = login(" ".join(_with_interactive(start)), tmp_path, LOGIN_PATH).stdout.splitlines()
    assert options[options.index("--group-add") + 1] == str(os.getgid())
    assert options[-2:] == [docker["image"], "bash"]
    assert "--user" not in options


@pytest.mark.system
def test_orthanc_sends_radiographs_to_the_node_and_no_results(tmp_path: Path, free_port: Callable[[], int]) -> None:
    given = json.loads((CLUSTER / "compose/orthanc.json").read_text())
    given["LuaScripts"] = [str(CLUSTER / "compose/orthanc.lua")]
    spool = tmp_path / "spool"
    with listener_process(spool, json.dumps({"port": 0})) as (_, port):
        given["DicomModalities"]["cxr-ray"][1:] = ["127.0.0.1", port]
        http, dicom = free_port(), free_port()
        given |= {"HttpPort": http, "DicomPort": dicom}
        given |= {place: str(tmp_path / "orthanc") for place in ("StorageDirectory", "IndexDirectory")}
        with running_orthanc(tmp_path / "orthanc", http, dicom, **given) as archive:
            result = instance(Modality="OT", SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
            assert archive.rest.post("/instances", content=part10(result)).status_code == 200
            (tmp_path / "ours.dcm").write_bytes(part10(instance(PatientID="sent-by-the-node")))
            sent = run_peer("storescu", "-aet", "CXRRAY", "-aec", "ORTHANC", "127.0.0.1", dicom, tmp_path / "ours.dcm")
            assert sent.returncode == 0, sent.stdout
            assert archive.rest.post("/instances", content=part10(instance(Modality="DX"))).status_code == 200
            until(lambda: list((spool / "ready").iterdir()), "the radiograph")
            assert len(archive.rest.get("/instances").json()) == 3
            # Orthanc looks at one after the other: whatever came before has been decided on.
            assert len(archive.rest.get("/jobs").json()) == 1
