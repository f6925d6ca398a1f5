"""The order of an epoch: every image once, the same again, and the rest of it after an interruption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.epoch_order import EpochOrder, Segment, windows

GROUPS = (50, 50, 50, 17)


def order(*, groups=GROUPS, seed=1, epoch=0, window=64, done=()) -> EpochOrder:
    return EpochOrder(tuple(groups), seed, epoch, window, tuple(done))


def all_rows(made: EpochOrder, workers: int, batch: int) -> list[np.ndarray]:
    return [made.rows(workers, batch, rank) for rank in range(workers)]


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    workers=st.integers(1, 5),
    batch=st.integers(1, 16),
    window=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_no_image_twice_and_less_than_a_batch_left_out(groups, workers, batch, window, seed):
    made = order(groups=groups, seed=seed, window=window)
    shares = all_rows(made, workers, batch)
    assert {len(share) for share in shares} == {made.steps(workers, batch) * batch}
    together = np.concatenate(shares)
    assert len(set(together.tolist())) == len(together)
    assert together.size == 0 or (together.min() >= 0 and together.max() < sum(groups))
    assert sum(groups) - len(together) < workers * batch


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    stretches=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(0, 3)), max_size=3),
    workers=st.integers(1, 4),
    window=st.integers(1, 50),
)
def test_after_interruptions_the_rest_is_dealt_without_a_repetition(groups, stretches, workers, window):
    taken: list[int] = []
    done: list[Segment] = []
    for number, batch, wanted in stretches:
        part = order(groups=groups, window=window, done=done)
        steps = min(wanted, part.steps(number, batch))
        for share in all_rows(part, number, batch):
            taken += share[: steps * batch].tolist()
        done.append(Segment(number, batch, steps))
    rest = order(groups=groups, window=window, done=done)
    for share in all_rows(rest, workers, 4):
        taken += share.tolist()
    assert len(set(taken)) == len(taken)
    assert sum(groups) - len(taken) < workers * 4


def test_an_epoch_is_the_same_again_and_the_next_one_is_another():
    one, again, next_one, other_seed = order(), order(), order(epoch=1), order(seed=2)
    assert np.array_equal(one.rows(2, 8, 1), again.rows(2, 8, 1))
    assert not np.array_equal(one.rows(2, 8, 1), next_one.rows(2, 8, 1))
    assert not np.array_equal(one.rows(2, 8, 1), other_seed.rows(2, 8, 1))


def test_what_is_left_out_differs_from_epoch_to_epoch():
    left = [set(range(167)) - set(np.concatenate(all_rows(order(epoch=epoch), 2, 16)).tolist()) for epoch in range(8)]
    assert all(len(each) == 167 - 160 for each in left)
    assert len(set.union(*left)) > 30


def test_a_single_group_is_dealt_differently_each_epoch():
    """Two workers over one row group: who gets which image must not be the same every time."""
    shares = [set(order(groups=(100,), epoch=epoch).rows(2, 10, 0).tolist()) for epoch in range(4)]
    assert len({frozenset(share) for share in shares}) == 4


def test_neighbours_in_a_shard_are_spread():
    """Images that lie together come from one patient: in a batch they must be as rare as chance has them."""
    made = order(groups=(100,) * 40, window=1600)
    rows = made.rows(1, 32, 0)
    neighbours = sum((np.abs(np.diff(np.sort(batch))) == 1).sum() for batch in rows.reshape(-1, 32))
    # 31 differences in each of 125 batches; drawn from 1,600 of 4,000 rows in whole groups, a difference is 1 in about 1 of 50.
    assert neighbours / (125 * 31) < 0.04
    assert np.corrcoef(rows[:-1], rows[1:])[0, 1] < 0.3


def test_only_the_groups_of_a_share_are_needed():
    """A worker's windows are of few groups: else every worker would read the whole split."""
    made = order(groups=(100,) * 64, window=400)
    rows = made.rows(4, 10, 2)
    assert len(np.unique(rows // 100)) <= 17
    for window in windows(rows, 400):
        assert len(np.unique(window // 100)) <= 5


@pytest.mark.parametrize("workers", [1, 3])
def test_windows_cut_a_share_where_it_was_shuffled(workers):
    made = order(window=30)
    rows = made.rows(workers, 5, 0)
    cut = windows(rows, 30)
    assert np.array_equal(np.concatenate(cut), rows)
    assert all(len(part) == 30 for part in cut[:-1])
