"""Runs as a whole, on few images: every preset, an interrupted run beside an undisturbed one, and a loss that is no number."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cxr_ray.bundle import load_bundle
from cxr_ray.dataset import Dataset
from cxr_ray.distributed import BUNDLE, PICTURE, train
from cxr_ray.errors import CxrRayError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.evaluation import evaluate
from cxr_ray.findings import FINDINGS
from cxr_ray.presets import PRESETS
from cxr_ray.records import clinical_columns, clinical_inputs, pixel_array
from cxr_ray.settings import load_settings
from cxr_ray.torch_engine import TorchEngine
from cxr_ray.train_events import EpochResult, TrainEvent
from cxr_ray.train_settings import TrainSettings
from cxr_ray.tune_settings import TuneSettings
from cxr_ray.tuning import search
from ingest.nih import NihSettings, ingest_nih
from ingest.phantom_release import PhantomSettings, make_release

pytestmark = [pytest.mark.system, pytest.mark.ray, pytest.mark.timeout(600)]

SIZE = 64


@pytest.fixture(scope="module")
def few(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 40 made-up patients."""
    root = tmp_path_factory.mktemp("few")
    make_release(PhantomSettings(out=str(root / "release"), patients=40, size=SIZE))
    ingest_nih(NihSettings(release=str(root / "release"), out=str(root / "dataset"), size=SIZE))
    return root / "dataset"


def trained(data: Path, out: Path, **chosen: object) -> list[TrainEvent]:
    events: list[TrainEvent] = []
    train(TrainSettings.model_validate({"data": str(data), "out": str(out), "workers": 2} | chosen), events.append)
    return events


def start(events: list[TrainEvent]) -> TrainEvent:
    return next(event for event in events if event.kind == "start")


def results(events: list[TrainEvent]) -> list[EpochResult]:
    return [event.result for event in events if event.kind == "epoch"]


# The others are trained by two workers elsewhere: multi-input in the session's phantom run, baltruschat2018 on real films,
# chexnet from an S3 server's dataset, clinical below.
@pytest.mark.long
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"multi-input", "baltruschat2018", "chexnet", "clinical"}))
def test_every_preset_is_trained_by_two_workers_and_scores(few: Path, tmp_path: Path, preset: str) -> None:
    events = trained(few, tmp_path / "run", preset=preset, epochs=1, batch_size=32, accumulate=1)
    assert len(set(start(events).pids)) == 2
    (result,) = results(events)
    assert math.isfinite(result.loss)
    assert math.isfinite(result.val_loss)
    bundle = load_bundle(str(tmp_path / "run" / BUNDLE))
    assert (bundle.description.preset, bundle.description.variant) == (preset, PRESETS[preset].variants[0])
    assert bundle.layout == PRESETS[preset].layout
    films = Dataset(str(few)).read("test", ["pixels", *clinical_columns(bundle.layout.encoding)])
    scores = TorchEngine(bundle).predict(pixel_array(films["pixels"]), clinical_inputs(films, bundle.layout.encoding))
    assert scores.shape == (films.num_rows, len(FINDINGS))
    assert ((scores > 0) & (scores < 1)).all()


@pytest.fixture(scope="module")
def undisturbed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainEvent]]:
    """A run with all that a checkpoint has to hold: dropout, averaged weights, withheld values, batch statistics."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, trained(few, out, **INTERRUPTED)


INTERRUPTED = dict(preset="beyond", variant="densenet121", epochs=3, batch_size=16, learning_rate=1e-3, precision="float32")


def test_an_interrupted_run_ends_where_the_undisturbed_one_does(
    few: Path, undisturbed: tuple[Path, list[TrainEvent]], tmp_path: Path
) -> None:
    """A worker is killed after the first epoch: the others' losses and AUCs have to be those of the undisturbed run."""
    events: list[TrainEvent] = []

    def watch(event: TrainEvent) -> None:
        events.append(event)
        if event.kind == "epoch" and event.epoch == 1:
            os.kill(start(events).pids[1], signal.SIGKILL)

    settings = TrainSettings.model_validate({"data": str(few), "out": str(tmp_path / "run"), "workers": 2} | INTERRUPTED)
    train(settings, watch)
    starts = [event for event in events if event.kind == "start"]
    assert [start.epoch for start in starts] == [1, 2]
    expected = results(undisturbed[1])
    kept = json.loads((tmp_path / "run" / "epochs.json").read_text())
    assert [result["epoch"] for result in kept] == [1, 2, 3]
    for interrupted, whole in zip(kept, expected, strict=True):
        assert interrupted["loss"] == pytest.approx(whole.loss, rel=1e-4)
        assert interrupted["val_loss"] == pytest.approx(whole.val_loss, rel=1e-4)
        assert interrupted["val_auc"] == pytest.approx(whole.val_auc, abs=1e-3)
    # Epochs differ by far more than that.
    assert abs(expected[1].loss - expected[2].loss) > 1e-2 * expected[2].loss


