"""Training on a Ray cluster: DDP workers fed by Ray Data, a checkpoint an epoch, a bundle at the end.

`cxr_ray.train_worker` is what each worker does. A lost worker makes Ray start all of them again; they go on from the last
checkpoint.
"""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import ray
import ray.data
import ray.train
import torch
import yaml
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from cxr_ray import presets, storage
from cxr_ray.bundle import BundleDescription, describe, read_description, write_bundle
from cxr_ray.clinical import ClinicalStatistics, fit_statistics
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError
from cxr_ray.losses import class_weights
from cxr_ray.progress import ProgressReport
from cxr_ray.records import CLINICAL_COLUMNS, clinical_inputs, from_fixed_lists
from cxr_ray.settings import as_yaml
from cxr_ray.train_events import TrainEvent
from cxr_ray.train_worker import STATE, VALIDATION, WorkerTask, train_worker
from cxr_ray.training import TrainSettings

BUNDLE = "bundle"
RUN_SETTINGS = "settings.yaml"
_RUN_NAME = "train"


def train(settings: TrainSettings, watch: Callable[[TrainEvent], None]) -> BundleDescription:
    """Train a preset and write its bundle to ``OUT/bundle``; Ray has to be initialised.

    Parameters
    ----------
    watch
        Called in this thread with every event.

    Raises
    ------
    CxrRayError
        If the dataset or the run does not allow it, or training fails more often than `max_failures`.
    """
    presets.find(settings.preset)
    settings = _with_absolute_paths(settings)
    dataset = Dataset(settings.data)
    size = dataset.require_pixels()
    _check_labelled(dataset)
    _check_resources(settings)
    _prepare_run(settings)
    metadata = dataset.read("train", [*CLINICAL_COLUMNS, "labels"])
    statistics = fit_statistics(clinical_inputs(metadata))
    events = Queue(actor_options={"num_cpus": 0})
    task = WorkerTask(
        settings=settings,
        statistics=statistics,
        weights=class_weights(from_fixed_lists(metadata["labels"])),
        train_images=dataset.split("train").images,
        val_images=dataset.split("val").images,
        events=events,
    )
    try:
        result = _fit(_trainer(task, dataset), events, watch)
    finally:
        events.shutdown(force=True)
    return _write_best(result, settings, dataset, statistics, size)


def _with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Workers run in folders of their own."""
    init = settings.init if settings.init in ("random", "imagenet") else storage.absolute(settings.init)
    paths = {"data": storage.absolute(settings.data), "out": storage.absolute(settings.out), "init": init}
    return settings.model_copy(update=paths)


def show_training(event: TrainEvent, progress: ProgressReport, epochs: int) -> None:
    """Show an event of training on a terminal or in a log."""
    if event.kind == "start":
        progress.set_total(event.images_total)
        begins = "training" if event.epoch == 1 else f"going on from the checkpoint of epoch {event.epoch - 1}"
        progress.say(f"{begins}, {len(event.pids)} workers (processes {', '.join(map(str, event.pids))})")
        progress.move_to(event.images)
    elif event.kind == "step":
        progress.move_to(event.images, f"epoch {event.epoch}/{epochs}, loss {event.loss:.4f}", rate=event.rate)
    else:
        progress.move_to(event.images)
        progress.say(f"epoch {event.epoch}/{epochs}: loss {event.loss:.4f}, validation AUC {event.auc:.3f}")


def _check_labelled(dataset: Dataset) -> None:
    for name in ("train", "val"):
        if dataset.split(name).labelled == 0:
            raise CxrRayError(f"{dataset.uri}: split {name} has no labelled image; ingest with labels")


def _check_resources(settings: TrainSettings) -> None:
    """Refuse at once what Ray would wait for endlessly."""
    available = ray.cluster_resources()
    wanted = settings.workers * settings.cpus_per_worker
    if wanted >= available.get("CPU", 0):
        raise CxrRayError(
            f"setting 'workers' is {settings.workers} with {settings.cpus_per_worker} CPUs each, the cluster has "
            f"{available.get('CPU', 0):.0f} and the data readers need some; lower workers or cpus_per_worker"
        )
    if settings.gpu and settings.workers > available.get("GPU", 0):
        raise CxrRayError(
            f"setting 'workers' is {settings.workers} with a GPU each, the cluster has {available.get('GPU', 0):.0f}; "
            "lower workers or leave out --gpu"
        )


def _prepare_run(settings: TrainSettings) -> None:
    """A run's folder is new, or the one to go on with."""
    filesystem, root = storage.resolve(settings.out)
    earlier = storage.exists(filesystem, f"{root}/{RUN_SETTINGS}")
    if earlier and not settings.resume:
        raise CxrRayError(f"--out {settings.out}: holds a run already; choose another folder or go on with --resume")
    if settings.resume and not earlier:
        raise CxrRayError(f"--out {settings.out}: holds no run to resume; leave out --resume")
    if earlier:
        _check_same_run(settings, storage.read_bytes(filesystem, f"{root}/{RUN_SETTINGS}").decode())
    filesystem.create_dir(root, recursive=True)
    storage.write_atomically(filesystem, f"{root}/{RUN_SETTINGS}", as_yaml(settings).encode())


