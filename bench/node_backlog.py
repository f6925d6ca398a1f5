"""A DICOM node's backlog through a week: a hospital's day, outages, and a spool that fills.

    python bench/node_backlog.py [STUDIES-A-YEAR:NODES:REPLICAS ...] [--spool-gb G] [--keep-days D] [--plot PNG] ...

A film is taken where the spool's disk has room, answered in the order of receipt, and kept for days; a study's results are made
once its films are answered and it has been quiet, and go to one archive. Each stage serves one after the other in a constant
time, which was measured (docs/scaling-studies.md). While service, archive or node are away nothing passes that needs them; how
long after their return that is noticed follows from the node's own settings and pauses, which are imported. What is refused
its sender offers again. Not modelled: the time to receive, what attempts in vain cost, revisions, dead letters.

Arrivals are a Poisson process. Nothing in the data at hand says at which hours films are taken, so DAY and WEEK are
assumptions in the shape of what is published: a PACS' busiest hour has 10.1 % of the day's images and single hours up to
15 % of a mean day's (Wilson and Smith, Proc. SPIE 2165, 1994); radiographs are fewest at night and on Sundays. A file of 24
numbers (hours of the day) or 168 (hours from Monday, 0:00) takes their place.
"""

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import origin, say

from serve.node.assembly import AssemblySettings
from serve.node.destinations import PatienceSettings
from serve.node.listener_settings import ListenerSettings
from serve.node.node import NodeSettings
from serve.node.patience import pause_seconds
from serve.node.service_client import DispatchSettings

HOUR, WEEK_HOURS, STEP = 3600.0, 168, 60.0
# Percent of a day's studies by the hour, of a week's by the day from Monday.
DAY = (1.3, 1.1, 1, 1, 1.3, 2.2, 3.2, 4.6, 7, 9, 10.1, 9, 6.9, 7, 7.2, 6.3, 5.1, 3.7, 3, 2.6, 2.3, 2, 1.7, 1.4)
WEEK = (16.8, 16.8, 16.8, 16.8, 16.0, 9.0, 7.8)
# Standard deviation of an hour's rate, as a share: one busiest hour in a thousand then has the published 15 %.
HOUR_SPREAD = 0.15
# MIMIC-CXR 2.0.0. One image of a study is taken for the one that is answered, others for lateral views.
IMAGES_A_STUDY = 377_110 / 227_835
# Bytes, at 2 a pixel, and share of the commonest sizes of ChestX-ray14's originals (its table: 112,120), four fifths of them.
SIZES = ((2500 * 2048 * 2, 0.409), (2992 * 2991 * 2, 0.196), (3056 * 2544 * 2, 0.158), (2021 * 2021 * 2, 0.039))
# `study_costs.py chain`: seconds of CPU of a service (2 cores a replica) and of a node, a parcel's way, and its bytes.
ANSWER_CPU, REFUSAL_CPU, RESULT_CPU, CORES = 0.254, 0.119, 0.365, 2
RESULT_SECONDS, DELIVERY_SECONDS, PARCEL_BYTES = 0.288, 1 / 14.1, 3.93e6
STUDY_CPU = ANSWER_CPU + (IMAGES_A_STUDY - 1) * REFUSAL_CPU + RESULT_CPU

Spans = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Site:
    """One node and what stands behind it; times in seconds, outages as (first hour of the week, hours).

    `image_seconds`, `result_seconds` and `delivery_seconds` are what an image takes the service, a study's results the node
    and their delivery the archive. A sender that was refused offers again after `resend_seconds`; None: never. `hours` is the
    length of the simulation, a week at most.
    """

    studies_a_year: float
    image_seconds: float
    result_seconds: float = RESULT_SECONDS
    delivery_seconds: float = DELIVERY_SECONDS
    parcel_bytes: float = PARCEL_BYTES
    spool_bytes: float = math.inf
    min_free_bytes: float = ListenerSettings().min_free_bytes
    keep_days: float = NodeSettings().keep_done_days
    quiet_seconds: float = AssemblySettings().quiet_seconds
    resend_seconds: float | None = 300.0
    images_a_study: float = IMAGES_A_STUDY
    sizes: tuple[tuple[float, float], ...] = SIZES
    curve: tuple[float, ...] = tuple(day * hour for day in WEEK for hour in DAY)
    hour_spread: float = HOUR_SPREAD
    hours: int = WEEK_HOURS
    service: Spans = ()
    node: Spans = ()
    archive: Spans = ()

    def studies(self) -> np.ndarray:
        """Expected studies of each hour of the week; shape (168,)."""
        return self.studies_a_year / 365 * 7 * np.asarray(self.curve, dtype=float) / sum(self.curve)

    def busiest(self) -> float:
        """Share of the service's time that the images of the busiest hour take."""
        return float(self.studies().max()) / HOUR * self.images_a_study * self.image_seconds

    def away(self, what: str) -> Spans:
        """Begin and end of the outages of ``service``, ``node`` or ``archive``."""
        return [(start * HOUR, (start + hours) * HOUR) for start, hours in getattr(self, what)]


