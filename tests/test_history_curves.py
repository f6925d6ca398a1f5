"""Courses told visit by visit: equal to what ingest computes at once, and changed only by what is missing."""

import numpy as np
import pytest

from cxr_ray.clinical import ClinicalInputs
from cxr_ray.course import Courses
from cxr_ray.dataset import Dataset
from cxr_ray.errors import UsageError
from cxr_ray.history_curves import Course, CourseFilms, check_courses, roll
from ingest.history import earlier_history
from ingest.nih import NihSettings, ingest_nih

NAN = float("nan")


def films(seed=0, patients=25):
    """Films of patients with one to nine visits, some visits of two films, some views unknown; in no order."""
    generator = np.random.default_rng(seed)
    patient, visit = [], []
    for number in range(patients):
        for rank in range(generator.integers(1, 10)):
            taken = 1 + (generator.random() < 0.15)
            patient += [number] * taken
            visit += [rank] * taken
    order = generator.permutation(len(patient))
    patient, visit = np.array(patient)[order], np.array(visit)[order]
    labels = (generator.random((len(patient), 14)) < 0.2).astype(np.float32)
    age = (40 + patient % 30 + visit // 2).astype(np.float32)
    ap = generator.choice([0.0, 1.0, NAN], len(patient), p=[0.5, 0.4, 0.1]).astype(np.float32)
    male = (patient % 2).astype(np.float32)
    inputs = ClinicalInputs(age, male, ap, np.zeros_like(labels))
    return CourseFilms(patient, visit, inputs, labels)


def nothing_missing(of):
    return Course(np.zeros(len(of.patient), dtype=bool), None)


def everything_missing(of, thresholds=None):
    return Course(np.ones(len(of.patient), dtype=bool), thresholds)


def told(of, course, answer=None):
    """The inputs that the network is asked with, film by film, and what `roll` gives back."""
    asked = {}

    def predict(rows, inputs):
        for place, row in enumerate(rows):
            asked[int(row)] = inputs.taken(np.array([place]))
        return np.full((len(rows), 14), 0.5, dtype=np.float32) if answer is None else answer[rows]

    answers = roll(of, [course], predict)
    return ClinicalInputs.concatenate([asked[row] for row in range(len(of.patient))]), answers


@pytest.mark.parametrize("seed", range(5))
def test_with_every_report_it_is_the_history_of_ingest(seed):
    of = films(seed)
    view = np.array([None if np.isnan(value) else "AP" if value else "PA" for value in of.inputs.ap], dtype=object)
    expected = earlier_history(of.patient, of.visit, of.labels, of.inputs.age_years, view)
    found, _ = told(of, nothing_missing(of))
    np.testing.assert_array_equal(found.ever, expected.ever)
    for name in ("count", "age_gap", "fraction", "decayed_80", "decayed_50", "no_finding", "ap"):
        np.testing.assert_allclose(getattr(found.past, name), getattr(expected, name), rtol=1e-5, atol=1e-6, err_msg=name)
    for back, name in enumerate(("last", "last_2", "last_3")):
        np.testing.assert_array_equal(found.past.last[:, back], getattr(expected, name))
        views = getattr(expected, f"{name}_view")
        as_number = np.array([NAN if value is None else float(value == "AP") for value in views])
        np.testing.assert_array_equal(found.past.last_ap[:, back], as_number)


def test_without_any_report_every_visit_is_a_first_one():
    of = films()
    found, _ = told(of, everything_missing(of))
    assert found.ever.max() == 0
    assert found.past.count.max() == 0
    assert np.isnan(found.past.age_gap).all()


def test_an_own_answer_that_is_right_is_as_good_as_the_report():
    of = films()
    honest, _ = told(of, nothing_missing(of))
    own, _ = told(of, everything_missing(of, np.full(14, 0.5)), answer=of.labels * 0.8 + 0.1)
    np.testing.assert_array_equal(own.ever, honest.ever)
    np.testing.assert_array_equal(own.past.decayed_50, honest.past.decayed_50)


def test_an_own_answer_tells_what_the_network_said():
    """A network that always sees the first finding and nothing else: known from the second visit on."""
    of = films()
    says = np.zeros((len(of.patient), 14), dtype=np.float32)
    says[:, 0] = 1
    found, _ = told(of, everything_missing(of, np.full(14, 0.5)), answer=says)
    np.testing.assert_array_equal(found.ever[:, 0], of.visit > 0)
    assert found.ever[:, 1:].max() == 0
    np.testing.assert_array_equal(found.past.count, of.visit)


def test_a_missing_report_changes_only_what_comes_after_it():
    of = films()
    missing = np.zeros(len(of.patient), dtype=bool)
    patient = of.patient[of.visit == 5][0]
    missing[(of.patient == patient) & (of.visit == 3)] = True
    honest, _ = told(of, nothing_missing(of))
    found, _ = told(of, Course(missing, None))
    later = (of.patient == patient) & (of.visit > 3)
    np.testing.assert_array_equal(found.past.count[later], honest.past.count[later] - 1)
    np.testing.assert_array_equal(found.past.count[~later], honest.past.count[~later])
    np.testing.assert_array_equal(found.past.fraction[~later], honest.past.fraction[~later])


def test_courses_are_played_beside_each_other_and_do_not_mix():
    of = films()
    answer = np.random.default_rng(1).random((len(of.patient), 14)).astype(np.float32)
    courses = [nothing_missing(of), everything_missing(of), everything_missing(of, np.full(14, 0.5))]

    def predict(rows, inputs):
        return answer[rows] * 0.5 + inputs.ever * 0.5

    together = roll(of, courses, predict)
    for number, course in enumerate(courses):
        np.testing.assert_array_equal(together[number], roll(of, [course], predict)[0])
    assert not np.array_equal(together[0], together[1])


def test_a_course_without_visits_is_a_first_visit():
    found = Courses.begin(2).told(np.array([1]), np.array([50.0]), np.array([1.0]), np.array([0.0]))
    assert found.past.count.tolist() == [0]
    assert found.past.decayed_80.max() == found.past.no_finding.max() == 0
    assert np.isnan(found.past.ap).all()


@pytest.mark.ray
def test_a_split_without_whole_courses_is_refused(real_data, ray_cluster, tmp_path):
    """A part of the real release: histories come from its whole table, films of some visits are not there."""
    ingest_nih(NihSettings(release=str(real_data / "nih"), out=str(tmp_path / "part"), size=32))
    with pytest.raises(UsageError, match=r"earlier visits of \d+ images of split train are not in .*; ingest all images"):
        check_courses(Dataset(str(tmp_path / "part")), "train", "paper")
