"""How large a cluster may become, as its site says.

Nodes of an autoscaling cluster come when work asks for them, and go when none does: what is there when a command begins, often
a head without CPUs, says little of what it may use. Ray itself does not tell how far its autoscaler may go, so the site does.
"""

import json
import os
import time
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from rich.console import Console

from cxr_ray.cpus import available_cpus
from cxr_ray.errors import CxrRayError

MAX_CLUSTER = "CXR_RAY_MAX_CLUSTER"
_HEAD = "node:__internal_head__"
_SECONDS_BETWEEN_NOTICES = 60.0


class _Group(BaseModel):
    """Worker nodes alike; each other field is a resource of one of them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    nodes: int = Field(ge=1, le=100_000)

    # Pydantic takes the type of extra fields from here.
    __pydantic_extra__: dict[str, float] = Field(init=False)


class _Groups(RootModel[list[_Group]]):
    pass


def nodes_there() -> list[dict[str, float]]:
    """Resources of each node that is alive; Ray has to be initialised."""
    import ray  # noqa: PLC0415 - commands that run without it need not load it

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def nodes_at_most() -> list[dict[str, float]]:
    """Resources of each node when the cluster has grown as far as it may: as CXR_RAY_MAX_CLUSTER says, or else not at all.

    Raises
    ------
    CxrRayError
        If the variable cannot be read.
    """
    there = nodes_there()
    workers = [node for node in there if _HEAD not in node]
    may_come = stated_nodes(os.environ)
    # By hand, more workers may have been added than are stated.
    return [node for node in there if _HEAD in node] + (may_come if len(may_come) >= len(workers) else workers)


def cpus_at_most() -> int:
    """CPUs of the cluster when it has grown as far as it may, and at least one: for so many at once work is cut into parts.

    Where no cluster was joined, this process's own.
    """
    import ray  # noqa: PLC0415 - as above

    return max(1, int(cpus(nodes_at_most()))) if ray.is_initialized() else available_cpus()


def cpus(nodes: list[dict[str, float]]) -> float:
    """CPUs of nodes together."""
    return sum(node.get("CPU", 0.0) for node in nodes)


def more_nodes() -> str:
    """What somebody whose work does not fit can do about the cluster, in words."""
    if os.environ.get(MAX_CLUSTER):
        return f"let it grow further, and say so in {MAX_CLUSTER}"
    if cpus(nodes_there()) < 1:
        return f"add nodes, or say in {MAX_CLUSTER} how many come when work asks for them"
    return "add nodes"


def await_cpu() -> None:
    """Wait until the cluster has a CPU, and say so on standard error: one that grows may have none while nothing runs.

    Ray Data plans by the CPUs that are there, and Ray's autoscaler brings a node to a task that waits: so one does.

    Raises
    ------
    CxrRayError
        If none will come.
    """
    import ray  # noqa: PLC0415 - as above

    if not ray.is_initialized() or cpus(nodes_there()) >= 1:
        return
    most = cpus(nodes_at_most())
    if most < 1:
        raise CxrRayError(f"the cluster has no CPU; {more_nodes()}")
    waiting = ray.remote(num_cpus=1)(_nothing).remote()
    told = -_SECONDS_BETWEEN_NOTICES
    while not ray.wait([waiting], timeout=1)[0]:
        if time.monotonic() - told >= _SECONDS_BETWEEN_NOTICES:
            told = time.monotonic()
            said = f"cxr-ray: the cluster has no CPU now, and may grow to {most:g}; waiting for its first node"
            Console(stderr=True, markup=False).print(said, highlight=False, soft_wrap=True)


def _nothing() -> None:
    pass


def stated_nodes(environment: Mapping[str, str]) -> list[dict[str, float]]:
    """Resources of each worker node that may come, as CXR_RAY_MAX_CLUSTER says; none where it is not set.

    Raises
    ------
    CxrRayError
        If the variable cannot be read.
    """
    stated = environment.get(MAX_CLUSTER, "")
    if not stated:
        return []
    try:
        groups = _Groups.model_validate(json.loads(stated)).root
    except (ValueError, ValidationError):
        raise CxrRayError(
            f"{MAX_CLUSTER} is {stated[:200]!r}: no list of worker nodes; give the like of "
            '[{"nodes": 8, "CPU": 8}, {"nodes": 4, "CPU": 8, "GPU": 1}]'
        ) from None
    return [dict(group.__pydantic_extra__) for group in groups for _ in range(group.nodes)]
