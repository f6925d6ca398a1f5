"""The NIH ChestX-ray14 release: its table, its official lists and its folders of images, joined into records.

What the release says of itself is kept: the order of visits is the `Follow-up #` of the 2020 table (file names are not
chronological), history is computed on all rows before any is dropped, and the official test list stays untouched.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import fs
from pydantic import Field

from cxr_ray import findings, storage
from cxr_ray.dataset import Manifest
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import decode_picture
from cxr_ray.records import fixed_lists
from cxr_ray.settings import Settings
from ingest.history import History, earlier_history
from ingest.shards import Source, claim, write_dataset
from ingest.splits import carve_validation, check_disjoint

TRAIN_VAL_LIST = "train_val_list.txt"
TEST_LIST = "test_list.txt"
MAX_AGE_YEARS = 120

# Our name -> the release's column, compared without case, spaces and signs. The table's header breaks into eleven columns
# because two of its names hold commas; the columns used here come before those.
_COLUMNS = {
    "image": "imageindex",
    "labels": "findinglabels",
    "follow_up": "followup",
    "patient": "patientid",
    "age": "patientage",
    "sex": "patientgender",
    "view": "viewposition",
}


class NihSettings(Settings):
    """Settings of `cxr-ray ingest nih`."""

    release: str = Field(description="Folder or URI of the release: Data_Entry_2017_v2020.csv, the two lists, images.")
    out: str = Field(description="Folder or URI of the dataset.")
    size: int = Field(256, ge=16, le=4096, description="Edge of the stored square, in pixels.")
    metadata_only: bool = Field(default=False, description="Write every row of the table, without pixels.")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="Share of train_val that becomes validation, by patient.")
    seed: int = Field(0, ge=0, description="Seed of the validation split.")
    max_quarantined: float = Field(0.01, ge=0, le=1, description="Share of unreadable images that stops the run; 1 never.")
    overwrite: bool = Field(default=False, description="Replace the dataset that OUT holds.")


@dataclass(frozen=True)
class Release:
    """The release's metadata: a row an image of the full table, and where the images are that are there.

    Attributes
    ----------
    table
        Columns image, patient, follow_up, age, sex, view, split ("train_val" or "test"), location (None if absent).
    labels
        uint8, shape (N, 14).
    """

    table: pd.DataFrame
    labels: np.ndarray
    sha256: str
    filesystem: fs.FileSystem
    counts: dict[str, int]


def ingest_nih(settings: NihSettings) -> Manifest:
    """Turn a release into a dataset.

    Raises
    ------
    CxrRayError
        If the table or a list is absent or wrong, or too many images are unreadable.
    """
    claim(settings.out, overwrite=settings.overwrite)
    release = read_release(settings.release)
    table = release.table
    history = earlier_history(table["patient"].to_numpy(), table["follow_up"].to_numpy(), release.labels.astype(np.float32))
    split = _splits(table, settings)
    records = _records(release, history, split)
    if not settings.metadata_only:
        records = records.filter(pa.array(table["location"].notna()))
    source = Source(
        kind="nih",
        filesystem=release.filesystem,
        decode=None if settings.metadata_only else decode_picture,
        metadata_sha256=release.sha256,
        settings=settings.model_dump(mode="json"),
        counts=release.counts,
    )
    size = None if settings.metadata_only else settings.size
    return write_dataset(records, settings.out, source, size=size, max_quarantined=settings.max_quarantined)


def _splits(table: pd.DataFrame, settings: NihSettings) -> np.ndarray:
    split = np.where(table["split"] == "test", "test", "train").astype(object)
    train_val = (table["split"] == "train_val").to_numpy()
    in_validation = carve_validation(table["patient"].to_numpy()[train_val], settings.val_fraction, settings.seed)
    split[np.flatnonzero(train_val)[in_validation]] = "val"
    check_disjoint(table["patient"].to_numpy(), split)
    return split


def _records(release: Release, history: History, split: np.ndarray) -> pa.Table:
    table = release.table
    return pa.table(
        {
            "image_id": pa.array(table["image"], type=pa.string()),
            "patient_key": pa.array([f"nih-{patient}" for patient in table["patient"]], type=pa.string()),
            "visit": history.visit,
            "age_years": pa.array(table["age"].to_numpy(dtype=np.float32), from_pandas=True),
            "sex": pa.array(table["sex"], type=pa.string(), from_pandas=True),
            "view": pa.array(table["view"], type=pa.string(), from_pandas=True),
            "history_count": history.count,
            "history_ever": fixed_lists(history.ever),
            "history_last": fixed_lists(history.last),
            "history_fraction": fixed_lists(history.fraction),
            "labels": fixed_lists(release.labels),
            "split": pa.array(split, type=pa.string()),
            "source": pa.array(["nih"] * len(table), type=pa.string()),
            "location": pa.array(table["location"], type=pa.string(), from_pandas=True),
        }
    )


def read_release(uri: str) -> Release:
    """Read the table and the lists, and find the images wherever the release's folders hold them.

    Raises
    ------
    CxrRayError
        Naming the file, what is wrong in it and the remedy.
    """
    filesystem, root = storage.resolve(uri)
    files = _list_files(filesystem, root, uri)
    table_path = _one_table(files, uri)
    content = storage.read_bytes(filesystem, table_path)
    table, labels = _read_table(content, table_path)
    table, listed = _join_lists(table, filesystem, root)
    images, duplicates = _find_images(files)
    table["location"] = table["image"].map(images).astype(object).where(lambda found: found.notna(), None)
    present = int(table["location"].notna().sum())
    inside = table["split"].notna().to_numpy()
    counts = {
        "rows": len(table),
        **listed,
        "present": present,
        "absent": len(table) - present,
        "not_in_table": len(set(images) - set(table["image"])),
        "duplicate_files": duplicates,
        "age_unknown": int(table["age"].isna().sum()),
    }
    if not inside.all():
        raise CxrRayError(
            f"{uri}: {int((~inside).sum())} images of the table stand in no list (first: {table['image'][~inside].iloc[0]}); "
            f"add them to {TRAIN_VAL_LIST} or {TEST_LIST}"
        )
    return Release(table, labels, hashlib.sha256(content).hexdigest(), filesystem, counts)


def _list_files(filesystem: fs.FileSystem, root: str, uri: str) -> list[str]:
    try:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise CxrRayError(
            f"--release {uri}: cannot be listed ({str(error).splitlines()[0]}); give the release's folder"
        ) from None
    return sorted(info.path for info in infos if info.type == fs.FileType.File)


def _one_table(files: list[str], uri: str) -> str:
    tables = [path for path in files if path.rsplit("/", 1)[-1].startswith("Data_Entry") and path.endswith(".csv")]
    if len(tables) != 1:
        found = "none" if not tables else ", ".join(path.rsplit("/", 1)[-1] for path in tables)
        raise CxrRayError(f"--release {uri}: needs one Data_Entry*.csv, found {found}; put Data_Entry_2017_v2020.csv there")
    return tables[0]


def _plain(name: object) -> str:
    return "".join(character for character in str(name).casefold() if character.isalnum())


def _read_table(content: bytes, path: str) -> tuple[pd.DataFrame, np.ndarray]:
    try:
        raw = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise CxrRayError(f"{path}: is no readable CSV ({' '.join(str(error).split())}); download it again") from None
    by_name = {_plain(column): column for column in raw.columns}
    absent = [column for column in _COLUMNS.values() if column not in by_name]
    if absent:
        raise CxrRayError(
            f"{path}: has no column {', '.join(absent)} (found: {', '.join(map(str, raw.columns))}); download it again"
        )
    named = raw[[by_name[column] for column in _COLUMNS.values()]].set_axis(list(_COLUMNS), axis=1)
    if named.empty:
        raise CxrRayError(f"{path}: has no rows; download it again")
    table = pd.DataFrame(
        {
            "image": named["image"].str.strip(),
            "patient": _numbers(named["patient"], "Patient ID", path),
            "follow_up": _numbers(named["follow_up"], "Follow-up #", path),
            "age": _ages(_numbers(named["age"], "Patient Age", path)),
            "sex": _values(named["sex"], ("M", "F"), "Patient Gender", path),
            "view": _values(named["view"], ("PA", "AP"), "View Position", path),
        }
    )
    _refuse_repeats(table, ["image"], "Image Index", path)
    _refuse_repeats(table, ["patient", "follow_up"], "Patient ID and Follow-up #", path)
    return table, _labels(named["labels"], path)


def _line(row: int) -> int:
    """Line of the file, counted from 1, the header included."""
    return row + 2


def _numbers(column: pd.Series, name: str, path: str) -> pd.Series:
    numbers = pd.to_numeric(column.str.strip(), errors="coerce")
    wrong = ~np.isfinite(numbers) | (numbers != numbers.round())
    if wrong.any():
        first = int(wrong.to_numpy().argmax())
        raise CxrRayError(
            f"{path} line {_line(first)}: {name} is {column.iloc[first]!r}; whole numbers are needed (2020 release)"
        )
    return numbers.astype(np.int64)


def _ages(ages: pd.Series) -> pd.Series:
    return ages.astype(np.float32).where((ages >= 0) & (ages <= MAX_AGE_YEARS))


def _values(column: pd.Series, allowed: tuple[str, ...], name: str, path: str) -> pd.Series:
    values = column.str.strip().str.upper()
    wrong = ~values.isin([*allowed, ""])
    if wrong.any():
        first = int(wrong.to_numpy().argmax())
        raise CxrRayError(
            f"{path} line {_line(first)}: {name} is {column.iloc[first]!r}; one of {', '.join(allowed)} is needed"
        )
    return values.where(values != "", None)


def _refuse_repeats(table: pd.DataFrame, columns: list[str], name: str, path: str) -> None:
    repeated = table.duplicated(columns)
    if repeated.any():
        first = int(repeated.to_numpy().argmax())
        value = ", ".join(str(table[column].iloc[first]) for column in columns)
        raise CxrRayError(f"{path} line {_line(first)}: {name} {value} stands there a second time; remove one of the rows")


def _labels(column: pd.Series, path: str) -> np.ndarray:
    encoded: dict[str, np.ndarray] = {}
    for text in column.unique():
        try:
            encoded[text] = findings.parse(text)
        except CxrRayError as error:
            raise CxrRayError(f"{path} line {_line(int((column == text).to_numpy().argmax()))}: {error}") from None
    return np.stack([encoded[text] for text in column])


def _join_lists(table: pd.DataFrame, filesystem: fs.FileSystem, root: str) -> tuple[pd.DataFrame, dict[str, int]]:
    lists = {name: _read_list(filesystem, f"{root}/{name}") for name in (TRAIN_VAL_LIST, TEST_LIST)}
    known = set(table["image"])
    for name, images in lists.items():
        unknown = [image for image in images if image not in known]
        if unknown:
            raise CxrRayError(
                f"{root}/{name}: names {len(unknown)} images that the table does not hold (first: {unknown[0]}); "
                "use lists and table of one release"
            )
    both = set(lists[TRAIN_VAL_LIST]) & set(lists[TEST_LIST])
    if both:
        raise CxrRayError(f"{root}: {len(both)} images stand in both lists (first: {min(both)}); correct the lists")
    split = dict.fromkeys(lists[TRAIN_VAL_LIST], "train_val") | dict.fromkeys(lists[TEST_LIST], "test")
    joined = table.assign(split=table["image"].map(split))
    patients = {name: set(joined["patient"][joined["split"] == name]) for name in ("train_val", "test")}
    shared = patients["train_val"] & patients["test"]
    if shared:
        raise CxrRayError(
            f"{root}: {len(shared)} patients have images in both {TRAIN_VAL_LIST} and {TEST_LIST} (first: {min(shared)}); "
            "move all images of a patient to one list"
        )
    return joined, {
        "official_train_val": int((joined["split"] == "train_val").sum()),
        "official_test": int((joined["split"] == "test").sum()),
    }


def _read_list(filesystem: fs.FileSystem, path: str) -> list[str]:
    try:
        text = storage.read_bytes(filesystem, path).decode()
    except UnicodeDecodeError:
        raise CxrRayError(f"{path}: is no text; put the release's list there") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _find_images(files: list[str]) -> tuple[dict[str, str], int]:
    """Name to path of every PNG, whichever folder holds it, and how many files repeat a name."""
    images: dict[str, str] = {}
    duplicates = 0
    for path in files:
        if path.lower().endswith(".png"):
            name = path.rsplit("/", 1)[-1]
            duplicates += name in images
            images.setdefault(name, path)
    return images, duplicates