@dataclass(frozen=True)
class Course:
    """What came of each film and study; times in seconds, infinite where it did not happen.

    `offered`, `accepted` and `answered` are of films; `arrived` (first offer), `made` and `delivered` of studies whose films
    are all answered, in that order; `used` are bytes on the spool's disk at the end of each minute; `refused` the offers that
    found a full disk, and no node.
    """

    site: Site
    offered: np.ndarray
    accepted: np.ndarray
    answered: np.ndarray
    arrived: np.ndarray
    made: np.ndarray
    delivered: np.ndarray
    used: np.ndarray
    refused: tuple[int, int]

    def waiting(self, at: np.ndarray) -> np.ndarray:
        """Films that are taken and not answered at these times."""
        return np.searchsorted(np.sort(self.accepted), at, "right") - np.searchsorted(np.sort(self.answered), at, "right")

    def parcels(self, at: np.ndarray) -> np.ndarray:
        """Studies whose results wait for the archive at these times."""
        return np.searchsorted(self.made, at, "right") - np.searchsorted(self.delivered, at, "right")

    def oldest(self, at: np.ndarray) -> np.ndarray:
        """Age of the film that has waited longest, 0 where none waits."""
        order = np.argsort(self.accepted, kind="stable")
        first = np.searchsorted(np.maximum.accumulate(self.answered[order]), at, "right")
        return np.maximum(at - np.append(self.accepted[order], np.inf)[first], 0.0)

    def counts(self) -> dict[str, int]:
        """Where the films are at the end."""
        taken, answered = (times <= self.site.hours * HOUR for times in (self.accepted, self.answered))
        return {"answered": int(answered.sum()), "waiting": int((taken & ~answered).sum()), "not taken": int((~taken).sum())}

    def drained_after(self, end: float) -> float:
        """Hours from the end of an outage until no film has waited for more than a minute."""
        minutes = np.arange(end * HOUR, self.site.hours * HOUR, STEP)
        calm = np.flatnonzero(self.oldest(minutes) <= STEP)
        return float(calm[0]) * STEP / HOUR if calm.size else math.inf


class Stage:
    """Serves one after the other, each in `seconds`, while nothing is away; exact, by Lindley's recursion."""

    def __init__(self, seconds: float, away: Spans) -> None:
        spans = np.array(sorted(away)).reshape(-1, 2)
        ends = np.maximum.accumulate(spans[:, 1])
        # Those that overlap are one.
        first = np.append(True, spans[1:, 0] > ends[:-1])[: len(spans)]
        self._starts, self._ends = spans[first, 0], ends[np.append(first[1:], True)[: len(spans)]]
        self._lost = np.append(0.0, np.cumsum(self._ends - self._starts))
        self._seconds, self._free = seconds, -math.inf

    def leave(self, ready: np.ndarray) -> np.ndarray:
        """When those that are ready at these times leave, in the order in which they are given."""
        if not len(ready):
            return ready
        over = np.searchsorted(self._ends, ready, "right")
        # By a clock that stands still while something is away.
        worked = np.minimum(np.append(self._starts, np.inf)[over], ready) - self._lost[over]
        places = np.arange(len(ready)) * self._seconds
        left = np.maximum.accumulate(np.maximum(worked, self._free) - places) + places + self._seconds
        self._free = left[-1]
        return left + self._lost[np.searchsorted(self._starts - self._lost[:-1], left, "left")]


def first_attempt_after(tried: np.ndarray, end: float, settings: DispatchSettings, chance: np.random.Generator) -> np.ndarray:
    """When films that were first tried at these times, in vain until `end`, are first tried after it."""
    steady, at, failures = settings.model_copy(update={"jitter": 0.0}), tried.copy(), 0
    while (early := np.flatnonzero(at < end)).size:
        failures += 1
        # The dispatcher's pauses are delivery's, under the same names.
        at[early] += pause_seconds(steady, failures) * (1 + settings.jitter * chance.random(early.size))  # type: ignore[arg-type]
    return at


def noticed(outage: tuple[float, float], settings: PatienceSettings) -> tuple[float, float]:
    """An outage of the archive as the outbox has it: until the first attempt after its end."""
    at, failures = outage[0], 0
    while at < outage[1]:
        failures += 1
        at += pause_seconds(settings, failures)
    return outage[0], at


