"""Clinical inputs: what is known about the patient besides the image.

The `paper` encoding packs age, sex, view and the fourteen findings seen on strictly earlier visits into the 17 numbers of
Crobu & Di Ciaccio. The `rich` one adds which of these are known, how often, how lately and at which visits findings were
seen, and how many visits there were. Unknown is not zero and not negative: an unknown number takes its mean over the
training split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS

MAX_AGE_YEARS = 120

Encoding = Literal["paper", "rich"]
# The visits that the rich encoding tells one by one, and the numbers it has for each.
VISITS = 3
VISIT_WIDTH = 2 + len(FINDINGS)
_RICH_META_WIDTH = 6
_RICH_SUMMARY_WIDTH = 7 + 4 * len(FINDINGS)
# The longest course in the NIH release has 184 visits.
_LOG_MANY_VISITS = float(np.log(200))


@dataclass(frozen=True)
class ClinicalLayout:
    """Which clinical numbers a network reads: meta (age, sex, view) first, then history.

    With the paper's encoding, meta is 3 numbers and history 14. With the rich one, meta is 6, and history is a summary of all
    earlier visits (63) followed by `VISITS` x `VISIT_WIDTH` numbers of the latest ones, the latest first.
    """

    encoding: Encoding = "paper"
    meta: bool = True
    history: bool = True

    @property
    def meta_width(self) -> int:
        """How many numbers say age, sex and view."""
        if not self.meta:
            return 0
        return 3 if self.encoding == "paper" else _RICH_META_WIDTH

    @property
    def summary_width(self) -> int:
        """How many numbers sum up all earlier visits."""
        if not self.history:
            return 0
        return len(FINDINGS) if self.encoding == "paper" else _RICH_SUMMARY_WIDTH

    @property
    def visits_width(self) -> int:
        """How many numbers tell of single earlier visits: `VISITS` x `VISIT_WIDTH`, or none."""
        return VISITS * VISIT_WIDTH if self.history and self.encoding == "rich" else 0

    @property
    def width(self) -> int:
        """Clinical numbers in all."""
        return self.meta_width + self.summary_width + self.visits_width


_RICH_HISTORY_WIDTH = ClinicalLayout("rich", meta=False).width


@dataclass(frozen=True)
class PastVisits:
    """Strictly earlier visits of N radiographs' patients, beyond `ClinicalInputs.ever`; float32, NaN where unknown.

    Attributes
    ----------
    count
        Earlier visits, 0 on a first one; shape (N,).
    age_gap
        Years since the latest, NaN on a first visit; shape (N,).
    fraction, decayed_80, decayed_50
        Share of the earlier visits that showed the finding; the same share, the visit k back weighing 0.8 and 0.5 to the power
        of k - 1; shape (N, 14), NIH order.
    no_finding, ap
        Share of the earlier visits without any finding, and taken AP; shape (N,).
    last
        1 where the latest, the second and the third latest visit showed the finding; shape (N, 3, 14).
    last_ap
        1 where these visits were taken AP, NaN where there was none; shape (N, 3).
    """

    count: np.ndarray
    age_gap: np.ndarray
    fraction: np.ndarray
    decayed_80: np.ndarray
    decayed_50: np.ndarray
    no_finding: np.ndarray
    ap: np.ndarray
    last: np.ndarray
    last_ap: np.ndarray

    def __len__(self) -> int:
        return len(self.count)

    @classmethod
    def unknown(cls, n: int) -> "PastVisits":
        """`n` radiographs of which nothing is known."""
        return cls._filled(n, np.nan)

    @classmethod
    def none_before(cls, n: int) -> "PastVisits":
        """`n` radiographs of first visits."""
        return cls._filled(n, 0.0)

    @classmethod
    def _filled(cls, n: int, value: float) -> "PastVisits":
        """One value everywhere, but NaN for what is not known of a first visit either."""

        def filled(*shape: int, value: float = value) -> np.ndarray:
            return np.full((n, *shape), value, dtype=np.float32)

        return cls(
            count=filled(),
            age_gap=filled(value=np.nan),
            fraction=filled(len(FINDINGS)),
            decayed_80=filled(len(FINDINGS)),
            decayed_50=filled(len(FINDINGS)),
            no_finding=filled(),
            ap=filled(value=np.nan),
            last=filled(VISITS, len(FINDINGS)),
            last_ap=filled(VISITS, value=np.nan),
        )

    def repeated(self, n: int) -> "PastVisits":
        """Each radiograph `n` times."""
        return PastVisits(*(np.repeat(getattr(self, field.name), n, axis=0) for field in fields(self)))

    def taken(self, rows: np.ndarray) -> "PastVisits":
        """The radiographs at these positions."""
        return PastVisits(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["PastVisits"]) -> "PastVisits":
        """The radiographs of all parts, at least one, in their order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


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
    past
        What the rich encoding reads of the earlier visits beyond `ever`; None if nothing of it is known.
    """

    age_years: np.ndarray
    male: np.ndarray
    ap: np.ndarray
    ever: np.ndarray
    past: PastVisits | None = None

    def __len__(self) -> int:
        return len(self.age_years)

    def repeated(self, n: int) -> "ClinicalInputs":
        """Each radiograph `n` times."""
        past = None if self.past is None else self.past.repeated(n)
        return self._changed(lambda values: np.repeat(values, n, axis=0), past)

    def taken(self, rows: np.ndarray) -> "ClinicalInputs":
        """The radiographs at these positions."""
        return self._changed(lambda values: values[rows], None if self.past is None else self.past.taken(rows))

    def without_history(self) -> "ClinicalInputs":
        """The same radiographs with an unknown history."""
        return replace(self, ever=np.full_like(self.ever, np.nan), past=None)

    @classmethod
    def concatenate(cls, parts: Sequence["ClinicalInputs"]) -> "ClinicalInputs":
        """The radiographs of all parts, at least one, in their order."""
        past = None
        if any(part.past is not None for part in parts):
            past = PastVisits.concatenate([part.past or PastVisits.unknown(len(part)) for part in parts])
        return cls(
            age_years=np.concatenate([part.age_years for part in parts]),
            male=np.concatenate([part.male for part in parts]),
            ap=np.concatenate([part.ap for part in parts]),
            ever=np.concatenate([part.ever for part in parts]),
            past=past,
        )

    def _changed(self, change: Callable[[np.ndarray], np.ndarray], past: PastVisits | None) -> "ClinicalInputs":
        return ClinicalInputs(change(self.age_years), change(self.male), change(self.ap), change(self.ever), past)


@dataclass(frozen=True)
class ClinicalStatistics:
    """Means and spread over the training split; they live in the bundle and stand in for what is unknown.

    `past_mean` has a mean for each number that the rich encoding has of the history (111); None if the training split was
    read without it.
    """

    age_mean: float
    age_std: float
    male_mean: float
    ap_mean: float
    ever_mean: tuple[float, ...]
    past_mean: tuple[float, ...] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ClinicalStatistics":
        """Read what `dataclasses.asdict` wrote.

        Raises
        ------
        CxrRayError
            If a number is absent or not finite, or there are not as many as there are numbers to stand in for.
        """
        try:
            age_mean, age_std, male_mean, ap_mean = (
                float(str(values[name])) for name in ("age_mean", "age_std", "male_mean", "ap_mean")
            )
            ever_mean = tuple(float(value) for value in values["ever_mean"])
            past = values.get("past_mean")
            past_mean = None if past is None else tuple(float(value) for value in past)
        except (KeyError, TypeError, ValueError) as error:
            raise CxrRayError(f"clinical statistics are incomplete ({error!r}); write the bundle again") from None
        finite = np.isfinite([age_mean, age_std, male_mean, ap_mean, *ever_mean, *(past_mean or ())]).all()
        whole = len(ever_mean) == len(FINDINGS) and (past_mean is None or len(past_mean) == _RICH_HISTORY_WIDTH)
        if not whole or not finite or age_std <= 0:
            raise CxrRayError(f"clinical statistics {values} are not usable; write the bundle again")
        return cls(age_mean, age_std, male_mean, ap_mean, ever_mean, past_mean)


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
        past_mean=None if inputs.past is None else tuple(_mean(column, 0.0) for column in _rich_history(inputs).T),
    )


def encode(inputs: ClinicalInputs, statistics: ClinicalStatistics, layout: ClinicalLayout) -> np.ndarray:
    """The clinical numbers that a network reads.

    What is unknown takes its training mean, number by number; a flag that says "known" is then 0.

    - `paper`: age (standardised), male, AP; whether each finding was ever seen (14).
    - `rich`, meta: age, male, AP as above, and for each whether it is known.
    - `rich`, summary: whether the history is known; whether there was an earlier visit; ln(1 + visits) / ln 200; ln(1 + years
      since the latest); whether these years are known; the share of visits without finding; the share taken AP; for each
      finding whether it was ever seen, the share of visits with it, and that share with weights 0.8 and 0.5 (4 x 14).
    - `rich`, visits, the latest first (3 x 16): whether there was one, AP, its findings; zeros where there was none.

    On a first visit all of the rich history is 0, but for the flag that it is known.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, layout.width), without NaN.

    Raises
    ------
    CxrRayError
        If `layout` asks for the rich history and `statistics` come from a split that was read without it.
    """
    parts = [np.empty((len(inputs), 0), dtype=np.float32)]
    if layout.meta:
        parts += _meta(inputs, statistics, layout.encoding)
    if layout.history and layout.encoding == "paper":
        parts.append(_imputed(inputs.ever, statistics.ever_mean))
    elif layout.history:
        if statistics.past_mean is None:
            raise CxrRayError("clinical statistics have no past_mean, which the rich encoding needs; train again with it")
        parts.append(_imputed(_rich_history(inputs), statistics.past_mean))
    return np.concatenate(parts, axis=1)


def _imputed(numbers: np.ndarray, means: Sequence[float]) -> np.ndarray:
    return np.where(np.isnan(numbers), np.array(means, dtype=np.float32), numbers)


def _meta(inputs: ClinicalInputs, statistics: ClinicalStatistics, encoding: Encoding) -> list[np.ndarray]:
    age = (inputs.age_years - statistics.age_mean) / statistics.age_std
    numbers = np.stack([age, inputs.male, inputs.ap], axis=1).astype(np.float32, copy=False)
    imputed = _imputed(numbers, (0.0, statistics.male_mean, statistics.ap_mean))
    return [imputed] if encoding == "paper" else [imputed, (~np.isnan(numbers)).astype(np.float32)]


def _rich_history(inputs: ClinicalInputs) -> np.ndarray:
    """Summary and visits as `encode` tells them, NaN where unknown; float32, shape (N, 111)."""
    past = inputs.past or PastVisits.unknown(len(inputs))
    unknown_count, unknown_gap = np.isnan(past.count), np.isnan(past.age_gap)
    leading = (
        ~unknown_count & ~np.isnan(inputs.ever).any(axis=1),
        np.where(unknown_count, np.nan, past.count > 0),
        np.log1p(past.count) / _LOG_MANY_VISITS,
        np.log1p(np.maximum(past.age_gap, 0)),
        ~unknown_gap,
        past.no_finding,
        past.ap,
    )
    by_finding = (inputs.ever, past.fraction, past.decayed_80, past.decayed_50)
    numbers = np.concatenate([np.stack(leading, axis=1), *by_finding, _latest_visits(past)], axis=1, dtype=np.float32)
    numbers[past.count == 0] = np.eye(1, _RICH_HISTORY_WIDTH, dtype=np.float32)
    return numbers


def _latest_visits(past: PastVisits) -> np.ndarray:
    """Whether there was a visit, AP and findings of the latest visits, NaN where unknown; float32, shape (N, 48)."""
    back = np.arange(1, VISITS + 1)
    visits = np.concatenate([np.ones((len(past), VISITS, 1)), past.last_ap[:, :, None], past.last], axis=2, dtype=np.float32)
    visits[past.count[:, None] < back] = 0
    visits[np.isnan(past.count), :, 0] = np.nan
    return visits.reshape(len(past), VISITS * VISIT_WIDTH)


def withheld(inputs: ClinicalInputs) -> ClinicalInputs:
    """The same radiographs with every clinical value unknown: the ablation that asks what the image alone is worth."""
    return inputs._changed(lambda values: np.full_like(values, np.nan), past=None)


def partly_withheld(inputs: ClinicalInputs, share: float, rng: np.random.Generator) -> ClinicalInputs:
    """The same radiographs with some of their values unknown, for training.

    Of every image age, sex, view and history are each unknown with the probability `share`, and with the same probability
    all four. A network whose training data know everything has no idea what to make of a patient of whom nothing is known.
    """
    hidden = rng.random((5, len(inputs))) < share
    age, sex, view, history = hidden[:4] | hidden[4]

    def without(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed[rows] = np.nan
        return changed

    past = inputs.past
    if past is not None:
        past = PastVisits(**{field.name: without(getattr(past, field.name), history) for field in fields(past)})
    return ClinicalInputs(
        without(inputs.age_years, age), without(inputs.male, sex), without(inputs.ap, view), without(inputs.ever, history), past
    )


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
        Findings on strictly earlier visits, of which neither number nor time is known then; empty if there were no such
        visits, None if nothing is known.
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
        past=PastVisits.none_before(1) if history is not None and not history else None,
    )
    given = {"age": age_years, "sex": sex, "view": view, "history": history}
    return inputs, [name for name, value in given.items() if value is None]
