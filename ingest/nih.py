"""The NIH ChestX-ray14 release: its table, the lists of its splits and its images, joined into records.

What the release says of itself is kept: the order of visits is that of its table (file names are not chronological), history is
computed on all rows before any is dropped, and the official test list stays untouched unless other splits are asked for.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pydantic import Field, ValidationInfo, field_validator

from cxr_ray import storage
from cxr_ray.dataset import Manifest
from cxr_ray.decoding import Format
from cxr_ray.errors import CxrRayError
from cxr_ray.records import SPLITS, fixed_lists
from cxr_ray.settings import Settings
from ingest.files import SourceFile, list_files
from ingest.history import earlier_history, history_columns
from ingest.nih_images import find_images, without_litter
from ingest.nih_lists import TEST_LIST, TRAIN_VAL_LIST, given_lists, list_of_each, official_lists
from ingest.nih_table import RELEASE_TABLE, NihTable, read_table
from ingest.shards import Source, claim, warm_up, write_dataset
from ingest.splits import check_disjoint, stratified_splits

_DEFAULT_VAL_FRACTION = 0.1
_DEFAULT_TEST_FRACTION = 0.2


class SplitRule(StrEnum):
    """Who decides which patients train, validate and test."""

    OFFICIAL = "official"
    RANDOM = "random"
    LISTS = "lists"


# Which settings a rule goes by.
_SETTINGS_OF_RULE = {
    SplitRule.OFFICIAL: ("val_fraction",),
    SplitRule.RANDOM: ("val_fraction", "test_fraction"),
    SplitRule.LISTS: ("train_list", "val_list", "test_list"),
}


class NihSettings(Settings):
    """Settings of `cxr-ray ingest nih`."""

    release: str = Field(
        description="Folder or URI of the release: table, lists, and images in folders or as downloaded (.tar.gz, .tar, .zip)."
    )
    out: str = Field(description="Folder or URI of the dataset.")
    size: int = Field(256, ge=16, le=4096, description="Edge of the stored square, in pixels.")
    metadata_only: bool = Field(default=False, description="Write every row of the table, without pixels.")
    split: SplitRule = Field(
        SplitRule.OFFICIAL, description="official: the release's lists; random: by patient; lists: those that are given."
    )
    val_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        validate_default=True,
        description="Share of train_val, or of all if random, for validation [0.1].",
    )
    test_fraction: float | None = Field(
        None, ge=0, lt=1, validate_default=True, description="Share of the images for the test, with split random [0.2]."
    )
    train_list: str | None = Field(None, description="File or URI with the images to train on, with split lists.")
    val_list: str | None = Field(None, description="File or URI with the images to validate on, with split lists.")
    test_list: str | None = Field(None, validate_default=True, description="File or URI with the images to test on.")
    seed: int = Field(0, ge=0, description="Seed of the splits that are drawn.")
    max_quarantined: float = Field(0.01, ge=0, le=1, description="Share of unreadable images that stops the run; 1 never.")
    overwrite: bool = Field(default=False, description="Replace the dataset that OUT holds.")

    @field_validator("val_fraction", "test_fraction", "train_list", "val_list", "test_list")
    @classmethod
    def _fits_the_rule(cls, value: object, info: ValidationInfo) -> object:
        rule, name = info.data.get("split"), str(info.field_name)
        if rule is None or name in _SETTINGS_OF_RULE[rule]:
            return value
        if value is not None:
            rules = " or ".join(other for other, names in _SETTINGS_OF_RULE.items() if name in names)
            raise ValueError(f"means nothing with split {rule}; leave it out, or choose split {rules}")
        return None

    @field_validator("val_fraction")
    @classmethod
    def _default_val_fraction(cls, value: float | None, info: ValidationInfo) -> float | None:
        drawn = info.data.get("split") in (SplitRule.OFFICIAL, SplitRule.RANDOM)
        return _DEFAULT_VAL_FRACTION if value is None and drawn else value

    @field_validator("test_fraction")
    @classmethod
    def _leaves_something_to_train_on(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("split") is not SplitRule.RANDOM:
            return value
        test = _DEFAULT_TEST_FRACTION if value is None else value
        val = info.data.get("val_fraction") or 0.0
        if val + test >= 1:
            raise ValueError(f"with val_fraction {val:g} leaves nothing to train on; make their sum less than 1")
        return test

    @field_validator("test_list")
    @classmethod
    def _some_list(cls, value: str | None, info: ValidationInfo) -> str | None:
        given = (value, info.data.get("train_list"), info.data.get("val_list"))
        if info.data.get("split") is SplitRule.LISTS and not any(given):
            raise ValueError("split lists needs at least one of train_list, val_list and test_list; name a file")
        return value


@dataclass(frozen=True)
class Release:
    """A release as it was found, its images not yet looked for.

    Attributes
    ----------
    files
        All its files, archives unopened, in the order of their names.
    sha256
        Digest of the table's file.
    """

    filesystem: fs.FileSystem
    root: str
    files: list[SourceFile]
    table: NihTable
    sha256: str


def ingest_nih(settings: NihSettings) -> Manifest:
    """Turn a release into a dataset.

    Raises
    ------
    CxrRayError
        If the table, a list or an archive is absent or wrong, or too many images are unreadable.
    """
    dumped = settings.model_dump(mode="json")
    claim(settings.out, dumped, overwrite=settings.overwrite)
    warm_up()
    records, source = _read(settings, dumped)
    return write_dataset(
        records,
        settings.out,
        source,
        size=None if settings.metadata_only else settings.size,
        max_quarantined=settings.max_quarantined,
        overwrite=settings.overwrite,
    )


def _read(settings: NihSettings, dumped: dict[str, object]) -> tuple[pa.Table, Source]:
    """The records and their source; what else was read is given back before the first image is decoded."""
    release = read_release(settings.release)
    table = release.table
    split, counts = _splits(release, settings)
    counts = {"rows": len(table), **counts, **table.counts}
    images: dict[str, SourceFile] = {}
    if not settings.metadata_only:
        images, duplicates = find_images(release.filesystem, release.files)
        present = sum(image in images for image in table.image)
        counts |= {"present": present, "absent": len(table) - present}
        counts |= {"not_in_table": len(images) - present, "duplicate_files": duplicates}
    wanted = np.array([name is not None for name in split])
    if not settings.metadata_only:
        wanted &= np.array([image in images for image in table.image])
    source = Source(
        kind="nih",
        filesystem=release.filesystem,
        root=release.root,
        format=None if settings.metadata_only else Format.PICTURE,
        metadata_sha256=release.sha256,
        settings=dumped,
        counts=counts,
        warnings=table.warnings,
    )
    return _records(table, split, images).filter(pa.array(wanted)), source


def read_release(uri: str) -> Release:
    """List a release and read its table.

    Raises
    ------
    CxrRayError
        Naming the file, what is wrong in it and the remedy.
    """
    filesystem, root, files = list_files(uri, "--release")
    files = without_litter(files)
    names = [file.name.rpartition("/")[2] for file in files]
    tables = [place for place, name in enumerate(names) if name.startswith("Data_Entry") and name.endswith(".csv")]
    if len(tables) != 1:
        found = ", ".join(names[place] for place in tables) or "none"
        raise CxrRayError(
            f"--release {storage.shown(uri)}: needs one Data_Entry*.csv, found {found}; put {RELEASE_TABLE} there alone"
        )
    path = files[tables[0]].location
    content = storage.read_bytes(filesystem, path)
    return Release(filesystem, root, files, read_table(content, path), hashlib.sha256(content).hexdigest())


def _splits(release: Release, settings: NihSettings) -> tuple[np.ndarray, dict[str, int]]:
    """The split of each image of the table, None for those of no list (object, shape (N,)), and what the manifest counts."""
    table = release.table
    if settings.split is SplitRule.OFFICIAL:
        split, counts = _official_splits(release, settings)
    elif settings.split is SplitRule.RANDOM:
        shares = {"val": settings.val_fraction or 0.0, "test": settings.test_fraction or 0.0}
        split, counts = _drawn(table, np.ones(len(table), dtype=bool), shares, settings.seed), {}
    else:
        uris = {"train": settings.train_list, "val": settings.val_list, "test": settings.test_list}
        lists = given_lists({name: uri for name, uri in uris.items() if uri})
        split = list_of_each(table.image, table.patient, lists)
        counts = {"in_no_list": int(np.sum(split == None))}  # noqa: E711 - element by element
    listed = np.isin(split, SPLITS)
    check_disjoint(table.patient[listed], split[listed])
    return split, counts


def _official_splits(release: Release, settings: NihSettings) -> tuple[np.ndarray, dict[str, int]]:
    table = release.table
    split = list_of_each(table.image, table.patient, official_lists(release.filesystem, release.root))
    train_val, test = split == "train_val", split == "test"
    unlisted = ~(train_val | test)
    if unlisted.any():
        raise CxrRayError(
            f"--release {storage.shown(settings.release)}: {unlisted.sum()} images of the table stand in no list "
            f"(first: {table.image[unlisted.argmax()]}); add them to {TRAIN_VAL_LIST} or {TEST_LIST}, or choose another --split"
        )
    split[train_val] = _drawn(table, train_val, {"val": settings.val_fraction or 0.0}, settings.seed)
    return split, {"official_train_val": int(train_val.sum()), "official_test": int(test.sum())}


def _drawn(table: NihTable, rows: np.ndarray, held_out: dict[str, float], seed: int) -> np.ndarray:
    """Splits of the `rows` (bool, shape (N,)) with the given shares held out, the rest being for training."""
    shares = {"train": 1 - sum(held_out.values()), **held_out}
    some = {name: share for name, share in shares.items() if share > 0}
    return stratified_splits(table.patient[rows], table.labels[rows], some, seed)


def _records(table: NihTable, split: np.ndarray, images: dict[str, SourceFile]) -> pa.Table:
    """A record of each image in the order of the table, with ``location`` and ``stamp`` of its file, null without one."""
    history = earlier_history(table.patient, table.order, table.labels.astype(np.float32), table.age_years, table.view)
    files = [images.get(image) for image in table.image]
    return pa.table(
        {
            "image_id": pa.array(table.image, type=pa.string()),
            "patient_key": pa.array([f"nih-{patient}" for patient in table.patient], type=pa.string()),
            "visit": history.visit,
            "age_years": pa.array(table.age_years, from_pandas=True),
            "sex": pa.array(table.sex, type=pa.string()),
            "view": pa.array(table.view, type=pa.string()),
            **history_columns(history),
            "labels": fixed_lists(table.labels),
            "split": pa.array(split, type=pa.string()),
            "source": pa.array(["nih"] * len(table), type=pa.string()),
            "location": pa.array([None if file is None else file.location for file in files], type=pa.string()),
            "stamp": pa.array([None if file is None else file.stamp for file in files], type=pa.string()),
        }
    )
