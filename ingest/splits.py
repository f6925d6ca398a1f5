"""Splits: train, validation and test, with every patient in exactly one of them."""

import hashlib
from collections.abc import Mapping

import numpy as np

from cxr_ray.errors import CxrRayError


def stratified_splits(patients: np.ndarray, labels: np.ndarray, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """Deal whole patients to splits so that each gets its share of the images and of the images with each finding.

    Iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011) whose items are patients of several images: those with the
    finding that fewest remaining images show are dealt first, while there is still freedom to place them well. Each goes where
    it keeps all shares closest to what has been dealt so far.

    Parameters
    ----------
    patients
        Patient of each image, shape (N,).
    labels
        Zeros and ones, shape (N, K).
    shares
        Share of each split, positive, the sum of all being 1.
    seed
        Decides the order in which patients of the same finding are dealt.

    Returns
    -------
    numpy.ndarray
        Name of the split of each image; object, shape (N,). No split is empty if there are as many patients as splits. Row
        order plays no role.
    """
    unique, patient_of_image = np.unique(patients, return_inverse=True)
    with_finding = np.zeros((len(unique), labels.shape[1]))
    np.add.at(with_finding, patient_of_image, labels)
    strata = np.c_[with_finding, _images_by_size(np.bincount(patient_of_image))]
    split_of_patient = _deal(strata, np.array(list(shares.values())), np.random.default_rng(seed))
    _fill_empty(split_of_patient, strata, len(shares))
    return np.array(list(shares), dtype=object)[split_of_patient][patient_of_image]


def _images_by_size(images_P: np.ndarray) -> np.ndarray:
    """Images of each patient in the column of the patient's size: 1, 2, 3 or 4, 5 to 8, ... images, and all in the last column.

    Without them, large patients would gather in the largest split, and the others would hold too little history.
    """
    size = np.ceil(np.log2(images_P)).astype(np.int64)
    by_size = np.where(size[:, None] == np.arange(size.max(initial=0) + 1), images_P[:, None], 0)
    return np.c_[by_size, images_P]


def _deal(strata_PL: np.ndarray, shares_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of each patient's split (int64, shape (P,)); `strata_PL` counts its images in each stratum, the last being all."""
    split = np.full(len(strata_PL), -1)
    # Relative to its total, an image with a rare finding counts for more than one with a common finding.
    weighed = strata_PL / np.maximum(strata_PL.sum(axis=0), 1)
    # How far each split is above its share of what has been dealt.
    excess = np.zeros((len(shares_S), strata_PL.shape[1]))
    undealt = rng.permutation(len(strata_PL))
    while len(undealt):
        chosen = _patients_of_rarest(strata_PL[undealt, :-1])
        for patient in undealt[chosen]:
            added = weighed[patient]
            # What the sum of squares of all excess grows by, less what is the same for every split.
            best = int(np.argmin(excess @ added - shares_S * (added @ added)))
            split[patient] = best
            excess -= shares_S[:, None] * added
            excess[best] += added
        undealt = undealt[~chosen]
    return split


def _patients_of_rarest(strata_PL: np.ndarray) -> np.ndarray:
    """Which patients are in the stratum that holds the fewest images but some; bool, shape (P,)."""
    totals = strata_PL.sum(axis=0)
    return strata_PL[:, np.where(totals > 0, totals, np.inf).argmin()] > 0


def _fill_empty(split: np.ndarray, strata_PL: np.ndarray, splits: int) -> None:
    """Give each empty split, in place, the patient of fewest images and findings of the split that has most patients."""
    for number in range(splits):
        held = np.bincount(split, minlength=splits)
        if not held[number] and held.max() > 1:
            fullest = np.flatnonzero(split == held.argmax())
            split[fullest[strata_PL[fullest].sum(axis=1).argmin()]] = number


def split_by_key(patient_keys: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """Assign patients by a hash of their key: the same patient lands in the same split in every run and every archive."""
    position = {key: int.from_bytes(hashlib.sha256(str(key).encode()).digest()[:6]) / 2**48 for key in np.unique(patient_keys)}
    drawn = np.array([position[key] for key in patient_keys])
    return np.where(drawn < test_fraction, "test", np.where(drawn < test_fraction + val_fraction, "val", "train"))


def check_disjoint(patients: np.ndarray, splits: np.ndarray) -> None:
    """Raise CxrRayError if a patient stands in two splits."""
    pairs = np.unique(np.stack([patients.astype(str), splits.astype(str)], axis=1), axis=0)
    names, times = np.unique(pairs[:, 0], return_counts=True)
    shared = names[times > 1]
    if len(shared):
        raise CxrRayError(f"{len(shared)} patients stand in two splits (first: {shared[0]}); correct the lists")
