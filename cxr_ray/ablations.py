"""Ablations and leak controls: what a figure owes to a part of the inputs, and what it would be if the answer leaked into them.

An honest history ends before the film that is scored. The two leak controls break that rule on purpose, so that a reader sees
how much a careless join would have earned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from cxr_ray.clinical import ClinicalInputs, ClinicalLayout, PastVisits, withheld
from cxr_ray.dataset import Dataset
from cxr_ray.records import SPLITS, clinical_columns, clinical_inputs, from_fixed_lists
from cxr_ray.resampling import Interval

_PATIENT_COLUMNS = ("image_id", "patient_key", "visit", "labels")


@dataclass(frozen=True)
class Films:
    """All films of a split, sorted by image id, with what a leak needs.

    Attributes
    ----------
    labels
        float32, shape (N, 14), NaN where unknown.
    others
        What all other visits of the patient showed, earlier and later: share of them, shape (N, 14), float32; zero without one.
    others_without
        Share of them without any finding; shape (N,), float32.
    other_visits
        How many they are; shape (N,).
    """

    image_ids: np.ndarray
    inputs: ClinicalInputs
    labels: np.ndarray
    others: np.ndarray
    others_without: np.ndarray
    other_visits: np.ndarray


@dataclass(frozen=True)
class Ablation:
    """A change of the inputs.

    Attributes
    ----------
    name
        As it is printed.
    change
        Of the clinical inputs; None leaves them.
    blank
        Whether every film becomes its own mean grey.
    """

    name: str
    change: Callable[[Films, np.random.Generator], ClinicalInputs] | None
    blank: bool = False


@dataclass(frozen=True)
class AblationScore:
    """Mean AUC under an ablation, and how much it is above the honest one, on the same resamples of patients."""

    name: str
    auroc: Interval
    difference: Interval


def ablations(layout: ClinicalLayout, *, reads_images: bool) -> list[Ablation]:
    """Those that change anything for a network of this layout."""
    chosen = []
    if layout.width and reads_images:
        chosen.append(Ablation("no image", None, blank=True))
        chosen.append(Ablation("no clinical inputs", lambda films, _: withheld(films.inputs)))
    if layout.history:
        chosen += [
            Ablation("no history", lambda films, _: films.inputs.without_history()),
            Ablation("another patient's history", _shuffled),
            Ablation("LEAK: this film included", lambda films, _: including_this_film(films)),
            Ablation("LEAK: future included", lambda films, _: including_the_future(films)),
        ]
    return chosen


def films_of(dataset: Dataset, split: str, layout: ClinicalLayout) -> Films:
    """Read the films of a split, and all visits of their patients in any split."""
    table = dataset.read(split, [*_PATIENT_COLUMNS, *clinical_columns(layout.encoding)])
    table = table.take(np.argsort(table["image_id"].to_numpy()))
    visits = _visits(dataset)
    key = [table["patient_key"].to_numpy(), table["visit"].to_numpy()]
    here = visits.loc[list(zip(*key, strict=True))].to_numpy(dtype=np.float64)
    patients = visits.groupby(level=0)
    total = patients.sum().loc[key[0]].to_numpy(dtype=np.float64)
    count = patients.size().loc[key[0]].to_numpy() - 1
    shares = (total - here) / np.maximum(count, 1)[:, None]
    return Films(
        image_ids=table["image_id"].to_numpy(),
        inputs=clinical_inputs(table, layout.encoding),
        labels=from_fixed_lists(table["labels"]),
        others=shares[:, :-1].astype(np.float32),
        others_without=shares[:, -1].astype(np.float32),
        other_visits=count,
    )


def _visits(dataset: Dataset) -> pd.DataFrame:
    """What each visit of the dataset showed, 0 or 1, and in a last column whether it showed nothing; by patient and visit."""
    held = [name for name in SPLITS if (split := dataset.manifest.splits.get(name)) is not None and split.images]
    tables = [dataset.read(name, ["patient_key", "visit", "labels"]) for name in held]
    labels = np.nan_to_num(np.concatenate([from_fixed_lists(table["labels"]) for table in tables]))
    index = pd.MultiIndex.from_arrays(
        [np.concatenate([table[name].to_numpy() for table in tables]) for name in ("patient_key", "visit")]
    )
    shown = pd.DataFrame(labels, index=index).groupby(level=[0, 1]).max()
    shown["nothing"] = (shown == 0).all(axis=1).astype(np.float64)
    return shown


def _shuffled(films: Films, generator: np.random.Generator) -> ClinicalInputs:
    other = films.inputs.taken(generator.permutation(len(films.inputs)))
    return replace(films.inputs, ever=other.ever, past=other.past)


def including_this_film(films: Films) -> ClinicalInputs:
    """The history as it is after this visit, its own findings included."""
    inputs, shown = films.inputs, np.nan_to_num(films.labels)
    ever = np.maximum(inputs.ever, shown)
    return replace(inputs, ever=ever, past=None if inputs.past is None else _one_more(inputs.past, inputs.ap, shown))


def _one_more(past: PastVisits, ap: np.ndarray, shown: np.ndarray) -> PastVisits:
    """The earlier visits and one more, which is the latest."""
    count = past.count[:, None]

    def decayed(mean: np.ndarray, decay: float) -> np.ndarray:
        held = (1 - decay**count) / (1 - decay)
        return ((shown + decay * held * mean) / (1 + decay * held)).astype(np.float32)

    nothing = (shown == 0).all(axis=1)
    share_ap = (past.count * np.where(np.isnan(past.ap), 0, past.ap) + np.nan_to_num(ap)) / (past.count + 1)
    return PastVisits(
        count=past.count + 1,
        age_gap=np.zeros_like(past.age_gap),
        fraction=((count * past.fraction + shown) / (count + 1)).astype(np.float32),
        decayed_80=decayed(past.decayed_80, 0.8),
        decayed_50=decayed(past.decayed_50, 0.5),
        no_finding=((past.count * past.no_finding + nothing) / (past.count + 1)).astype(np.float32),
        ap=share_ap.astype(np.float32),
        last=np.concatenate([shown[:, None], past.last[:, :-1]], axis=1),
        last_ap=np.concatenate([ap[:, None], past.last_ap[:, :-1]], axis=1),
    )


def including_the_future(films: Films) -> ClinicalInputs:
    """The history of all other visits of the patient, earlier and later; what tells of the latest ones stays."""
    inputs = films.inputs
    past = inputs.past
    if past is not None:
        past = replace(
            past,
            count=films.other_visits.astype(np.float32),
            fraction=films.others,
            decayed_80=films.others,
            decayed_50=films.others,
            no_finding=films.others_without,
        )
    return replace(inputs, ever=(films.others > 0).astype(np.float32), past=past)
