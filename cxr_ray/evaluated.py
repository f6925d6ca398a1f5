"""What an evaluation found, and on what: as a value, and as JSON."""

from dataclasses import asdict, dataclass
from datetime import datetime

from cxr_ray.ablations import AblationScore
from cxr_ray.bundle_description import BundleDescription
from cxr_ray.calibration import Calibrator
from cxr_ray.completeness import Extent
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.findings import FINDINGS
from cxr_ray.history_curves import HistoryCurves
from cxr_ray.localisation import Localisation
from cxr_ray.operating import OperatingPoint
from cxr_ray.predictions import Predictions
from cxr_ray.readings import Reading
from cxr_ray.report_cases import CaseGroup
from cxr_ray.score_tables import plain
from cxr_ray.split_scores import SplitScores
from cxr_ray.subgroups import SubgroupScore


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found and on what.

    Attributes
    ----------
    dataset_uri
        As it may be shown.
    operating
        The bundle's thresholds, which were chosen on validation, judged on this split, one a finding.
    other_operating
        The same for the thresholds of other rules, by rule.
    subgroups, ablations, cases
        Empty unless they were asked for.
    recalibrated
        One a finding; empty where the probabilities are the bundle's own.
    readings
        How often the dataset's test split was read up to now; None for another split, or where it cannot be noted.
    """

    settings: EvaluateSettings
    created: datetime
    bundle: BundleDescription
    dataset_uri: str
    dataset_digest: str
    extent: Extent
    scores: SplitScores
    operating: tuple[OperatingPoint, ...]
    other_operating: dict[str, tuple[OperatingPoint, ...]]
    subgroups: tuple[SubgroupScore, ...]
    ablations: tuple[AblationScore, ...]
    recalibrated: tuple[Calibrator, ...]
    predictions: Predictions
    readings: tuple[Reading, ...] | None = None
    history: HistoryCurves | None = None
    cases: tuple[CaseGroup, ...] = ()
    localisation: Localisation | None = None

    @property
    def title(self) -> str:
        """What was scored on what, as it stands above every table."""
        scores = self.scores
        without = ", clinical inputs withheld" if self.settings.withhold == "clinical" else ""
        images = f"{scores.images:,} images of {scores.patients:,} patients"
        return f"{self.bundle.name} on {self.settings.split}: {images} ({self.extent.in_words()}){without}"

    @property
    def title_in_lines(self) -> str:
        """The same in lines of less than eighty columns, for a terminal and a picture."""
        return self.title.replace(" (", "\n(", 1).replace(": NOT", ":\nNOT", 1)

    def to_json(self) -> dict[str, object]:
        """The scores for machines; what cannot be scored is null."""
        settings = self.settings
        return {
            "title": self.title,
            "bundle": {"name": self.bundle.name, "version": self.bundle.version, "digest": self.bundle.digest},
            "dataset_digest": self.dataset_digest,
            "trained_on_this_dataset": self.bundle.dataset_digest == self.dataset_digest,
            "split": settings.split,
            "is_official_test": self.extent.is_official_test,
            "test_readings": None if self.readings is None else len(self.readings),
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
            "history": None if self.history is None else plain(asdict(self.history)),
            "localisation": None if self.localisation is None else plain(asdict(self.localisation)),
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
                "at_other_thresholds": {rule: asdict(points[k]) for rule, points in self.other_operating.items()},
                **changed,
            }
        )
