"""The order of an epoch's samples: a permutation from (seed, epoch), and the same in groups that ranks can keep to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests import reference
from tl_fast.plan.order import epoch_order, group_count, grouped_order


def test_epoch_order_is_a_fresh_permutation():
    orders = [epoch_order(seed, epoch, 5000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert (np.sort(order) == np.arange(5000)).all()
    assert (orders[0] == epoch_order(0, 0, 5000)).all()
    assert (orders[0] == orders[1]).mean() < 0.01 and (orders[0] == orders[2]).mean() < 0.01
    assert abs(stats.spearmanr(orders[0], np.arange(5000)).statistic) < 0.06


@pytest.mark.parametrize("global_batch, groups", [(1, 1), (3, 1), (12, 4), (40, 8), (64, 64), (96, 32), (1024, 64)])
def test_the_number_of_groups(global_batch, groups):
    assert group_count(global_batch) == groups == reference.order_groups(global_batch)


def test_the_order_of_a_tiny_set_in_groups():
    """11 samples, batches of 4: two steps of groups 0, 1, 2, 3 (ids mod 4), one sample each."""
    free = [9, 4, 2, 8, 7, 10, 1, 0, 6, 5, 3]
    assert epoch_order(7, 2, 11).tolist() == free == reference.epoch_order(7, 2, 11)
    grouped = [4, 9, 2, 7, 8, 1, 10, 3]
    assert grouped_order(7, 2, 11, 4).tolist() == grouped == reference.grouped_order(7, 2, 11, 4)


SIZES = st.tuples(st.integers(1, 80), st.integers(0, 700)).filter(lambda sizes: sizes[0] <= sizes[1])
SEEDS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 2))


@given(SEEDS, SIZES)
def test_every_batch_takes_equal_parts_of_all_groups(seeds, sizes):
    """Each sample at most once an epoch, as many steps as in the free order, and the slow oracle's very order."""
    (seed, epoch), (global_batch, samples) = seeds, sizes
    order, groups = grouped_order(seed, epoch, samples, global_batch), group_count(global_batch)
    assert order.dtype == np.int64 and order.size == samples // global_batch * global_batch
    assert np.unique(order).size == order.size and order.min() >= 0 and order.max() < samples
    for step in order.reshape(-1, global_batch):
        assert (np.bincount(step % groups, minlength=groups) == global_batch // groups).all()
    assert order.tolist() == reference.grouped_order(seed, epoch, samples, global_batch)


@given(SEEDS, st.integers(0, 6), st.integers(1, 5), st.integers(0, 6), st.integers(0, 200))
def test_a_rank_keeps_to_its_groups(seeds, ranks_power, factor, batch_power, more):
    """For every number of ranks that divides the groups a rank's part of every step is of its own groups alone, and
    they are the same in all epochs."""
    world_size = 1 << ranks_power
    global_batch = world_size * factor << batch_power
    groups = group_count(global_batch)
    for epoch in (0, seeds[1]):
        order = grouped_order(seeds[0], epoch, 2 * global_batch + more, global_batch)
        for rank, mine in enumerate(order.reshape(-1, world_size, global_batch // world_size).swapaxes(0, 1)):
            assert set((mine % groups * world_size // groups).ravel().tolist()) == {rank}


def test_every_group_has_a_new_order_in_every_epoch_and_another_seed():
    def by_group(seed, epoch):
        """[groups, samples of a group], as numbers within the group."""
        return grouped_order(seed, epoch, 64 * 500, 1024).reshape(-1, 64, 16).swapaxes(0, 1).reshape(64, -1) // 64

    base = by_group(0, 0)
    assert (base == by_group(0, 0)).all()
    assert (base == by_group(0, 1)).mean() < 0.01 and (base == by_group(1, 0)).mean() < 0.01
    assert (base[:-1] == base[1:]).mean() < 0.01  # groups do not share an order
    assert abs(stats.spearmanr(base[5], np.arange(base.shape[1])).statistic) < 0.15


def test_what_is_left_out_changes_from_epoch_to_epoch():
    """1,000 samples, batches of 96: of the 32 groups, eight have 32 samples and leave out two, the others have 31 and
    leave out one."""
    left_out = [sorted(set(range(1000)) - set(grouped_order(0, epoch, 1000, 96).tolist())) for epoch in range(40)]
    expected = [2] * 8 + [1] * 24
    assert all(np.bincount(np.array(out) % 32, minlength=32).tolist() == expected for out in left_out)
    counts = np.bincount(np.concatenate(left_out), minlength=1000)
    assert counts.max() < 15 and np.count_nonzero(counts) > 600  # 1.6 on average; of most samples not 0


def test_classes_of_a_sorted_set_are_spread_as_in_the_free_order():
    """10 classes of 640 in files' order: a class's share of a batch varies as it does freely, also on every rank."""
    free = epoch_order(3, 1, 6400).reshape(-1, 8, 16) // 640
    grouped = grouped_order(3, 1, 6400, 128).reshape(-1, 8, 16) // 640

    def variance(classes):
        return (classes[..., None] == np.arange(10)).sum(axis=-2).var()

    assert variance(grouped) == pytest.approx(variance(free), rel=0.1)
    whole = (6400 // 128, 128)
    assert variance(grouped.reshape(whole)) == pytest.approx(variance(free.reshape(whole)), rel=0.2)
    assert all(set(grouped[:, rank].ravel().tolist()) == set(range(10)) for rank in range(8))
