"""Phantoms: the patients' courses hold together, and each finding is drawn where it belongs."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from cxr_ray.findings import FINDINGS, encode
from ingest.phantom import DAYS_PER_YEAR, HIDDEN_SHARE, MAX_VISITS, PhantomVisit, simulate_patients
from ingest.phantom_drawing import draw

# Where a finding may change the film: top, bottom, left, right as shares of the film.
REGIONS = {
    "Atelectasis": (0.45, 0.95, 0.05, 0.95),
    "Cardiomegaly": (0.35, 0.90, 0.15, 0.90),
    "Effusion": (0.45, 0.95, 0.05, 0.95),
    "Infiltration": (0.08, 0.90, 0.05, 0.95),
    "Mass": (0.15, 0.80, 0.05, 0.95),
    "Nodule": (0.12, 0.85, 0.05, 0.95),
    "Pneumonia": (0.25, 0.90, 0.05, 0.95),
    "Pneumothorax": (0.05, 0.80, 0.05, 0.95),
    "Consolidation": (0.05, 0.60, 0.05, 0.95),
    "Edema": (0.10, 0.85, 0.05, 0.95),
    "Emphysema": (0.05, 0.98, 0.05, 0.95),
    "Fibrosis": (0.35, 0.90, 0.05, 0.95),
    "Pleural_Thickening": (0.10, 0.85, 0.03, 0.97),
    "Hernia": (0.50, 0.90, 0.35, 0.70),
}


@pytest.fixture(scope="module")
def visits() -> list[PhantomVisit]:
    return simulate_patients(300, seed=5)


@pytest.fixture(scope="module")
def many() -> list[PhantomVisit]:
    return simulate_patients(1500, seed=11)


def series_of(visits):
    series = defaultdict(list)
    for visit in visits:
        series[visit.patient_id].append(visit)
    return series


def showing(visit, *names):
    return replace(visit, visible=tuple(encode(names).tolist()))


def test_equal_arguments_give_equal_visits_and_films(visits):
    again = simulate_patients(300, seed=5)
    assert again == visits
    assert simulate_patients(300, seed=6) != visits
    for one, other in zip(visits[:5], again[:5], strict=True):
        np.testing.assert_array_equal(draw(one, 64), draw(other, 64))


def test_a_patient_does_not_depend_on_how_many_there_are(visits):
    few = simulate_patients(7, seed=5)
    assert few == visits[: len(few)]
    assert {visit.patient_id for visit in few} == set(range(1, 8))


def test_visits_are_numbered_in_time(visits):
    assert len({visit.image_id for visit in visits}) == len(visits)
    for patient_id, series in series_of(visits).items():
        assert [visit.visit for visit in series] == list(range(len(series)))
        assert len(series) <= MAX_VISITS
        assert len({visit.sex for visit in series}) == 1
        assert series[0].image_id == f"{patient_id:08d}_000"
        for earlier, later in pairwise(series):
            assert later.days > earlier.days
            years = (later.days - earlier.days) / DAYS_PER_YEAR
            assert abs(later.age_years - earlier.age_years - years) < 1
    assert 3 < len(visits) / 300 < 5


def test_ages_sexes_and_views_are_plausible(many):
    assert all(20 <= visit.age_years <= 90 for visit in many)
    assert {visit.sex for visit in many} == {"M", "F"}
    findings = {view: np.mean([sum(visit.labels) for visit in many if visit.view == view]) for view in ("PA", "AP")}
    assert findings["AP"] > findings["PA"] + 0.3


def test_hidden_findings_were_present_earlier(visits):
    for series in series_of(visits).values():
        earlier = np.zeros(len(FINDINGS), dtype=bool)
        for visit in series:
            labels, visible = np.array(visit.labels), np.array(visit.visible)
            assert np.all(visible <= labels)
            assert np.all(earlier[labels > visible])
            earlier |= labels.astype(bool)


def test_the_hidden_share_is_as_stated(many):
    known = hidden = 0
    for series in series_of(many).values():
        earlier = np.zeros(len(FINDINGS), dtype=bool)
        for visit in series:
            labels, visible = np.array(visit.labels, dtype=bool), np.array(visit.visible, dtype=bool)
            known += int((labels & earlier).sum())
            hidden += int((labels & ~visible).sum())
            earlier |= labels
    assert hidden / known == pytest.approx(HIDDEN_SHARE, abs=0.03)


def test_every_finding_has_positives_and_most_films_lack_it(visits):
    labels = np.array([visit.labels for visit in visits])
    assert labels.sum(axis=0).min() >= 40
    assert labels.mean(axis=0).max() < 0.25


def test_findings_stay_and_follow_age(many):
    present = stayed = 0
    for series in series_of(many).values():
        for earlier, later in pairwise(series):
            before = np.array(earlier.labels, dtype=bool)
            present += int(before.sum())
            stayed += int(np.array(later.labels)[before].sum())
    assert 0.72 < stayed / present < 0.88

    first = [visit for visit in many if visit.visit == 0]
    for name in ("Cardiomegaly", "Emphysema", "Fibrosis", "Hernia"):
        column = FINDINGS.index(name)
        old = np.mean([visit.labels[column] for visit in first if visit.age_years >= 55])
        young = np.mean([visit.labels[column] for visit in first if visit.age_years < 55])
        assert old > young, name


@pytest.mark.parametrize("arguments", [(0, 1), (5, -1)])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        simulate_patients(*arguments)


@pytest.mark.parametrize("name", FINDINGS)
def test_each_finding_changes_its_own_region(visits, name):
    top, bottom, left, right = (round(share * 256) for share in REGIONS[name])
    for visit in visits[:60:6]:
        healthy = draw(showing(visit)).astype(int)
        change = np.abs(draw(showing(visit, name)).astype(int) - healthy)
        assert (change > 12).sum() > 100
        inside = change[top:bottom, left:right].sum()
        assert inside > 0.97 * change.sum()


@pytest.mark.parametrize("name", [name for name in FINDINGS if name != "Mass"])
def test_a_finding_leaves_the_others_where_they_were(visits, name):
    """Where a mass and another finding do not overlap, the film with both agrees with the one or the other."""
    visit = visits[8]
    none, mass, other, both = (
        draw(showing(visit, *names), 128).astype(int) for names in ((), ("Mass",), (name,), ("Mass", name))
    )
    untouched = np.abs(other - none) <= 1
    assert np.mean(np.abs(both - mass)[untouched] <= 3) > 0.98


def test_side_effects_of_findings_are_radiological(visits):
    def mean(film, top, bottom, left, right):
        return film[round(top * 256) : round(bottom * 256), round(left * 256) : round(right * 256)].mean()

    for visit in visits[:40:8]:
        healthy = draw(showing(visit))
        lungs = healthy[64:160, 48:96]
        emphysema = draw(showing(visit, "Emphysema"))[64:160, 48:96]
        assert emphysema.mean() < lungs.mean() - 8
        edema = draw(showing(visit, "Edema"))
        for left, right in ((0.30, 0.42), (0.60, 0.70)):
            assert mean(edema, 0.40, 0.55, left, right) > mean(healthy, 0.40, 0.55, left, right) + 20
        assert draw(showing(visit, "Pneumothorax")).min(initial=255, where=lung_fields(healthy)) < 40


def lung_fields(film):
    """The dark part of a healthy film away from the air around the body."""
    within = np.zeros(film.shape, dtype=bool)
    within[40:170, 40:215] = True
    return within & (film < 90)


def cardiothoracic_ratio(film):
    """The heart between the dark lungs over the chest, both just above the diaphragm."""
    profile = cv2.GaussianBlur(film, (0, 0), 3)[156:168].mean(axis=0)
    within = profile[30:226]
    dark = np.flatnonzero(within < 0.5 * (profile[118:134].mean() + within.min())) + 30
    left, right = dark[dark < 118], dark[dark > 134]
    return (right.min() - left.max()) / (dark.max() - dark.min())


def test_cardiomegaly_widens_the_heart_beyond_half_the_chest(visits):
    for visit in visits[:120:4]:
        normal = cardiothoracic_ratio(draw(showing(visit)))
        wide = cardiothoracic_ratio(draw(showing(visit, "Cardiomegaly")))
        assert normal < 0.5 < wide


def test_air_is_dark_and_bone_bright(visits):
    for visit in visits[:40:4]:
        film = draw(showing(visit))
        assert film.dtype == np.uint8
        assert film.shape == (256, 256)
        assert film[:12, :12].mean() < 15
        assert film[:12, -12:].mean() < 15
        spine, lung = film[140:230, 118:138].mean(), film[80:150, 60:90].mean()
        assert spine > 140 > 110 > lung


def test_the_heart_points_to_the_patients_left(visits):
    for visit in visits[:40:4]:
        film = draw(showing(visit))
        assert film[150:170, 140:165].mean() > film[150:170, 91:116].mean() + 15


@pytest.mark.parametrize(("small", "large"), [(64, 256), (100, 256), (128, 512)])
def test_sizes_agree(visits, small, large):
    for visit in visits[:20:4]:
        reduced = cv2.resize(draw(visit, large), (small, small), interpolation=cv2.INTER_AREA)
        assert np.abs(draw(visit, small).astype(int) - reduced.astype(int)).mean() < 3


def test_a_patient_is_recognisable_between_visits(visits):
    series = next(series for series in series_of(visits).values() if len(series) >= 3)
    stranger = next(visit for visit in visits if visit.patient_id != series[0].patient_id and visit.view == series[0].view)
    first, later, other = (
        draw(replace(showing(visit), view="PA", age_years=50, sex="M"), 64).astype(int)
        for visit in (series[0], series[1], stranger)
    )
    assert np.abs(first - later).mean() < np.abs(first - other).mean()


def test_too_small_a_film_is_refused(visits):
    with pytest.raises(ValueError, match="size must be at least 16"):
        draw(visits[0], 8)
