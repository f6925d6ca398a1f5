"""The loop that one would write without Ray: the product's network and step over tensors in memory, DDP under torchrun.

    python bench/bare_loop.py --settings JSON --tensors FILE
    torchrun --nproc-per-node 2 bench/bare_loop.py --settings JSON --tensors FILE

It does what an epoch of `cxr-ray train` does but for the checkpoint: shuffled training on whole batches, then the loss and the
scores of the validation split. Prints the last epoch's figures as JSON.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from cxr_ray import presets
from cxr_ray.cpus import available_cpus
from cxr_ray.losses import class_weights, make_loss
from cxr_ray.train_settings import TrainSettings
from cxr_ray.training import Batch, Moment, TrainingStep, choose_precision, logits_of, make_optimizer, step_seed

_CPU = torch.device("cpu")
_FEWEST_AT_ONCE = 32


def make_step(settings: TrainSettings, labels: torch.Tensor, workers: int) -> TrainingStep:
    """The step as a worker of `cxr-ray train` makes it."""
    torch.manual_seed(settings.seed)
    model = presets.build(settings.preset)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if workers > 1 else model
    return TrainingStep(
        model=wrapped,
        optimizer=make_optimizer(model, settings),
        loss=make_loss(settings.loss, class_weights(labels.numpy(), settings.weight_cap), settings.label_smoothing),
        settings=settings,
        precision=choose_precision(settings.precision, _CPU),
    )


def batch_at(images: dict[str, torch.Tensor], rows: torch.Tensor) -> Batch:
    """The images at these positions."""
    return Batch(images["pixels"][rows], images["clinical"][rows], images["labels"][rows], rows)


def train_epoch(step: TrainingStep, images: dict[str, torch.Tensor], epoch: int, rank: int, workers: int) -> int:
    """Train on this worker's share; returns the images of all workers."""
    settings = step.settings
    count = len(images["labels"])
    size = settings.batch_size // workers
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed + epoch))
    steps = count // (size * workers)
    own = order[rank * steps * size : (rank + 1) * steps * size]
    step.model.train()
    losses = []
    for number, rows in enumerate(own.split(size)):
        done = number * size * workers
        moment = Moment((epoch + done / count) / settings.epochs, step_seed(settings.seed, epoch, done, rank))
        losses.append(step(batch_at(images, rows), moment))
    float(torch.stack(losses).mean())
    return steps * size * workers


def validate(step: TrainingStep, images: dict[str, torch.Tensor], rank: int, workers: int) -> None:
    """Score this worker's share of the validation split and gather everybody's."""
    model = step.model.module if isinstance(step.model, DistributedDataParallel) else step.model
    model.eval()
    own = torch.arange(len(images["labels"])).tensor_split(workers)[rank]
    size = max(step.settings.batch_size // workers, _FEWEST_AT_ONCE)
    batches = [batch_at(images, rows) for rows in own.split(size)]
    logits = torch.cat([logits_of(model, part.pixels, part.clinical, step.precision, None) for part in batches])
    parts = [logits] * workers
    if workers > 1:
        torch.distributed.all_gather_object(parts, logits)
    float(step.loss(torch.cat(parts), images["labels"]))


def main() -> None:
    """Train the epochs that the settings name; the last one's figures count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", required=True)
    parser.add_argument("--tensors", type=Path, required=True)
    given = parser.parse_args()
    settings = TrainSettings.model_validate_json(given.settings)
    rank, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(settings.threads or max(1, available_cpus() // workers))
    if workers > 1:
        torch.distributed.init_process_group("gloo")
    splits = torch.load(given.tensors, weights_only=True)
    step = make_step(settings, splits["train"]["labels"], workers)
    figures: dict[str, float] = {}
    for epoch in range(settings.epochs):
        started = time.perf_counter()
        images = train_epoch(step, splits["train"], epoch, rank, workers)
        trained = time.perf_counter()
        validate(step, splits["val"], rank, workers)
        ended = time.perf_counter()
        figures = {"images": images, "images_per_second": images / (trained - started), "seconds": ended - started}
    if rank == 0:
        print(json.dumps(figures | {"validation": ended - trained}), flush=True)
    if workers > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
