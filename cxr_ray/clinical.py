"""Clinical inputs: what is known about the patient besides the image.

`paper` encoding packs age, sex, view and the fourteen findings seen on strictly earlier visits into the 17 numbers of Crobu &
Di Ciaccio. Unknown is not zero and not negative: an unknown value takes the mean of the training split, and `missing` says
which values were filled in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS

PAPER_WIDTH = 3 + len(FINDINGS)
MAX_AGE_YEARS = 120


@dataclass(frozen=True)
class ClinicalInputs:
    """Clinical values of N radiographs; NaN where unknown.

    Attributes
    ----------
    age_years
        float32, shape (N,).
    male
        1 for sex M, 0 for F; float32, shape (N,).
    ap
        1 for view AP, 0 for PA; float32, shape (N,).
    ever
        1 where a strictly earlier visit showed the finding; float32, shape (N, 14), NIH order.
    """

    age_years: np.ndarray
    male: np.ndarray
    ap: np.ndarray
    ever: np.ndarray

    def __len__(self) -> int:
        return len(self.age_years)


@dataclass(frozen=True)
class ClinicalStatistics:
    """Means and spread over the training split; they live in the bundle and stand in for what is unknown."""

    age_mean: float
    age_std: float
    male_mean: float
    ap_mean: float
    ever_mean: tuple[float, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "ClinicalStatistics":
        """Read what `dataclasses.asdict` wrote.

        Raises
        ------
        CxrRayError
            If a number is absent, not finite, or the history has not 14 entries.
        """
        try:
            age_mean, age_std, male_mean, ap_mean = (
                float(str(values[name])) for name in ("age_mean", "age_std", "male_mean", "ap_mean")
            )
            ever_mean = tuple(float(value) for value in values["ever_mean"])  # type: ignore[attr-defined]
        except (KeyError, TypeError, ValueError) as error:
            raise CxrRayError(f"clinical statistics are incomplete ({error!r}); write the bundle again") from None
        finite = np.isfinite([age_mean, age_std, male_mean, ap_mean, *ever_mean]).all()
        if len(ever_mean) != len(FINDINGS) or not finite or age_std <= 0:
            raise CxrRayError(f"clinical statistics {values} are not usable; write the bundle again")
        return cls(age_mean, age_std, male_mean, ap_mean, ever_mean)


def _mean(values: np.ndarray, default: float) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else default


def fit_statistics(inputs: ClinicalInputs) -> ClinicalStatistics:
    """Statistics of the training split, unknown values left out; neutral ones where a column is wholly unknown."""
    known_age = inputs.age_years[np.isfinite(inputs.age_years)]
    return ClinicalStatistics(
        age_mean=_mean(inputs.age_years, 50.0),
        age_std=max(float(known_age.std()), 1.0) if known_age.size else 20.0,
        male_mean=_mean(inputs.male, 0.5),
        ap_mean=_mean(inputs.ap, 0.5),
        ever_mean=tuple(_mean(column, 0.0) for column in inputs.ever.T),
    )


def encode_paper(inputs: ClinicalInputs, statistics: ClinicalStatistics) -> np.ndarray:
    """The paper's 17 numbers: age (standardised), sex, view, and "seen before" for each finding.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, 17), without NaN.
    """
    encoded = np.empty((len(inputs), PAPER_WIDTH), dtype=np.float32)
    encoded[:, 0] = (inputs.age_years - statistics.age_mean) / statistics.age_std
    encoded[:, 1] = inputs.male
    encoded[:, 2] = inputs.ap
    encoded[:, 3:] = inputs.ever
    stand_in = np.array([0.0, statistics.male_mean, statistics.ap_mean, *statistics.ever_mean], dtype=np.float32)
    return np.where(np.isnan(encoded), stand_in, encoded)


def withheld(inputs: ClinicalInputs) -> ClinicalInputs:
    """The same radiographs with every clinical value unknown: the ablation that asks what the image alone is worth."""
    return ClinicalInputs(*(np.full_like(getattr(inputs, field.name), np.nan) for field in fields(inputs)))


def from_request(
    age_years: float | None, sex: str | None, view: str | None, history: Sequence[str] | None
) -> tuple[ClinicalInputs, list[str]]:
    """The inputs of one radiograph (N = 1) and the names of what is unknown.

    Parameters
    ----------
    age_years
        0 to 120, or None.
    sex, view
        "M" or "F"; "PA" or "AP"; None where unknown.
    history
        Findings on strictly earlier visits; empty if there were none, None if nothing is known.
    """
    unknown = np.nan
    ever = np.full(len(FINDINGS), unknown, dtype=np.float32)
    if history is not None:
        ever = np.array([name in history for name in FINDINGS], dtype=np.float32)
    inputs = ClinicalInputs(
        age_years=np.array([unknown if age_years is None else age_years], dtype=np.float32),
        male=np.array([{"M": 1.0, "F": 0.0}.get(sex or "", unknown)], dtype=np.float32),
        ap=np.array([{"AP": 1.0, "PA": 0.0}.get(view or "", unknown)], dtype=np.float32),
        ever=ever[None],
    )
    given = {"age": age_years, "sex": sex, "view": view, "history": history}
    return inputs, [name for name, value in given.items() if value is None]
