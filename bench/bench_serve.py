"""How fast `cxr-ray serve` answers, beside the engine alone and beside the service that one would write in an afternoon.

    python bench/bench_serve.py compare | memory | overload | all     [--rounds N] [--seconds S] [--requests N] [--smoke]

- compare: 1, 8 and 32 clients in a closed loop on loopback, each posting a PNG of 1024x1024 or a DICOM file of 10 MB, against
  (a) the engine alone on squares in memory, with decoding measured apart, (b) `plain_server`, and (c) `cxr-ray serve`. Goals
  at 8 clients: 0.8 of the images/s of (a) and 2.5 times those of (b), p99 below three medians; with one client and the PNG, a
  median of at most (a) and decoding and 12 ms.
- memory: all processes of the service over many requests with a small PNG; goal: no growth after the first quarter.
- overload: 200 clients for a minute; goal: what is accepted is answered within 5 s (p99), the rest is told 503 with
  Retry-After, nothing fails otherwise.

The network is the multi-input one for 224 pixels, with random weights. Rounds go through all targets in turns, so that a
machine that changes its speed does so for each; the servers stay up all the time, and what the idle service takes is told. A
machine with other work slows (a) most, whose threads wait for each other. Figures are printed as Markdown for RESULTS.md.
--smoke takes times that show that a part works, and nothing else.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import ROOT, origin, say
from serve_targets import EngineAlone, Server, bundle, files, load, percentile_ms, plain, product

sys.path.insert(0, str(ROOT))

_STORED, _SEEN = 256, 224
_CLIENTS = (1, 8, 32)
_FILES = ("PNG", "DICOM")
_ENGINE, _PLAIN, _PRODUCT = "(a) engine alone", "(b) FastAPI, one process", "(c) cxr-ray serve"
_SETTLE_SECONDS = 1.0
_OVERLOAD_CLIENTS = 200
_SAMPLE_REQUESTS = 500
_MEMORY_CLIENTS = 8


@dataclass
class Measured:
    """All rounds of one target with one file and so many clients.

    Attributes
    ----------
    rates
        Images a second of each round.
    seconds
        Of every request, or of every batch of the engine.
    failed
        Requests that were not answered with 200.
    """

    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def rate(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rates)

    def ms(self, q: float) -> float:
        """A percentile over all rounds, in milliseconds."""
        return percentile_ms(self.seconds, q)


Results = dict[tuple[str, str, int], Measured]


def compare(work: Path, front: str, rounds: int, seconds: float, *, clients: tuple[int, ...]) -> None:
    """Throughput and latency of all targets, in turns."""
    made = bundle(work, _STORED, _SEEN)
    posted = files(work)
    results: Results = defaultdict(Measured)
    decoding: dict[str, list[float]] = defaultdict(list)
    load_cpu: list[float] = []
    begun = origin(f"bench_serve.py compare --front {front} --rounds {rounds} --seconds {seconds:g}")
    with EngineAlone(made) as alone, plain(made, work) as one, product(made, work, front) as ours:
        say(f"\n**Serving** {_SEEN} px beside the engine alone and a plain service. {begun}\n")
        idle = _idle_share(ours, min(seconds, 10.0))
        for _ in range(rounds):
            for kind in _FILES:
                decoding[kind] += alone.decoder(posted[kind], min(seconds, 3.0))
                for number in clients:
                    _engine_round(results[_ENGINE, kind, number], alone, number, seconds)
                    for target, server in ((_PLAIN, one), (_PRODUCT, ours)):
                        met = load(server, posted[kind], number, seconds=seconds, settle=_SETTLE_SECONDS)
                        _add(results[target, kind, number], met)
                        load_cpu.append(met["cpu"] / (met["elapsed"] + _SETTLE_SECONDS))
        device = alone.device
    _print_results(results, clients)
    alone_ms = {kind: percentile_ms(taken, 50) for kind, taken in decoding.items()}
    say(f"\nEngine: {device}. Decoding alone, one thread: " + ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in alone_ms.items()))
    say(f"Load: {statistics.median(load_cpu):.1%} of a core ({max(load_cpu):.1%} at most), idle service: {idle:.1%}.\n")
    _print_goals(results, alone_ms, clients)


def _idle_share(server: Server, seconds: float) -> float:
    before = server.cpu_seconds()
    time.sleep(seconds)
    return (server.cpu_seconds() - before) / seconds


def _engine_round(measured: Measured, alone: EngineAlone, clients: int, seconds: float) -> None:
    """As many squares a batch as clients could fill, at most the service's own batch."""
    batch, taken = alone.engine(clients, seconds)
    measured.rates.append(batch * len(taken) / sum(taken))
    measured.seconds += taken


def _add(measured: Measured, met: Any) -> None:
    measured.rates.append(len(met["seconds"]) / met["elapsed"])
    measured.seconds += met["seconds"]
    measured.failed += sum(met["statuses"].values()) - len(met["seconds"])


def _print_results(results: Results, clients: tuple[int, ...]) -> None:
    say("| | file | clients | images/s (range) | median | p95 | p99 | failed |\n|---|---|---|---|---|---|---|---|")
    for kind in _FILES:
        for number in clients:
            for target in (_ENGINE, _PLAIN, _PRODUCT):
                found = results[target, kind, number]
                times = " | ".join(f"{found.ms(q):.1f} ms" for q in (50, 95, 99))
                spread = f"{min(found.rates):.1f} to {max(found.rates):.1f}"
                say(f"| {target} | {kind} | {number} | **{found.rate:.1f}** ({spread}) | {times} | {found.failed} |")