def simulate(site: Site, seed: int = 0) -> Course:
    """Minute by minute; within one, times are exact, and what leaves the disk is seen at its end."""
    chance = np.random.default_rng(seed)
    random.seed(seed)
    offered, study, sizes = _arrivals(site, chance)
    steps, films, room = int(site.hours * HOUR / STEP), len(offered), site.spool_bytes - site.min_free_bytes
    away = [*site.away("service"), *site.away("node")]
    answering, making = Stage(site.image_seconds, away), Stage(site.result_seconds, away)
    archive = [noticed(outage, PatienceSettings()) for outage in site.away("archive")]
    delivering = Stage(site.delivery_seconds, [*archive, *site.away("node")])
    accepted, answered, left = np.full(films, np.inf), np.full(films, np.inf), np.bincount(study)
    change, used = _kept_from_before(site, room, steps), np.zeros(steps)
    disk, finished, refused = -change.sum(), [], np.zeros(2, dtype=int)
    again, begun = np.empty((2, 0)), 0
    for step in range(steps):
        disk += change[step]
        stop, due = int(np.searchsorted(offered, (step + 1) * STEP)), again[0] < (step + 1) * STEP
        offers = np.hstack([np.vstack([offered[begun:stop], np.arange(begun, stop)]), again[:, due]])
        again, begun = again[:, ~due], stop
        times, numbers = offers[:, np.argsort(offers[0], kind="stable")]
        numbers = numbers.astype(int)
        up = ~_within(times, site.away("node"))
        # Once a film finds no room, nothing does for the rest of the minute.
        fits = up & (disk + np.cumsum(np.where(up, sizes[numbers], 0.0)) <= room)
        refused += (up & ~fits).sum(), (~up).sum()
        if site.resend_seconds is not None and not fits.all():
            pauses = site.resend_seconds * (1 + 0.2 * chance.random((~fits).sum()))
            again = np.hstack([again, np.vstack([times[~fits] + pauses, numbers[~fits]])])
        times, numbers = times[fits], numbers[fits]
        accepted[numbers], disk = times, disk + sizes[numbers].sum()
        for outage in site.away("service"):
            inside = _within(times, [outage])
            times[inside] = first_attempt_after(times[inside], outage[1], DispatchSettings(), chance)
        answered[numbers] = answering.leave(times)
        np.subtract.at(left, study[numbers], 1)
        complete = numbers[left[study[numbers]] == 0]
        last = complete[::-1][np.unique(study[complete][::-1], return_index=True)[1]]
        last = last[np.argsort(answered[last], kind="stable")]
        made = making.leave(answered[last] + site.quiet_seconds)
        finished.append(np.vstack([offered[last], made, delivering.leave(made)]))
        _put(change, answered[numbers] + site.keep_days * 24 * HOUR, -sizes[numbers])
        _put(change, made, site.parcel_bytes)
        _put(change, finished[-1][2], -site.parcel_bytes)
        used[step] = disk
    return Course(site, offered, accepted, answered, *np.hstack(finished), used, (int(refused[0]), int(refused[1])))


