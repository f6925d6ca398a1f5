"""What Prometheus reads of delivery: what waits, for how long, and what became of the rest; no label but the destination."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.node.outbox import Outbox

_COUNTED = {
    "delivered": ("cxr_delivery_delivered", "Parcels of results that a destination has taken."),
    "dead": ("cxr_delivery_given_up", "Parcels of results that became dead letters."),
    "failed": ("cxr_delivery_failed_attempts", "Attempts that failed in passing."),
}


class DeliveryCollector(Collector):
    """Looks at the outbox whenever it is asked; counters are those of this process.

    Parameters
    ----------
    counts
        What each destination has counted.
    """

    def __init__(self, outbox: Outbox, counts: Mapping[str, Counter[str]]) -> None:
        self._outbox, self._counts = outbox, counts

    def describe(self) -> Iterator[Metric]:
        """Nothing that registering could look at."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        waiting = GaugeMetricFamily("cxr_delivery_waiting", "Parcels of results that wait.", labels=["destination"])
        oldest = GaugeMetricFamily(
            "cxr_delivery_oldest_seconds", "Age of the oldest parcel that waits; 0: none does.", labels=["destination"]
        )
        dead = GaugeMetricFamily("cxr_delivery_dead_letters", "Dead letters that are kept.", labels=["destination"])
        for name in self._outbox.destinations():
            queue = self._outbox.queue(name)
            added = queue.waiting_since()
            waiting.add_metric([name], len(added))
            oldest.add_metric([name], max(time.time() - min(added), 0.0) if added else 0.0)
            dead.add_metric([name], queue.count_dead())
        yield from (waiting, oldest, dead)
        for key, (metric, words) in _COUNTED.items():
            counter = CounterMetricFamily(metric, words, labels=["destination"])
            for name, counts in self._counts.items():
                counter.add_metric([name], counts[key])
            yield counter
