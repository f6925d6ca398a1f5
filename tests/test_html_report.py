"""The report as a file: self-contained, complete for what was computed, silent on what was not, and safe against its names."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest

from cxr_ray import presets
from cxr_ray.ablations import AblationScore
from cxr_ray.boxes import Box
from cxr_ray.bundle import describe
from cxr_ray.completeness import OFFICIAL_TEST_IMAGES, Extent
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.evaluated import Evaluation
from cxr_ray.findings import FINDINGS
from cxr_ray.history_curves import HistoryCurve, HistoryCurves
from cxr_ray.html_report import Axis, render
from cxr_ray.input_profile import InputProfile
from cxr_ray.localisation import pointing_game
from cxr_ray.operating import judge
from cxr_ray.predictions import Predictions
from cxr_ray.readings import Reading
from cxr_ray.report_cases import Case, CaseGroup
from cxr_ray.resampling import Interval
from cxr_ray.split_scores import score
from cxr_ray.subgroups import SubgroupScore

INTERVAL = Interval(0.71234, 0.68, 0.74)
UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))


def evaluation(**changed):
    generator = np.random.default_rng(0)
    labels = (generator.random((300, 14)) < 0.2).astype(np.float32)
    labels[:, 13] = 0
    probabilities = (1 / (1 + np.exp(1.5 - labels - generator.normal(size=labels.shape)))).astype(np.float32)
    patients = np.repeat([f"p{number}" for number in range(60)], 5)
    chosen = presets.options(presets.find("wang2017"))
    bundle = describe(
        preset="wang2017",
        network=chosen,
        size=64,
        input_size=64,
        statistics={},
        training_inputs=InputProfile(),
        thresholds=dict.fromkeys(FINDINGS, 0.3),
        other_thresholds={},
        validation={"auc": 0.7},
        settings={},
        dataset_digest="d" * 64,
    )
    operating = tuple(judge(probabilities[:, k], labels[:, k], 0.3) for k in range(14))
    made = Evaluation(
        settings=EvaluateSettings(bundle="b", data="d"),
        created=datetime(2026, 11, 23, tzinfo=UTC),
        bundle=bundle.model_copy(update={"digest": "e" * 64}),
        dataset_uri="/data/<script>alert(1)</script>",
        dataset_digest="d" * 64,
        extent=Extent(300, from_official_list=True),
        scores=score(probabilities, labels, patients, resamples=100),
        operating=operating,
        other_operating={"sensitivity_90": operating},
        subgroups=(),
        ablations=(),
        recalibrated=(),
        predictions=Predictions(np.arange(300).astype(str), patients, probabilities, labels),
    )
    return replace(made, **changed)


class Page(HTMLParser):
    """Headings, sections, addresses that are loaded, and whether all tags are closed."""

    VOID = frozenset({"meta", "br", "img", "image", "line", "rect", "circle"})

    def __init__(self, text):
        super().__init__()
        self.sections, self.addresses, self.tags, self.text = [], [], [], []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(named["id"])
        self.addresses += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def plain():
    return render(evaluation())


def test_the_file_needs_nothing_but_itself(plain):
    page = Page(plain)
    assert "script" not in page.tags
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import", plain)


def test_names_are_no_markup(plain):
    assert "<script>" not in plain
    assert "&lt;script&gt;alert(1)" in plain


def test_what_was_not_computed_has_no_section(plain):
    assert Page(plain).sections == ["summary", "findings", "curves", "thresholds", "origin", "limits"]


def test_curves_are_of_the_findings_that_could_be_scored(plain):
    assert plain.count('alt="ROC of ') == plain.count('alt="Reliability of ') == 13
    assert 'alt="ROC of Hernia"' not in plain
    assert "13 of 14" in plain


def test_figures_are_those_of_the_evaluation(plain):
    text = " ".join("".join(Page(plain).text).split())
    made = evaluation()
    for finding in made.scores.findings[:13]:
        assert f"{finding.auroc.value:.3f} {finding.auroc.low:.3f}" in text
    assert f"mean AUC95 % {made.scores.auroc.low:.3f} to {made.scores.auroc.high:.3f}" in text
    assert "nan" not in text
    assert "e" * 64 in text


def test_everything_that_was_computed_is_shown():
    boxes = [Box("0.png", "Mass", 0.1, 0.1, 0.2, 0.2), Box("1.png", "Nodule", 0.4, 0.4, 0.2, 0.2)]
    case = Case(
        "0.png", "Mass", 0.9, 0.3, True, "50 years, F, PA", "data:image/jpeg;base64,", "data:image/jpeg;base64,", boxes[0]
    )
    text = render(
        evaluation(
            subgroups=(
                SubgroupScore("finding", "known", 100, 20, 9, INTERVAL),
                SubgroupScore("finding", "new", 200, 50, 14, Interval(0.65123, 0.6, 0.7)),
                SubgroupScore("age", "80+", 2, 1, 0, UNKNOWN),
            ),
            ablations=(AblationScore("LEAK: this film included", INTERVAL, Interval(0.1, 0.09, 0.11)),),
            history=HistoryCurves((0.0, 1.0), (HistoryCurve("visit not told", (INTERVAL, Interval(0.6, 0.59, 0.61))),)),
            cases=(CaseGroup("Least certain", (case,)),),
            localisation=pointing_game(boxes, np.array([1.0, 0.0]), np.array(["p", "q"]), resamples=100),
            readings=(Reading("2026-11-23T10:00:00+00:00", "b 1", "e" * 64, "d" * 64, 5),) * 2,
        )
    )
    page = Page(text)
    assert page.sections[4:9] == ["subgroups", "ablations", "history", "cases", "localisation"]
    said = " ".join("".join(page.text).split())
    assert "no earlier visit showed are ranked with a mean AUC of 0.651 (0.600-0.700)" in said
    assert "would have scored 0.712" in said
    assert "(visit not told): 0.600 instead of 0.712" in said
    assert "2 up to now, with 1 bundle, for 10 rows of figures" in said
    assert "nan" not in said
    assert text.count('class="box"') == 2


def test_published_figures_stand_only_beside_the_whole_official_split(plain):
    assert "Hollow squares" not in plain
    assert "300 of the 25,596 images of the official test split: NOT comparable with published figures" in plain
    whole = render(evaluation(extent=Extent(OFFICIAL_TEST_IMAGES, from_official_list=True)))
    assert "Hollow squares" in whole
    assert whole.count('class="published"') == 15
    assert "NOT comparable" not in whole


@pytest.mark.parametrize(("lowest", "low", "ticks"), [(0.6, 0.5, 6), (0.43, 0.4, 7), (0.03, 0.0, 6)])
def test_an_axis_holds_every_interval_and_ends_at_1(lowest, low, ticks):
    axis = Axis.of([Interval(0.8, lowest, 0.9), UNKNOWN])
    assert (axis.low, axis.ticks[-1], len(axis.ticks)) == (low, 1.0, ticks)
    assert axis.at(1.0) == 100
    assert 0 <= axis.at(lowest) < axis.at(0.8)


def test_a_split_in_which_nothing_can_be_scored_has_a_report_all_the_same():
    made = evaluation()
    labels = np.zeros_like(made.predictions.labels)
    predictions = replace(made.predictions, labels=labels)
    text = render(
        replace(
            made,
            predictions=predictions,
            scores=score(predictions.probabilities, labels, predictions.patient_keys, resamples=100),
            operating=tuple(judge(predictions.probabilities[:, k], labels[:, k], 0.3) for k in range(14)),
        )
    )
    assert "0 of 14" in text
    assert not re.search(r"\bnan\b", text)
