"""A DICOM node's backlog through a week: a hospital's day, outages, and a spool that fills.

    python bench/node_backlog.py [STUDIES-A-YEAR:NODES:REPLICAS ...] [--spool-gb G] [--keep-days D] [--plot PNG] ...

A film is taken where the spool's disk has room, answered in the order of receipt, and kept for days; a study's results are made
once its films are answered and it has been quiet, and go to one archive. Each stage serves one after the other in a constant
time, which was measured (docs/scaling-studies.md). While service, archive or node are away nothing passes that needs them; how
long after their return that is noticed follows from the node's own settings and pauses, which are imported. What is refused
its sender offers again. Not modelled: the time to receive, what attempts in vain cost, revisions, dead letters.

Arrivals are a Poisson process. No data at hand say at which hours films are taken: DAY and WEEK are assumptions in the shape
of what is published. A PACS' busiest hour has 10.1 % of a day's images, single hours up to 15 % of a mean day's (Wilson and
Smith, Proc. SPIE 2165, 1994); radiographs are fewest at night and on Sundays. --curve takes their place.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from measuring import origin, say

from serve.node.destinations import PatienceSettings
from serve.node.node import NodeSettings
from serve.node.patience import pause_seconds

NODE = NodeSettings()
HOUR, WEEK_HOURS, STEP = 3600.0, 168, 60.0
# Percent of a day's studies by the hour, of a week's by the day from Monday.
DAY = (1.3, 1.1, 1, 1, 1.3, 2.2, 3.2, 4.6, 7, 9, 10.1, 9, 6.9, 7, 7.2, 6.3, 5.1, 3.7, 3, 2.6, 2.3, 2, 1.7, 1.4)
WEEK = (16.8, 16.8, 16.8, 16.8, 16.0, 9.0, 7.8)
# MIMIC-CXR 2.0.0. One image of a study is taken for the one that is answered, others for lateral views.
IMAGES_A_STUDY = 377_110 / 227_835
# Bytes, at 2 a pixel, and share of the commonest sizes of ChestX-ray14's originals (its table: 112,120), four fifths of them.
SIZES = ((2500 * 2048 * 2, 0.409), (2992 * 2991 * 2, 0.196), (3056 * 2544 * 2, 0.158), (2021 * 2021 * 2, 0.039))
# `study_costs.py chain`: seconds of CPU of a service (2 cores a replica) and of a node, a parcel's way, and its bytes.
ANSWER_CPU, REFUSAL_CPU, RESULT_CPU, CORES = 0.270, 0.116, 0.432, 2
RESULT_SECONDS, DELIVERY_SECONDS, PARCEL_BYTES = 0.334, 1 / 25.0, 3.93e6
STUDY_CPU = ANSWER_CPU + (IMAGES_A_STUDY - 1) * REFUSAL_CPU + RESULT_CPU

Spans = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Site:
    """One node and what stands behind it; times in seconds, from Monday, 0:00; outages as (begin, end).

    `image_seconds`, `result_seconds`, `delivery_seconds` are what an image takes the service, a study's results the node and
    their delivery the archive; `room_bytes` is the spool's disk less what stays free; who is refused offers again; None: not.
    """

    studies_a_year: float
    image_seconds: float
    result_seconds: float = RESULT_SECONDS
    delivery_seconds: float = DELIVERY_SECONDS
    room_bytes: float = math.inf
    keep_days: float = NODE.keep_done_days
    resend_seconds: float | None = 300.0
    images_a_study: float = IMAGES_A_STUDY
    sizes: tuple[tuple[float, float], ...] = SIZES
    curve: tuple[float, ...] = tuple(day * hour for day in WEEK for hour in DAY)
    # Standard deviation of an hour's rate, as a share: one busiest hour in a thousand then has the published 15 %.
    hour_spread: float = 0.15
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


@dataclass(frozen=True)
class Course:
    """What came of each film and study; times in seconds, infinite where it did not happen.

    `offered`, `accepted`, `answered` are of films; `arrived` (first offer), `complete` (last answer), `made` and `delivered` of
    studies, in that order; `used` the spool's bytes after each minute; `refused` offers that found a full disk, and no node.
    """

    site: Site
    offered: np.ndarray
    accepted: np.ndarray
    answered: np.ndarray
    arrived: np.ndarray
    complete: np.ndarray
    made: np.ndarray
    delivered: np.ndarray
    used: np.ndarray
    refused: tuple[int, int]

    def counts(self) -> dict[str, int]:
        """Where the films are at the end; those that are not taken are still with their senders."""
        taken, answered = (int((times <= self.site.hours * HOUR).sum()) for times in (self.accepted, self.answered))
        return {"answered": answered, "waiting": taken - answered, "not taken": len(self.offered) - taken}


def between(begun: np.ndarray, ended: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How many have begun and not ended at these times."""
    return np.searchsorted(np.sort(begun), at, "right") - np.searchsorted(np.sort(ended), at, "right")


