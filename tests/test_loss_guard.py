"""The guard finds the first loss that is no number, and whose images they were, on whichever worker."""

import os
import socket
import time

import numpy as np
import pytest
import torch

from cxr_ray import loss_guard
from cxr_ray.loss_guard import LossGuard

CPU = torch.device("cpu")


def add(guard: LossGuard, *losses: float) -> None:
    for number, loss in enumerate(losses):
        guard.add(torch.tensor(loss), torch.tensor([10 * number, 10 * number + 1]))


def test_finite_losses_pass():
    guard = LossGuard(1, CPU)
    add(guard, 0.5, 1e30, -3.0)
    assert guard.check() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_step_is_named(bad):
    guard = LossGuard(1, CPU)
    add(guard, 0.5, bad, float("nan"), 0.5)
    np.testing.assert_array_equal(guard.check(), [10, 11])
    add(guard, 0.5)
    assert guard.check() is None


def test_it_is_due_once_in_some_seconds(monkeypatch):
    monkeypatch.setattr(loss_guard, "_SECONDS_BETWEEN_CHECKS", 1.0)
    guard = LossGuard(1, CPU)
    add(guard, 0.5)
    # The first step is always looked at: a learning rate far too high shows there.
    assert guard.due()
    time.sleep(0.1)
    guard.check()
    counted = 0
    while not guard.due():
        add(guard, 0.5)
        counted += 1
    # A step took 0.1 s, so that ten of them take a second.
    assert 5 <= counted <= 10


def test_quick_steps_are_checked_after_two_hundred():
    guard = LossGuard(1, CPU)
    add(guard, 0.5)
    guard.check()
    for _ in range(199):
        add(guard, 0.5)
        assert not guard.due()
    add(guard, 0.5)
    assert guard.due()


def two_workers(rank: int, port: int, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    guard = LossGuard(2, CPU)
    add(guard, 0.5, float("nan") if rank == 1 else 0.5, float("nan"))
    first = guard.check()
    add(guard, 0.5)
    second = guard.check()
    queue.put((rank, first.tolist(), second))
    torch.distributed.destroy_process_group()


def test_workers_agree_on_the_first_bad_step():
    """The loss of one worker spoils the weights of all: the images that matter are those of the first."""
    context = torch.multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    queue = context.Queue()
    processes = [context.Process(target=two_workers, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert answers == [(0, [], None), (1, [10, 11], None)]
