"""What history is worth when it is not complete: mean AUC over the share of earlier reports that are missing.

At prediction time a report may not be there, or not yet. Then either the visit is not told at all, or the network's own answer
stands in for it. Both are played through visit by visit, since an own answer depends on the ones before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import ray
import ray.data

from cxr_ray.bundle import BundleDescription
from cxr_ray.clinical import ClinicalInputs, Encoding
from cxr_ray.course import Courses, common_of_visit
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import Dataset
from cxr_ray.errors import UsageError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.findings import FINDINGS
from cxr_ray.predictions import engine_of
from cxr_ray.progress import ProgressReport
from cxr_ray.records import clinical_columns, clinical_inputs, fixed_lists, from_fixed_lists
from cxr_ray.resampling import Interval
from cxr_ray.shard_rows import read_rows
from cxr_ray.split_scores import mean_auroc

SHARES = (0.25, 0.5, 0.75, 1.0)
_IMAGES_A_TASK = 4096
_COLUMNS = ("image_id", "patient_key", "visit", "labels")

Predict = Callable[[np.ndarray, ClinicalInputs], np.ndarray]


@dataclass(frozen=True)
class HistoryCurve:
    """One way to do without reports; the intervals belong to `SHARES`, and before them to no report missing."""

    name: str
    aurocs: tuple[Interval, ...]


@dataclass(frozen=True)
class HistoryCurves:
    """Mean AUC over the share of earlier reports that are missing.

    Attributes
    ----------
    shares
        0 first; shape (S,).
    curves
        Each with S figures.
    """

    shares: tuple[float, ...]
    curves: tuple[HistoryCurve, ...]


@dataclass(frozen=True)
class Course:
    """One way to tell the history of all films.

    Attributes
    ----------
    missing
        Films whose report is missing, bool, shape (N,).
    thresholds
        Where the network's answer counts as a finding, shape (14,), to stand in for what is missing; None tells nothing of
        such a visit.
    """

    missing: np.ndarray
    thresholds: np.ndarray | None


@dataclass(frozen=True)
class CourseFilms:
    """N films, each patient's whole course among them.

    Attributes
    ----------
    patient
        Position of the patient, int64, shape (N,).
    visit
        Rank of the visit within the patient, int64, shape (N,).
    inputs
        As the dataset has them.
    labels
        float32, shape (N, 14).
    """

    patient: np.ndarray
    visit: np.ndarray
    inputs: ClinicalInputs
    labels: np.ndarray


def roll(films: CourseFilms, courses: list[Course], predict: Predict) -> np.ndarray:
    """Play the visits through, from the first of all patients to the last.

    Parameters
    ----------
    predict
        Positions of films (int64, shape (n,)) and their clinical inputs to probabilities (n, 14).

    Returns
    -------
    numpy.ndarray
        Probabilities under each course, float32, shape (C, N, 14).
    """
    patients = int(films.patient.max()) + 1
    told = Courses.begin(len(courses) * patients)
    answers = np.empty((len(courses), len(films.patient), len(FINDINGS)), dtype=np.float32)
    inputs = films.inputs
    for visit in range(int(films.visit.max()) + 1):
        at = np.flatnonzero(films.visit == visit)
        if not at.size:
            continue
        every = np.tile(at, len(courses))
        rows = np.concatenate([films.patient[at] + number * patients for number in range(len(courses))])
        asked = told.told(rows, inputs.age_years[every], inputs.male[every], inputs.ap[every])
        answers[:, at] = predict(every, asked).reshape(len(courses), len(at), -1)
        for number, course in enumerate(courses):
            _tell(told, number * patients, films, at, course, answers[number, at])
    return answers


def _tell(told: Courses, first: int, films: CourseFilms, at: np.ndarray, course: Course, answers: np.ndarray) -> None:
    """Add a visit to each patient's course; films of one visit are told as one."""
    missing = course.missing[at]
    shown = np.nan_to_num(films.labels[at])
    if course.thresholds is not None:
        shown = np.where(missing[:, None], answers >= course.thresholds, shown)
        missing = np.zeros_like(missing)
    patients, which = np.unique(films.patient[at], return_inverse=True)
    together = np.zeros((len(patients), shown.shape[1]))
    np.maximum.at(together, which, shown)
    here = np.ones(len(patients), dtype=bool)
    here[which[missing]] = False
    ap, age = (common_of_visit(values[at], which, len(patients)) for values in (films.inputs.ap, films.inputs.age_years))
    told.add(first + patients[here], together[here], ap[here], age[here])


def history_curves(settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset) -> HistoryCurves:
    """Play the split through, on Ray Data; Ray has to be initialised, and `check_courses` has to have passed."""
    table = _read(dataset, settings.split, bundle.layout.encoding)
    films = _films(table, bundle.layout.encoding)
    ways = _ways(bundle)
    draw = np.random.default_rng(settings.seed).random(len(films.patient))
    courses = [Course(draw < 0, None)]
    courses += [Course(draw < share, thresholds) for thresholds in ways.values() for share in SHARES]
    answers = _rolled(settings, bundle, dataset, films, courses)
    keys = table["patient_key"].to_numpy()

    def scored(number: int) -> Interval:
        return mean_auroc(answers[number], films.labels, keys, resamples=settings.resamples, seed=settings.seed)

    figures = [scored(number) for number in range(len(courses))]
    parts = np.arange(1, len(courses)).reshape(len(ways), len(SHARES))
    curves = tuple(
        HistoryCurve(name, (figures[0], *(figures[number] for number in part))) for name, part in zip(ways, parts, strict=True)
    )
    return HistoryCurves((0.0, *SHARES), curves)


