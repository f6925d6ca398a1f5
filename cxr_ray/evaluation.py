"""Evaluation: a bundle judged on a split of a dataset, as figures and as files."""

import io
import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq

from cxr_ray import calibration, readings, storage
from cxr_ray.ablations import Ablation, AblationScore, ablations, films_of
from cxr_ray.boxes import Box, read_boxes
from cxr_ray.bundle import BundleDescription, read_description, write_card
from cxr_ray.calibration import Calibrator
from cxr_ray.completeness import extent
from cxr_ray.dataset import Dataset
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.evaluated import Evaluation
from cxr_ray.evaluation_checks import check_fit
from cxr_ray.explanations import asked_for, hits
from cxr_ray.findings import FINDINGS
from cxr_ray.history_curves import check_courses, history_curves
from cxr_ray.html_report import REPORT, render
from cxr_ray.localisation import Localisation, pointing_game
from cxr_ray.operating import OperatingPoint, judge
from cxr_ray.predictions import OtherInputs, Predictions, predict_split
from cxr_ray.prevalence_file import read_prevalence
from cxr_ray.readings import Reading
from cxr_ray.report import roc_picture
from cxr_ray.report_cases import CaseGroup, make_cases
from cxr_ray.score_tables import (
    ablations_csv,
    findings_csv,
    history_csv,
    localisation_csv,
    subgroups_csv,
    thresholds_csv,
)
from cxr_ray.split_scores import AurocDraws, draw_aurocs, score
from cxr_ray.subgroups import COLUMNS, SubgroupScore, score_subgroup, subgroups


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Score a bundle on a split and write the results to `settings.out`; Ray has to be initialised.

    Raises
    ------
    CxrRayError
        If bundle or dataset are unusable or do not fit each other.
    """
    settings = settings.model_copy(update={"bundle": storage.absolute(settings.bundle)})
    bundle = read_description(settings.bundle)
    dataset = Dataset(settings.data)
    check_fit(settings, bundle, dataset)
    if settings.history_curves:
        check_courses(dataset, settings.split, bundle.layout.encoding)
    boxes = read_boxes(settings.boxes) if settings.boxes is not None else ()
    expected = read_prevalence(settings.prevalence) if settings.prevalence is not None else {}
    removed = ablations(bundle.layout, reads_images=bundle.size is not None) if settings.ablate else []
    read = _note_reading(settings, bundle, dataset, 1 + len(removed))
    changes = _recalibrations(settings, bundle, dataset, expected)
    others = _other_inputs(settings, bundle, dataset, removed)
    predictions, *ablated = predict_split(settings, bundle, dataset, settings.split, others)
    if changes:
        changed = [change(predictions.probabilities[:, k]) for k, change in enumerate(changes)]
        predictions = replace(predictions, probabilities=np.stack(changed, axis=1).astype(np.float32))
    data = (predictions.probabilities, predictions.labels, predictions.patient_keys)
    operating = _operating(bundle.thresholds, changes, predictions)
    evaluation = Evaluation(
        settings=settings,
        created=datetime.now(UTC),
        bundle=bundle,
        dataset_uri=dataset.uri,
        dataset_digest=dataset.digest,
        extent=extent(dataset.manifest, settings.split),
        scores=score(*data, resamples=settings.resamples, seed=settings.seed),
        operating=operating,
        other_operating={
            rule: _operating(thresholds, changes, predictions) for rule, thresholds in bundle.other_thresholds.items()
        },
        subgroups=_subgroups(settings, dataset, predictions) if settings.subgroups else (),
        ablations=_ablation_scores(settings, removed, predictions, ablated),
        recalibrated=changes,
        predictions=predictions,
        readings=read,
        history=history_curves(settings, bundle, dataset) if settings.history_curves else None,
        cases=_cases(settings, bundle, dataset, predictions, operating, boxes),
        localisation=_localisation(settings, dataset, predictions, boxes),
    )
    if settings.out is not None:
        _write(evaluation, settings.out)
    if settings.scores is not None:
        _write_scores(predictions, settings.scores)
    if settings.card:
        write_card(settings.bundle, evaluation.to_json())
    return evaluation


def _note_reading(
    settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset, rows: int
) -> tuple[Reading, ...] | None:
    """Before anything is scored: who breaks off after a look has looked all the same."""
    if settings.split != "test":
        return None
    noted = readings.note(dataset, f"{bundle.name} {bundle.version}", bundle.digest, rows)
    return None if noted is None else tuple(noted)


def _cases(
    settings: EvaluateSettings,
    bundle: BundleDescription,
    dataset: Dataset,
    predictions: Predictions,
    operating: tuple[OperatingPoint, ...],
    boxes: tuple[Box, ...],
) -> tuple[CaseGroup, ...]:
    """Nothing without a report to show them in, or images to show."""
    if settings.out is None or settings.cases == 0 or bundle.size is None:
        return ()
    return make_cases(settings, dataset, predictions, [point.threshold for point in operating], boxes)


def _localisation(
    settings: EvaluateSettings, dataset: Dataset, predictions: Predictions, boxes: tuple[Box, ...]
) -> Localisation | None:
    keys = dict(zip(predictions.image_ids.astype(str).tolist(), predictions.patient_keys, strict=True))
    held = [box for box in boxes if box.image_id in keys]
    if not held:
        return None
    ids = dataset.read(settings.split, ["image_id"])["image_id"].to_pylist()
    asked = asked_for(held, {image_id: row for row, image_id in enumerate(ids)})
    patients = np.array([keys[box.image_id] for box in held])
    found = hits(settings, dataset, asked, held)
    return pointing_game(held, found, patients, resamples=settings.resamples, seed=settings.seed)


def _recalibrations(
    settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset, expected: dict[str, float]
) -> tuple[Calibrator, ...]:
    if settings.calibrate == "none":
        return ()
    (held,) = predict_split(settings, bundle, dataset, "val")
    changes = []
    for k, name in enumerate(FINDINGS):
        change = calibration.fit(held.probabilities[:, k], held.labels[:, k], settings.calibrate)
        if name in expected:
            change = calibration.for_prevalence(change, float(np.nanmean(held.labels[:, k])), expected[name])
        changes.append(change)
    return tuple(changes)


def _operating(
    thresholds: dict[str, float], changes: tuple[Calibrator, ...], predictions: Predictions
) -> tuple[OperatingPoint, ...]:
    points = []
    for k, name in enumerate(FINDINGS):
        threshold = thresholds[name]
        # In the same arithmetic as the probabilities, so that what lay on it still does.
        moved = float(changes[k](np.array([threshold])).astype(np.float32)[0]) if changes else threshold
        points.append(judge(predictions.probabilities[:, k], predictions.labels[:, k], moved))
    return tuple(points)


def _subgroups(settings: EvaluateSettings, dataset: Dataset, predictions: Predictions) -> tuple[SubgroupScore, ...]:
    table = dataset.read(settings.split, list(COLUMNS))
    table = table.take(np.argsort(table["image_id"].to_numpy()))
    return tuple(
        score_subgroup(
            group,
            predictions.probabilities,
            predictions.labels,
            predictions.patient_keys,
            resamples=settings.resamples,
            seed=settings.seed,
        )
        for group in subgroups(table)
    )


def _other_inputs(
    settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset, removed: list[Ablation]
) -> list[OtherInputs]:
    if not removed:
        return []
    films = films_of(dataset, settings.split, bundle.layout)
    return [
        OtherInputs(
            films.image_ids,
            films.inputs if ablation.change is None else ablation.change(films, np.random.default_rng(settings.seed)),
            ablation.blank,
        )
        for ablation in removed
    ]


def _ablation_scores(
    settings: EvaluateSettings, removed: list[Ablation], honest: Predictions, ablated: list[Predictions]
) -> tuple[AblationScore, ...]:
    if not removed:
        return ()

    def draws(predictions: Predictions) -> AurocDraws:
        known = (honest.labels, honest.patient_keys)
        return draw_aurocs(predictions.probabilities, *known, resamples=settings.resamples, seed=settings.seed)

    as_they_are = draws(honest)
    changed = [draws(predictions) for predictions in ablated]
    return tuple(
        AblationScore(ablation.name, each.mean(), each.less(as_they_are).mean())
        for ablation, each in zip(removed, changed, strict=True)
    )


def _write(evaluation: Evaluation, out: str) -> None:
    filesystem, root = storage.resolve(out)
    filesystem.create_dir(root, recursive=True)
    predictions = evaluation.predictions
    files = {
        REPORT: render(evaluation).encode(),
        "evaluation.json": json.dumps(evaluation.to_json(), indent=2, allow_nan=False).encode(),
        "findings.csv": findings_csv(evaluation.scores, evaluation.operating).encode(),
        "thresholds.csv": thresholds_csv({"youden": evaluation.operating, **evaluation.other_operating}).encode(),
        "roc.png": roc_picture(predictions.probabilities, predictions.labels, evaluation.scores, evaluation.title_in_lines),
    }
    if evaluation.subgroups:
        files["subgroups.csv"] = subgroups_csv(evaluation.subgroups).encode()
    if evaluation.ablations:
        files["ablations.csv"] = ablations_csv(evaluation.ablations).encode()
    if evaluation.history is not None:
        files["history.csv"] = history_csv(evaluation.history).encode()
    if evaluation.localisation is not None:
        files["localisation.csv"] = localisation_csv(evaluation.localisation).encode()
    for name, content in files.items():
        storage.write_atomically(filesystem, f"{root}/{name}", content)


def _write_scores(predictions: Predictions, uri: str) -> None:
    filesystem, path = storage.resolve(uri)
    content = io.BytesIO()
    pq.write_table(predictions.as_table(), content)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    storage.write_atomically(filesystem, path, content.getvalue())