def oldest(begun: np.ndarray, ended: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Age of what began first and has not ended at these times, 0 where there is nothing."""
    order = np.argsort(begun, kind="stable")
    first = np.searchsorted(np.maximum.accumulate(ended[order]), at, "right")
    return np.maximum(at - np.append(begun[order], np.inf)[first], 0.0)


def calm_from(begun: np.ndarray, ended: np.ndarray, at: np.ndarray) -> float:
    """The first of these times at which nothing is older than two minutes."""
    return float(np.append(at[oldest(begun, ended, at) <= 120], np.inf)[0])


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
        over = np.searchsorted(self._ends, ready, "right")
        # By a clock that stands still while something is away.
        worked = np.minimum(np.append(self._starts, np.inf)[over], ready) - self._lost[over]
        places = np.arange(len(ready)) * self._seconds
        left = np.maximum.accumulate(np.maximum(worked, self._free) - places) + places + self._seconds
        self._free = np.append(self._free, left)[-1]
        return left + self._lost[np.searchsorted(self._starts - self._lost[:-1], left, "left")]


def first_attempt_after(tried: np.ndarray, end: float, settings: PatienceSettings, chance: np.random.Generator) -> np.ndarray:
    """When what was first tried at these times, in vain until `end`, is first tried after it, by the node's own pauses."""
    steady, at, failures = settings.model_copy(update={"jitter": 0.0}), tried.copy(), 0
    while (early := np.flatnonzero(at < end)).size:
        failures += 1
        at[early] += pause_seconds(steady, failures) * (1 + settings.jitter * chance.random(early.size))
    return at


def simulate(site: Site, seed: int = 0) -> Course:
    """Minute by minute; within one, times are exact, and what leaves the disk is seen at its end."""
    chance = np.random.default_rng(seed)
    offered, study, sizes = _arrivals(site, chance)
    steps, films, room = int(site.hours * HOUR / STEP), len(offered), site.room_bytes
    # The dispatcher's settings have the names of delivery's, and its pauses are the same.
    dispatch, patience, away = NODE.dispatch, NODE.delivery.patience, [*site.service, *site.node]
    answering, making = Stage(site.image_seconds, away), Stage(site.result_seconds, away)
    # One parcel after the other finds out whether the archive is back, and then all of them go.
    noticed = [(start, float(first_attempt_after(np.array([start]), end, patience, chance)[0])) for start, end in site.archive]
    delivering = Stage(site.delivery_seconds, [*noticed, *site.node])
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
        up = ~_within(times, site.node)
        # Once a film finds no room, nothing does for the rest of the minute.
        fits = up & (disk + np.cumsum(np.where(up, sizes[numbers], 0.0)) <= room)
        refused += (up & ~fits).sum(), (~up).sum()
        if site.resend_seconds is not None and not fits.all():
            pauses = site.resend_seconds * (1 + 0.2 * chance.random((~fits).sum()))
            again = np.hstack([again, np.vstack([times[~fits] + pauses, numbers[~fits]])])
        times, numbers = times[fits], numbers[fits]
        accepted[numbers], disk = times, disk + sizes[numbers].sum()
        for outage in site.service:
            inside = _within(times, [outage])
            times[inside] = first_attempt_after(times[inside], outage[1], dispatch, chance)
        answered[numbers] = answering.leave(times)
        np.subtract.at(left, study[numbers], 1)
        complete = numbers[left[study[numbers]] == 0]
        last = complete[::-1][np.unique(study[complete][::-1], return_index=True)[1]]
        last = last[np.argsort(answered[last], kind="stable")]
        made = making.leave(answered[last] + NODE.assembly.quiet_seconds)
        finished.append(np.vstack([offered[last], answered[last], made, delivering.leave(made)]))
        _put(change, answered[numbers] + site.keep_days * 24 * HOUR, -sizes[numbers])
        _put(change, made, PARCEL_BYTES)
        _put(change, finished[-1][3], -PARCEL_BYTES)
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


def _row(course: Course) -> str:
    week, end = np.arange(0, course.site.hours * HOUR, STEP), max((end for _, end in course.site.service), default=0.0)
    cells, calm = f"{course.site.busiest():.2f}", end
    films, studies = (course.offered, course.accepted, course.answered), (course.arrived, course.complete, course.delivered)
    for since, begun, ended in (films, studies):
        slowest = np.max((ended - since)[np.isfinite(ended)], initial=0) / HOUR
        calm = calm_from(begun, ended, week[week >= calm])
        cells += f" | {between(begun, ended, week).max():,} | {slowest:.1f} h | {(calm - end) / HOUR:.1f} h"
    left = course.counts()["not taken"] / max(len(course.offered), 1)
    return f"{cells} | {course.used.max() / 1e9:,.0f} GB | {course.refused[0]:,} + {course.refused[1]:,} | {left:.0%}"


def _plot(course: Course, path: str) -> None:
    site, edges, at = course.site, np.arange(course.site.hours + 1), np.arange(0, course.site.hours * HOUR, STEP)
    figure = Figure(figsize=(9, 9.5), layout="constrained")
    panels, hours = figure.subplots(4, sharex=True), at / HOUR
    for what, colour in (("service", "tab:red"), ("node", "black"), ("archive", "tab:green")):
        for panel, label in zip(panels, (f"{what} away", None, None, None), strict=True):
            for start, end in getattr(site, what):
                panel.axvspan(start / HOUR, end / HOUR, color=colour, alpha=0.2, label=label)
    for times, words in ((course.offered, "films sent for the first time"), (course.answered, "films answered")):
        panels[0].stairs(np.histogram(times / HOUR, edges)[0] / 1e3, edges, label=words)
    panels[1].plot(hours, between(course.accepted, course.answered, at) / 1e3, label="films without an answer")
    panels[1].plot(hours, between(course.complete, course.delivered, at) / 1e3, label="answered studies without results")
    panels[1].plot(hours, between(course.offered, course.accepted, at) / 1e3, label="films refused, still with their senders")
    panels[2].plot(hours, oldest(course.accepted, course.answered, at) / HOUR, label="age of the oldest film without an answer")
    panels[2].plot(course.arrived / HOUR, (course.delivered - course.arrived) / HOUR, ".", ms=1, label="delay of the results")
    panels[3].plot(hours, course.used / 1e12, label="spool")
    if math.isfinite(site.room_bytes):
        panels[3].axhline(site.room_bytes / 1e12, color="tab:red", ls="--", label="full: refused")
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
    parser.add_argument("--keep-days", type=float, default=NODE.keep_done_days)
    parser.add_argument("--curve", help="24 or 168 shares, one a line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="PNG")
    away = ["service=33+4", "node=58.5+0.25", "archive=80+8"]
    parser.add_argument("--away", nargs="*", default=away, help="outages: hour of the week+hours")
    given = parser.parse_args()
    settings: dict = {"room_bytes": given.spool_gb * 1e9 - NODE.listener.min_free_bytes, "keep_days": given.keep_days}
    for what, start, hours in (re.split("[=+]", outage) for outage in given.away):
        settings[what] = (*settings.get(what, ()), (float(start) * HOUR, (float(start) + float(hours)) * HOUR))
    if given.curve:
        shares = np.loadtxt(given.curve)
        settings["curve"] = tuple(shares if len(shares) == WEEK_HOURS else np.outer(WEEK, shares).ravel())
    say(f"{origin(' '.join(['node_backlog.py', *sys.argv[1:]]))}\n")
    heads = "studies, nodes, replicas, busy, films, slowest, drained, results, slowest, drained, disk, refused, left"
    say(f"| {heads.replace(', ', ' | ')} |\n|{'---|' * 13}")
    for volume in given.volume:
        studies, nodes, replicas = map(float, volume.split(":"))
        course = simulate(Site(studies / nodes, STUDY_CPU / IMAGES_A_STUDY / CORES / replicas, **settings), given.seed)
        say(f"| {studies:,.0f} | {nodes:g} | {replicas:g} | {_row(course)} |")
    if given.plot:
        _plot(course, given.plot)


if __name__ == "__main__":
    main()
