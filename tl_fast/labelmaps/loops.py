"""CPU loops over label maps, compiled by numba: they quantise, check, encode and read maps.

docs/file_format.md describes the layouts of a map in a beton. Every loop releases the GIL. Errors are numbers here;
`tl_fast.labelmaps.format` and `tl_fast.beton.reader` put them into words.
"""

from __future__ import annotations

import numpy as np

from tl_fast.maths.compile import njit

# What is wrong with a map; 0 stands for nothing.
BAD_SIZE, BAD_CLASS, BAD_BITMAP, BAD_INDEX, TWICE, BAD_SCORE = 1, 2, 3, 4, 5, 6
NOT_FINITE = -(1 << 17)  # what `encode` returns for a bad score_min or score_step
_FLOAT32_MAX, _FLOAT32_TINY = float(np.finfo(np.float32).max), np.finfo(np.float32).tiny

_BIT_COUNT = np.array([byte.bit_count() for byte in range(256)])
# Of each byte: the positions of the bits that are set, then those of the others.
_SET_BITS = np.array(
    [sorted(range(8), key=lambda bit, byte=byte: not byte >> bit & 1) for byte in range(256)], np.uint16
)


@njit
def quantise(scores: np.ndarray, levels: np.ndarray) -> tuple[int, np.float32, np.float32]:
    """`format.quantise` of scores float64 [k, cells per class]: (BAD_SCORE or 0, score_min, score_step).

    levels: uint8, the same shape, written.
    """
    low, high = np.inf, -np.inf
    finite = True
    for t in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            value = scores[t, i]
            finite &= np.isfinite(value)
            low, high = min(low, value), max(high, value)
    if not finite or max(-low, high) > _FLOAT32_MAX or high - low > 0.99 * _FLOAT32_MAX:
        return BAD_SCORE, np.float32(0), np.float32(0)
    score_min, score_step = np.float32(low), np.float32((high - low) / 255**2)
    if score_step < _FLOAT32_TINY:  # equal, or so nearly that float32 has no digits left for a step
        levels[:] = 0
        return 0, score_min, np.float32(0)
    exact = np.empty(scores.shape, np.float64)
    for t in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            exact[t, i] = np.sqrt(
                min(max((scores[t, i] - np.float64(score_min)) / np.float64(score_step), 0.0), 255.0**2)
            )
            levels[t, i] = np.uint8(np.rint(exact[t, i]))
    if scores.shape[0] > 1:
        for i in range(scores.shape[1]):
            _keep_best_apart(exact[:, i], levels[:, i])
    return 0, score_min, score_step


@njit
def _keep_best_apart(exact: np.ndarray, levels: np.ndarray) -> None:
    """Where the levels of a cell's best two classes coincide, move apart the one whose score lies on that side.

    exact: the cell's levels before rounding, float64 [k]; levels: uint8 [k], written.
    """
    best, second = (0, 1) if exact[0] >= exact[1] else (1, 0)
    for t in range(2, len(exact)):
        if exact[t] > exact[best]:
            best, second = t, best
        elif exact[t] > exact[second]:
            second = t
    if levels[best] != levels[second] or exact[best] == exact[second]:
        return
    if exact[best] + exact[second] > 2.0 * levels[best]:
        levels[best] += np.uint8(1)
        return
    levels[second] -= np.uint8(1)
    for t in range(len(exact)):  # a third class of the same level moves along
        if t != best:
            levels[t] = min(levels[t], levels[second])


@njit
def pack(
    classes: np.ndarray, scores: np.ndarray, num_classes: int, out: np.ndarray, levels: np.ndarray
) -> tuple[int, np.float32, np.float32]:
    """Check and quantise one map: (what is wrong, score_min, score_step).

    classes: int64 or float64 [k, cells per class]; scores: float64, the same shape; out: uint16 and levels: uint8,
    written.
    """
    seen = np.zeros(num_classes, np.int64)
    for i in range(classes.shape[1]):
        for t in range(classes.shape[0]):
            if not 0 <= classes[t, i] < num_classes:  # NaN too
                return BAD_CLASS, np.float32(0), np.float32(0)
            c = np.int64(classes[t, i])
            if c != classes[t, i]:
                return BAD_CLASS, np.float32(0), np.float32(0)
            if seen[c] == i + 1:
                return TWICE, np.float32(0), np.float32(0)
            seen[c] = i + 1
            out[t, i] = c
    return quantise(scores, levels)


