"""What Prometheus reads of the receiving side: associations, instances, times, disk.

No label carries an identifier or a peer's name: outcomes and statuses are few.
"""

from collections.abc import Callable
from http.server import HTTPServer
from threading import Thread
from typing import Self, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cxr_ray.errors import CxrRayError
from serve.node.spool import Spool, Stored

_STORE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SYNC_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class ReceivingMetrics:
    """Counts what a listener does.

    Parameters
    ----------
    registry : prometheus_client.CollectorRegistry
        Where the figures are shown from.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._associations = Counter("cxr_node_associations", "Connections that ended, by how.", ["outcome"], registry=registry)
        self._answers = Counter("cxr_node_instances", "C-STOREs answered, by status.", ["status"], registry=registry)
        self._stored = Counter(
            "cxr_node_stored_instances", "Instances made durable: new, duplicate or conflict.", ["kind"], registry=registry
        )
        self._bytes = Counter("cxr_node_stored_bytes", "Bytes of data sets made durable.", registry=registry)
        self._store_seconds = Histogram(
            "cxr_node_store_seconds", "From a C-STORE's command to its answer.", buckets=_STORE_SECONDS, registry=registry
        )
        self._sync_seconds = Histogram(
            "cxr_node_fsync_seconds", "Forcing an instance to disk.", buckets=_SYNC_SECONDS, registry=registry
        )

    @classmethod
    def uncounted(cls) -> Self:
        """For who shows no figures."""
        return cls(CollectorRegistry())

    def watch(self, spool: Spool, associations: Callable[[], int], connections: Callable[[], int]) -> None:
        """Show states besides counts: each is asked for when the figures are read."""
        for name, words, value in (
            ("cxr_node_open_associations", "Associations that are open.", associations),
            ("cxr_node_pending_connections", "Connections that are no association.", connections),
            ("cxr_node_free_bytes", "Free bytes on the spool's disk.", spool.free_bytes),
            ("cxr_node_ready_instances", "Instances that wait for their answer.", lambda: spool.count("ready")),
            ("cxr_node_answered_instances", "Answered ones whose results are not sent yet.", lambda: spool.count("answered")),
            ("cxr_node_dead_letters", "Instances that were given up.", lambda: spool.count("dead")),
            ("cxr_node_conflicts", "Instances kept aside under a UID that was taken.", lambda: spool.count("conflicts")),
        ):
            Gauge(name, words, registry=self._registry).set_function(_or_nothing(value))

    def ended(self, outcome: str) -> None:
        """Count a connection that ended."""
        self._associations.labels(outcome).inc()

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer to a C-STORE."""
        self._answers.labels(f"{status:04X}").inc()
        self._store_seconds.observe(seconds)

    def stored(self, kind: Stored, size: int, sync_seconds: float) -> None:
        """Count an instance that is durable."""
        self._stored.labels(kind.value).inc()
        if kind is not Stored.DUPLICATE:
            self._bytes.inc(size)
            self._sync_seconds.observe(sync_seconds)


class MetricsServer:
    """Shows a registry over HTTP under ``/metrics``.

    Raises
    ------
    CxrRayError
        When the address cannot be taken.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = cast(tuple[HTTPServer, Thread], start_http_server(port, addr=host, registry=registry))
        except OSError as error:
            raise CxrRayError(f"metrics {host}:{port}: {error.strerror}; name a free port, or none") from error

    @property
    def port(self) -> int:
        """TCP port."""
        return self._server.server_port

    def stop(self) -> None:
        """Close it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _or_nothing(value: Callable[[], int]) -> Callable[[], float]:
    def read() -> float:
        try:
            return float(value())
        except OSError:
            return float("nan")

    return read