def _arrivals(site: Site, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Time, study and bytes of each film, in the order of time."""
    spread = site.hour_spread
    factors = chance.gamma(spread**-2, spread**2, site.hours) if spread else np.ones(site.hours)
    counts = chance.poisson(site.studies()[: site.hours] * factors)
    times = np.sort((np.repeat(np.arange(site.hours), counts) + chance.random(counts.sum())) * HOUR)
    study = np.repeat(np.arange(len(times)), 1 + chance.binomial(1, site.images_a_study - 1, len(times)))
    sizes, shares = np.array(site.sizes, dtype=float).T
    return times[study], study, chance.choice(sizes, len(study), p=shares / shares.sum())


def _kept_from_before(site: Site, room: float, steps: int) -> np.ndarray:
    """Bytes of the days before that leave the disk in each minute, as far as they had room; the last entry is after the end."""
    change, hours = np.zeros(steps + 1), math.ceil(site.keep_days * 24)
    sizes, shares = np.array(site.sizes, dtype=float).T
    before = np.resize(site.studies()[::-1], hours) * site.images_a_study * np.average(sizes, weights=shares)
    _put(change, (site.keep_days * 24 - np.arange(hours)) * HOUR, -before * min(1.0, room / max(before.sum(), 1.0)))
    return change


def _within(times: np.ndarray, spans: Spans) -> np.ndarray:
    return np.any([(times >= start) & (times < end) for start, end in spans], axis=0) if spans else np.zeros(len(times), bool)


def _put(change: np.ndarray, at: np.ndarray, bytes_each: np.ndarray | float) -> None:
    np.add.at(change, np.minimum(at / STEP + 1, len(change) - 1).astype(int), bytes_each)


def row(course: Course) -> str:
    """A week in figures."""
    site, minutes = course.site, np.arange(0, course.site.hours * HOUR, STEP)
    drained = max((course.drained_after(sum(outage)) for outage in site.service), default=0.0)
    slowest = np.max((course.answered - course.offered)[np.isfinite(course.answered)], initial=0) / HOUR
    cells = [f"{site.busiest():.2f}", f"{course.waiting(minutes).max():,}", f"{drained:.1f} h", f"{slowest:.2f} h"]
    cells += [f"{course.parcels(minutes).max():,}", f"{np.max(course.delivered - course.arrived, initial=0) / HOUR:.2f} h"]
    cells += [f"{course.used.max() / 1e9:,.0f} GB", "{:,} + {:,}".format(*course.refused)]
    return " | ".join([*cells, f"{course.counts()['not taken'] / max(len(course.offered), 1):.0%}"])


def plot(course: Course, path: Path) -> None:
    """Four panels over the days of the week, outages shaded."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    site, edges, minutes = course.site, np.arange(course.site.hours + 1), np.arange(0, course.site.hours * HOUR, STEP)
    figure, panels = plt.subplots(4, 1, figsize=(9, 9.5), sharex=True, layout="constrained")
    for what, colour in (("service", "tab:red"), ("node", "black"), ("archive", "tab:green")):
        for number, panel in enumerate(panels):
            for start, hours in getattr(site, what):
                # What begins with an underscore is in no legend.
                panel.axvspan(start, start + hours, color=colour, alpha=0.2, label="_" * number + f"{what} away")
    for times, words in ((course.offered, "films sent for the first time"), (course.answered, "films answered")):
        panels[0].stairs(np.histogram(times / HOUR, edges)[0] / 1e3, edges, label=words)
    at, held = minutes / HOUR, np.searchsorted(course.offered, minutes) - np.searchsorted(np.sort(course.accepted), minutes)
    panels[1].plot(at, course.waiting(minutes) / 1e3, label="films without an answer")
    panels[1].plot(at, course.parcels(minutes) / 1e3, label="studies whose results wait for the archive")
    panels[1].plot(at, held / 1e3, label="films refused, still with their senders")
    panels[2].plot(at, course.oldest(minutes) / HOUR, label="age of the oldest film without an answer")
    sent, delay = (
        times[:: max(1, len(course.made) // 3000)] / HOUR for times in (course.arrived, course.delivered - course.arrived)
    )
    panels[2].plot(sent, delay, ".", ms=2, label="from a study's sending to its results' delivery")
    panels[3].plot(at, course.used / 1e12, label="spool")
    if math.isfinite(site.spool_bytes):
        panels[3].axhline((site.spool_bytes - site.min_free_bytes) / 1e12, color="tab:red", ls="--", label="full: refused")
    for panel, words in zip(panels, ("thousands an hour", "thousands waiting", "hours", "TB"), strict=True):
        panel.set(ylabel=words, ylim=(0, None), xlim=(0, site.hours))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right" if panel is panels[3] else "upper right", fontsize=8)
    panels[3].set_xticks(range(0, WEEK_HOURS, 24), ["Mon 0:00", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"])
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print a row a volume, draw the last one's week."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", nargs="*", default=["1e6:1:1", "1e7:1:1", "1e8:4:2"], help="replicas are a node's")
    parser.add_argument("--spool-gb", type=float, default=math.inf, help="disk of a node; default: as much as it takes")
    parser.add_argument("--keep-days", type=float, default=NodeSettings().keep_done_days)
    parser.add_argument("--curve", type=Path, help="24 or 168 shares, one a line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG")
    for what, outage in (("service", "33+4"), ("node", "58.5+0.25"), ("archive", "80+8")):
        parser.add_argument(f"--{what}", nargs="*", default=[outage], help="outages: hour of the week+hours")
    given = parser.parse_args()
    settings = {"spool_bytes": given.spool_gb * 1e9, "keep_days": given.keep_days}
    for what in ("service", "node", "archive"):
        settings[what] = tuple(tuple(map(float, outage.split("+"))) for outage in getattr(given, what))
    if given.curve:
        shares = np.loadtxt(given.curve)
        settings["curve"] = tuple(shares if len(shares) == WEEK_HOURS else np.outer(WEEK, shares).ravel())
    say(f"{origin(' '.join(['node_backlog.py', *sys.argv[1:]]))}\n")
    say(
        "| studies a year | nodes | replicas | busy | waiting | drained | slowest answer | parcels | slowest result | disk | refused | left |"
    )
    say("|" + "---|" * 12)
    for volume in given.volume:
        studies, nodes, replicas = map(float, volume.split(":"))
        course = simulate(Site(studies / nodes, STUDY_CPU / IMAGES_A_STUDY / CORES / replicas, **settings), given.seed)
        say(f"| {studies:,.0f} | {nodes:g} | {replicas:g} | {row(course)} |")
    if given.plot:
        plot(course, given.plot)


if __name__ == "__main__":
    main()