def test_a_run_can_be_followed_from_outside(undisturbed: tuple[Path, list[TrainEvent]]) -> None:
    out, events = undisturbed
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    figures = EventAccumulator(str(out / "tensorboard"))
    figures.Reload()
    assert [round(scalar.value, 4) for scalar in figures.Scalars("val_auc")] == [
        round(result.val_auc, 4) for result in results(events)
    ]
    steps = [event for event in events if event.kind == "step"]
    assert steps
    assert all(0 <= event.waiting <= 1 for event in steps)


def test_the_bundle_holds_the_averaged_weights_that_were_validated(
    few: Path, undisturbed: tuple[Path, list[TrainEvent]]
) -> None:
    out, events = undisturbed
    best = max(results(events), key=lambda result: result.val_auc)
    scored = evaluate(EvaluateSettings(bundle=str(out / BUNDLE), data=str(few), split="val", resamples=100))
    assert scored.scores.auroc.value == pytest.approx(best.val_auc, abs=2e-3)


@pytest.mark.long
def test_patience_ends_a_run_early_with_a_bundle(few: Path, tmp_path: Path) -> None:
    events = trained(few, tmp_path / "run", preset="clinical", epochs=30, batch_size=16, learning_rate=1e-14, patience=2)
    assert events[-1].kind == "stopped"
    assert "has not improved for 2 epochs" in events[-1].text
    assert len(results(events)) < 30
    scored = evaluate(EvaluateSettings(bundle=str(tmp_path / "run" / BUNDLE), data=str(few), resamples=100))
    assert scored.scores.images == Dataset(str(few)).split("test").images


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_images(few: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CxrRayError, match=r"the loss is no finite number in epoch 1, at a batch with .*; look at these"
    ) as failed:
        trained(
            few,
            tmp_path / "run",
            preset="multi-input",
            epochs=2,
            batch_size=16,
            learning_rate=1e30,
            warmup=0,
            precision="float32",
        )
    assert "\n" not in str(failed.value)
    names = str(failed.value).split("batch with ")[1].split(";")[0].split(", ")
    known = set(Dataset(str(few)).read("train", ["image_id"])["image_id"].to_pylist())
    assert names
    assert set(names) <= known
    assert not (tmp_path / "run" / BUNDLE).exists()


@pytest.mark.long
def test_a_search_stops_poor_trials_and_keeps_the_best_settings(few: Path, tmp_path: Path) -> None:
    settings = TuneSettings(
        **{"data": str(few), "out": str(tmp_path / "search"), "preset": "clinical", "batch_size": 4, "epochs": 2},
        **{"search": "learning_rate=1e-14|1e-2,weight_decay=1e-4..1e-1", "trials": 2, "at_once": 1, "grace": 1, "reduction": 2},
        # Draws the good rate first: the other one has something to be poorer than.
        seed=2,
    )
    told: list[tuple[str, int]] = []
    trials = search(settings, lambda name, epoch, auc: told.append((name, epoch)))
    assert len(trials) == 2
    assert [trial.error for trial in trials] == [None] * 2
    aucs = [trial.val_auc for trial in trials]
    assert aucs == sorted(aucs, reverse=True)
    assert sorted(told) == sorted((trial.name, epoch) for trial in trials for epoch in range(1, trial.epochs + 1))
    assert [trial.drawn["learning_rate"] for trial in trials] == ["1e-2", "1e-14"]
    assert [trial.finished for trial in trials] == [True, False]
    assert (tmp_path / "search" / "trials" / trials[0].name / BUNDLE / "bundle.json").exists()
    best = load_settings(TrainSettings, tmp_path / "search" / "best.yaml", {})
    assert best.weight_decay == pytest.approx(trials[0].drawn["weight_decay"])
    assert best.learning_rate == float(str(trials[0].drawn["learning_rate"]))
    with pytest.raises(CxrRayError, match="is there already; choose another folder"):
        search(settings, lambda *_: None)
