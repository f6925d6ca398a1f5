"""What a training worker does: train on its share, validate with the others, report a checkpoint an epoch.

Each worker has its own order of images (`cxr_ray.epoch_order`). The validation split is cut into as many parts as there are
workers, and what all of them scored has to be as many images as the manifest has.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode
from ray.train.torch import prepare_model
from ray.util.queue import Queue

from cxr_ray import presets
from cxr_ray.cpus import available_cpus
from cxr_ray.ema import AveragedWeights
from cxr_ray.epoch_order import EpochOrder, Segment, windows
from cxr_ray.findings import FINDINGS
from cxr_ray.loss_guard import LossGuard
from cxr_ray.losses import ClassWeights, Loss, make_loss
from cxr_ray.operating import choose
from cxr_ray.presets.preset import Network, NetworkOptions
from cxr_ray.scoring import auroc, mean_over_findings
from cxr_ray.shard_rows import ShardReader
from cxr_ray.train_events import EpochResult, TrainEvent
from cxr_ray.train_reporter import Reporter
from cxr_ray.train_settings import TrainSettings
from cxr_ray.train_state import RunPosition, Trained
from cxr_ray.training import (
    Batch,
    Moment,
    TrainingStep,
    choose_precision,
    count_plateaus,
    logits_of,
    make_optimizer,
    out_of_patience,
    step_seed,
)
from cxr_ray.training_data import as_batch, stream
from cxr_ray.window_source import WorkerShare

_SECONDS_TO_COMMIT = 60.0
_METADATA_ROW_BYTES = 512
_FEWEST_AT_ONCE = 32


@dataclass(frozen=True)
class WorkerTask:
    """Everything a worker needs besides its data.

    Attributes
    ----------
    train, val
        Readers of the two splits.
    prior
        Log-odds of each finding to start the last layer with, or None.
    forest
        State of the network's trees, empty where it has none.
    """

    settings: TrainSettings
    network: NetworkOptions
    train: ShardReader
    val: ShardReader
    train_images: int
    val_images: int
    weights: ClassWeights
    prior: torch.Tensor | None
    forest: dict[str, torch.Tensor]
    events: Queue


def train_worker(config: dict[str, WorkerTask]) -> None:
    """Ray Train's loop of one worker; `config` holds the ``task``."""
    _Worker(config["task"]).run()


