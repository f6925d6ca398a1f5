"""Ablations: a leak of the film itself is the honest history one visit later; a leak of the future is every other visit."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cxr_ray.ablations import Films, ablations, films_of, including_the_future, including_this_film
from cxr_ray.clinical import ClinicalLayout, encode, fit_statistics
from cxr_ray.dataset import Dataset
from cxr_ray.records import clinical_inputs, from_fixed_lists
from ingest.history import earlier_history, history_columns
from ingest.nih import NihSettings, ingest_nih
from ingest.phantom import simulate_patients
from ingest.phantom_release import write_tables

pytestmark = pytest.mark.ray

RICH = ClinicalLayout("rich")


@pytest.fixture(scope="module")
def dataset(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Visits of made-up patients, without films, in three splits."""
    root = tmp_path_factory.mktemp("visits")
    write_tables(root, simulate_patients(60, 0), size=1)
    ingest_nih(NihSettings(release=str(root), out=str(root / "dataset"), metadata_only=True, split="random"))
    return Dataset(str(Path(root) / "dataset"))


def one_patient(count: int, seed: int = 0) -> tuple[Films, pa.Table]:
    """The visits of one patient, one film each, in their order."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((count, 14)) < 0.2).astype(np.float32)
    ages = np.sort(generator.integers(30, 60, count)).astype(np.float32)
    view = generator.choice(np.array(["PA", "AP"], dtype=object), count)
    history = earlier_history(np.zeros(count), np.arange(count), labels, ages, view)
    table = pa.table({"age_years": ages, "sex": ["F"] * count, "view": view.tolist(), **history_columns(history)})
    nothing = np.zeros(count, dtype=np.float32)
    films = Films(np.arange(count).astype(str), clinical_inputs(table, "rich"), labels, np.zeros_like(labels), nothing, nothing)
    return films, table


@pytest.mark.parametrize("seed", range(5))
def test_a_history_that_includes_the_film_is_the_next_visits_honest_one(seed):
    films, _ = one_patient(9, seed)
    leaked, honest = including_this_film(films), films.inputs
    np.testing.assert_array_equal(leaked.ever[:-1], honest.ever[1:])
    for name in ("count", "fraction", "decayed_80", "decayed_50", "no_finding", "ap", "last", "last_ap"):
        np.testing.assert_allclose(getattr(leaked.past, name)[:-1], getattr(honest.past, name)[1:], atol=1e-6, err_msg=name)


def test_a_history_that_includes_the_future_is_of_all_other_visits(dataset):
    films = films_of(dataset, "test", RICH)
    rows = pd.concat(
        [
            dataset.read(split, ["image_id", "patient_key", "visit", "labels"]).to_pandas().assign(split=split)
            for split in ("train", "val", "test")
        ]
    )
    shown = np.stack(rows["labels"].to_numpy())
    of_test = dataset.read("test", ["image_id"])["image_id"].to_pylist()
    assert films.image_ids.tolist() == sorted(of_test)
    leaked = including_the_future(films)
    with_others = 0
    for place, image in enumerate(films.image_ids):
        (row,) = np.flatnonzero(rows["image_id"] == image)
        others = (rows["patient_key"] == rows["patient_key"].iloc[row]) & (rows["visit"] != rows["visit"].iloc[row])
        of_others = shown[others.to_numpy()]
        assert films.other_visits[place] == leaked.past.count[place] == len(of_others)
        if len(of_others):
            with_others += 1
            np.testing.assert_array_equal(leaked.ever[place], of_others.max(axis=0))
            np.testing.assert_allclose(leaked.past.fraction[place], of_others.mean(axis=0), atol=1e-6)
            assert leaked.past.no_finding[place] == pytest.approx((of_others == 0).all(axis=1).mean())
        else:
            assert not leaked.ever[place].any()
    assert with_others > 10


def test_the_films_are_those_of_the_split_with_their_own_inputs(dataset):
    films = films_of(dataset, "val", RICH)
    table = dataset.read("val", ["image_id", "history_ever", "labels"])
    order = np.argsort(table["image_id"].to_numpy())
    np.testing.assert_array_equal(films.inputs.ever, from_fixed_lists(table["history_ever"])[order])
    np.testing.assert_array_equal(films.labels, from_fixed_lists(table["labels"])[order])


def test_each_ablation_changes_what_it_says(dataset):
    films = films_of(dataset, "test", RICH)
    statistics = fit_statistics(films.inputs)
    honest = encode(films.inputs, statistics, RICH)
    changed = {
        each.name: encode(each.change(films, np.random.default_rng(0)), statistics, RICH)
        for each in ablations(RICH, reads_images=True)
        if each.change is not None
    }
    assert list(changed) == [
        "no clinical inputs",
        "no history",
        "another patient's history",
        "LEAK: this film included",
        "LEAK: future included",
    ]
    meta = RICH.meta_width
    assert (np.ptp(changed["no clinical inputs"], axis=0) == 0).all()
    assert (np.ptp(changed["no history"][:, meta:], axis=0) == 0).all()
    for name in list(changed)[1:]:
        np.testing.assert_array_equal(changed[name][:, :meta], honest[:, :meta])
        assert not np.array_equal(changed[name][:, meta:], honest[:, meta:])
    # Shuffled: the same histories, in other places.
    shuffled = changed["another patient's history"][:, meta:]
    np.testing.assert_array_equal(np.sort(shuffled.sum(axis=1)), np.sort(honest[:, meta:].sum(axis=1)))


@pytest.mark.parametrize(
    ("layout", "reads_images", "count"),
    [
        (ClinicalLayout(), True, 6),
        (ClinicalLayout(), False, 4),
        (ClinicalLayout(history=False), True, 2),
        (ClinicalLayout(meta=False, history=False), True, 0),
    ],
)
def test_a_network_is_spared_what_would_change_nothing(layout, reads_images, count):
    assert len(ablations(layout, reads_images=reads_images)) == count
