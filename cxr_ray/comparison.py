"""A comparison of networks: each trained as `cxr-ray train` does, scored as `cxr-ray evaluate` does, and set side by side.

All are scored on the same images, so that each is compared to the first by paired differences: of the mean AUC by a bootstrap
over patients, of each finding by Obuchowski's covariance (`cxr_ray.delong`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cxr_ray import storage
from cxr_ray.bundle import load_bundle
from cxr_ray.bundle_description import BundleDescription
from cxr_ray.compare_settings import CompareSettings
from cxr_ray.comparison_plan import Entry, Plan
from cxr_ray.completeness import extent, published_of
from cxr_ray.delong import Difference, areas
from cxr_ray.distributed import train
from cxr_ray.errors import CxrRayError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.evaluation import evaluate
from cxr_ray.findings import FINDINGS
from cxr_ray.predictions import Predictions, Speed
from cxr_ray.presets.preset import Published
from cxr_ray.progress import ProgressReport
from cxr_ray.resampling import Interval
from cxr_ray.split_scores import AurocDraws, SplitScores, draw_aurocs
from cxr_ray.training_view import TrainingView


@dataclass(frozen=True)
class Lead:
    """What a network's AUCs are above those of the first network, on the same images.

    Attributes
    ----------
    mean, p_value
        Of the mean AUC: paired bootstrap over patients.
    findings
        One a finding, NIH order: Obuchowski's.
    """

    mean: Interval
    p_value: float
    findings: tuple[Difference, ...]


@dataclass(frozen=True)
class NetworkScores:
    """A network of a comparison, scored.

    Attributes
    ----------
    trained_here
        Whether the comparison trained it.
    published
        Figures of its preset; empty where the network differs from the one that they were published of.
    lead
        None for the first network.
    """

    name: str
    uri: str
    trained_here: bool
    bundle: BundleDescription
    parameters: int
    scores: SplitScores
    speed: Speed | None
    published: tuple[Published, ...]
    lead: Lead | None


@dataclass(frozen=True)
class Comparison:
    """Networks scored on the same images.

    Attributes
    ----------
    basis
        What the split is to the official test list, which published figures may have been taken on.
    left_out
        Presets that the dataset could not feed, and why.
    """

    settings: CompareSettings
    dataset_digest: str
    basis: str
    networks: tuple[NetworkScores, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class _Scored:
    entry: Entry
    bundle: BundleDescription
    parameters: int
    scores: SplitScores
    predictions: Predictions


def compare(plan: Plan, tell: Callable[[str], None]) -> Comparison:
    """Train what is left to train, score every network; Ray has to be initialised.

    Parameters
    ----------
    tell
        Called with a line about each network before it is worked on.

    Raises
    ------
    CxrRayError
        If a network cannot be trained or scored; what was trained stays, and the same plan goes on from there.
    """
    for line in left_out_in_words(plan.left_out):
        tell(line)
    scored = []
    for entry in plan.entries:
        _train(entry, tell)
        scored.append(_score(plan.settings, entry, tell))
    return Comparison(
        settings=plan.settings,
        dataset_digest=plan.dataset.digest,
        basis=extent(plan.dataset.manifest, plan.settings.split).in_words(),
        networks=tuple(_side_by_side(scored, plan.settings)),
        left_out=plan.left_out,
    )


def _train(entry: Entry, tell: Callable[[str], None]) -> None:
    training = entry.training
    if training is None:
        if entry.trained_here:
            tell(f"{entry.name}: is trained already")
        return
    tell(f"{entry.name}: going on with its training" if training.resume else f"{entry.name}: training")
    with ProgressReport(f"train {entry.name}", 0, "images") as progress:
        try:
            train(training, TrainingView(progress, training.epochs))
        except CxrRayError as error:
            # The remedy that training names is an option of its own.
            said = str(error).replace("with --resume", "with the same command")
            raise type(error)(f"preset {entry.name}: {said}") from error


def _score(settings: CompareSettings, entry: Entry, tell: Callable[[str], None]) -> _Scored:
    bundle = load_bundle(entry.bundle)
    tell(f"{entry.name}: scoring split {settings.split}")
    out = storage.child(settings.out, f"{entry.name}/evaluation")
    evaluation = evaluate(
        EvaluateSettings(
            bundle=entry.bundle,
            data=settings.data,
            split=settings.split,
            out=out,
            scores=storage.child(out, "scores.parquet"),
            resamples=settings.resamples,
            seed=settings.seed,
            gpu=settings.gpu,
        )
    )
    return _Scored(entry, bundle.description, bundle.model.trainable_parameters, evaluation.scores, evaluation.predictions)


def _side_by_side(scored: list[_Scored], settings: CompareSettings) -> list[NetworkScores]:
    leads: list[Lead | None] = [None]
    leads += leads_over_first([each.predictions for each in scored], resamples=settings.resamples, seed=settings.seed)
    return [
        NetworkScores(
            name=each.entry.name,
            uri=storage.shown(each.entry.bundle),
            trained_here=each.entry.trained_here,
            bundle=each.bundle,
            parameters=each.parameters,
            scores=each.scores,
            speed=each.predictions.speed,
            published=published_of(each.bundle),
            lead=lead,
        )
        for each, lead in zip(scored, leads, strict=True)
    ]


def leads_over_first(predictions: list[Predictions], *, resamples: int = 1000, seed: int = 0) -> list[Lead]:
    """What every network but the first is above it.

    Parameters
    ----------
    predictions
        Of the same images.
    """
    if len(predictions) < 2:
        return []
    labels, patients = predictions[0].labels, predictions[0].patient_keys
    together = np.stack([each.probabilities for each in predictions])
    of_findings = [areas(together[:, :, k], labels[:, k], patients) for k in range(len(FINDINGS))]

    def draws(of: Predictions) -> AurocDraws:
        return draw_aurocs(of.probabilities, labels, patients, resamples=resamples, seed=seed)

    first = draws(predictions[0])
    leads = []
    for number, each in enumerate(predictions[1:], start=1):
        apart = draws(each).less(first)
        leads.append(Lead(apart.mean(), apart.p_value(), tuple(finding.difference(number, 0) for finding in of_findings)))
    return leads


def left_out_in_words(left_out: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the presets that were left out for it."""
    of_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        of_reason.setdefault(reason, []).append(name)
    return [f"left out, as {reason}: {', '.join(names)}" for reason, names in of_reason.items()]
