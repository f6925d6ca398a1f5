"""Training and evaluation as a whole: on phantoms, where the truth is known, and on real images."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
from conftest import PHANTOM_EPOCHS, PhantomRun
from sklearn.metrics import roc_auc_score

from cxr_ray.bundle import load_bundle
from cxr_ray.calibration import Calibrator
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.dataset import Dataset
from cxr_ray.distributed import BUNDLE, train
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.evaluation import Evaluation, evaluate
from cxr_ray.findings import FINDINGS
from cxr_ray.train_events import TrainEvent
from cxr_ray.train_settings import TrainSettings
from ingest.nih import NihSettings, ingest_nih

pytestmark = [pytest.mark.system, pytest.mark.ray, pytest.mark.timeout(600)]

EPOCHS = PHANTOM_EPOCHS


def settings(phantoms: PhantomRun, **changed: object) -> TrainSettings:
    """What `phantom_run` was trained with."""
    same = dict(data=str(phantoms.dataset), out=str(phantoms.run), workers=2, epochs=EPOCHS)
    return TrainSettings.model_validate({**same, **changed})


@pytest.fixture(scope="module")
def evaluation(phantom_run: PhantomRun, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    out = tmp_path_factory.mktemp("evaluation") / "new"
    boxes = out.with_name("boxes.csv")
    held = Dataset(str(phantom_run.dataset)).read("test", ["image_id"])["image_id"].to_pylist()[:20]
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *(f"{image_id},Mass,0,0,1024,512" for image_id in held)]
    boxes.write_text("\n".join([*lines, "elsewhere.png,Mass,0,0,9,9\n"]))
    return evaluate(
        EvaluateSettings(
            bundle=str(phantom_run.run / BUNDLE),
            data=str(phantom_run.dataset),
            out=str(out),
            scores=str(out / "more" / "scores.parquet"),
            subgroups=True,
            ablate=True,
            history_curves=True,
            boxes=str(boxes),
            card=True,
        )
    )


@pytest.fixture(scope="module")
def calibrated(evaluation: Evaluation) -> Evaluation:
    """The same bundle and split once more, calibrated; nothing written."""
    return evaluate(scored_only(evaluation, calibrate="platt"))


def test_network_learns_what_phantoms_show(evaluation: Evaluation, phantom_run: PhantomRun) -> None:
    scores = evaluation.scores
    split = Dataset(str(phantom_run.dataset)).split("test")
    assert (scores.images, scores.patients) == (split.images, split.patients)
    assert scores.auroc.low <= scores.auroc.value <= scores.auroc.high
    assert scores.auroc.value >= 0.80
    assert scores.auroc.low > 0.5


def test_clinical_inputs_are_worth_something(evaluation: Evaluation) -> None:
    ablated = {ablation.name: ablation for ablation in evaluation.ablations}
    assert len(ablated) == 6
    honest = evaluation.scores.auroc.value
    for name in ("no image", "no clinical inputs", "no history", "another patient's history"):
        assert ablated[name].auroc.value < honest
    assert ablated["LEAK: this film included"].auroc.value > honest
    for ablation in evaluation.ablations:
        assert ablation.difference.value == pytest.approx(ablation.auroc.value - honest)
        assert ablation.difference.low <= ablation.difference.value <= ablation.difference.high


def test_evaluation_is_written_for_machines_and_for_people(evaluation: Evaluation, phantom_run: PhantomRun) -> None:
    out = Path(evaluation.settings.out)
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "evaluation.json",
        "findings.csv",
        "thresholds.csv",
        "history.csv",
        "localisation.csv",
        "subgroups.csv",
        "ablations.csv",
        "roc.png",
        "more",
    }
    assert (out / "roc.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "evaluation.json").read_text())
    assert written == evaluation.to_json()
    assert written["trained_on_this_dataset"] is True
    assert (written["split"], written["withheld"], written["images"]) == ("test", "nothing", evaluation.scores.images)
    assert list(written["findings"]) == list(FINDINGS)
    for finding in written["findings"].values():
        auc = finding["auc"]
        assert finding["positives"] == 0 or auc["low"] <= auc["value"] <= auc["high"]
    assert written["bundle"]["digest"] == load_bundle(str(phantom_run.run / BUNDLE)).description.digest


def test_the_report_shows_films_and_the_card_tells_the_same_figures(evaluation: Evaluation, phantom_run: PhantomRun) -> None:
    report = (Path(evaluation.settings.out) / "report.html").read_text()
    cases = [case for group in evaluation.cases for case in group.cases]
    assert len(cases) >= 6
    assert all(case.image_id in report and case.film in report and case.overlay in report for case in cases)
    assert f"{evaluation.scores.auroc.value:.3f}" in report
    card = (phantom_run.run / BUNDLE / "MODEL_CARD.md").read_text()
    mean = evaluation.scores.auroc
    assert f"| mean |  | {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}) |" in card


def test_missing_reports_cost_what_they_are_worth(evaluation: Evaluation) -> None:
    curves = {curve.name: curve.aurocs for curve in evaluation.history.curves}
    assert set(curves) == {"visit not told", "own answer, Youden", "own answer, matched"}
    honest = evaluation.scores.auroc
    for aurocs in curves.values():
        assert aurocs[0] == honest
        assert aurocs[-1].value < honest.value
    untold = curves["visit not told"]
    assert untold[-1].value < untold[2].value < untold[0].value


def test_heatmaps_are_judged_by_the_boxes_of_the_split(evaluation: Evaluation) -> None:
    found = evaluation.localisation
    assert list(found.findings) == ["Mass"]
    assert (found.overall.boxes, found.overall.at_random.value) == (20, 0.5)
    assert 0 <= found.overall.hits.value <= 1


def test_readings_of_the_test_split_are_counted(evaluation: Evaluation, calibrated: Evaluation) -> None:
    assert len(calibrated.readings) == len(evaluation.readings) + 1
    assert evaluation.readings[-1].rows == 1 + len(evaluation.ablations)
    assert evaluate(scored_only(evaluation, split="val")).readings is None


def test_an_expected_prevalence_moves_probabilities_and_thresholds(
    evaluation: Evaluation, calibrated: Evaluation, tmp_path: Path
) -> None:
    expected = tmp_path / "expected.csv"
    expected.write_text("finding,prevalence\nEffusion,0.9\n")
    shifted = evaluate(scored_only(evaluation, calibrate="platt", prevalence=str(expected)))
    k = FINDINGS.index("Effusion")
    before, after = calibrated.predictions.probabilities, shifted.predictions.probabilities
    assert (after[:, k] > before[:, k]).all()
    # Two runs batch their rows differently, and the last digits of a float32 product depend on that.
    np.testing.assert_allclose(np.delete(after, k, axis=1), np.delete(before, k, axis=1), atol=1e-5)
    assert shifted.operating[k].sensitivity == pytest.approx(calibrated.operating[k].sensitivity, abs=0.05)


def scored_only(evaluation: Evaluation, **changed: object) -> EvaluateSettings:
    """The same bundle and dataset, nothing written."""
    plain = {"out": None, "scores": None, "boxes": None}
    plain |= dict.fromkeys(("subgroups", "ablate", "history_curves", "card"), False)
    return evaluation.settings.model_copy(update={**plain, **changed})


def test_another_program_scores_the_same_from_the_file_of_scores(evaluation: Evaluation) -> None:
    scores = pd.read_parquet(evaluation.settings.scores)
    assert len(scores) == 14 * evaluation.scores.images
    for name, finding in zip(FINDINGS, evaluation.scores.findings, strict=True):
        of_finding = scores[scores["finding"] == name]
        if 0 < of_finding["label"].sum() < len(of_finding):
            theirs = roc_auc_score(of_finding["label"], of_finding["probability"])
            assert finding.auroc.value == pytest.approx(theirs, abs=1e-9)


def test_subgroups_add_up_to_the_split(evaluation: Evaluation) -> None:
    images: dict[str, int] = {}
    for group in evaluation.subgroups:
        images[group.by] = images.get(group.by, 0) + group.images
    assert {by: images[by] for by in ("sex", "age", "view", "visit", "per patient")} == dict.fromkeys(
        ("sex", "age", "view", "visit", "per patient"), evaluation.scores.images
    )
    assert [group.name for group in evaluation.subgroups if group.by == "finding"] == ["known", "new"]


def test_calibration_changes_probabilities_and_not_their_order(evaluation: Evaluation, calibrated: Evaluation) -> None:
    for before, after, change in zip(
        evaluation.scores.findings, calibrated.scores.findings, calibrated.recalibrated, strict=True
    ):
        if change.slope > 0:
            assert after.auroc.value == pytest.approx(before.auroc.value, abs=1e-3, nan_ok=True)
    assert any(change != Calibrator() for change in calibrated.recalibrated)
    # What a threshold finds does not change when it moves with the probabilities.
    for before, after, change in zip(evaluation.operating, calibrated.operating, calibrated.recalibrated, strict=True):
        if change.slope > 0:
            assert after.sensitivity == pytest.approx(before.sensitivity, abs=0.05, nan_ok=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scores": "/tmp"}, r"--scores /tmp: is a folder; name a file, such as /tmp/scores\.parquet"),
        (
            {"ablate": True, "withhold": "clinical"},
            r"setting 'ablate' is True beside withhold or calibrate: .*; leave them out",
        ),
        ({"calibrate": "platt", "split": "val"}, r"setting 'calibrate' is 'platt': it is fitted on split val"),
        ({"prevalence": "x.csv"}, r"--prevalence x\.csv: shifts what is calibrated .*; give --calibrate temperature or platt"),
        ({"card": True, "split": "val"}, r"setting 'card' is True beside .* another split than test: .*; leave them out"),
        ({"history_curves": True, "withhold": "clinical"}, r"setting 'history_curves' is True beside withhold or calibrate"),
    ],
)
def test_evaluations_that_mean_nothing_are_refused(evaluation: Evaluation, changed: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate(scored_only(evaluation, **changed))


def test_bundle_verifies_and_validation_was_complete(phantom_run: PhantomRun) -> None:
    description = load_bundle(str(phantom_run.run / BUNDLE)).description
    dataset = Dataset(str(phantom_run.dataset))
    assert description.validation["images"] == dataset.split("val").images
    assert description.dataset_digest == dataset.digest
    assert (description.preset, description.size, description.settings["epochs"]) == ("multi-input", 64, EPOCHS)
    assert (description.layout, description.input_size) == (ClinicalLayout("paper"), 64)
    assert list(description.thresholds) == list(FINDINGS)
    assert all(0 <= threshold <= 1 for threshold in description.thresholds.values())


def test_events_tell_the_course_of_training(phantom_run: PhantomRun) -> None:
    images = Dataset(str(phantom_run.dataset)).split("train").images
    events = phantom_run.events
    assert events[0].kind == "start"
    assert [event.kind for event in events].count("start") == 1
    assert len(set(events[0].pids)) == 2
    assert all(event.images_total == EPOCHS * images for event in events)
    epochs = [event for event in events if event.kind == "epoch"]
    assert [event.epoch for event in epochs] == list(range(1, EPOCHS + 1))
    assert [event.images for event in epochs] == [epoch * images for epoch in range(1, EPOCHS + 1)]
    assert all(math.isfinite(event.loss) and 0 < event.auc <= 1 for event in epochs)
    assert epochs[-1].loss < epochs[0].loss
    counted = [event.images for event in events]
    assert counted == sorted(counted)
    best = load_bundle(str(phantom_run.run / BUNDLE)).description.validation
    assert best["auc"] == pytest.approx(max(event.auc for event in epochs))
    assert epochs[best["epoch"] - 1].auc == pytest.approx(best["auc"])


def test_resuming_a_finished_run_trains_no_more(phantom_run: PhantomRun) -> None:
    before = load_bundle(str(phantom_run.run / BUNDLE)).description
    events = []
    after = train(settings(phantom_run, resume=True), events.append)
    assert [event.kind for event in events if event.kind != "start"] == []
    assert after.validation == before.validation
    assert after.files["model.safetensors"] == before.files["model.safetensors"]
    assert load_bundle(str(phantom_run.run / BUNDLE)).description.digest == after.digest


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, r"--out .*: holds a run already; choose another folder or go on with --resume"),
        (
            {"resume": True, "epochs": EPOCHS + 1},
            rf"--resume: setting 'epochs' is {EPOCHS + 1}, the run in .* has {EPOCHS}; give the same",
        ),
        ({"resume": True, "history": False}, r"--resume: setting 'history' is False, the run in .* has True; give the same"),
        ({"resume": True, "preset": "chexnet"}, r"--resume: setting 'preset' is 'chexnet', the run in .* has 'multi-input'"),
        (
            {"out": "new", "input_size": 224},
            r"setting 'input_size' is 224: .* holds images of 64 pixels; ingest with --size 224",
        ),
        (
            {"out": "new", "preset": "wang2017", "input_size": 48},
            r"preset wang2017 needs images of 63 pixels, .* gives 48; ingest with --size 1024",
        ),
        ({"resume": True, "out": "nowhere"}, r"--out .*nowhere: holds no run to resume; leave out --resume"),
        (
            {"out": "new", "workers": 40},
            r"setting 'workers' is 40 with 0\.5 CPU each: .* 1 x 4 CPU, room for 7 beside the half CPU",
        ),
        ({"out": "new", "data": "nowhere"}, r"nowhere: holds no manifest\.json; make a dataset"),
    ],
)
def test_runs_that_cannot_be_are_refused_in_one_line(
    phantom_run: PhantomRun, tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    elsewhere = {name: str(tmp_path / changed[name]) for name in ("out", "data") if name in changed}
    with pytest.raises(CxrRayError, match=said) as refused:
        train(settings(phantom_run, **{**changed, **elsewhere}), lambda _: None)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def kill_after_first_epoch(command: list[str], environment: dict[str, str]) -> None:
    """Run a training and end it, with everything that it started itself, when its first epoch is said to be safe."""
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as training:
        try:
            said = iter(training.stderr.readline, "")
            assert any(line.startswith("train: epoch 1/") for line in said), training.wait()
        finally:
            os.killpg(training.pid, signal.SIGKILL)


def test_real_release_is_ingested_trained_on_resumed_and_evaluated(ray_cluster: None, real_data: Path, tmp_path: Path) -> None:
    data, run = str(tmp_path / "dataset"), str(tmp_path / "run")
    manifest = ingest_nih(NihSettings(release=str(real_data / "nih"), out=data, size=64))
    images = {name: split.images for name, split in manifest.splits.items()}
    assert (images["train"] + images["val"], images["test"]) == (690, 219)
    assert (manifest.counts["rows"], manifest.counts["present"], manifest.left_out) == (112_120, 909, [])
    # Processes of their own, which join the cluster that is there.
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    options = ["--data", data, "--out", run, "--preset", "baltruschat2018", "--workers", "2", "--epochs", "2"]
    kill_after_first_epoch([sys.executable, "-m", "cxr_ray", "train", *options], environment)
    events: list[TrainEvent] = []
    description = train(
        TrainSettings(data=data, out=run, preset="baltruschat2018", workers="2", epochs=2, resume=True), events.append
    )
    assert (events[0].kind, events[0].epoch) == ("start", 2)
    assert [event.epoch for event in events if event.kind == "epoch"] == [2]
    assert description.validation["images"] == images["val"]

    command = [sys.executable, "-m", "cxr_ray", "evaluate", "--bundle", f"{run}/{BUNDLE}", "--data", data]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baltruschat2018 on test: 219 images of" in done.stdout
    title = " ".join(done.stdout.split())
    assert "(219 of the 25,596 images of the official test split: NOT comparable with published figures)" in title
    interval = r"[01]\.\d{3} \([01]\.\d{3}-[01]\.\d{3}\)"
    assert re.search(rf"^ *mean +{interval}", done.stdout, re.MULTILINE), done.stdout
    # A dash where the part of the test split that is here holds no positive.
    for name in FINDINGS:
        assert re.search(rf"^ *{name.replace('_', ' ')} +\d+( \([\d.]+%\))? +({interval}|-)", done.stdout, re.MULTILINE), (
            done.stdout
        )
    # The published figures are of the whole test split.
    assert "published AUC" not in done.stdout
