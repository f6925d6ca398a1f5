"""Whether a cluster can ever place the workers that are asked for: Ray itself would wait for them without end."""

from collections.abc import Mapping

from cxr_ray.cluster_growth import cpus, more_nodes, nodes_at_most, nodes_there
from cxr_ray.errors import CxrRayError

# What a task that reads shards takes of one node: workers that leave it nowhere wait for data that nobody may read.
_CPUS_FOR_READERS = 0.5


def reserved(cpus: float, *, gpu: bool) -> dict[str, float]:
    """What a worker that takes so many CPUs, and perhaps a GPU, reserves of Ray's resources."""
    return {"CPU": cpus} | ({"GPU": 1.0} if gpu else {})


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
    room = _room(nodes_at_most(), resources)
    if room < workers:
        raise CxrRayError(
            f"setting 'workers' is {workers} with {_said(resources)} each: the cluster {_size(resources)}, room for {room} "
            f"beside the half CPU that reading the data takes; lower workers or cpus_per_worker, or {more_nodes()}"
        )


def check_task(resources: Mapping[str, float], setting: str) -> None:
    """Refuse a task, or an actor, that no node of the cluster will ever hold, however far it grows.

    Parameters
    ----------
    resources
        What it reserves.
    setting
        What asks for that, as the error names it.

    Raises
    ------
    CxrRayError
        Saying what is asked and what is there.
    """
    if not any(_slots(node, resources) for node in nodes_at_most()):
        raise CxrRayError(
            f"{setting}: takes {_said(resources)} of one node; the cluster {_size(resources)}; ask for less, or {more_nodes()}"
        )


def slots(resources: Mapping[str, float]) -> int:
    """How many workers the cluster has room for when it has grown, with something left to the tasks that read their data."""
    nodes = nodes_at_most()
    with_reader = resources.get("CPU", 0.0) + _CPUS_FOR_READERS
    return min(sum(_slots(node, resources) for node in nodes), int(cpus(nodes) / with_reader))


def lacking(workers: int, resources: Mapping[str, float]) -> str | None:
    """What is asked and what is free, in words, where the cluster has no room for these workers at the moment."""
    import ray  # noqa: PLC0415 - commands that run without it need not load it

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


def _alike(nodes: list[dict[str, float]], wanted: Mapping[str, float]) -> dict[tuple[tuple[str, float], ...], int]:
    counted: dict[tuple[tuple[str, float], ...], int] = {}
    for node in nodes:
        key = tuple((name, node.get(name, 0.0)) for name in wanted)
        counted[key] = counted.get(key, 0) + 1
    return counted


def _size(wanted: Mapping[str, float]) -> str:
    """What is there, and what may be, of the resources that are wanted."""
    there, at_most = nodes_there(), nodes_at_most()
    has = f"has {_list(there, wanted)}"
    return has if at_most == there else f"{has}, and may grow to {_list(at_most, wanted)}"


def _list(nodes: list[dict[str, float]], wanted: Mapping[str, float]) -> str:
    return ", ".join(f"{count} x {_said(dict(held))}" for held, count in _alike(nodes, wanted).items()) or "no node"


def _said(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
