"""The Kubernetes manifests: accepted by the published schemas, locked down, of one mind with the code and with each other."""

import math
import os
import re
import shlex
from copy import deepcopy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from manifests import (
    CLUSTER,
    DASHBOARD,
    DICOM,
    HTTP,
    KUBERAY,
    NODE_METRICS,
    PINNED,
    PROJECT,
    RAY_KINDS,
    RAY_METRICS,
    REPOSITORY,
    Document,
    definition,
    documents,
    faults,
    found,
    pods,
    rendered,
)
from ray.serve import Application, Deployment

from cluster.command_line import check
from cxr_ray.cluster_growth import stated_nodes
from cxr_ray.settings import load_settings
from serve.deployment import DeploymentSettings, application, serve_config
from serve.node.listener_settings import ListenerSettings
from serve.node.node import ListenSettings
from serve.service import ServeSettings, prepare_environment
from serve.token import TOKEN_VARIABLE

BASE = KUBERAY / "base"
SITES = (BASE, KUBERAY / "overlays" / "small", KUBERAY / "overlays" / "gpu")
JOBS = (KUBERAY / "jobs" / "train", KUBERAY / "jobs" / "train-resume")
COMPONENTS = (KUBERAY / "components" / "ingress", KUBERAY / "components" / "dicom-tls")
# The oldest release that has all that is used (ReadWriteOncePod), and the newest whose schemas are installed.
KUBERNETES = ("1.29.0", f"{kubernetes_validate.latest_version()}")


@pytest.fixture(params=[*SITES, *JOBS, *COMPONENTS], ids=lambda folder: folder.name)
def applied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """Everything that a kustomization applies; a component on top of the base."""
    if request.param not in COMPONENTS:
        return rendered(request.param)
    # kustomize follows relative paths only.
    folder = tmp_path_factory.mktemp("site")
    site = {"resources": [os.path.relpath(BASE, folder)], "components": [os.path.relpath(request.param, folder)]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(site))
    return rendered(folder)


@pytest.fixture(params=SITES, ids=lambda folder: folder.name)
def site(request: pytest.FixtureRequest) -> list[Document]:
    return rendered(request.param)


def test_kinds_of_kuberay_are_as_published(applied: list[Document]) -> None:
    checked = [document for document in applied if document["kind"] in RAY_KINDS]
    assert checked
    assert {document["metadata"]["name"]: faults(document) for document in checked} == {
        document["metadata"]["name"]: [] for document in checked
    }


def test_a_field_that_kuberay_does_not_know_is_noticed() -> None:
    service = deepcopy(found(rendered(BASE), "RayService"))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "two"
    assert sorted(fault.partition(":")[0] for fault in faults(service)) == [
        "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0",
        "spec.rayClusterConfig.workerGroupSpecs.0.minReplicas",
    ]


def test_nothing_goes_unchecked_in_ci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind in RAY_KINDS:
        assert "spec" in definition(kind)["schema"]["openAPIV3Schema"]["properties"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"kubectl .*1\.27"):
        rendered(tmp_path)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kinds_of_kubernetes_are_as_published(applied: list[Document], version: str) -> None:
    for document in applied:
        if document["kind"] not in RAY_KINDS:
            kubernetes_validate.validate(document, version, strict=True)
    for each in pods(applied):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": each.spec}
        kubernetes_validate.validate(pod, version, strict=True)


def test_pods_may_do_nothing_that_they_need_not(applied: list[Document]) -> None:
    checked = list(pods(applied))
    assert checked
    for each in checked:
        security = each.spec["securityContext"]
        assert security["runAsNonRoot"], each.where
        assert security["runAsUser"] > 0, each.where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, each.where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(each.spec), each.where
        assert not [volume for volume in each.spec.get("volumes", []) if "hostPath" in volume], each.where
        # The head that the autoscaler runs on has an account that KubeRay makes.
        if ".headGroupSpec" not in each.where:
            assert each.spec["automountServiceAccountToken"] is False, each.where
        for container in each.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, each.where
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), each.where
            assert "memory" in container["resources"]["limits"], each.where
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, each.where
    for document in applied:
        cluster = document["spec"].get("rayClusterConfig", document["spec"]) if document["kind"] in RAY_KINDS else {}
        if "autoscalerOptions" in cluster:
            assert cluster["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"] is True