@njit
def encode(record: np.ndarray, num_classes: int, sizes: tuple[int, int, int], out: np.ndarray) -> int:
    """Write one map in its smaller layout. Returns its size in bytes; −1 − c if it lists a class c >= C; NOT_FINITE.

    record: uint8 [8 + 3·cells], a record of `MapSpec.dtype`; sizes: `format.encoded_sizes`; out: uint8 [3·cells],
    written.
    """
    cells = len(out) // 3
    header = record[:8].view(np.float32)
    if not (np.isfinite(header[0]) and np.isfinite(header[1]) and header[1] >= 0):
        return NOT_FINITE
    rank = np.zeros(num_classes, np.uint16)
    for i in range(cells):
        c = np.int64(record[8 + 2 * i]) | np.int64(record[9 + 2 * i]) << 8
        if c >= num_classes:
            return -1 - c
        rank[c] = 1
    n = np.int64(0)
    for c in range(num_classes):
        n += rank[c]
    size = sizes[1] if n <= 256 else sizes[2] if n <= 512 else sizes[0]
    if size == sizes[0]:
        out[:] = record[8:]
        return size
    start = (num_classes + 7) // 8
    out[:start] = 0
    n = np.int64(0)
    for c in range(num_classes):
        if rank[c]:
            out[c >> 3] |= np.uint8(1 << (c & 7))
            rank[c] = n
            n += 1
    high = start + cells
    out[high : size - cells] = 0
    for i in range(cells):
        index = np.int64(rank[np.int64(record[8 + 2 * i]) | np.int64(record[9 + 2 * i]) << 8])
        out[start + i] = index & 255
        if index > 255:
            out[high + (i >> 3)] |= np.uint8(1 << (i & 7))
    out[size - cells : size] = record[8 + 2 * cells :]
    return size


def _expand(data: np.ndarray, num_classes: int, sizes: tuple[int, int, int], classes: np.ndarray) -> int:
    """Read the classes of one map in any layout; its scores are the last `cells` bytes of `data` in all of them.

    Returns 0 or what is wrong. data: uint8 [size]; sizes: `format.encoded_sizes`; classes: uint16 [cells], written.
    Nothing is read or written out of bounds, whatever `data` holds.
    """
    cells = len(classes)
    greatest = np.int64(0)
    if len(data) == sizes[0]:
        for i in range(cells):
            c = np.int64(data[2 * i]) | np.int64(data[2 * i + 1]) << 8
            classes[i] = c
            greatest = max(greatest, c)
        return BAD_CLASS if greatest >= num_classes else 0
    if len(data) != sizes[1] and len(data) != sizes[2]:
        return BAD_SIZE
    palette = np.zeros(520, np.uint16)
    n = np.int64(0)
    start = (num_classes + 7) // 8
    for j in range(start):  # without branches: no branch predictor can tell whether a class is in the palette
        positions = _SET_BITS[data[j]]
        for i in range(8):
            palette[n + i] = 8 * j + positions[i]
        n += _BIT_COUNT[data[j]]
        if n > 512:
            return BAD_BITMAP
    if n and palette[n - 1] >= num_classes:
        return BAD_BITMAP
    indices = data[start : start + cells]
    if len(data) == sizes[1]:
        last = np.uint8(0)
        for i in range(cells):
            last = max(last, indices[i])
        greatest = np.int64(last)
        for i in range(cells):
            classes[i] = palette[indices[i]]
    else:
        high = data[start + cells : sizes[2] - cells]
        for i in range(cells):
            index = np.int64(indices[i]) | (np.int64(high[i >> 3]) >> (i & 7) & 1) << 8
            greatest = max(greatest, index)
            classes[i] = palette[index]
    return BAD_INDEX if greatest >= n else 0


expand = njit(_expand)
# A second copy for `read_maps` alone, which always passes the same types: numba 0.68 inferred types without end where
# compiled code called a function that had been compiled for other types too.
_expand_inside = njit(_expand)


@njit
def read_maps(
    file: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    score_min: np.ndarray,
    score_step: np.ndarray,
    curve: np.ndarray,
    num_classes: int,
    sizes: tuple[int, int, int],
    classes: np.ndarray,
    scores: np.ndarray,
) -> tuple[int, int]:
    """Read classes and dequantised scores of a batch of maps straight from the mapped file.

    Returns (row, what is wrong) of the first map that is wrong, or (B, 0). file: uint8 [bytes]; starts, lengths: int64
    [B], inside the file; score_min, score_step: float32 [B]; curve: `format.LEVELS`; sizes: `format.encoded_sizes`;
    classes: uint16 [B, cells], scores: float32 [B, cells], written.
    """
    cells = classes.shape[1]
    for row in range(len(starts)):
        end = starts[row] + lengths[row]
        wrong = _expand_inside(file[starts[row] : end], num_classes, sizes, classes[row])
        if wrong:
            return row, wrong
        levels, low, step = file[end - cells : end], score_min[row], score_step[row]
        for i in range(cells):
            scores[row, i] = curve[levels[i]] * step + low
    return len(starts), 0
