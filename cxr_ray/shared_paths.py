"""Whether every node of a cluster sees the same files: a local path means another disk on another machine.

Ray starts a job's parts wherever there is room. A path that only one node has would fail late, or worse, be written to several
disks; so each node is asked before the work begins. URIs name the same place everywhere and are not asked about, but
``file://`` is a local path in other words.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cxr_ray.cluster_growth import await_cpu, stated_nodes
from cxr_ray.errors import CxrRayError
from cxr_ray.storage import absolute, resolve

_PATIENCE_SECONDS = 60.0


def check_shared(read: Mapping[str, str | None], written: Mapping[str, str | None]) -> None:
    """Refuse local paths that a node of this cluster does not see. Ray has to be initialised; one node is never asked.

    Of a cluster that grows, its first worker node is waited for, and stands for those that may come later.

    Parameters
    ----------
    read
        Setting and path or URI of what is read; None for a setting that is not used.
    written
        Setting and path or URI of what will be written; it need not exist.

    Raises
    ------
    CxrRayError
        Naming the setting, the path and the node.
    """
    import ray  # noqa: PLC0415 - commands that run without it need not load it

    looked_for = {name: path for name, uri in read.items() if (path := _local(uri)) is not None}
    targets = {name: path for name, uri in written.items() if (path := _local(uri)) is not None}
    if not looked_for and not targets:
        return
    if stated_nodes(os.environ):
        # Its head alone would say nothing of the nodes that come.
        await_cpu()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    with contextlib.ExitStack() as stack:
        for name, target in targets.items():
            looked_for[name] = stack.enter_context(_marker(name, target))
        _ask(nodes, looked_for, {**read, **written})


def _local(uri: str | None) -> Path | None:
    """The path of what lies on a node's own file system; None for what does not, or is not used."""
    if uri is None:
        return None
    if uri.startswith("file:"):
        return Path(resolve(uri)[1])
    return None if "://" in uri else Path(absolute(uri))


@contextlib.contextmanager
def _marker(name: str, target: Path) -> Iterator[Path]:
    """A file beside what will be written, in the nearest folder that there is."""
    folder = next(parent for parent in (target, *target.parents) if parent.is_dir())
    path = folder / f".cxr-ray-{secrets.token_hex(8)}"
    try:
        path.touch()
    except OSError as error:
        raise CxrRayError(f"{name} {target}: {folder} cannot be written ({error.strerror}); name another folder") from None
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _ask(nodes: list[dict[str, Any]], looked_for: dict[str, Path], given: Mapping[str, str | None]) -> None:
    import ray  # noqa: PLC0415 - as above
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    paths = {name: str(path) for name, path in looked_for.items()}
    asked = {
        ray.remote(_unseen)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(paths): node["NodeManagerAddress"]
        for node in nodes
    }
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_SECONDS)
    if silent:
        raise CxrRayError(
            f"node {asked[silent[0]]} does not say within {_PATIENCE_SECONDS:g} s whether it sees the files; look at the "
            "cluster with 'ray status', or name the data by URIs, which every node sees"
        )
    for answer in ready:
        for name in _answer(answer):
            raise CxrRayError(
                f"{name} {given[name]}: node {asked[answer]} of the cluster does not see it; put it on storage that every node "
                "mounts at the same path, or give a URI such as s3://bucket/folder"
            )


def _answer(answer: Any) -> list[str]:
    """What a node does not see; nothing where it has gone, as a node without work does."""
    import ray  # noqa: PLC0415 - as above

    try:
        return list(ray.get(answer))
    except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
        return []


def _unseen(paths: dict[str, str]) -> list[str]:
    return [name for name, path in paths.items() if not Path(path).exists()]
