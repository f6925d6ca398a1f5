"""Whether a cluster can ever place the workers that are asked for: Ray itself would wait for them without end."""

from collections.abc import Mapping
from typing import Any

import ray

from cxr_ray.errors import CxrRayError

# What a task that reads shards takes of one node: workers that leave it nowhere wait for data that nobody may read.
_CPUS_FOR_READERS = 0.5


def check_placement(workers: int, resources: Mapping[str, float]) -> None:
    """Refuse workers that the cluster cannot place, even when it is idle and has grown as far as it may.

    Parameters
    ----------
    resources
        What one worker reserves, such as ``{"CPU": 0.5, "GPU": 1}``.

    Raises
    ------
    CxrRayError
        Saying what is asked and what is there.
    """
    nodes = _alive()
    grown = _largest_cluster()
    room = _room(nodes, resources)
    if room >= workers:
        return
    if grown is not None and _slots(grown, resources) >= workers:
        return
    there = ", ".join(f"{count} x {_said(dict(held))}" for held, count in _alike(nodes, resources).items())
    raise CxrRayError(
        f"setting 'workers' is {workers} with {_said(resources)} each: the cluster has {there or 'no node'}, room for {room} "
        "beside the half CPU that reading the data takes; lower workers or cpus_per_worker, or add nodes"
    )


def slots(resources: Mapping[str, float]) -> int:
    """How many workers the cluster as it is has room for, with something left to the tasks that read their data."""
    nodes = _alive()
    with_reader = resources.get("CPU", 0.0) + _CPUS_FOR_READERS
    return min(sum(_slots(node, resources) for node in nodes), int(_cpus(nodes) / with_reader))


def lacking(workers: int, resources: Mapping[str, float]) -> str | None:
    """What is asked and what is free, in words, where the cluster has no room for these workers at the moment."""
    available = ray.available_resources()
    free = {name: available.get(name, 0.0) for name in resources}
    if all(free[name] >= workers * amount for name, amount in resources.items()):
        return None
    return f"{workers} workers with {_said(resources)} each; the cluster has {_said(free)} free now"


def _room(nodes: list[dict[str, float]], wanted: Mapping[str, float]) -> int:
    """How many workers fit into the nodes when one of these has room for a reader besides."""
    fit = [_slots(node, wanted) for node in nodes]
    beside_reader = [
        _slots(node | {"CPU": node["CPU"] - _CPUS_FOR_READERS}, wanted) if node.get("CPU", 0.0) >= _CPUS_FOR_READERS else -1
        for node in nodes
    ]
    return max((sum(fit) - each + left for each, left in zip(fit, beside_reader, strict=True) if left >= 0), default=0)


def _slots(held: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many workers fit into these resources."""
    return min((int(held.get(name, 0) / amount + 1e-9) for name, amount in wanted.items() if amount), default=1_000_000)


def _alive() -> list[dict[str, float]]:
    """What each node that is there has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _cpus(nodes: list[dict[str, float]]) -> float:
    return sum(node.get("CPU", 0.0) for node in nodes)


def _alike(nodes: list[dict[str, float]], wanted: Mapping[str, float]) -> dict[tuple[tuple[str, float], ...], int]:
    counted: dict[tuple[tuple[str, float], ...], int] = {}
    for node in nodes:
        key = tuple((name, node.get(name, 0.0)) for name in wanted)
        counted[key] = counted.get(key, 0) + 1
    return counted


def _largest_cluster() -> Mapping[str, Any] | None:
    """What an autoscaler may grow the cluster to; None where there is no autoscaler."""
    try:
        from ray._private.state import state  # noqa: PLC0415 - Ray has no public way to ask
    except ImportError:
        return None
    return state.get_max_resources_from_cluster_config()


def _said(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
