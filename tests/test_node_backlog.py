"""The simulation of a node's backlog: nothing is lost in it, and where theory has a figure it agrees."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from node_backlog import HOUR, NODE, STEP, Site, Stage, between, calm_from, first_attempt_after, oldest, simulate

FLAT = {"curve": (1.0,) * 168, "hour_spread": 0.0, "images_a_study": 1.0}
FILM = 13_000_000.0


def flat(films_a_second: float, image_seconds: float, **given: object) -> Site:
    """A site at which the same number of studies of one film comes at all hours."""
    settings = {"sizes": ((FILM, 1.0),), "result_seconds": 1e-6, "delivery_seconds": 1e-6, **FLAT, **given}
    return Site(films_a_second * 365 * 86_400, image_seconds, **settings)


def test_queue_agrees_with_that_of_one_server_with_constant_service():
    # Pollaczek and Khinchine: the mean wait of M/D/1 is rho s / (2 (1 - rho)).
    rho, service = 0.8, 0.5
    course = simulate(flat(rho / service, service, hours=24), seed=1)
    wait = course.answered - course.offered - service
    batches = np.array([part.mean() for part in np.array_split(wait[1000:], 40)])
    error = batches.std(ddof=1) / np.sqrt(len(batches))
    assert wait.min() > -1e-6
    assert error < 0.03
    assert abs(batches.mean() - rho * service / (2 * (1 - rho))) < 4 * error
    # Little: so many films are with the service as come in the time that one spends there.
    at = np.linspace(HOUR, 23 * HOUR, 40_000)
    there = between(course.accepted, course.answered, at).mean()
    assert there == pytest.approx(rho / service * (batches.mean() + service), rel=0.05)


@pytest.mark.parametrize("resend_seconds", [None, 300.0])
def test_films_are_conserved(resend_seconds: float | None):
    away = {"service": ((2 * HOUR, 3 * HOUR), (10.5 * HOUR, 12 * HOUR)), "node": ((5 * HOUR, 5.5 * HOUR),)}
    archive = ((6 * HOUR, 9 * HOUR),)
    site = Site(1e6, 2.0, hours=11, keep_days=0.1, room_bytes=1.2e10, resend_seconds=resend_seconds, archive=archive, **away)
    course = simulate(site, seed=2)
    counts = course.counts()
    assert counts["answered"] + counts["waiting"] + counts["not taken"] == len(course.offered)
    assert min(course.refused) > 0
    assert counts["answered"] > counts["waiting"] > 0
    if resend_seconds is None:
        assert counts["not taken"] == sum(course.refused)
    taken = np.isfinite(course.accepted)
    assert (course.accepted[taken] >= course.offered[taken]).all()
    assert (course.answered[taken] >= course.accepted[taken] + site.image_seconds - 1e-6).all()
    assert (course.delivered >= course.made).all()
    assert (course.made >= course.complete + NODE.assembly.quiet_seconds).all()
    assert (course.complete >= course.arrived).all()
    for start, end in site.node:
        assert not ((course.accepted >= start) & (course.accepted < end)).any()
    for start, end in (*site.service, *site.node):
        assert not ((course.answered > start) & (course.answered < end)).any()


def test_outage_is_drained_as_arithmetic_says():
    rate, service, hours = 2.0, 0.25, 2
    course = simulate(flat(rate, service, hours=12, service=((3 * HOUR, (3 + hours) * HOUR),)), seed=3)
    at = np.array([(3 + hours) * HOUR])
    waiting = rate * hours * HOUR
    assert between(course.accepted, course.answered, at)[0] == pytest.approx(waiting, abs=4 * np.sqrt(waiting))
    # What came meanwhile goes at the rate by which the service is faster than the arrivals.
    drained = waiting / (1 / service - rate) / HOUR
    longest_pause = NODE.dispatch.max_retry_seconds * (1 + NODE.dispatch.jitter)
    minutes = np.arange(at[0], 12 * HOUR, STEP)
    calm = calm_from(course.accepted, course.answered, minutes) - at[0]
    assert calm == pytest.approx(drained * HOUR, rel=0.03, abs=longest_pause + 120)
    assert oldest(course.accepted, course.answered, at)[0] == pytest.approx(hours * HOUR, abs=10)
    slowest = (course.answered - course.offered).max()
    assert hours * HOUR <= slowest <= hours * HOUR + longest_pause + 60


def test_full_spool_refuses_and_takes_again_when_there_is_room():
    rate, room = 1.0, 1800 * FILM
    site = flat(rate, 0.1, hours=8, keep_days=1 / 24, room_bytes=room, service=((2 * HOUR, 4 * HOUR),))
    course = simulate(site, seed=4)
    assert course.used.max() <= room
    assert course.refused[0] > 0
    assert course.refused[1] == 0
    # The hour's films that are kept are 3,600, twice what there is room for: half of them are refused at any time.
    refused_at = course.offered[course.accepted > course.offered + 60]
    assert refused_at.min() < 2 * HOUR
    assert course.counts()["not taken"] > 0
    # During the outage nothing leaves, so that nothing comes; afterwards there is room as what was answered grows old.
    in_outage = (course.accepted > 3.1 * HOUR) & (course.accepted < 4 * HOUR)
    assert in_outage.sum() < 10
    assert ((course.accepted > 5.2 * HOUR) & (course.accepted < 8 * HOUR)).sum() > 1800


def test_roomy_spool_refuses_nothing():
    course = simulate(flat(1.0, 0.1, hours=4, keep_days=1 / 24, room_bytes=8000 * FILM), seed=5)
    assert course.refused == (0, 0)
    assert course.used[-1] == pytest.approx(3600 * FILM, rel=0.06)


def test_archive_that_was_away_is_noticed_by_the_outboxs_own_pauses():
    start, end = 2 * HOUR, 4 * HOUR
    course = simulate(flat(0.2, 0.1, hours=8, archive=((start, end),)), seed=6)
    meanwhile = (course.made > start) & (course.made < end)
    longest = NODE.delivery.patience.max_retry_seconds * (1 + NODE.delivery.patience.jitter)
    assert course.delivered[meanwhile].min() >= end
    assert course.delivered[meanwhile].max() <= end + longest + 60
    # Nobody's answer waits for the archive.
    assert (course.answered - course.offered).max() < 5


def test_first_attempt_after_an_outage_follows_the_dispatchers_pauses():
    settings = NODE.dispatch.model_copy(update={"jitter": 0.0})
    pauses = np.minimum(settings.first_retry_seconds * 2.0 ** np.arange(40), settings.max_retry_seconds)
    attempts = np.concatenate([[0.0], np.cumsum(pauses)])
    chance = np.random.default_rng(0)
    for end in (0.0, 0.4, 3.0, 100.0, 1800.0):
        found = first_attempt_after(np.zeros(1), end, settings, chance)[0]
        assert found == attempts[np.searchsorted(attempts, end)]
    spread = first_attempt_after(np.zeros(2000), 3600.0, NODE.dispatch, chance) - 3600
    assert spread.min() >= 0
    assert spread.max() <= settings.max_retry_seconds * (1 + NODE.dispatch.jitter)
    assert spread.std() > 10


def test_stage_stands_still_while_something_is_away():
    stage = Stage(10.0, ((100.0, 200.0), (150.0, 250.0)))
    assert stage.leave(np.array([0.0, 95.0, 120.0])).tolist() == [10.0, 255.0, 265.0]
    assert stage.leave(np.array([130.0, 400.0])).tolist() == [275.0, 410.0]
    assert Stage(10.0, ()).leave(np.array([0.0, 1.0])).tolist() == [10.0, 20.0]


def test_same_seed_same_week():
    site = Site(1e6, 1.0, hours=6, service=((2 * HOUR, 3 * HOUR),))
    one, again, other = simulate(site, 7), simulate(site, 7), simulate(site, 8)
    for name in ("offered", "accepted", "answered", "complete", "made", "delivered", "used"):
        assert np.array_equal(getattr(one, name), getattr(again, name)), name
    assert not np.array_equal(one.offered[:100], other.offered[:100])


def test_busiest_hour_is_a_tenth_of_a_weekday():
    hours = Site(1e6, 1.0).studies()
    assert hours.sum() == pytest.approx(1e6 / 365 * 7)
    assert hours[:24].max() / hours[:24].sum() == pytest.approx(0.101)
