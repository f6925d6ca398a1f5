"""What a network is shown, as counts: of the training split in its bundle, of live requests in a service.

A network that answers for other films and other patients than it learnt from has drifted, and nobody has labels to see it
by. What it is shown can be watched without them: how bright and how contrasted the stored squares are, how old the patients,
and how often sex, view and history say what. Profiles hold counts in fixed bins and nothing of a single patient; those of two
replicas or two hours are added up.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from cxr_ray.clinical import ClinicalInputs
from cxr_ray.errors import CxrRayError

# Grey levels: the mean of a square lies in 0..255, its standard deviation in 0..127.5. Decades of age, and unknown.
BRIGHTNESS_EDGES = np.linspace(0, 256, 33)
CONTRAST_EDGES = np.linspace(0, 128, 33)
AGE_EDGES = np.arange(0, 131, 10)
# The smallest share that a bin counts as where only one of two profiles has something in it.
_SMALLEST_SHARE = 1e-4
_SQUARES_AT_ONCE = 256


@dataclass(frozen=True)
class InputProfile:
    """How many radiographs fell into each bin; all zero where none was counted.

    Attributes
    ----------
    brightness
        Mean grey of the stored squares, in steps of 8 from 0 to 256.
    contrast
        Their standard deviation, in steps of 4 from 0 to 128.
    age
        Decades from 0 to 130 years; unknown.
    sex
        M, F, unknown.
    view
        PA, AP, unknown.
    history
        Findings on earlier visits, none, unknown.
    """

    brightness: tuple[int, ...] = (0,) * (len(BRIGHTNESS_EDGES) - 1)
    contrast: tuple[int, ...] = (0,) * (len(CONTRAST_EDGES) - 1)
    age: tuple[int, ...] = (0,) * len(AGE_EDGES)
    sex: tuple[int, ...] = (0,) * 3
    view: tuple[int, ...] = (0,) * 3
    history: tuple[int, ...] = (0,) * 3

    def __add__(self, other: "InputProfile") -> "InputProfile":
        """The radiographs of both."""
        added = {
            name: tuple(one + two for one, two in zip(counts, getattr(other, name), strict=True))
            for name, counts in vars(self).items()
        }
        return InputProfile(**added)

    def to_json(self) -> dict[str, object]:
        """Counts by quantity, as `from_json` reads them."""
        return {name: list(counts) for name, counts in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "InputProfile":
        """Read what `to_json` wrote.

        Raises
        ------
        CxrRayError
            Naming the quantity that is absent, unknown, or no list of as many counts as there are bins.
        """
        bins = {field.name: len(getattr(cls(), field.name)) for field in fields(cls)}
        if unequal := sorted(set(values) ^ set(bins)):
            raise CxrRayError(f"input profile: {unequal[0]} is absent or not known; use the release that wrote it")
        for name, counts in values.items():
            whole = isinstance(counts, list | tuple) and len(counts) == bins[name]
            if not whole or not all(type(count) is int and count >= 0 for count in counts):  # type: ignore[attr-defined]
                raise CxrRayError(f"input profile: {name} is {counts!r} instead of {bins[name]} counts; write it again")
        return cls(**{name: tuple(counts) for name, counts in values.items()})  # type: ignore[arg-type]


def profile(pixels: np.ndarray, inputs: ClinicalInputs) -> InputProfile:
    """The profile of some radiographs.

    Parameters
    ----------
    pixels
        Stored squares, uint8, shape (N, size, size); (N, 0, 0) where there are none, and nothing is counted of them.
    inputs
        Their clinical values.
    """
    return profile_of_squares(pixels) + profile_of_patients(inputs)


def profile_of_squares(pixels: np.ndarray) -> InputProfile:
    """The part of a `profile` that tells of the stored squares (uint8, shape (N, size, size))."""
    if not pixels.size:
        return InputProfile()
    brightness, contrast = np.empty(len(pixels)), np.empty(len(pixels))
    # A square becomes eight times as large where its deviation is computed.
    for first in range(0, len(pixels), _SQUARES_AT_ONCE):
        part = slice(first, first + _SQUARES_AT_ONCE)
        brightness[part] = pixels[part].mean(axis=(1, 2))
        contrast[part] = pixels[part].std(axis=(1, 2), dtype=np.float32)
    return InputProfile(brightness=_counted(brightness, BRIGHTNESS_EDGES), contrast=_counted(contrast, CONTRAST_EDGES))


def profile_of_patients(inputs: ClinicalInputs) -> InputProfile:
    """The part of a `profile` that tells of the patients."""
    unknown = np.isnan(inputs.ever).any(axis=1)
    seen = ~unknown & (inputs.ever > 0).any(axis=1)
    age = inputs.age_years[np.isfinite(inputs.age_years)]
    return InputProfile(
        age=(*_counted(age, AGE_EDGES), len(inputs) - len(age)),
        sex=_answers(inputs.male, 1.0, 0.0),
        view=_answers(inputs.ap, 0.0, 1.0),
        history=(int(seen.sum()), int((~unknown & ~seen).sum()), int(unknown.sum())),
    )


def _counted(values: np.ndarray, edges: np.ndarray) -> tuple[int, ...]:
    return tuple(np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist())


def _answers(values: np.ndarray, first: float, second: float) -> tuple[int, int, int]:
    return int((values == first).sum()), int((values == second).sum()), int(np.isnan(values).sum())


def drift(reference: InputProfile, observed: InputProfile) -> dict[str, float]:
    """How far what is observed lies from the reference: the population stability index of each quantity.

    With the shares p of the reference and q of what was observed, it is the sum of (q - p) ln(q / p) over the bins (Siddiqi,
    Credit Risk Scorecards, 2006; the symmetric divergence of Jeffreys 1946). By the rule of thumb that comes with it, below 0.1
    nothing has changed, above 0.25 something has. Of equal populations it is expected at (bins - 1) (1 / n + 1 / m) for n and m
    radiographs (Yurdakul 2018): some hundreds have to be observed before 0.1 means anything.

    Returns
    -------
    dict[str, float]
        By quantity; without those of which either profile counted nothing. A bin that is empty in both adds nothing, one that
        is empty in one of them counts as a share of 0.0001.
    """
    found = {}
    for name, counts in vars(reference).items():
        expected, seen = np.array(counts, dtype=float), np.array(getattr(observed, name), dtype=float)
        if expected.sum() and seen.sum():
            found[name] = _stability(expected, seen)
    return found


def _stability(expected: np.ndarray, seen: np.ndarray) -> float:
    told = (expected > 0) | (seen > 0)
    shares = [np.maximum(counts[told] / counts.sum(), _SMALLEST_SHARE) for counts in (expected, seen)]
    return math.fsum((shares[1] - shares[0]) * np.log(shares[1] / shares[0]))