def _print_goals(results: Results, decoding_ms: dict[str, float], clients: tuple[int, ...]) -> None:
    say("| | | goal |\n|---|---|---|")
    many = 8
    for kind in _FILES if many in clients else ():
        ours = results[_PRODUCT, kind, many]
        for target, goal in ((_ENGINE, 0.8), (_PLAIN, 2.5)):
            say(f"| {kind}, {many} clients: images/s of (c) over {target} | {_ratio(results, target, kind, many)} | {goal} |")
        say(f"| {kind}, {many} clients: p99 over median of (c) | {ours.ms(99) / ours.ms(50):.2f} | < 3 |")
    for kind in _FILES:
        ours = results[_PRODUCT, kind, 1].ms(50)
        alone = results[_ENGINE, kind, 1].ms(50) + decoding_ms[kind]
        goal = "12 ms" if kind == "PNG" else "none"
        say(f"| {kind}, 1 client: median of (c) above (a) and decoding | {ours - alone:.1f} ms | {goal} |")


def _ratio(results: Results, target: str, kind: str, clients: int) -> str:
    """Round by round, as both sides of a round met the same machine."""
    pairs = zip(results[_PRODUCT, kind, clients].rates, results[target, kind, clients].rates, strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def memory(work: Path, front: str, requests: int) -> None:
    """Memory of all processes of the service, sampled between chunks of requests."""
    import numpy as np

    made, posted = bundle(work, _STORED, _SEEN), files(work)
    begun = origin(f"bench_serve.py memory --front {front} --requests {requests}")
    samples: list[tuple[int, float]] = []
    failed = 0
    with product(made, work, front) as ours:
        say(f"\n**Memory** of the service over {requests:,} requests with a PNG of 256x256. {begun}\n")
        say("| requests | MiB |\n|---|---|")
        samples.append((0, ours.memory_mib()))
        step = min(_SAMPLE_REQUESTS, requests // 8)
        for done in range(step, requests + 1, step):
            met = load(ours, posted["small"], _MEMORY_CLIENTS, requests=step)
            failed += step - len(met["seconds"])
            samples.append((done, ours.memory_mib()))
            if done % (4 * step) == 0:
                say(f"| {done:,} | {samples[-1][1]:.0f} |")
    warm = np.array([sample for sample in samples if sample[0] >= requests / 4])
    slope = np.polyfit(warm[:, 0] / 1000, warm[:, 1], 1)[0]
    held = f"{warm[:, 1].min():.0f} to {warm[:, 1].max():.0f} MiB"
    say(
        f"\nAt the start {samples[0][1]:.0f} MiB; after the first quarter {held}, "
        f"slope **{slope:+.2f} MiB** a thousand requests; {failed} requests failed."
    )


def overload(work: Path, front: str, seconds: float) -> None:
    """Many more clients than the service lets wait; once they wait as they are told, once they ask again at once."""
    made, posted = bundle(work, _STORED, _SEEN), files(work)
    begun = origin(f"bench_serve.py overload --front {front} --seconds {seconds:g}")
    with product(made, work, front) as ours:
        say(f"\n**Overload** by {_OVERLOAD_CLIENTS} clients for {seconds:g} s. {begun}\n")
        say("| after a 503 clients | accepted/s | median | p99 (goal < 5 s) | 503 | without Retry-After | other failures |")
        say("|---|---|---|---|---|---|---|")
        for shed, words in (("wait", "wait as told"), ("retry", "ask again at once")):
            met = load(ours, posted["PNG"], _OVERLOAD_CLIENTS, seconds=seconds, shed=shed)
            statuses = dict(met["statuses"])
            asked, accepted, refused = sum(statuses.values()), statuses.pop("200", 0), statuses.pop("503", 0)
            others = ", ".join(f"{status}: {number}" for status, number in statuses.items()) or "none"
            say(
                f"| {words} | {accepted / met['elapsed']:.1f} | {percentile_ms(met['seconds'], 50) / 1000:.2f} s "
                f"| **{percentile_ms(met['seconds'], 99) / 1000:.2f} s** | {refused / max(asked, 1):.1%} of {asked} "
                f"| {met['without_retry_after']} | {others} |"
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "memory", "overload", "all"])
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/cxr-ray-bench/serve"), help="folder of bundle and files")
    parser.add_argument("--front", choices=["proxy", "haproxy"], default="haproxy", help="what stands before the service")
    parser.add_argument("--rounds", type=int, default=3, help="compare: turns through all targets")
    parser.add_argument("--seconds", type=float, help="compare: of each measurement [10]; overload: of load [60]")
    parser.add_argument("--requests", type=int, default=20_000, help="memory: requests in all")
    parser.add_argument("--smoke", action="store_true", help="short: shows that a part works, measures nothing")
    return parser.parse_args()


def main() -> None:
    """Run what the first argument names."""
    given = _arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    parts = ("compare", "memory", "overload") if given.what == "all" else (given.what,)
    for part in parts:
        if part == "compare":
            seconds = 2.0 if given.smoke else given.seconds or 10.0
            compare(
                given.work,
                given.front,
                1 if given.smoke else given.rounds,
                seconds,
                clients=(1, 8) if given.smoke else _CLIENTS,
            )
        elif part == "memory":
            memory(given.work, given.front, 80 if given.smoke else given.requests)
        else:
            overload(given.work, given.front, 5.0 if given.smoke else given.seconds or 60.0)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