def _read(dataset: Dataset, split: str, encoding: Encoding) -> pa.Table:
    return dataset.read(split, [*_COLUMNS, *clinical_columns(encoding)])


def _ways(bundle: BundleDescription) -> dict[str, np.ndarray | None]:
    ways: dict[str, np.ndarray | None] = {"visit not told": None}
    ways["own answer, Youden"] = _in_order(bundle.thresholds)
    if "prevalence" in bundle.other_thresholds:
        ways["own answer, matched"] = _in_order(bundle.other_thresholds["prevalence"])
    return ways


def _in_order(thresholds: dict[str, float]) -> np.ndarray:
    return np.array([thresholds[name] for name in FINDINGS])


def _films(table: pa.Table, encoding: Encoding) -> CourseFilms:
    _, patient = np.unique(table["patient_key"].to_numpy(), return_inverse=True)
    return CourseFilms(
        patient, table["visit"].to_numpy().astype(np.int64), clinical_inputs(table, encoding), from_fixed_lists(table["labels"])
    )


def check_courses(dataset: Dataset, split: str, encoding: Encoding) -> None:
    """Whether the split holds its patients' courses: with every report, the history told again has to be the one it holds.

    Raises
    ------
    UsageError
        If earlier visits of the split's patients are not in it.
    """
    films = _films(_read(dataset, split, encoding), encoding)
    told: list[tuple[np.ndarray, np.ndarray]] = []

    def watch(rows: np.ndarray, inputs: ClinicalInputs) -> np.ndarray:
        told.append((rows, inputs.ever))
        return np.zeros((len(rows), len(FINDINGS)), dtype=np.float32)

    roll(films, [Course(np.zeros(len(films.patient), dtype=bool), None)], watch)
    other = sum(int((ever != films.inputs.ever[rows]).any(axis=1).sum()) for rows, ever in told)
    if other:
        raise UsageError(
            f"setting 'history_curves' is True: earlier visits of {other:,} images of split {split} are not in {dataset.uri}; "
            "ingest all images of these patients, or leave it out"
        )


def _rolled(
    settings: EvaluateSettings, bundle: BundleDescription, dataset: Dataset, films: CourseFilms, courses: list[Course]
) -> np.ndarray:
    """Probabilities under each course; shape (C, N, 14). Each task plays some patients through."""
    images = np.bincount(films.patient)
    task_of_patient = (np.cumsum(images) - images) // _IMAGES_A_TASK
    task = task_of_patient[films.patient]
    tasks = [{"task": number} for number in range(int(task.max()) + 1)]
    told = ray.put((films, courses, task))
    rolled = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        partial(_roll_task, settings=settings, encoding=bundle.layout.encoding, size=bundle.size),
        fn_kwargs={"dataset": ray.put(dataset), "told": [told]},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=settings.workers),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if settings.gpu else 0,
    )
    answers = np.full((len(courses), len(task), len(FINDINGS)), np.nan, dtype=np.float32)
    with ProgressReport("courses", len(task), "images") as progress:
        for batch in rolled.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows, number = batch["row"].to_numpy(), batch["course"].to_numpy()
            answers[number, rows] = from_fixed_lists(batch["answer"])
            progress.advance(len(rows) // len(courses))
    return answers


def _roll_task(
    batch: pa.Table,
    settings: EvaluateSettings,
    encoding: Encoding,
    size: int | None,
    dataset: ray.ObjectRef,
    told: list[ray.ObjectRef],
) -> pa.Table:
    """One task's patients: rows (positions in the split), courses and answers."""
    films, courses, task = ray.get(told[0])
    rows = np.flatnonzero(task == batch["task"][0].as_py())
    opened: Dataset = ray.get(dataset)
    squares = np.empty((len(rows), size or 0, size or 0), dtype=np.uint8)
    if size is not None:
        read_rows(opened.filesystem, opened.row_groups(settings.split), rows, ["image_id"], squares)
    threads = None if settings.gpu else max(1, available_cpus() // settings.workers)
    engine = engine_of(settings.bundle, threads, settings.tta)

    def predict(at: np.ndarray, inputs: ClinicalInputs) -> np.ndarray:
        parts = np.array_split(np.arange(len(at)), -(-len(at) // settings.batch_size))
        return np.concatenate([engine.predict(squares[at[part]], inputs.taken(part)) for part in parts])

    _, patient = np.unique(films.patient[rows], return_inverse=True)
    own = CourseFilms(patient, films.visit[rows], films.inputs.taken(rows), films.labels[rows])
    answers = roll(own, [Course(course.missing[rows], course.thresholds) for course in courses], predict)
    return pa.table(
        {
            "row": np.tile(rows, len(courses)),
            "course": np.repeat(np.arange(len(courses)), len(rows)),
            "answer": fixed_lists(answers.reshape(-1, len(FINDINGS))),
        }
    )
