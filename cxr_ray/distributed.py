"""Training on a Ray cluster: DDP workers fed by Ray Data, a checkpoint an epoch, a bundle at the end.

`cxr_ray.train_worker` is what each worker does. A lost worker makes Ray start all of them again; they go on from the last
checkpoint.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load, save

from cxr_ray import presets, storage
from cxr_ray.boosting import grow_forest
from cxr_ray.bundle import BundleDescription, describe, read_description, write_bundle
from cxr_ray.clinical import ClinicalInputs, ClinicalStatistics, encode, fit_statistics, partly_withheld
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError
from cxr_ray.losses import class_weights, prior_log_odds
from cxr_ray.node_network import NodeNetworkConfig
from cxr_ray.placement import check_placement, lacking
from cxr_ray.presets.preset import NetworkOptions
from cxr_ray.recipe import check_data, network_options, resolve
from cxr_ray.records import clinical_columns, clinical_inputs, from_fixed_lists
from cxr_ray.run_folder import begin_run, check_run
from cxr_ray.run_history import RunHistory
from cxr_ray.settings import without_credentials
from cxr_ray.shard_rows import ShardReader
from cxr_ray.tracking import trackers_for
from cxr_ray.train_events import TrainEvent
from cxr_ray.train_settings import TrainSettings
from cxr_ray.train_state import VALIDATION, judged
from cxr_ray.train_worker import WorkerTask, train_worker
from cxr_ray.training_inputs import training_inputs
from cxr_ray.training_picture import training_picture

BUNDLE = "bundle"
PICTURE = "training.png"
FOREST = "forest.safetensors"
_RUN_NAME = "train"
_SECONDS_TO_PLACE = 30.0


def train(settings: TrainSettings, watch: Callable[[TrainEvent], None]) -> BundleDescription:
    """Train a preset and write its bundle to ``OUT/bundle``; Ray has to be initialised.

    Parameters
    ----------
    watch
        Called in this thread with every event.

    Raises
    ------
    UsageError
        If the settings contradict each other or the preset.
    CxrRayError
        If the dataset or the run does not allow it, or training fails more often than `max_failures`.
    """
    settings = _with_absolute_paths(resolve(settings))
    dataset = Dataset(settings.data)
    network = network_options(settings)
    check_data(settings, dataset)
    check_placement(settings.worker_range[0], settings.worker_resources)
    check_run(settings)
    history = RunHistory(settings.out)
    follower = _Follower(settings, history, watch)
    begin_run(settings)
    task, statistics = _task(settings, dataset, network)
    failure: str | None = "interrupted"
    uri: str | None = None
    try:
        result = _fit(_trainer(task), task.events, follower)
        description = _write_best(result, settings, dataset, network, statistics)
        failure, uri = None, storage.child(settings.out, BUNDLE)
    except CxrRayError as error:
        failure = str(error)
        raise
    finally:
        task.events.shutdown(force=True)
        follower.finish(uri, failure)
    return description


def _with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Workers run in folders of their own."""
    init = settings.init if settings.init in ("random", "imagenet") else storage.absolute(settings.init)
    paths = {"data": storage.absolute(settings.data), "out": storage.absolute(settings.out), "init": init}
    return settings.model_copy(update=paths)


def _task(settings: TrainSettings, dataset: Dataset, network: NetworkOptions) -> tuple[WorkerTask, ClinicalStatistics]:
    layout = network.layout
    metadata = dataset.read("train", [*clinical_columns(layout.encoding), "labels"])
    inputs = clinical_inputs(metadata, layout.encoding)
    statistics = fit_statistics(inputs)
    labels = from_fixed_lists(metadata["labels"])
    size = dataset.require_pixels() if presets.find(settings.preset).reads_images else None
    train_reader, val_reader = (
        ShardReader(dataset.filesystem, tuple(dataset.row_groups(split)), size, layout, statistics)
        for split in ("train", "val")
    )
    task = WorkerTask(
        settings=settings,
        network=network,
        train=train_reader,
        val=val_reader,
        train_images=dataset.split("train").images,
        val_images=dataset.split("val").images,
        weights=class_weights(labels, settings.weight_cap),
        prior=prior_log_odds(labels) if settings.prior_bias else None,
        forest=_forest(settings, network, inputs, statistics, labels),
        events=_queue_beside_the_driver(),
    )
    return task, statistics


def _forest(
    settings: TrainSettings,
    network: NetworkOptions,
    inputs: ClinicalInputs,
    statistics: ClinicalStatistics,
    labels: np.ndarray,
) -> dict[str, torch.Tensor]:
    """The trees of a network that has some, from the run's folder where they were grown before."""
    # Only asked whether it has trees and of what size: nothing of it is held.
    with torch.device("meta"):
        forest = presets.build(settings.preset, network).trees()
    if forest is None:
        return {}
    filesystem, root = storage.resolve(settings.out)
    path = f"{root}/{FOREST}"
    if settings.resume and storage.exists(filesystem, path):
        return load(storage.read_bytes(filesystem, path))
    if settings.withhold:
        inputs = partly_withheld(inputs, settings.withhold, np.random.default_rng(settings.seed))
    state = grow_forest(forest, encode(inputs, statistics, network.layout), labels, settings.seed)
    storage.write_atomically(filesystem, path, save(state))
    return state


