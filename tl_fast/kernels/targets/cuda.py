"""The CUDA kernel of the token targets: one launch a batch, a warp a token row, the class token's row by a whole block.

A row of C scores lies in shared memory, NaN where no class of its bin is. The bin's cells are added to it one after the
other, the classes of a cell side by side, so sums have one order and repeat bit for bit; then the few classes met get
their softmax, the rest share one value, and the row is written in 16-byte stores. Rows of many cells (the class
token's) are spread over the block: weights of cells as whole numbers of 2**-30, whose order does not matter, then every
warp adds its share of the cells. docs/kernels.md counts the bytes.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, float32, int32, uint16

from tl_fast.kernels.cuda_device import ALIGNMENT, I, device, poke
from tl_fast.kernels.targets import cuda_maps, cuda_rows
from tl_fast.kernels.targets.cuda_bins import (
    CROWDED,
    FLOATS,
    INTEGERS,
    KIND,
    SAMPLES_X,
    SAMPLES_Y,
    STEP_M,
    STEP_T,
    WARPED,
    WRONG,
    Tables,
    fill_axes,
    place_crop,
)
from tl_fast.kernels.targets.cuda_block_row import build_block_row
from tl_fast.kernels.targets.cuda_maps import PALETTE, READERS
from tl_fast.kernels.targets.cuda_rows import GROUPS, LANES, NAN, Block, Places, Shared, Task

BOUNDS = LANES * GROUPS, 3  # threads of a block; blocks that a multiprocessor shall have registers for: 80 each


@device
def _places(num_classes, bins, slots, reach, group, groups):
    """Where a group has what in dynamic shared memory, in the order of `shared_bytes`. bins: of both axes together."""
    stride = I((num_classes + 3) >> 2 << 2)
    share = I(stride + slots + 2 * LANES + (slots >> 1))
    row = I(group * share)
    values = I(row + stride)
    weights = I(values + slots)
    numbers = I(weights + LANES)
    listed = I(2 * (numbers + LANES))
    axes = I(groups * share)
    return Places(row, values, weights, numbers, listed, share, axes, reach, I(axes + bins * (reach + 2)))


def _build(open_map, read, write):
    """The kernel for one kind of source and one type of output."""
    block_row, warp_row = build_block_row(read, write), cuda_rows.build_warp_row(read, write)

    def targets(source, sizes, affines, settings, room, tokens, vector, out, errors):
        """Block (0, b) makes the class token's row of sample b, the others `tokens` rows each.

        source, sizes: as of `cuda_maps.open_*`; affines: float32 [6 B]; settings: (k, H, W, C, h, w, smoothing, cut);
        room: (entries of a bin that a group has room for, at least k reach**2; reach, the cells of a bin along one axis
        that there is room for); vector: rows of `out` begin at multiples of 16 bytes; out: [B (1 + h w) C],
        written; errors: int32 [B], 0 or the code of what is wrong with the map, all of whose targets are NaN then.
        Dynamic shared memory: `shared_bytes`.
        """
        rows = cuda.shared.array(0, float32, ALIGNMENT)
        integers = cuda.shared.array(0, int32, ALIGNMENT)
        shorts = cuda.shared.array(0, uint16, ALIGNMENT)
        palette = cuda.shared.array(PALETTE, uint16)
        counts = cuda.shared.array(READERS, int32)
        crop = cuda.shared.array(FLOATS, float32)
        state = cuda.shared.array(INTEGERS, int32)
        partial = cuda.shared.array(GROUPS, float32)
        scratch = cuda.shared.array(LANES, float32)
        lane, group, lanes, groups = I(cuda.threadIdx.x), I(cuda.threadIdx.y), I(cuda.blockDim.x), I(cuda.blockDim.y)
        thread, threads = I(group * lanes + lane), I(lanes * groups)
        k, height, width, num_classes, bins_y, bins_x, smoothing, cut = settings
        k, height, width, num_classes = I(k), I(height), I(width), I(num_classes)
        bins_y, bins_x = I(bins_y), I(bins_x)
        slots, reach = I(room[0]), I(room[1])
        b, all_rows = I(cuda.blockIdx.y), I(1 + bins_y * bins_x)
        begin = I(0) if cuda.blockIdx.x == 0 else I(1 + (cuda.blockIdx.x - 1) * tokens)
        end = I(1) if cuda.blockIdx.x == 0 else I(min(begin + tokens, all_rows))
        places = _places(num_classes, I(bins_y + bins_x), slots, reach, group, groups)
        if begin == 0:
            bins_y, bins_x = I(1), I(1)
        task = Task(k, height, width, num_classes, bins_y, bins_x, smoothing, cut)
        block = Block(lane, lanes, group, groups)
        shared = Shared(rows, integers, shorts, crop, state, partial, scratch)

        # The crop, the label map, the bins along the axes, and rows of NaN.
        if thread < 2:
            state[thread] = 0  # WRONG and CROWDED
        if thread == threads - 1:
            place_crop(affines, b, height, width, bins_y, bins_x, crop, state)
            state[STEP_M] = lanes // k
            state[STEP_T] = lanes % k
        for c in range(lane, places.values - places.row, lanes):
            poke(rows, places.row + c, NAN)
        cuda.syncthreads()
        map_room = cuda_maps.Room(palette, counts, state, crop)
        label_map = open_map(source, sizes, b, I(k * height * width), num_classes, map_room)
        if begin and state[KIND] != WARPED:
            fill_axes(Tables(rows, integers, places.axes, reach), crop, state, task)
        cuda.syncthreads()

        # A damaged map: nothing but NaN.
        if state[WRONG]:
            if thread == 0:
                errors[b] = state[WRONG]
            for row in range(I(begin + group), end, groups):
                first = (np.int64(b) * all_rows + row) * num_classes
                write(rows, places.row, NAN, num_classes, False, out, first, lane, lanes)
            return

        # Rows of many cells, by the whole block.
        warped = state[KIND] == WARPED
        if begin == 0 or state[CROWDED] or (warped and 4 * k * state[SAMPLES_X] * state[SAMPLES_Y] > slots):
            for row in range(begin, end):
                first = (np.int64(b) * all_rows + row) * num_classes
                block_row(label_map, task, row, shared, places, block, out, first)
            return

        # A row a group.
        start = I(lane // k), I(lane - lane // k * k)
        row = I(begin + group)
        while row < end:
            first = (np.int64(b) * all_rows + row) * num_classes
            warp_row(label_map, task, row, start, shared, places, block, vector, out, first)
            row = I(row + groups)

    return targets


def shared_bytes(groups: int, num_classes: int, slots: int, grid: tuple[int, int], reach: int, cells: int) -> int:
    """Dynamic shared memory of the kernel: for each group float32 [C rounded up to 4] a row, float32 [slots] values of
    entries, float32 [LANES] weights and int32 [LANES] numbers of cells, uint16 [slots] classes; then [h + w, reach +
    2] bins along the axes and int32 [H W] weights of cells. slots: a multiple of 8."""
    stride = (num_classes + 3) // 4 * 4
    return 4 * (groups * (stride + slots + 2 * LANES + slots // 2) + sum(grid) * (reach + 2) + cells)


_SOURCES = {
    "arrays": (cuda_maps.open_arrays, cuda_maps.read_arrays),
    "bytes": (cuda_maps.open_bytes, cuda_maps.read_bytes),
}
KERNELS = {
    (kind, bfloat16): _build(*reading, cuda_rows.write_bfloat16 if bfloat16 else cuda_rows.write_float32)
    for kind, reading in _SOURCES.items()
    for bfloat16 in (False, True)
}
"""The kernels, not compiled yet, by the source of the maps and whether `out` is bfloat16."""