class _Worker:
    def __init__(self, task: WorkerTask) -> None:
        context = ray.train.get_context()
        if context.get_world_rank() == 0:
            task.events.put(TrainEvent("placed", 1))
        self._task, self._settings = task, task.settings
        self._rank, self._workers = context.get_world_rank(), context.get_world_size()
        if not self._settings.gpu:
            torch.set_num_threads(self._settings.threads or max(1, available_cpus() // context.get_local_world_size()))
        self._device = ray.train.torch.get_device()
        checkpoint = ray.train.get_checkpoint()
        self._model = self._build(resumed=checkpoint is not None)
        self._trained = Trained(
            self._model,
            make_optimizer(self._model, self._settings),
            AveragedWeights(self._model, self._settings.ema) if self._settings.ema else None,
        )
        self._position = RunPosition() if checkpoint is None else self._trained.restore(checkpoint)
        # Of fewer images than a batch, each worker takes as many as the others.
        self._batch = max(1, min(self._settings.batch_size, task.train_images) // self._workers)
        self._reporter = Reporter(
            task.events,
            rank=self._rank,
            workers=self._workers,
            images_total=self._settings.epochs * task.train_images,
        )
        self._guard = LossGuard(self._workers, self._device)
        self._noticed_deadline: int | None = -1

    def _build(self, *, resumed: bool) -> Network:
        settings, task = self._settings, self._task
        torch.manual_seed(settings.seed)
        # A checkpoint brings all weights: those that the run began with need not be there any more.
        init = "random" if resumed else settings.init
        model = presets.build(settings.preset, task.network, init=init)
        if task.prior is not None and not resumed:
            model.set_prior(task.prior)
        if (forest := model.trees()) is not None and not resumed:
            forest.load_state_dict(task.forest)
        return model.to(self._device)

    def run(self) -> None:
        position, settings = self._position, self._settings
        step = self._step()
        orders = [self._order(epoch) for epoch in range(position.epoch, settings.epochs)]
        share = WorkerShare(self._workers, self._rank, self._batch)
        batches = stream(self._task.train, orders, share, withhold=settings.withhold)
        images = position.epoch * self._task.train_images + position.images
        self._reporter.begin_run(position.epoch, images, position.last)
        for order in orders:
            if out_of_patience(self._position.val_aucs, settings.patience):
                self._reporter.stopped(
                    order.epoch - 1, f"validation AUC has not improved for {settings.patience} epochs: the run ends"
                )
                return
            if not self._train_epoch(order, step, batches):
                return
            self._end_epoch(step)

    def _step(self) -> TrainingStep:
        settings = self._settings
        precision = choose_precision(settings.precision, self._device) if self._model.reads_images else "float32"
        if settings.compile:
            self._model.compile()
        # Batch statistics are each worker's own between validations, where they are averaged: DDP need not send them.
        wrapped = prepare_model(
            self._model, parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True}
        )
        return TrainingStep(
            model=wrapped,
            optimizer=self._trained.optimizer,
            loss=self._loss(self._device),
            settings=settings,
            precision=precision,
            size=settings.input_size,
            averaged=self._trained.averaged,
        )

    def _loss(self, device: torch.device) -> Loss:
        return make_loss(self._settings.loss, self._task.weights.to(device), self._settings.label_smoothing)

    def _order(self, epoch: int) -> EpochOrder:
        reader = self._task.train
        row_bytes = _METADATA_ROW_BYTES if reader.size is None else reader.size**2
        return EpochOrder(
            group_rows=tuple(group.rows for group in reader.groups),
            seed=self._settings.seed,
            epoch=epoch,
            window=max(self._batch, self._settings.window * 1024**2 // row_bytes),
            done=self._position.done if epoch == self._position.epoch else (),
        )

    def _train_epoch(self, order: EpochOrder, step: TrainingStep, batches: Iterator[Batch]) -> bool:
        """Train on the rest of an epoch; False where the loss is no number any more."""
        steps = order.steps(self._workers, self._batch)
        begun_at = self._position.images
        plateaus = count_plateaus(self._position.val_losses) if self._settings.schedule == "plateau" else 0
        step.model.train()
        self._reporter.begin_epoch()
        for number in range(steps):
            asked = time.monotonic()
            batch = next(batches)
            self._reporter.waited(time.monotonic() - asked)
            images = begun_at + number * self._workers * self._batch
            moment = Moment(
                progress=(order.epoch + images / self._task.train_images) / self._settings.epochs,
                seed=step_seed(self._settings.seed, order.epoch, images, self._rank),
                plateaus=plateaus,
            )
            loss = step(batch.to(self._device), moment)
            self._guard.add(loss, batch.rows)
            self._reporter.stepped(order.epoch, len(batch), loss, step.optimizer.param_groups[0]["lr"])
            if self._guard.due() or number + 1 == steps:
                if not self._loss_is_finite(order.epoch):
                    return False
                self._save_if_preempted(order.epoch, number + 1)
        return True

    def _loss_is_finite(self, epoch: int) -> bool:
        rows = self._guard.check()
        if rows is None:
            return True
        own = self._task.train.image_ids(rows) if len(rows) else []
        images = [own] * self._workers
        if self._workers > 1:
            torch.distributed.all_gather_object(images, own)
        names = ", ".join(name for part in images for name in part)
        self._reporter.failed(
            epoch,
            f"the loss is no finite number in epoch {epoch + 1}, at a batch with {names}; "
            "look at these images, or lower learning_rate; the last good checkpoint is kept",
        )
        return False

    def _save_if_preempted(self, epoch: int, steps: int) -> None:
        """Take a checkpoint in the middle of an epoch when a machine is about to be taken away."""
        notice = ray.train.get_preemption_info()
        if notice is None or notice.deadline_ms == self._noticed_deadline:
            return
        self._noticed_deadline = notice.deadline_ms
        self._average_statistics()
        position = self._position.within(Segment(self._workers, self._batch, steps), self._reporter.trained().loss)
        # Nothing of it was validated: it never becomes the bundle, and goes when there is a better one.
        self._report({"val_auc": -1.0, "epoch": epoch}, position, None)
        self._reporter.notice(
            epoch, f"a node is about to be taken away: checkpoint after {position.images} images of the epoch"
        )

    def _end_epoch(self, step: TrainingStep) -> None:
        trained = self._reporter.trained()
        self._average_statistics()
        with self._averaged_weights():
            logits, labels = self._validate(step.precision)
        val_loss = float(self._loss(torch.device("cpu"))(torch.from_numpy(logits), torch.from_numpy(labels)))
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        aucs = auroc(scores, labels)
        result = EpochResult(
            epoch=self._position.epoch + 1,
            loss=self._position.epoch_loss(trained.loss, trained.images),
            val_loss=val_loss,
            val_auc=mean_over_findings(aucs),
            val_auc_by_finding={name: float(auc) for name, auc in zip(FINDINGS, aucs, strict=True) if np.isfinite(auc)},
            learning_rate=step.optimizer.param_groups[0]["lr"],
            images_per_second=trained.images_per_second,
            waiting=trained.waiting,
            seconds=self._reporter.seconds(),
            workers=self._workers,
        )
        self._position = self._position.after_epoch(result)
        validation = {
            "epoch": result.epoch,
            "images": len(scores),
            "auc": self._position.val_aucs[-1],
            "auc_by_finding": result.val_auc_by_finding,
            "thresholds": {
                rule: dict(zip(FINDINGS, chosen.tolist(), strict=True)) for rule, chosen in choose(scores, labels).items()
            },
        }
        self._report({"val_auc": self._position.val_aucs[-1], "epoch": result.epoch}, self._position, validation)
        self._reporter.end_epoch(result, result.epoch * self._task.train_images)

    def _averaged_weights(self) -> AbstractContextManager[None]:
        averaged = self._trained.averaged
        return averaged.applied() if averaged is not None else nullcontext()

    def _average_statistics(self) -> None:
        """Give all workers the mean of their batch statistics, with the weights as they are and with the averaged ones."""
        if self._workers == 1:
            return
        self._average_buffers()
        if self._trained.averaged is not None:
            with self._averaged_weights():
                self._average_buffers()

    def _average_buffers(self) -> None:
        held = [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        if not held:
            return
        together = torch.cat([buffer.reshape(-1).float() for buffer in held])
        torch.distributed.all_reduce(together)
        together /= self._workers
        for buffer, mean in zip(held, together.split([buffer.numel() for buffer in held]), strict=True):
            buffer.copy_(mean.view_as(buffer))

    def _validate(self, precision: str) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels of the whole validation split, gathered on every worker."""
        self._model.eval()
        logits = [np.zeros((0, len(FINDINGS)), dtype=np.float32)]
        labels = [np.zeros((0, len(FINDINGS)), dtype=np.float32)]
        for batch in self._validation_batches():
            moved = batch.to(self._device)
            scored = logits_of(self._model, moved.pixels, moved.clinical, precision, self._settings.input_size)
            logits.append(scored.cpu().numpy())
            labels.append(batch.labels.numpy())
        own = (np.concatenate(logits), np.concatenate(labels))
        parts = [own] * self._workers
        if self._workers > 1:
            torch.distributed.all_gather_object(parts, own)
        counted = sum(len(part[0]) for part in parts)
        if counted != self._task.val_images:
            raise RuntimeError(f"validation scored {counted} images, the manifest has {self._task.val_images}")
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _validation_batches(self) -> Iterator[Batch]:
        """The validation split's part of this worker; the next table is read while the network scores the one before."""
        rows = np.array_split(np.arange(self._task.val_images), self._workers)[self._rank]
        # A row group at a time, since less of one takes as long to read.
        parts = windows(rows, self._task.val.groups[0].rows)
        size = max(self._batch, _FEWEST_AT_ONCE)
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self._task.val.read, part) for part in parts[:1]]
            for number in range(len(parts)):
                coming += [reader.submit(self._task.val.read, part) for part in parts[number + 1 : number + 2]]
                table = coming.pop(0).result()
                for begin in range(0, table.num_rows, size):
                    yield as_batch(table.slice(begin, size))

    def _report(self, metrics: dict[str, float], position: RunPosition, validation: dict[str, object] | None) -> None:
        checkpoint, folder = None, None
        if self._rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
            self._trained.save(folder, position, validation)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            # A reported checkpoint outlives its workers only when the controller has taken note of it, a second later.
            ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, timeout_s=_SECONDS_TO_COMMIT)
