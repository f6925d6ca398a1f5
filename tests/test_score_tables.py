"""Scores as rows: what other programs read of them."""

import csv
import io
import json

import numpy as np
import pytest

from cxr_ray.boxes import Box
from cxr_ray.findings import FINDINGS
from cxr_ray.history_curves import HistoryCurve, HistoryCurves
from cxr_ray.localisation import pointing_game
from cxr_ray.operating import judge
from cxr_ray.predictions import Predictions
from cxr_ray.resampling import Interval
from cxr_ray.score_tables import findings_csv, history_csv, localisation_csv, plain, subgroups_csv, thresholds_csv
from cxr_ray.split_scores import score
from cxr_ray.subgroups import SubgroupScore

NAN = float("nan")


@pytest.fixture
def predictions():
    generator = np.random.default_rng(0)
    labels = (generator.random((40, 14)) < 0.4).astype(np.float32)
    labels[:, 13] = 0
    labels[3, 0] = NAN
    return Predictions(
        image_ids=np.array([f"film{number:02}" for number in range(40)], dtype=object),
        patient_keys=np.array([f"p{number // 2}" for number in range(40)], dtype=object),
        probabilities=generator.random((40, 14)).astype(np.float32),
        labels=labels,
    )


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_every_image_and_finding_is_a_row_that_another_program_can_score(predictions):
    table = predictions.as_table()
    assert table.column_names == ["image_id", "finding", "probability", "label"]
    assert table.num_rows == 40 * 14
    rows = {(row["image_id"], row["finding"]): row for row in table.to_pylist()}
    assert len(rows) == 40 * 14
    for image, film in enumerate(predictions.image_ids):
        for k, name in enumerate(FINDINGS):
            row = rows[film, name]
            assert row["probability"] == predictions.probabilities[image, k]
            label = predictions.labels[image, k]
            assert row["label"] is None if np.isnan(label) else row["label"] == label


def test_a_row_a_finding_and_one_of_the_means(predictions):
    scores = score(predictions.probabilities, predictions.labels, predictions.patient_keys, resamples=100)
    points = [judge(predictions.probabilities[:, k], predictions.labels[:, k], 0.5) for k in range(14)]
    rows = rows_of(findings_csv(scores, points))
    assert [row["finding"] for row in rows] == [*FINDINGS, "mean"]
    first, last, mean = rows[0], rows[13], rows[14]
    assert (first["images"], first["positives"]) == ("39", str(scores.findings[0].positives))
    assert float(first["auc"]) == pytest.approx(scores.findings[0].auroc.value, abs=1e-6)
    assert float(first["sensitivity_at_specificity_90_low"]) <= float(first["sensitivity_at_specificity_90"])
    assert float(first["threshold"]) == 0.5
    # Hernia has no positive here: what cannot be scored is empty, not zero.
    assert (last["positives"], last["auc"], last["average_precision"], last["sensitivity"]) == ("0", "", "", "")
    assert float(mean["auc_high"]) == pytest.approx(scores.auroc.high, abs=1e-6)
    assert mean["brier"] == ""


def test_a_row_a_subgroup():
    scored = score(np.linspace(0, 1, 20)[:, None], np.tile([0.0, 1], 10)[:, None], np.arange(20), resamples=100)
    group = SubgroupScore("view", "AP", 20, 10, 1, scored.auroc)
    (row,) = rows_of(subgroups_csv([group]))
    assert (row["by"], row["name"], row["images"], row["patients"], row["findings"]) == ("view", "AP", "20", "10", "1")
    assert float(row["auc"]) == pytest.approx(scored.auroc.value, abs=1e-6)


def test_what_is_no_number_is_null_in_json():
    assert plain({"a": [NAN, np.inf, 1 / 3], "b": {"c": np.float64(0.5)}, "d": 3, "e": "x"}) == {
        "a": [None, None, 0.333333],
        "b": {"c": 0.5},
        "d": 3,
        "e": "x",
    }
    json.dumps(plain([NAN]), allow_nan=False)


def test_a_row_a_rule_and_finding(predictions):
    points = [judge(predictions.probabilities[:, k], predictions.labels[:, k], 0.5) for k in range(14)]
    rows = rows_of(thresholds_csv({"youden": points, "prevalence": points}))
    assert [(row["rule"], row["finding"]) for row in rows] == [
        (rule, name) for rule in ("youden", "prevalence") for name in FINDINGS
    ]
    assert float(rows[0]["sensitivity"]) == pytest.approx(points[0].sensitivity, abs=1e-6)
    assert rows[13]["sensitivity"] == ""


def test_a_row_a_share_of_missing_reports():
    curve = HistoryCurve("visit not told", (Interval(0.8, 0.7, 0.9), Interval(0.6, 0.5, 0.7)))
    rows = rows_of(history_csv(HistoryCurves((0.0, 1.0), (curve,))))
    assert rows[1] == {"way": "visit not told", "missing": "1.0", "auc": "0.6", "auc_low": "0.5", "auc_high": "0.7"}
    assert len(rows) == 2


def test_a_row_a_finding_with_boxes_one_of_all_and_one_of_the_mean():
    boxes = [Box("0.png", "Mass", 0.1, 0.1, 0.2, 0.2), Box("1.png", "Nodule", 0.4, 0.4, 0.2, 0.2)]
    rows = rows_of(localisation_csv(pointing_game(boxes, np.array([1.0, 0.0]), np.array(["p", "q"]), resamples=100)))
    assert [(row["finding"], row["boxes"], row["hits"]) for row in rows] == [
        ("Mass", "1", "1.0"),
        ("Nodule", "1", "0.0"),
        ("all", "2", "0.5"),
        ("mean", "2", "0.5"),
    ]
    assert float(rows[1]["at_centre"]) == 1
