"""Evaluation: a bundle judged on a split of a dataset, as figures and as files."""

import io
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow.parquet as pq
from pyarrow import fs

from cxr_ray import calibration, presets, storage
from cxr_ray.ablations import Ablation, AblationScore, ablations, films_of
from cxr_ray.bundle import BundleDescription, read_description
from cxr_ray.calibration import Calibrator
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.findings import FINDINGS
from cxr_ray.operating import OperatingPoint, judge
from cxr_ray.predictions import OtherInputs, Predictions, predict_split
from cxr_ray.report import roc_picture
from cxr_ray.score_tables import ablations_csv, findings_csv, plain, subgroups_csv
from cxr_ray.split_scores import SplitScores, difference, mean_auroc, score
from cxr_ray.subgroups import COLUMNS, SubgroupScore, score_subgroup, subgroups


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found and on what.

    Attributes
    ----------
    operating
        The bundle's thresholds, which were chosen on validation, judged on this split.
    subgroups, ablations
        Empty unless they were asked for.
    recalibrated
        One a finding; empty where the probabilities are the bundle's own.
    """

    settings: EvaluateSettings
    bundle: BundleDescription
    dataset_digest: str
    scores: SplitScores
    operating: tuple[OperatingPoint, ...]
    subgroups: tuple[SubgroupScore, ...]
    ablations: tuple[AblationScore, ...]
    recalibrated: tuple[Calibrator, ...]
    predictions: Predictions

    def to_json(self) -> dict[str, object]:
        """The scores for machines; what cannot be scored is null."""
        settings = self.settings
        return {
            "bundle": {"name": self.bundle.name, "version": self.bundle.version, "digest": self.bundle.digest},
            "dataset_digest": self.dataset_digest,
            "trained_on_this_dataset": self.bundle.dataset_digest == self.dataset_digest,
            "split": settings.split,
            "withheld": settings.withhold,
            "test_time_augmentation": settings.tta,
            "calibration": settings.calibrate,
            "images": self.scores.images,
            "patients": self.scores.patients,
            "interval": f"95 % percentile bootstrap, {self.scores.resamples} resamples of patients",
            "mean": plain({"auc": asdict(self.scores.auroc), "average_precision": asdict(self.scores.average_precision)}),
            "findings": {name: self._finding(k) for k, name in enumerate(FINDINGS)},
            "subgroups": plain([asdict(group) for group in self.subgroups]),
            "ablations": plain([asdict(ablation) for ablation in self.ablations]),
        }

    def _finding(self, k: int) -> object:
        scores = self.scores.findings[k]
        changed = {"recalibrated": asdict(self.recalibrated[k])} if self.recalibrated else {}
        return plain(
            {
                "images": scores.images,
                "positives": scores.positives,
                "prevalence": scores.prevalence,
                "auc": asdict(scores.auroc),
                "average_precision": asdict(scores.average_precision),
                "sensitivity_at_specificity_90": asdict(scores.sensitivity[0]),
                "sensitivity_at_specificity_95": asdict(scores.sensitivity[1]),
                "brier": scores.brier,
                "calibration_error": scores.calibration_error,
                "at_threshold": asdict(self.operating[k]),
                **changed,
            }
        )


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
    _check_fit(settings, bundle, dataset)
    if dataset.split(settings.split).labelled == 0:
        raise CxrRayError(f"--data {dataset.uri}: split {settings.split} has no labelled image; ingest with labels")
    changes = _recalibrations(settings, bundle, dataset)
    removed = ablations(bundle.layout, reads_images=bundle.size is not None) if settings.ablate else []
    others = _other_inputs(settings, bundle, dataset, removed)
    predictions, *ablated = predict_split(settings, bundle, dataset, settings.split, others)
    if changes:
        changed = [change(predictions.probabilities[:, k]) for k, change in enumerate(changes)]
        predictions = replace(predictions, probabilities=np.stack(changed, axis=1).astype(np.float32))
    data = (predictions.probabilities, predictions.labels, predictions.patient_keys)
    evaluation = Evaluation(
        settings=settings,
        bundle=bundle,
        dataset_digest=dataset.digest,
        scores=score(*data, resamples=settings.resamples, seed=settings.seed),
        operating=_operating(bundle, changes, predictions),
        subgroups=_subgroups(settings, dataset, predictions) if settings.subgroups else (),
        ablations=tuple(
            _ablation_score(settings, ablation.name, predictions, changed)
            for ablation, changed in zip(removed, ablated, strict=True)
        ),
        recalibrated=changes,
        predictions=predictions,
    )
    if settings.out is not None:
        _write(evaluation, settings.out)
    if settings.scores is not None:
        _write_scores(predictions, settings.scores)
    return evaluation


def _check_fit(settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset) -> None:
    if bundle.size is None:
        if settings.tta != "none":
            raise UsageError(f"setting 'tta' is {settings.tta!r}: bundle {bundle.name} reads no image; leave it out")
    elif (size := dataset.require_pixels()) != bundle.size:
        raise CxrRayError(
            f"--data {dataset.uri}: images of {size} pixels, the bundle was trained on {bundle.size}; "
            f"ingest with --size {bundle.size}"
        )
    smallest = presets.find(bundle.preset).smallest_size
    if settings.tta == "ten-crop" and bundle.input_size is not None and bundle.input_size * 7 // 8 < smallest:
        raise UsageError(
            f"setting 'tta' is 'ten-crop': a crop of 7/8 of {bundle.input_size} pixels is below the {smallest} that "
            f"{bundle.preset} needs; use flip or none"
        )
    if settings.scores is not None:
        filesystem, path = storage.resolve(settings.scores)
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            shown = storage.shown(settings.scores)
            raise UsageError(f"--scores {shown}: is a folder; name a file, such as {shown.rstrip('/')}/scores.parquet")
    if settings.ablate and (settings.withhold != "nothing" or settings.calibrate != "none"):
        raise UsageError(
            "setting 'ablate' is True beside withhold or calibrate: ablations are of the bundle as it is; leave them out"
        )
    if settings.ablate and bundle.layout.width == 0:
        raise UsageError(f"setting 'ablate' is True: bundle {bundle.name} reads nothing but the image; leave it out")
    if settings.calibrate != "none" and settings.split == "val":
        raise UsageError(
            f"setting 'calibrate' is {settings.calibrate!r}: it is fitted on split val, which says nothing of itself; "
            "score another split"
        )


def _recalibrations(settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset) -> tuple[Calibrator, ...]:
    if settings.calibrate == "none":
        return ()
    (held,) = predict_split(settings, bundle, dataset, "val")
    return tuple(calibration.fit(held.probabilities[:, k], held.labels[:, k], settings.calibrate) for k in range(len(FINDINGS)))


def _operating(
    bundle: BundleDescription, changes: tuple[Calibrator, ...], predictions: Predictions
) -> tuple[OperatingPoint, ...]:
    points = []
    for k, name in enumerate(FINDINGS):
        threshold = bundle.thresholds[name]
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


def _ablation_score(settings: EvaluateSettings, name: str, honest: Predictions, changed: Predictions) -> AblationScore:
    one, other, labels, patients = changed.probabilities, honest.probabilities, honest.labels, honest.patient_keys
    _, mean = difference(one, other, labels, patients, resamples=settings.resamples, seed=settings.seed)
    return AblationScore(name, mean_auroc(one, labels, patients, resamples=settings.resamples, seed=settings.seed), mean)


def _write(evaluation: Evaluation, out: str) -> None:
    filesystem, root = storage.resolve(out)
    filesystem.create_dir(root, recursive=True)
    predictions = evaluation.predictions
    title = f"{evaluation.bundle.name}, {evaluation.settings.split} split, {evaluation.scores.images:,} images"
    files = {
        "evaluation.json": json.dumps(evaluation.to_json(), indent=2, allow_nan=False).encode(),
        "findings.csv": findings_csv(evaluation.scores, evaluation.operating).encode(),
        "roc.png": roc_picture(predictions.probabilities, predictions.labels, evaluation.scores, title),
    }
    if evaluation.subgroups:
        files["subgroups.csv"] = subgroups_csv(evaluation.subgroups).encode()
    if evaluation.ablations:
        files["ablations.csv"] = ablations_csv(evaluation.ablations).encode()
    for name, content in files.items():
        storage.write_atomically(filesystem, f"{root}/{name}", content)


def _write_scores(predictions: Predictions, uri: str) -> None:
    filesystem, path = storage.resolve(uri)
    content = io.BytesIO()
    pq.write_table(predictions.as_table(), content)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    storage.write_atomically(filesystem, path, content.getvalue())
