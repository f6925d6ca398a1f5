"""Prometheus takes its configuration and fires when it should; alerts have a runbook, and what is asked for is counted."""

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import ray
import yaml
from conftest import require_program
from manifests import CLUSTER, NODE_METRICS, RAY_METRICS, REPOSITORY, documents

from serve.app import APPLICATION
from serve.node.listener_settings import ListenerSettings

MONITORING = CLUSTER / "monitoring"
GRAFANA = MONITORING / "grafana"
DASHBOARDS = [*sorted((GRAFANA / "dashboards").glob("*.json")), REPOSITORY / "docs/monitoring/grafana-dashboard.json"]
RUNBOOK = REPOSITORY / "docs/operations.md"
RULES = [rule for group in documents(MONITORING / "alerts.yml")[0]["groups"] for rule in group["rules"]]
RAY_SOURCES = ("serve/_private", "data/_internal", "train/v2/_internal/metrics", "dashboard/modules/reporter")


def promtool(*arguments: object) -> str:
    done = subprocess.run(
        [require_program("promtool"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_prometheus_takes_the_configuration_of_one_server() -> None:
    assert "valid" in promtool("check", "config", MONITORING / "prometheus.yml")
    jobs = {job["job_name"]: job for job in documents(MONITORING / "prometheus.yml")[0]["scrape_configs"]}
    # Targets that stay when their container stops: one that DNS has forgotten would be missed by nobody.
    assert jobs["cxr-ray"]["static_configs"] == [
        {"targets": [f"{name}:{RAY_METRICS}"], "labels": {"component": "serve", "ray": name}} for name in ("head", "worker")
    ]
    assert jobs["cxr-ray-node"]["static_configs"] == [{"targets": [f"node:{NODE_METRICS}"]}]
    assert not [job for job in jobs.values() if "dns_sd_configs" in job]


def test_prometheus_takes_the_configuration_of_kubernetes(tmp_path: Path) -> None:
    (given,) = documents(MONITORING / "prometheus-kubernetes.yml")
    (ray_pods,) = [job for job in given["scrape_configs"] if job["job_name"] == "cxr-ray"]
    # By these the alerts miss a head.
    assert {"component", "ray"} <= {rule.get("target_label") for rule in ray_pods["relabel_configs"]}
    for job in given["scrape_configs"]:
        # Debian builds its promtool without Kubernetes; the rest of the job is checked.
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"names": ["cxr-ray"]}}]
        job["static_configs"] = [{"targets": ["pod:1"]}]
    (tmp_path / "alerts.yml").symlink_to(MONITORING / "alerts.yml")
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(given))
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_alerts_fire_when_they_should_and_not_on_a_quiet_day() -> None:
    promtool("check", "rules", MONITORING / "alerts.yml")
    promtool("test", "rules", MONITORING / "alerts.test.yml")
    (tests,) = documents(MONITORING / "alerts.test.yml")
    fired = set(re.findall(r'alertname="(\w+)"', json.dumps(tests).replace("\\", "")))
    assert fired == {rule["alert"] for rule in RULES}


def test_each_alert_has_its_line_in_the_runbook() -> None:
    headings = re.findall(r"^### (Cxr\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in RULES)
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]


def test_thresholds_are_those_of_the_settings() -> None:
    listener = ListenerSettings()
    expressions = {rule["alert"]: rule["expr"] for rule in RULES}
    assert expressions["CxrNodeRefusesForDisk"] == f"cxr_node_free_bytes < {listener.min_free_bytes}"
    assert expressions["CxrNodeFull"] == f"cxr_node_open_associations >= {listener.max_associations}"
    assert set(re.findall(r'application="([^"]+)"', " ".join(expressions.values()))) == {APPLICATION}


def test_what_prometheus_throws_away_nobody_asks_for() -> None:
    for name in ("prometheus.yml", "prometheus-kubernetes.yml"):
        (given,) = documents(MONITORING / name)
        (job,) = [job for job in given["scrape_configs"] if job["job_name"] == "cxr-ray"]
        (kept,) = job["metric_relabel_configs"]
        asked = {metric for _, expression in expressions() for metric in metrics(expression) if metric.startswith("ray_")}
        assert [metric for metric in sorted(asked) if not re.fullmatch(kept["regex"], metric)] == []


def test_alerts_and_dashboards_ask_for_figures_that_somebody_counts() -> None:
    asked = {metric: where for where, expression in expressions() for metric in metrics(expression)}
    assert len(asked) > 50
    assert {metric: where for metric, where in asked.items() if not is_counted(metric)} == {}


@pytest.mark.parametrize(
    "name", ["cxr_node_ready_instance", "ray_cxr_request_total", "ray_serve_deployment_state", "ray_data_num_tasks_lost"]
)
def test_figures_that_nobody_counts_are_noticed(name: str) -> None:
    assert not is_counted(name)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_can_be_imported(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    (source,) = [variable for variable in dashboard["templating"]["list"] if variable["type"] == "datasource"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert panels
    assert all(panel["datasource"] == {"type": "prometheus", "uid": f"${{{source['name']}}}"} for panel in panels)
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert [json.loads(other.read_text())["uid"] for other in DASHBOARDS].count(dashboard["uid"]) == 1


def test_grafana_finds_what_compose_mounts() -> None:
    services = documents(CLUSTER / "compose.yaml")[0]["services"]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in services["grafana"]["volumes"])
    assert mounted["/etc/grafana/provisioning"] == "./monitoring/grafana/provisioning"
    (provider,) = documents(GRAFANA / "provisioning/dashboards/cxr-ray.yaml")[0]["providers"]
    folder = provider["options"]["path"]
    shown = {(CLUSTER / source).resolve() for target, source in mounted.items() if target.startswith(f"{folder}/")}
    assert shown == set(DASHBOARDS)
    (datasource,) = documents(GRAFANA / "provisioning/datasources/prometheus.yaml")[0]["datasources"]
    assert datasource["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression of alerts and dashboards, and where it stands."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.name}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.name}: {variable['name']}", variable["definition"].removeprefix("label_values(").split(",")[0]


def metrics(expression: str) -> set[str]:
    """Names of metrics in an expression: what is left without labels and what they are grouped by."""
    bare = re.sub(r"\{[^}]*\}|\b(?:by|on|without)\s*\([^)]*\)", "", expression)
    return set(re.findall(r"\b(?:cxr|ray)_\w+", bare))


def is_counted(metric: str) -> bool:
    """Whether some source file makes it; Ray puts its name before what Python processes count."""
    name = re.sub(r"_(?:bucket|count|sum)$", "", metric)
    bases = {name, name.removesuffix("_total")}
    if name.startswith("cxr_"):
        return any(f'"{base}"' in own_sources() for base in bases)
    bases = {base.removeprefix("ray_") for base in bases}
    if metric.startswith("ray_cxr_"):
        return any(f'"{base}"' in own_sources() for base in bases)
    # Ray Data makes names of the fields of its statistics.
    fields = {base.removeprefix("data_") for base in bases if base.startswith("data_")}
    return any(f'"{base}"' in ray_sources() for base in bases) or any(
        re.search(rf"^    (?:{field}: \w+ = metric_field|def {field}\(self)", ray_sources(), re.MULTILINE) for field in fields
    )


@cache
def own_sources() -> str:
    return "".join(path.read_text() for path in (REPOSITORY / "serve").rglob("*.py"))


@cache
def ray_sources() -> str:
    package = Path(ray.__file__).parent
    return "".join(path.read_text() for folder in RAY_SOURCES for path in (package / folder).rglob("*.py"))
