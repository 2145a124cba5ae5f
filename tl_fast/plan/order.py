"""The order of an epoch's samples: free, or in groups of which every global batch takes equal parts.

An order depends on (seed, epoch), and in groups on the size of the global batch: not on ranks or restarts.
"""

from __future__ import annotations

import math

import numpy as np

from tl_fast.maths.compile import compile_scalar, njit
from tl_fast.plan.records import epoch_word, seed_word

_scalar = compile_scalar(njit)

ORDERS = ("shuffled", "grouped")
MOST_GROUPS = 64


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The epoch's random order: a permutation of 0..num_samples-1, int64 [n], by sorting one 64-bit draw per sample."""
    return np.argsort(_keys(seed, epoch, num_samples), kind="stable")


def group_count(global_batch: int) -> int:
    """Groups of the grouped order: the largest power of two up to 64 that divides the global batch."""
    return math.gcd(global_batch, MOST_GROUPS)


def grouped_order(seed: int, epoch: int, num_samples: int, global_batch: int) -> np.ndarray:
    """The epoch's order in groups, int64 [steps * global_batch], steps = num_samples // global_batch.

    Sample i is of group i mod G, G = `group_count(global_batch)`. Seen as [steps, G, global_batch / G], line g of every
    step holds samples of group g alone. So the r-th of W equal parts of every step holds samples of G / W groups, those
    from r * G / W on, for every W that divides G. Within a group the samples come in the same order as in `epoch_order`
    of all; its last ones, those that fill no step, are left out.
    """
    groups = group_count(global_batch)
    steps, share = num_samples // global_batch, global_batch // groups
    keys = _keys(seed, epoch, num_samples)
    order = np.empty((steps, groups, share), np.int64)
    for group in range(groups):
        members = np.argsort(keys[group::groups], kind="stable")[: steps * share]
        order[:, group] = (members * groups + group).reshape(steps, share)
    return order.reshape(-1)


def _keys(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """What the samples are sorted by, uint64 [n]."""
    keys = np.empty(num_samples, np.uint64)
    _draw_keys(seed_word(seed), epoch_word(epoch), keys)
    return keys


@njit
def _draw_keys(seed, epoch, keys):
    for i in range(keys.size):
        words = _draw4(seed, epoch, np.uint64(i), _DRAW_ORDER)
        keys[i] = (words[0] << np.uint64(32)) | words[1]


_draw4, _DRAW_ORDER = _scalar.draw4, _scalar.DRAW_ORDER
