"""Starting Ray, or joining the cluster that is there, without its noise."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cxr_ray.errors import UsageError

# A dataset's blocks and a few batches are all that the object store holds here; the rest of the memory is the workers'.
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2


@contextmanager
def ray_session(*, local_cpus: int | None = None, metrics_port: int | None = None) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (a Ray job has it set), else start Ray in this machine, and leave it at the end.

    Parameters
    ----------
    local_cpus
        Logical CPUs of a Ray that is started here; None for the machine's own.
    metrics_port
        TCP port of the metrics of a Ray that is started here; None for one that is free.

    Raises
    ------
    UsageError
        If a port is named for a Ray that runs already.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Readers, workers and coordinators are light processes, and more of them than CPUs is what is wanted here.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    import ray  # noqa: PLC0415 - takes a second, and its environment has to be set first

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if metrics_port is not None and address != "local":
        raise UsageError(
            f"--metrics-port {metrics_port}: the Ray at {address} runs already and has its port; leave it out here, and name "
            "it to 'ray start --metrics-export-port'"
        )
    if address == "local":
        ray.init(
            address="local",
            num_cpus=local_cpus,
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            _metrics_export_port=metrics_port,
        )
    else:
        ray.init(log_to_driver=False, logging_level="ERROR")
    _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def metrics_urls() -> list[str]:
    """Where Prometheus finds the metrics of each node of the cluster that this process has joined."""
    import ray  # noqa: PLC0415 - as above

    alive = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in alive]


def without_reservations(dataset: Any) -> Any:
    """A Ray Data dataset of a single operator, which needs no resources kept for others.

    Keeping them leaves CPUs idle at the start, and for a moment after each task.
    """
    dataset.context.op_resource_reservation_enabled = False
    return dataset


def _quiet_ray_data() -> None:
    import logging  # noqa: PLC0415

    import ray.data  # noqa: PLC0415

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
