"""Batches through Ray Data: each worker's order, epoch by epoch, with the images that belong to it."""

import time

import numpy as np
import pytest
import torch
from ray.data._internal.execution.backpressure_policy import DownstreamCapacityBackpressurePolicy

from cxr_ray.clinical import ClinicalLayout, fit_statistics
from cxr_ray.dataset import Dataset
from cxr_ray.epoch_order import EpochOrder, RowGroup, Segment
from cxr_ray.input_profile import profile, profile_of_patients
from cxr_ray.records import clinical_columns, clinical_inputs, from_fixed_lists, pixel_array
from cxr_ray.shard_rows import ShardReader
from cxr_ray.training import Batch
from cxr_ray.training_data import stream
from cxr_ray.training_inputs import sampled, training_inputs
from cxr_ray.window_source import WorkerShare

pytestmark = pytest.mark.ray

BATCH = 8


@pytest.fixture(scope="module")
def dataset(ray_cluster, tmp_path_factory) -> Dataset:
    from ingest.nih import NihSettings, ingest_nih
    from ingest.phantom_release import PhantomSettings, make_release

    root = tmp_path_factory.mktemp("small")
    make_release(PhantomSettings(out=str(root / "release"), patients=40, size=64))
    ingest_nih(NihSettings(release=str(root / "release"), out=str(root / "dataset"), size=32))
    return Dataset(str(root / "dataset"))


@pytest.fixture(scope="module")
def reader(dataset) -> ShardReader:
    statistics = fit_statistics(clinical_inputs(dataset.read("train", ["age_years", "sex", "view", "history_ever"])))
    return ShardReader(dataset.filesystem, tuple(dataset.row_groups("train")), 32, ClinicalLayout(), statistics)


def orders(reader, epochs, done=()) -> list[EpochOrder]:
    groups = tuple(group.rows for group in reader.groups)
    return [EpochOrder(groups, 3, epoch, 30, done if epoch == epochs[0] else ()) for epoch in epochs]


def batches(reader, made, rank=0, workers=1) -> list[Batch]:
    return list(stream(reader, made, WorkerShare(workers, rank, BATCH)))


def test_batches_are_the_order_of_each_epoch_with_its_images(dataset, reader):
    made = orders(reader, range(2))
    streamed = batches(reader, made, rank=1, workers=2)
    expected = np.concatenate([order.rows(2, BATCH, 1) for order in made])
    assert len(streamed) == sum(order.steps(2, BATCH) for order in made)
    assert {len(batch) for batch in streamed} == {BATCH}
    np.testing.assert_array_equal(torch.cat([batch.rows for batch in streamed]).numpy(), expected)
    whole = dataset.read("train", ["pixels", "labels"])
    np.testing.assert_array_equal(
        torch.cat([batch.pixels for batch in streamed]).numpy(), pixel_array(whole["pixels"])[expected]
    )
    np.testing.assert_array_equal(
        torch.cat([batch.labels for batch in streamed]).numpy(), from_fixed_lists(whole["labels"])[expected]
    )
    assert streamed[0].clinical.shape == (BATCH, 17)


def test_batches_may_be_changed(reader):
    first = batches(reader, orders(reader, [0]))[0]
    for tensor in vars(first).values():
        tensor.zero_()


def test_the_rest_of_an_epoch_brings_what_is_missing(reader):
    before = batches(reader, orders(reader, [0]))
    taken = [batch.rows for batch in before[:3]]
    rest = [batch.rows for batch in batches(reader, orders(reader, [0], done=(Segment(1, BATCH, 3),)))]
    together = torch.cat([*taken, *rest]).tolist()
    assert len(set(together)) == len(together)
    assert sum(group.rows for group in reader.groups) - len(together) < BATCH


def test_a_window_that_waits_for_room_does_not_keep_the_loop_busy(reader, monkeypatch):
    """Ray Data's loop runs beside the training, in its process: asking on and on, it would take the interpreter's lock."""
    looks, full = 0, False

    def limit(policy, op):
        nonlocal looks
        looks += 1
        return 0 if full else None

    monkeypatch.setattr(DownstreamCapacityBackpressurePolicy, "max_task_output_bytes_to_read", limit)
    running = stream(reader, orders(reader, range(300)), WorkerShare(1, 0, BATCH))
    next(running)
    full = True
    time.sleep(1)
    looks = 0
    time.sleep(2)
    # At most one a fiftieth of a second; without a rest there are thousands.
    assert 10 < looks < 400
    full = False
    running.close()


def test_the_profile_of_a_small_split_counts_every_radiograph_once(dataset):
    columns = dataset.read("train", ["pixels", *clinical_columns("rich")])
    inputs = clinical_inputs(columns, "rich")
    counted = training_inputs(dataset, "rich", with_films=True)
    assert counted == profile(pixel_array(columns["pixels"]), inputs)
    assert sum(counted.brightness) == sum(counted.age) == dataset.split("train").images
    assert training_inputs(dataset, "paper", with_films=False) == profile_of_patients(inputs)


def test_films_of_a_large_split_are_sampled_from_end_to_end():
    groups = [RowGroup(f"{number // 10}.parquet", number % 10, 64, number * 64) for number in range(1000)]
    chosen = sampled(groups, 8192)
    assert sum(group.rows for group in chosen) == 8192
    assert (chosen[0], chosen[-1]) == (groups[0], groups[-1])
    assert np.diff([group.first // 64 for group in chosen]).max() <= 8
    assert sampled(groups[:5], 8192) == groups[:5]
    assert sampled(groups, 10) == groups[:1]
