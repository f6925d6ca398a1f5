"""Training on a Ray cluster: DDP workers fed by Ray Data, a checkpoint an epoch, a bundle at the end.

Every worker reads its own share of the training split. Validation goes another way, since Ray equalises shares by dropping
rows: the workers take turns over the batches of the shard files, and what all of them scored has to be as many images as the
manifest has. A lost worker makes Ray start all of them again; they go on from the last checkpoint.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchTrainer, prepare_model
from ray.util.queue import Empty, Queue
from torch import nn

from cxr_ray import presets, storage
from cxr_ray.bundle import BundleDescription, describe, write_bundle
from cxr_ray.clinical import ClinicalStatistics, encode_paper, fit_statistics
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import Dataset
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.losses import ClassWeights, class_weights
from cxr_ray.progress import ProgressReport
from cxr_ray.records import CLINICAL_COLUMNS, clinical_inputs, from_fixed_lists, pixel_array
from cxr_ray.scoring import auroc, mean_auroc, youden_thresholds
from cxr_ray.settings import as_yaml
from cxr_ray.training import Batch, TrainingStep, TrainSettings, make_optimizer, probabilities

BUNDLE = "bundle"
RUN_SETTINGS = "settings.yaml"
_RUN_NAME = "train"
_STATE = "state.pt"
_VALIDATION = "validation.json"
_SECONDS_BETWEEN_EVENTS = 1.0
_SECONDS_TO_COMMIT = 60.0


@dataclass(frozen=True)
class TrainEvent:
    """What happened in training, for whoever watches.

    Attributes
    ----------
    kind
        "start" (of a first or renewed attempt), "step", or "epoch" (validated and checkpointed).
    epoch
        From 1.
    images, images_total
        Images trained on since the beginning of the run, and at its end.
    rate
        Images a second over all workers.
    loss
        Mean training loss since the last event, at "epoch" that of the whole epoch.
    auc
        Mean validation AUC of the epoch; NaN before "epoch".
    """

    kind: str
    epoch: int
    images: int = 0
    images_total: int = 0
    rate: float = 0.0
    loss: float = float("nan")
    auc: float = float("nan")
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Task:
    """Everything a worker needs besides its data."""

    settings: TrainSettings
    statistics: ClinicalStatistics
    weights: ClassWeights
    train_images: int
    val_images: int
    events: Queue


def _to_batch(table: pa.Table, statistics: ClinicalStatistics) -> Batch:
    return Batch(
        pixels=torch.from_numpy(np.array(pixel_array(table["pixels"]))),
        clinical=torch.from_numpy(encode_paper(clinical_inputs(table), statistics)),
        labels=torch.from_numpy(from_fixed_lists(table["labels"])),
    )


@dataclass(frozen=True)
class _Collate(ArrowBatchCollateFn):
    """Arrow batch to tensors, in Ray Data's threads."""

    statistics: ClinicalStatistics

    def __call__(self, batch: pa.Table) -> dict[str, torch.Tensor]:
        made = _to_batch(batch, self.statistics)
        return {"pixels": made.pixels, "clinical": made.clinical, "labels": made.labels}


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
    task = _Task(
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
    import yaml  # noqa: PLC0415

    earlier = yaml.safe_load(earlier_yaml)
    now = settings.model_dump(mode="json")
    for name in ("preset", "encoding", "data", "batch_size", "epochs"):
        if earlier.get(name) != now[name]:
            raise CxrRayError(
                f"--resume: setting {name!r} is {now[name]!r}, the run in {settings.out} has {earlier.get(name)!r}; "
                "give the same, or start a new run"
            )


def _trainer(task: _Task, dataset: Dataset) -> TorchTrainer:
    settings = task.settings
    filesystem, root = storage.resolve(settings.out)
    images = ray.data.read_parquet(
        dataset.paths("train"),
        filesystem=dataset.filesystem,
        shuffle=ray.data.FileShuffleConfig(seed=settings.seed, reseed_after_execution=True),
    )
    return TorchTrainer(
        _train_worker,
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
        model.load_state_dict(torch.load(Path(folder) / _STATE, map_location="cpu", weights_only=True)["model"])
        validation = json.loads((Path(folder) / _VALIDATION).read_text())
    thresholds = validation.pop("thresholds")
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
    return write_bundle(f"{settings.out.rstrip('/')}/{BUNDLE}", model, description)


# What follows runs in the workers.


def _train_worker(config: dict[str, _Task]) -> None:
    task = config["task"]
    settings = task.settings
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not settings.gpu:
        torch.set_num_threads(max(1, available_cpus() // context.get_local_world_size()))
    torch.manual_seed(settings.seed)
    device = ray.train.torch.get_device()

    model = presets.build(settings.preset, init=settings.init, encoding=settings.encoding).to(device)
    optimizer = make_optimizer(model, settings)
    first_epoch = _restore(model, optimizer)
    wrapped = prepare_model(model)
    weights = ClassWeights(task.weights.positive.to(device), task.weights.negative.to(device))
    # Different in every worker and epoch, the same in every run with this seed.
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + first_epoch * 1009 + rank)
    step = TrainingStep(wrapped, optimizer, weights, settings, generator)
    reporter = _Reporter(task, world, rank)
    reporter.started(first_epoch)
    for epoch in range(first_epoch, settings.epochs):
        _train_epoch(step, task, epoch, device, reporter)
        scores = _validate(model, task, rank, world, device)
        _report(epoch, model, optimizer, scores, reporter)


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / _STATE, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


def _train_epoch(step: TrainingStep, task: _Task, epoch: int, device: torch.device, reporter: "_Reporter") -> None:
    settings = task.settings
    world = ray.train.get_context().get_world_size()
    per_worker = max(1, settings.batch_size // world)
    steps = max(1, task.train_images // world // per_worker)
    batches = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=per_worker,
        # A last batch of a single image has no batch statistics.
        drop_last=steps > 0 and task.train_images // world >= per_worker,
        collate_fn=_Collate(task.statistics),
        local_shuffle_buffer_size=min(settings.shuffle_buffer, task.train_images // world) or None,
        local_shuffle_seed=settings.seed + epoch,
    )
    step.model.train()
    reporter.epoch_started()
    for index, tensors in enumerate(batches):
        batch = Batch(tensors["pixels"], tensors["clinical"], tensors["labels"]).to(device)
        loss = step(batch, progress=min(1.0, (epoch + index / steps) / settings.epochs))
        reporter.stepped(epoch, len(batch.labels), loss)


def _validate(model: nn.Module, task: _Task, rank: int, world: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of the whole validation split, gathered on every worker."""
    if world > 1:
        # Each worker's batch statistics are its own since the last step; the checkpoint will hold the first worker's.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    dataset = Dataset(task.settings.data)
    scores = [np.zeros((0, len(FINDINGS)), dtype=np.float32)]
    labels = [np.zeros((0, len(FINDINGS)), dtype=np.float32)]
    batches = dataset.batches("val", ["pixels", "labels", *CLINICAL_COLUMNS], task.settings.batch_size)
    for number, table in enumerate(batches):
        if number % world == rank:
            batch = _to_batch(table, task.statistics).to(device)
            predicted = probabilities(model, batch.pixels, batch.clinical, task.settings.precision)
            scores.append(predicted.cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
    own = (np.concatenate(scores), np.concatenate(labels))
    parts = [own] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, own)
    counted = sum(len(part[0]) for part in parts)
    if counted != task.val_images:
        raise RuntimeError(f"validation scored {counted} images, the manifest has {task.val_images}")
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _report(
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scored: tuple[np.ndarray, np.ndarray],
    reporter: "_Reporter",
) -> None:
    aucs = auroc(*scored)
    mean = mean_auroc(aucs)
    # A validation split without a single positive cannot rank checkpoints: all are then worth the same.
    metrics = {"val_auc": mean if np.isfinite(mean) else 0.0, "epoch": epoch + 1}
    checkpoint, folder = None, None
    if reporter.rank == 0:
        folder = tempfile.mkdtemp(prefix="checkpoint-")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state, Path(folder) / _STATE)
        validation = {
            "epoch": epoch + 1,
            "images": len(scored[0]),
            "auc": metrics["val_auc"],
            "auc_by_finding": {name: float(auc) for name, auc in zip(FINDINGS, aucs, strict=True) if np.isfinite(auc)},
            "thresholds": dict(zip(FINDINGS, youden_thresholds(*scored).tolist(), strict=True)),
        }
        (Path(folder) / _VALIDATION).write_text(json.dumps(validation))
        checkpoint = Checkpoint.from_directory(folder)
    ray.train.report(metrics, checkpoint=checkpoint)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        # A checkpoint that was reported outlives its workers only when the controller has taken note of it, a second later.
        ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, timeout_s=_SECONDS_TO_COMMIT)
    reporter.validated(epoch, mean)


class _Reporter:
    """Sends the first worker's events, now and then, to the process that started the run."""

    def __init__(self, task: _Task, world: int, rank: int) -> None:
        self.rank = rank
        self._task, self._world = task, world
        self._sent = time.monotonic()
        self._first_step = True
        self._images = self._images_sent = 0
        self._losses: list[torch.Tensor] = []
        self._epoch_losses: list[torch.Tensor] = []

    def started(self, first_epoch: int) -> None:
        self._images = self._images_sent = first_epoch * self._task.train_images
        pids: list[int] = [os.getpid()]
        if self._world > 1:
            pids = [0] * self._world
            torch.distributed.all_gather_object(pids, os.getpid())
        self._send("start", first_epoch, pids=tuple(pids))

    def epoch_started(self) -> None:
        self._first_step = True

    def stepped(self, epoch: int, images: int, loss: torch.Tensor) -> None:
        self._images += images * self._world
        if self._first_step:
            # The rate is that of training: validation, checkpoint and the wait for the first batch lie before it.
            self._first_step, self._sent, self._images_sent = False, time.monotonic(), self._images
        self._losses.append(loss)
        self._epoch_losses.append(loss)
        if time.monotonic() - self._sent >= _SECONDS_BETWEEN_EVENTS:
            self._send("step", epoch)

    def validated(self, epoch: int, auc: float) -> None:
        self._images = (epoch + 1) * self._task.train_images
        self._losses, self._epoch_losses = self._epoch_losses, []
        self._send("epoch", epoch, auc=auc)

    def _send(self, kind: str, epoch: int, *, auc: float = float("nan"), pids: tuple[int, ...] = ()) -> None:
        if self.rank != 0:
            return
        now = time.monotonic()
        event = TrainEvent(
            kind=kind,
            epoch=epoch + 1,
            images=self._images,
            images_total=self._task.settings.epochs * self._task.train_images,
            rate=(self._images - self._images_sent) / max(now - self._sent, 1e-6),
            loss=float(torch.stack(self._losses).mean()) if self._losses else float("nan"),
            auc=auc,
            pids=pids,
        )
        self._sent, self._images_sent, self._losses = now, self._images, []
        self._task.events.put(event)