def test_ray_lets_nobody_in_without_the_token(site: list[Document]) -> None:
    service, cluster = found(site, "RayService")["spec"]["rayClusterConfig"], found(site, "RayCluster")["spec"]
    for each in (service, cluster):
        assert each["authOptions"] == {"mode": "token", "secretName": "cxr-ray-cluster-token"}
        assert each["rayVersion"] == PINNED["ray"]
    (submitter,) = pods(rendered(JOBS[0]))
    environment = {variable["name"]: variable for variable in submitter.containers[0]["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    reference = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": "cxr-ray-cluster-token", "key": "auth_token"}


def test_secrets_are_named_and_never_given(site: list[Document]) -> None:
    examples = {document["metadata"]["name"]: document["stringData"] for document in documents(BASE / "secrets.example.yaml")}
    assert {value for given in examples.values() for value in given.values()} == {"replace-me"}
    assert not [document for document in site if document["kind"] == "Secret"]
    named: set[tuple[str, str | None]] = {("cxr-ray-cluster-token", "auth_token")}
    for each in pods([*site, *rendered(JOBS[0])]):
        named |= {(volume["secret"]["secretName"], None) for volume in each.spec.get("volumes", []) if "secret" in volume}
        for container in each.containers:
            named |= {(source["secretRef"]["name"], None) for source in container.get("envFrom", []) if "secretRef" in source}
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                named |= {(reference["name"], reference["key"])} if reference else set()
    assert {name for name, _ in named} == set(examples)
    assert all(key is None or key in examples[name] for name, key in named)


@pytest.mark.parametrize("folder", [BASE / "config", *(site for site in SITES[1:])], ids=lambda folder: folder.name)
def test_serve_config_is_what_the_command_writes(folder: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    settings = load_settings(ServeSettings, folder / "serve.yaml", {})
    written = yaml.safe_load((folder / "serve-deploy.yaml").read_text())
    assert written == serve_config(settings, settings.host, settings.port)
    deployed = ServeDeploySchema.model_validate(written)
    assert deployed.http_options.port == HTTP == ServeSettings.model_fields["port"].default
    (deployment,) = deployed.applications
    # What `serve.deployment:application` is given by Serve; a token is needed there.
    assert DeploymentSettings(**deployment.args).insecure is False
    site = BASE if folder.parent == BASE else folder
    assert yaml.safe_load(found(rendered(site), "RayService")["spec"]["serveConfigV2"]) == written


def test_the_service_has_the_environment_that_the_command_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(ServeSettings(bundle=""))
    expected = dict(os.environ)
    monkeypatch.undo()
    assert found(rendered(BASE), "ConfigMap", "cxr-ray-serve-environment")["data"] == expected
    for each in pods([found(rendered(BASE), "RayService")]):
        (container,) = each.containers
        assert {"configMapRef": {"name": "cxr-ray-serve-environment"}} in container["envFrom"]
        assert {TOKEN_VARIABLE, "PGPASSWORD"} <= {variable["name"] for variable in container["env"]}


def test_the_node_is_where_its_settings_say(site: list[Document], tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(found(site, "ConfigMap", "cxr-ray-node")["data"]["node.yaml"])
    settings = load_settings(ListenSettings, tmp_path / "node.yaml", {})
    listener = ListenerSettings()
    assert (settings.listener.ae_title, settings.listener.port) == (listener.ae_title, listener.port) == ("CXRRAY", DICOM)
    node = found(site, "StatefulSet", "cxr-ray-node")
    assert node["spec"]["replicas"] == 1
    (template,) = pods([node])
    (container,) = template.containers
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"dicom": settings.listener.port, "metrics": settings.listener.metrics_port}
    assert found(site, "Service", "cxr-ray-node")["spec"]["ports"][0]["port"] == settings.listener.port
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert settings.spool.is_relative_to(mounts["spool"])
    assert settings.token_file is not None
    assert settings.token_file.is_relative_to(mounts["token"])
    (claim,) = node["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    # KubeRay names the Service of a RayService so.
    service = found(site, "RayService")["metadata"]["name"]
    assert settings.dispatch.service_url == f"http://{service}-serve-svc:{HTTP}"
    assert template.spec["terminationGracePeriodSeconds"] > settings.listener.drain_seconds


def test_what_listens_is_let_in_and_nothing_else(site: list[Document]) -> None:
    policies = [document["spec"] for document in site if document["kind"] == "NetworkPolicy"]
    (everybody,) = [policy for policy in policies if policy["podSelector"] == {} and "ingress" not in policy]
    assert set(everybody["policyTypes"]) == {"Ingress", "Egress"}
    allowed: dict[str, set[int]] = {}
    everywhere: set[int] = set()
    for policy in policies:
        ports = {port["port"] for rule in policy.get("ingress", []) for port in rule.get("ports", [])}
        assert all(rule.get("from") for rule in policy.get("ingress", [])), "a rule without peers lets in everybody"
        component = policy["podSelector"].get("matchLabels", {}).get("cxr-ray/component")
        if component:
            allowed.setdefault(component, set()).update(ports)
        else:
            everywhere |= ports
    assert everywhere == {RAY_METRICS, NODE_METRICS}
    assert allowed.pop("submitter") == set()
    assert allowed == {"serve": {DASHBOARD, HTTP}, "work": {DASHBOARD}, "node": {DICOM}, "postgresql": {5432}}
    listening = {
        (each.component, port["name"]): port["containerPort"]
        for each in pods(site)
        for container in each.containers
        for port in container["ports"]
    }
    assert listening[("serve", "metrics")] == listening[("work", "metrics")] == RAY_METRICS
    assert listening[("node", "metrics")] == NODE_METRICS
    # What is selected exists, and everything that runs is selected.
    known = {each.component for each in pods(site)}
    assert set(allowed) == known
    for document in site:
        if document["kind"] in {"Service", "PodDisruptionBudget", "StatefulSet"}:
            selector = document["spec"]["selector"]
            assert selector.get("matchLabels", selector)["cxr-ray/component"] in known


def test_drains_go_on(site: list[Document]) -> None:
    # What there is at least of the pods with these labels; KubeRay adds that of the node's type.
    least: dict[tuple[str, str | None], int] = {}
    for cluster in (found(site, "RayService")["spec"]["rayClusterConfig"], found(site, "RayCluster")["spec"]):
        head = cluster["headGroupSpec"]["template"]["metadata"]["labels"]["cxr-ray/component"]
        least[head, "head"] = 1
        least[head, "worker"] = sum(group["minReplicas"] for group in cluster["workerGroupSpecs"])
    budgets = [document["spec"] for document in site if document["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        # Kubernetes asks the owner of a pod how many there are to be of it, and KubeRay's kinds have no answer: with
        # maxUnavailable or a percentage nothing may ever go.
        assert "scale" not in definition("RayCluster")["subresources"]
        assert isinstance(budget["minAvailable"], int)
        labels = budget["selector"]["matchLabels"]
        assert budget["minAvailable"] < least[labels["cxr-ray/component"], labels.get("ray.io/node-type")]
    # Who has two workers of the service keeps one.
    assert len(budgets) == (least["serve", "worker"] > 1)


def test_ray_drains_a_node_for_as_long_as_its_pod_has(applied: list[Document]) -> None:
    from ray._private import ray_constants

    # Ray calls the constant and the variable that it comes from the same.
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, name)
    drains = int(found(rendered(BASE), "ConfigMap", "cxr-ray-cluster")["data"][name])
    for each in pods(applied):
        if each.component in {"serve", "work"}:
            # What is left is for ending Ray's processes; then comes SIGKILL.
            assert drains + 10 <= each.spec["terminationGracePeriodSeconds"] <= drains + 30, each.where
            assert {"configMapRef": {"name": "cxr-ray-cluster"}} in each.containers[0]["envFrom"], each.where


def test_workers_come_and_go(site: list[Document]) -> None:
    for cluster in (found(site, "RayService")["spec"]["rayClusterConfig"], found(site, "RayCluster")["spec"]):
        assert cluster["enableInTreeAutoscaling"] is True
        # Work goes where it can be taken away again, not to the head.
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            assert group["rayStartParams"]["metrics-export-port"] == str(RAY_METRICS)
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] < group["maxReplicas"]
    assert {group["minReplicas"] for group in found(site, "RayCluster")["spec"]["workerGroupSpecs"]} == {0}


def test_work_may_count_on_what_the_autoscaler_may_bring(site: list[Document]) -> None:
    cluster = found(site, "RayCluster")
    may_come = []
    for group in cluster["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = {"CPU": float(limits["cpu"])} | ({"GPU": float(limits["nvidia.com/gpu"])} if "nvidia.com/gpu" in limits else {})
        may_come += [node] * group["maxReplicas"]
    assert stated_nodes(found(site, "ConfigMap", "cxr-ray-cluster")["data"]) == may_come


def test_work_may_count_on_what_ray_up_may_bring() -> None:
    configuration = yaml.safe_load((CLUSTER / "ray-up/aws.yaml").read_text())
    types = configuration["available_node_types"].values()
    may_come = [kind["resources"] for kind in types for _ in range(kind["max_workers"])]
    words = shlex.split(" ".join(configuration["docker"]["run_options"]))
    assert stated_nodes(dict(word.split("=", 1) for word in words if "=" in word)) == may_come
    assert configuration["max_workers"] == len(may_come)


def test_networks_fit_on_the_workers_of_the_service_while_a_bundle_is_replaced(
    site: list[Document], untrained_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = found(site, "RayService")["spec"]
    settings = DeploymentSettings(**yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"])
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token")
    built = application(
        settings.model_copy(update={"bundle": str(untrained_bundle), "store": f"sqlite:///{tmp_path / 'store'}"})
    )
    wanted = [each for deployment in deployments(built) for each in at_most(deployment)]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    free = [[float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))] for _ in range(group["maxReplicas"])]
    # The largest first, each on the first worker that has room.
    for cpus, gpus in sorted(wanted, reverse=True):
        place = next((one for one in free if one[0] >= cpus - 1e-6 and one[1] >= gpus), None)
        assert place is not None, f"no room for a replica of {cpus} CPUs and {gpus} GPUs"
        place[0] -= cpus
        place[1] -= gpus


def deployments(built: Application) -> list[Deployment]:
    """Those of an application, the ingress first."""
    bound = built._bound_deployment
    below = [each for models in bound.init_args if isinstance(models, dict) for each in models.values()]
    return [bound, *(deployment for each in below for deployment in deployments(each))]


def at_most(deployment: Deployment) -> list[tuple[float, float]]:
    """CPUs and GPUs of every replica that there may be at once: as many as load asks for, and those that replace them."""
    config = deployment._deployment_config
    most = config.autoscaling_config.max_replicas if config.autoscaling_config else config.num_replicas
    options = deployment.ray_actor_options
    both = most + math.ceil(config.max_surge_percent * most / 100)
    return [(options.get("num_cpus", 1), options.get("num_gpus", 0))] * both


def test_gpus_are_asked_for_where_the_image_has_cuda() -> None:
    for site in SITES:
        for each in pods(rendered(site)):
            (container,) = each.containers
            cuda = container["image"].endswith("-cuda")
            assert cuda == ("nvidia.com/gpu" in container["resources"]["limits"]), each.where
    groups = found(rendered(KUBERAY / "overlays" / "gpu"), "RayCluster")["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["cpu", "gpu"]


def test_images_and_labels_bear_the_version(applied: list[Document]) -> None:
    own = {container["image"] for each in pods(applied) for container in each.containers if "cxr-ray" in container["image"]}
    assert own
    assert {re.fullmatch(r"registry\.example/cxr-ray:(.+)-(?:cpu|cuda)", image)[1] for image in own} == {PROJECT["version"]}


def test_everything_is_in_one_namespace(applied: list[Document]) -> None:
    assert {document["metadata"].get("namespace") for document in applied if document["kind"] != "Namespace"} == {"cxr-ray"}


PAGE = (REPOSITORY / "docs/kubernetes.md").read_text()


@pytest.fixture
def own_site(tmp_path: Path) -> Path:
    """The folder `site` of the page, with everything that the page puts into it."""
    site = tmp_path / "site"
    (site / "train").mkdir(parents=True)
    for folder, example in zip((site, site / "train"), re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL), strict=True):
        # kustomize follows relative paths only.
        relative = os.path.relpath(REPOSITORY / "cluster", folder)
        (folder / "kustomization.yaml").write_text(re.sub(r"(\.\./)+cluster", relative, example))
    (site / "node.yaml").write_text((BASE / "config/node.yaml").read_text().replace("10.20.0.0/16", "10.77.0.0/16"))
    given = yaml.safe_load((KUBERAY / "overlays/small/serve.yaml").read_text())
    (site / "serve.yaml").write_text(yaml.safe_dump(given | {"bundle": "s3://ours/models/chest"}))
    settings = load_settings(ServeSettings, site / "serve.yaml", {})
    (site / "serve-deploy.yaml").write_text(yaml.safe_dump(serve_config(settings, settings.host, settings.port)))
    return site


def test_a_site_of_its_own_is_made_as_the_page_says(own_site: Path) -> None:
    made = rendered(own_site)
    assert {document["metadata"].get("namespace") for document in made if document["kind"] != "Namespace"} == {"cxr-ray"}
    assert "10.77.0.0/16" in found(made, "ConfigMap", "cxr-ray-node")["data"]["node.yaml"]
    policies = yaml.safe_dump([document for document in made if document["kind"] == "NetworkPolicy"])
    assert policies.count("10.77.0.0/16") == 2
    assert "10.20." not in policies
    assert found(made, "ConfigMap", "cxr-ray-cluster")["data"]["AWS_ENDPOINT_URL"] == "https://s3.hospital.example"
    assert found(made, "ConfigMap", "cxr-ray-cluster")["data"]["RAY_USAGE_STATS_ENABLED"] == "0"
    service = yaml.safe_load(found(made, "RayService")["spec"]["serveConfigV2"])
    assert service["applications"][0]["args"]["bundle"] == "s3://ours/models/chest"
    images = {container["image"] for each in pods(made) for container in each.containers}
    assert images == {
        f"harbor.hospital.example/radiology/cxr-ray:{PROJECT['version']}-cpu",
        next(iter(pods([found(made, "StatefulSet", "cxr-ray-postgresql")]))).containers[0]["image"],
    }
    ingress = found(made, "Ingress")["spec"]
    assert ingress["rules"][0]["http"]["paths"][0]["backend"]["service"]["port"]["number"] == HTTP
    assert ingress["tls"][0]["hosts"] == [ingress["rules"][0]["host"]] == ["cxr.hospital.example"]
    for name, given in ((each["metadata"]["name"], each["stringData"]) for each in documents(BASE / "secrets.example.yaml")):
        (command,) = re.findall(rf"create secret generic {name} (.*)$", PAGE, re.MULTILINE)
        assert set(re.findall(r"--from-(?:literal|file)=(\w+)=", command)) == set(given)


def test_a_job_of_its_own_is_made_as_the_page_says(own_site: Path) -> None:
    (job,) = rendered(own_site / "train")
    assert faults(job) == []
    assert job["metadata"]["namespace"] == "cxr-ray"
    check(shlex.split(job["spec"]["entrypoint"])[1:])
    (submitter,) = pods([job])
    assert submitter.containers[0]["image"].startswith("harbor.hospital.example/")


def test_jobs_are_deleted_before_they_are_applied_again() -> None:
    for folder in JOBS:
        job = found(rendered(folder), "RayJob")
        # KubeRay refuses it of a job that has no cluster of its own to shut down, and ends nothing by it.
        assert "ttlSecondsAfterFinished" not in job["spec"]
        assert "kubectl delete -k" in (folder / "kustomization.yaml").read_text()
    lines = PAGE.splitlines()
    applied = [number for number, line in enumerate(lines) if "kubectl apply -k" in line and "train" in line]
    assert applied
    for number in applied:
        assert lines[number - 1] == f"{lines[number].replace('apply', 'delete')} --ignore-not-found"


def test_training_jobs_are_commands_that_submit_takes() -> None:
    train, resumed = (found(rendered(folder), "RayJob") for folder in JOBS)
    command = shlex.split(train["spec"]["entrypoint"])
    assert command[0] == "cxr-ray"
    check(command[1:])
    with pytest.raises(Exception, match="workers"):
        check([*command[1:], "--workers", "none"])
    assert shlex.split(resumed["spec"]["entrypoint"]) == [*command, "--resume"]
    assert resumed["metadata"]["name"] != train["metadata"]["name"]
    cluster = found(rendered(BASE), "RayCluster")["metadata"]["name"]
    assert train["spec"]["clusterSelector"] == resumed["spec"]["clusterSelector"] == {"ray.io/cluster": cluster}
    cpus = float(command[command.index("--cpus-per-worker") + 1])
    for site in SITES:
        for group in found(rendered(site), "RayCluster")["spec"]["workerGroupSpecs"]:
            # One is left to those who read the data.
            assert cpus + 1 <= int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])


def test_the_store_is_the_database_that_is_there(site: list[Document]) -> None:
    store = yaml.safe_load(found(site, "RayService")["spec"]["serveConfigV2"])["applications"][0]["args"]["store"]
    (postgresql,) = pods([found(site, "StatefulSet", "cxr-ray-postgresql")])
    environment = {variable["name"]: variable["value"] for variable in postgresql.containers[0]["env"]}
    host = found(site, "Service", "cxr-ray-postgresql")["metadata"]["name"]
    user, database = environment["POSTGRES_USER"], environment["POSTGRES_DB"]
    # No password: it comes from the Secret, in PGPASSWORD.
    assert store == f"postgresql+psycopg://{user}@{host}/{database}"
