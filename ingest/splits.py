"""Splits: train, validation and test, with every patient in exactly one of them."""

import hashlib

import numpy as np

from cxr_ray.errors import CxrRayError


def carve_validation(patients: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose whole patients at random until they hold `fraction` of the images.

    Parameters
    ----------
    patients
        Patient of each image of train_val, shape (N,).

    Returns
    -------
    numpy.ndarray
        True where the image belongs to validation; bool, shape (N,).
    """
    unique, images = np.unique(patients, return_counts=True)
    drawn = np.random.default_rng(seed).permutation(len(unique))
    taken = np.cumsum(images[drawn]) <= fraction * len(patients)
    if fraction > 0 and len(unique) > 1:
        taken[0] = True
    return np.isin(patients, unique[drawn[taken]])


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
