"""Bootstrap over patients: images of one patient are alike, so patients are drawn, not images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# A block of so many resamples of 25,596 images takes 5 MB, which a processor's cache holds.
_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; NaN where it cannot be had."""

    value: float
    low: float
    high: float

    @classmethod
    def of_draws(cls, value: float, drawn: np.ndarray) -> "Interval":
        """The percentile interval (2.5 to 97.5) of what resamples gave; those that could not be scored (NaN) are left out."""
        kept = drawn[np.isfinite(drawn)]
        if not np.isfinite(value) or kept.size == 0:
            return cls(float("nan"), float("nan"), float("nan"))
        low, high = np.percentile(kept, [2.5, 97.5])
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class PatientResamples:
    """Resamples of patients with replacement, as how often each image counts.

    Parameters
    ----------
    patient_keys
        Shape (N,); images with the same key are drawn together.
    """

    patient_keys: np.ndarray
    resamples: int
    seed: int

    @property
    def patients(self) -> int:
        """How many different patients there are."""
        return len(np.unique(self.patient_keys))

    def weights(self) -> Iterator[np.ndarray]:
        """How often each image counts, in blocks of shape (B, N), float32; the same ones each time."""
        _, patients = np.unique(self.patient_keys, return_inverse=True)
        count = int(patients.max()) + 1
        generator = np.random.default_rng(self.seed)
        for start in range(0, self.resamples, _RESAMPLES_AT_ONCE):
            block = min(_RESAMPLES_AT_ONCE, self.resamples - start)
            drawn = generator.integers(0, count, size=(block, count)) + np.arange(block)[:, None] * count
            times = np.bincount(drawn.ravel(), minlength=block * count).reshape(block, count)
            yield times[:, patients].astype(np.float32)
