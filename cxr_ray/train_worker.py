"""What a training worker does: train on its share, validate with the others, report a checkpoint an epoch.

Every worker reads its own share of the training split. Validation goes another way, since Ray equalises shares by dropping
rows: the workers take turns over the batches of the shard files, and what all of them scored has to be as many images as the
manifest has.
"""

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray.train
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from ray.train import Checkpoint, CheckpointConsistencyMode
from ray.train.torch import prepare_model
from ray.util.queue import Queue
from torch import nn

from cxr_ray import presets
from cxr_ray.clinical import ClinicalStatistics, encode_paper
from cxr_ray.cpus import available_cpus
from cxr_ray.dataset import Dataset
from cxr_ray.findings import FINDINGS
from cxr_ray.losses import ClassWeights
from cxr_ray.records import CLINICAL_COLUMNS, clinical_inputs, from_fixed_lists, pixel_array
from cxr_ray.scoring import auroc, mean_auroc, youden_thresholds
from cxr_ray.train_events import TrainEvent
from cxr_ray.training import Batch, TrainingStep, TrainSettings, make_optimizer, probabilities

STATE = "state.pt"
VALIDATION = "validation.json"
_SECONDS_BETWEEN_EVENTS = 1.0
_SECONDS_TO_COMMIT = 60.0


@dataclass(frozen=True)
class WorkerTask:
    """Everything a worker needs besides its data."""

    settings: TrainSettings
    statistics: ClinicalStatistics
    weights: ClassWeights
    train_images: int
    val_images: int
    events: Queue


def train_worker(config: dict[str, WorkerTask]) -> None:
    """Ray Train's loop of one worker; `config` holds the ``task``."""
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
        state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


def _train_epoch(step: TrainingStep, task: WorkerTask, epoch: int, device: torch.device, reporter: "_Reporter") -> None:
    settings = task.settings
    world = ray.train.get_context().get_world_size()
    per_worker = max(1, settings.batch_size // world)
    steps = max(1, task.train_images // world // per_worker)
    batches = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=per_worker,
        # A last batch of a single image has no batch statistics.
        drop_last=task.train_images // world >= per_worker,
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


def _validate(model: nn.Module, task: WorkerTask, rank: int, world: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
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
        torch.save(state, Path(folder) / STATE)
        validation = {
            "epoch": epoch + 1,
            "images": len(scored[0]),
            "auc": metrics["val_auc"],
            "auc_by_finding": {name: float(auc) for name, auc in zip(FINDINGS, aucs, strict=True) if np.isfinite(auc)},
            "thresholds": dict(zip(FINDINGS, youden_thresholds(*scored).tolist(), strict=True)),
        }
        (Path(folder) / VALIDATION).write_text(json.dumps(validation))
        checkpoint = Checkpoint.from_directory(folder)
    ray.train.report(metrics, checkpoint=checkpoint)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        # A checkpoint that was reported outlives its workers only when the controller has taken note of it, a second later.
        ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, timeout_s=_SECONDS_TO_COMMIT)
    reporter.validated(epoch, mean)


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


class _Reporter:
    """Sends the first worker's events, now and then, to the process that started the run."""

    def __init__(self, task: WorkerTask, world: int, rank: int) -> None:
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
