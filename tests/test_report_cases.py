"""Which films a report shows: for the stated reasons, and no patient twice."""

import numpy as np
import pytest

from cxr_ray.boxes import Box
from cxr_ray.findings import FINDINGS
from cxr_ray.predictions import Predictions
from cxr_ray.report_cases import chosen

THRESHOLDS = np.linspace(0.05, 0.6, 14)


def predictions(patients=40, seed=0):
    generator = np.random.default_rng(seed)
    count = patients * 3
    labels = (generator.random((count, 14)) < 0.2).astype(np.float32)
    labels[generator.random(labels.shape) < 0.1] = np.nan
    return Predictions(
        image_ids=np.array([f"{number:03d}.png" for number in range(count)]),
        patient_keys=np.repeat([f"p{number}" for number in range(patients)], 3),
        probabilities=generator.random((count, 14)).astype(np.float32),
        labels=labels,
    )


def distance(of, choice):
    probability, cut = float(of.probabilities[choice.row, choice.finding]), THRESHOLDS[choice.finding]
    return np.log(probability / (1 - probability)) - np.log(cut / (1 - cut))


def test_each_group_holds_what_its_title_says():
    of = predictions()
    groups = dict(chosen(of, THRESHOLDS, (), 3))
    assert list(groups) == [
        "Called with most certainty, and labelled",
        "Called with most certainty, and not labelled",
        "Labelled, and missed with most certainty",
        "Least certain",
    ]
    right, wrong, missed, unsure = groups.values()
    assert all(of.labels[c.row, c.finding] == 1 and distance(of, c) >= 0 for c in right)
    assert all(of.labels[c.row, c.finding] == 0 and distance(of, c) >= 0 for c in wrong)
    assert all(of.labels[c.row, c.finding] == 1 and distance(of, c) < 0 for c in missed)
    assert all(np.isfinite(of.labels[c.row, c.finding]) for c in unsure)
    assert max(abs(distance(of, c)) for c in unsure) < 0.2


def test_the_first_of_a_group_is_the_most_certain_of_all():
    of = predictions()
    (first, *_) = dict(chosen(of, THRESHOLDS, (), 3))["Called with most certainty, and labelled"]
    cuts = np.log(THRESHOLDS / (1 - THRESHOLDS))
    above = np.log(of.probabilities / (1 - of.probabilities)) - cuts
    assert distance(of, first) == pytest.approx(np.where(of.labels == 1, above, -np.inf).max(), rel=1e-5)


def test_no_patient_and_no_finding_twice_as_long_as_there_are_others():
    of = predictions()
    groups = chosen(of, THRESHOLDS, (), 5)
    patients = [of.patient_keys[choice.row] for _, choices in groups for choice in choices]
    assert len(patients) == len(set(patients)) == 20
    for _, choices in groups:
        assert len({choice.finding for choice in choices}) == 5


def test_fewer_patients_make_fewer_cases():
    groups = chosen(predictions(patients=3), THRESHOLDS, (), 3)
    assert sum(len(choices) for _, choices in groups) == 3


def test_films_with_a_box_come_last_and_only_where_there_are_some():
    of = predictions()
    box = Box("007.png", "Mass", 0.1, 0.2, 0.3, 0.4)
    other = Box("elsewhere.png", "Mass", 0.1, 0.2, 0.3, 0.4)
    groups = chosen(of, THRESHOLDS, (box, other), 1)
    title, (choice,) = groups[-1]
    assert title == "With a radiologist's box, called with most certainty"
    assert (of.image_ids[choice.row], FINDINGS[choice.finding]) == ("007.png", "Mass")


def test_where_nothing_is_labelled_there_are_no_cases():
    of = predictions()
    of.labels[:] = np.nan
    assert chosen(of, THRESHOLDS, (), 3) == []