def _queue_beside_the_driver() -> Queue:
    """Anywhere else it would be lost with another node, and the run with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _trainer(task: WorkerTask) -> TorchTrainer:
    settings = task.settings
    filesystem, root = storage.resolve(settings.out)
    fewest, most = settings.worker_range
    if fewest != most:
        # A node that is lost without notice leaves room for fewer workers: Ray tries again with those only after this time.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    return TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        torch_config=NodeNetworkConfig(),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=settings.gpu,
            resources_per_worker=settings.worker_resources,
            elastic_resize_monitor_interval_s=settings.resize_seconds,
        ),
        run_config=RunConfig(
            name=_RUN_NAME,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep, checkpoint_score_attribute="val_auc"),
        ),
    )


class _Follower:
    """Passes events on to whoever watches, the trackers and the run's history, and keeps why the run cannot go on."""

    def __init__(self, settings: TrainSettings, history: RunHistory, watch: Callable[[TrainEvent], None]) -> None:
        self.failure: str | None = None
        self.placed = False
        self._settings, self._history, self._watch = settings, history, watch
        self._trackers = trackers_for(settings, self.notice)
        # Before anything is trained: a tracker that cannot be reached is told while somebody is still looking.
        self._trackers.start(settings, len(history.results) + 1)

    def __call__(self, event: TrainEvent) -> None:
        if event.kind == "placed":
            self.placed = True
            return
        if event.kind == "start":
            self._catch_up(event)
            self._trackers.start(self._settings, event.epoch)
        elif event.kind == "step":
            self._trackers.step(event)
        elif event.kind == "epoch" and event.result is not None:
            self._history.add(event.result)
            self._trackers.epoch(event)
            self._draw()
        elif event.kind == "failed":
            self.failure = event.text
        self._watch(event)

    def _catch_up(self, start: TrainEvent) -> None:
        """A worker may be lost when the checkpoint of an epoch is safe and its figures are not yet told."""
        result = start.result
        if result is not None and result.epoch not in {told.epoch for told in self._history.results}:
            images = result.epoch * start.images_total // self._settings.epochs
            self(TrainEvent.of_epoch(result, images, start.images_total))

    def notice(self, text: str) -> None:
        """Tell something that no worker said."""
        self._watch(TrainEvent("notice", 1, text=text))

    def finish(self, bundle_uri: str | None, failure: str | None) -> None:
        """Close the trackers."""
        aucs = [result.val_auc for result in self._history.results if math.isfinite(result.val_auc)]
        best = max(aucs, default=math.nan)
        self._trackers.finish({"best_val_auc": best}, bundle_uri, failure)

    def _draw(self) -> None:
        filesystem, root = storage.resolve(self._settings.out)
        picture = training_picture(self._history.results, f"{self._settings.preset}, {storage.shown(self._settings.data)}")
        storage.write_atomically(filesystem, f"{root}/{PICTURE}", picture)


def _fit(trainer: TorchTrainer, events: Queue, follower: _Follower) -> ray.train.Result:
    outcome: list[ray.train.Result | Exception] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    waits_since: float | None = time.monotonic()
    while True:
        alive = thread.is_alive()
        for event in _pending(events):
            follower(event)
        if follower.placed:
            waits_since = None
        elif waits_since is not None and time.monotonic() - waits_since > _SECONDS_TO_PLACE:
            waits_since = None
            workers = trainer.scaling_config.min_workers
            if asked := lacking(workers, dict(trainer.scaling_config.resources_per_worker or {})):
                follower.notice(f"still waiting for {asked}")
        if not alive:
            break
        thread.join(timeout=0.2)
    result = outcome[0]
    if isinstance(result, Exception):
        raise CxrRayError(
            f"training failed: {_reason(result)}; see the run's folder, mend it and go on with --resume"
        ) from result
    if result.error is not None:
        raise CxrRayError(f"training failed: {_reason(result.error)}; mend it and go on with --resume") from result.error
    if follower.failure is not None:
        raise CxrRayError(f"training failed: {follower.failure}")
    return result


def _pending(events: Queue) -> Iterator[TrainEvent]:
    while True:
        try:
            yield events.get(block=False)
        except Empty:
            return


def _reason(error: Exception) -> str:
    """The last line of what is often a remote traceback."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _reason(next(iter(failures.values())))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _write_best(
    result: ray.train.Result,
    settings: TrainSettings,
    dataset: Dataset,
    network: NetworkOptions,
    statistics: ClinicalStatistics,
) -> BundleDescription:
    by = "val_auc" if settings.select == "best" else "epoch"
    # A checkpoint taken in the middle of an epoch was not validated.
    validated = [pair for pair in result.best_checkpoints if pair[1]["val_auc"] >= 0]
    checkpoint, _ = max(validated, key=lambda pair: pair[1][by])
    uri = storage.child(settings.out, BUNDLE)
    with checkpoint.as_directory() as folder:
        validation = json.loads((Path(folder) / VALIDATION).read_text())
        thresholds = validation.pop("thresholds")
        chosen = thresholds.pop("youden")
        if settings.resume and (finished := _bundle_of(uri, validation, dataset)) is not None:
            return finished
        size = dataset.require_pixels() if presets.find(settings.preset).reads_images else None
        description = describe(
            preset=settings.preset,
            network=network,
            size=size,
            input_size=settings.input_size or size,
            statistics=asdict(statistics),
            training_inputs=training_inputs(dataset, network.layout.encoding, with_films=size is not None),
            thresholds=chosen,
            other_thresholds=thresholds,
            validation=validation,
            settings=without_credentials(settings).model_dump(mode="json"),
            dataset_digest=dataset.digest,
        )
        with judged(presets.build(settings.preset, network), Path(folder), settings.ema) as model:
            return write_bundle(uri, model, description)


def _bundle_of(uri: str, validation: dict[str, object], dataset: Dataset) -> BundleDescription | None:
    """The bundle that an earlier, finished run wrote from the same checkpoint: resuming it must not make a new model."""
    try:
        written = read_description(uri)
    except CxrRayError:
        return None
    same = written.validation == validation and written.dataset_digest == dataset.digest
    return written if same else None
