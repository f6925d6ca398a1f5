"""Whether a cluster has a node on which a command can be placed: Ray itself would let it wait for a quarter of an hour."""

from typing import Any

from cluster.connection import Cluster
from cluster.errors import SubmitError, Unreachable

# More than any cluster has; Ray tells of a hundred unless asked for more.
_MOST_NODES = 10_000
# What Ray calls the kind of a node that nobody can add another one of.
_OF_ITS_OWN_KIND = "node_"


def check_room(cluster: Cluster, num_cpus: float) -> None:
    """Refuse a reservation that is larger than every node of the cluster.

    Raises
    ------
    SubmitError
        Naming what the largest node has.
    """
    if not num_cpus:
        return
    largest = largest_node(cluster)
    if largest is not None and num_cpus > largest:
        raise SubmitError(
            f"--num-cpus {num_cpus:g}: the largest node of {cluster.address} has {largest:g} CPUs; reserve at most that many "
            "for the command itself (its workers have their own), or add a larger node"
        )


def largest_node(cluster: Cluster) -> float | None:
    """CPUs of the largest node that the cluster has, or may come to have; None where it does not tell, or grows by itself."""
    if _may_grow(_data(cluster, "/api/cluster_status")):
        return None
    found = _data(cluster, f"/api/v0/nodes?limit={_MOST_NODES}").get("result")
    nodes = found.get("result") if isinstance(found, dict) else None
    if not isinstance(nodes, list):
        return None
    alive = [node.get("resources_total") or {} for node in nodes if node.get("state") == "ALIVE"]
    return max((float(held.get("CPU", 0)) for held in alive), default=None)


def _may_grow(status: dict[str, Any]) -> bool:
    """Whether nodes may be added that are not there yet; also where the cluster does not say that there are none."""
    report = (status.get("clusterStatus") or {}).get("autoscalerReport") or {}
    kinds = report.get("nodeTypeMapping")
    if not isinstance(kinds, dict) or not kinds:
        return True
    return any(kind != f"{_OF_ITS_OWN_KIND}{node}" for node, kind in kinds.items())


def _data(cluster: Cluster, path: str) -> dict[str, Any]:
    """What the dashboard tells at a path; nothing where it does not."""
    try:
        found = cluster.ask(path).json().get("data")
    except (Unreachable, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
