"""The CUDA kernel that shows masks through their plans' affines: one launch a batch, each output pixel the class of the
nearest source pixel, to the bit the one that `tl_fast.kernels.masks.cpu` takes."""

from __future__ import annotations

import numpy as np
from numba import cuda

from tl_fast.kernels.cuda_device import I, device, peek, scalar32, store_word

_nearest_pixel = scalar32.nearest_pixel

OUTSIDE = 256  # no class: the pixel shows nothing of the image
BOUNDS = 256, 4  # threads of a block, and blocks that a multiprocessor shall have room for


@device
def _class_at(masks, region, affine, i, j, size):
    """The class under the centre of pixel (i, j) of an output of `size` (rows, columns), or OUTSIDE. Of the image's
    pixels only those of `region` are read, whatever the affine says."""
    rows, columns = size
    x = _nearest_pixel(i, j, rows, columns, affine[0], affine[1], affine[2])
    y = _nearest_pixel(i, j, rows, columns, affine[3], affine[4], affine[5])
    if x < 0 or x >= region["width"] or y < 0 or y >= region["height"]:
        return np.uint32(OUTSIDE)
    x = min(max(x - region["left"], 0), region["columns"] - 1)
    y = min(max(y - region["top"], 0), region["rows"] - 1)
    return np.uint32(peek(masks, region["offset"] + y * np.int64(region["columns"]) + x))


def show(masks, regions, plans, ignore_index, fill, rows, columns, unit, out, images):
    """Blocks (x, b): sample b, `unit` pixels a thread at a time. Not compiled yet.

    masks: uint8 [M]; regions: `tl_fast.kernels.geometry.cuda.REGION` [B], of one byte a pixel; plans:
    `tl_fast.plan.PLAN` [B]; fill: three uint8; unit: pixels written at once, 4 where rows * columns is a multiple of 4,
    else 1; out: uint8 [B H W], written; images: uint8 [B 3 H W], written outside the stored images.
    """
    b = I(cuda.blockIdx.y)
    region, affine = regions[b], plans[b]["affine"]
    rows, columns, unit = I(rows), I(columns), I(unit)
    plane = I(rows * columns)
    first, size = np.int64(b) * plane, (rows, columns)
    p = I((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * unit)
    stride = I(cuda.gridDim.x * cuda.blockDim.x * unit)
    while p < plane:
        i = I(p // columns)
        j = I(p - i * columns)
        word = np.uint32(0)
        for n in range(unit):
            value = _class_at(masks, region, affine, i, j, size)
            if value == OUTSIDE:
                value = np.uint32(ignore_index)
                for c in range(3):
                    images[3 * first + c * np.int64(plane) + p + n] = fill[c]
            word |= value << np.uint32(8 * n)
            j = I(j + 1)
            if j == columns:
                i, j = I(i + 1), I(0)
        if unit == 4:
            store_word(out, first + p, word)
        else:
            out[first + p] = np.uint8(word)
        p = I(p + stride)
