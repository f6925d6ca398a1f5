"""Expected prevalences: read as they are written, or refused with the line; and what they do to probabilities."""

import numpy as np
import pytest

from cxr_ray.calibration import Calibrator, fit, for_prevalence
from cxr_ray.errors import CxrRayError
from cxr_ray.prevalence_file import read_prevalence


def test_findings_may_be_some_and_spelt_as_one_likes(tmp_path):
    path = tmp_path / "expected.csv"
    path.write_text("\ufefffinding,prevalence,remark\r\nEffusion,0.31,ward\r\npleural thickening,.02,\r\n")
    assert read_prevalence(str(path)) == {"Effusion": 0.31, "Pleural_Thickening": 0.02}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finding,share\nEffusion,0.3\n", "line 1: column 'prevalence' is missing; write the columns finding and prevalence"),
        ("", "line 1: column 'finding' is missing"),
        ("finding,prevalence\n", "names no finding; write lines such as Atelectasis,0.08"),
        (
            "finding,prevalence\nEffusion,31\n",
            "line 2: prevalence '31' is no number between 0 and 1; write a share",
        ),
        ("finding,prevalence\nEffusion,\n", "line 2: prevalence '' is no number"),
        ("finding,prevalence\nEffusion\n", "line 2: prevalence '' is no number"),
        ("finding,prevalence\nEffusion,nan\n", "line 2: prevalence 'nan' is no number"),
        ("finding,prevalence\nFlu,0.1\n", "line 2: finding 'Flu' is not known"),
        ("finding,prevalence\nEffusion,0.1\neffusion,0.2\n", "line 3: finding Effusion comes twice; leave one"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(tmp_path, text, said):
    path = tmp_path / "expected.csv"
    path.write_text(text)
    with pytest.raises(CxrRayError) as refused:
        read_prevalence(str(path))
    assert said in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_probabilities_fit_where_the_finding_is_more_common():
    """Positives are drawn ten times as often as where the calibrator was fitted; given that, it is right again."""
    generator = np.random.default_rng(0)
    truth = (generator.random(200_000) < 0.02).astype(float)
    scores = 1 / (1 + np.exp(-generator.normal(2 * truth - 4, 1)))
    calibrator = fit(scores, truth, "platt")
    common = np.r_[np.repeat(np.flatnonzero(truth == 1), 10), np.flatnonzero(truth == 0)]
    prevalence = truth[common].mean()
    assert calibrator(scores[common]).mean() < 0.6 * prevalence
    shifted = for_prevalence(calibrator, truth.mean(), prevalence)
    assert shifted(scores[common]).mean() == pytest.approx(prevalence, rel=0.03)
    assert shifted.slope == calibrator.slope


@pytest.mark.parametrize(("fitted", "expected"), [(0.0, 0.1), (1.0, 0.1), (float("nan"), 0.1), (0.1, 0.0)])
def test_without_both_prevalences_nothing_is_shifted(fitted, expected):
    assert for_prevalence(Calibrator(2.0, 1.0), fitted, expected) == Calibrator(2.0, 1.0)


def test_the_same_prevalence_shifts_nothing():
    assert for_prevalence(Calibrator(2.0, 1.0), 0.1, 0.1).intercept == pytest.approx(1.0)