def _check_same_run(settings: TrainSettings, earlier_yaml: str) -> None:
    earlier = yaml.safe_load(earlier_yaml)
    now = settings.model_dump(mode="json")
    for name in ("preset", "encoding", "data", "batch_size", "epochs"):
        if earlier.get(name) != now[name]:
            raise CxrRayError(
                f"--resume: setting {name!r} is {now[name]!r}, the run in {settings.out} has {earlier.get(name)!r}; "
                "give the same, or start a new run"
            )


def _trainer(task: WorkerTask, dataset: Dataset) -> TorchTrainer:
    settings = task.settings
    filesystem, root = storage.resolve(settings.out)
    images = ray.data.read_parquet(
        dataset.paths("train"),
        filesystem=dataset.filesystem,
        shuffle=ray.data.FileShuffleConfig(seed=settings.seed, reseed_after_execution=True),
    )
    return TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        datasets={"train": images.select_columns(["pixels", "labels", *CLINICAL_COLUMNS])},
        dataset_config=DataConfig(datasets_to_split=["train"]),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.gpu else {}),
        ),
        run_config=RunConfig(
            name=_RUN_NAME,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="val_auc"),
        ),
    )


def _fit(trainer: TorchTrainer, events: Queue, watch: Callable[[TrainEvent], None]) -> ray.train.Result:
    outcome: list[ray.train.Result | Exception] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    while True:
        alive = thread.is_alive()
        for event in _pending(events):
            watch(event)
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
    result: ray.train.Result, settings: TrainSettings, dataset: Dataset, statistics: ClinicalStatistics, size: int
) -> BundleDescription:
    by = "val_auc" if settings.select == "best" else "epoch"
    checkpoint, _ = max(result.best_checkpoints, key=lambda pair: pair[1][by])
    model = presets.build(settings.preset, encoding=settings.encoding)
    with checkpoint.as_directory() as folder:
        model.load_state_dict(torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)["model"])
        validation = json.loads((Path(folder) / VALIDATION).read_text())
    thresholds = validation.pop("thresholds")
    uri = f"{settings.out.rstrip('/')}/{BUNDLE}"
    if settings.resume and (finished := _bundle_of(uri, validation, dataset)) is not None:
        return finished
    description = describe(
        preset=settings.preset,
        encoding=settings.encoding,
        size=size,
        statistics=asdict(statistics),
        thresholds=thresholds,
        validation=validation,
        settings=settings.model_dump(mode="json"),
        dataset_digest=dataset.digest,
    )
    return write_bundle(uri, model, description)


def _bundle_of(uri: str, validation: dict[str, object], dataset: Dataset) -> BundleDescription | None:
    """The bundle that an earlier, finished run wrote from the same checkpoint: resuming it must not make a new model."""
    try:
        written = read_description(uri)
    except CxrRayError:
        return None
    same = written.validation == validation and written.dataset_digest == dataset.digest
    return written if same else None
