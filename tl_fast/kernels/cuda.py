"""The GPU's side of the decode pipeline: token targets, images and masks as `tl_fast.kernels.cpu` makes them, from
arrays on the device.

Arrays are numba device arrays, CUDA tensors of torch (bfloat16 ones too) or, under numba's simulator, numpy arrays or
CPU tensors; bfloat16 without torch is uint16. They must be contiguous. Nothing here waits for the GPU unless its
docstring says so; `stream` is a handle as torch's `stream.cuda_stream` is, 0 for the default one. Importing this module
needs no GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import cuda

from tl_fast.kernels import cuda_launch
from tl_fast.kernels.colour import cuda as cuda_colour
from tl_fast.kernels.cuda_device import SIMULATED
from tl_fast.kernels.geometry import cuda as cuda_geometry
from tl_fast.kernels.geometry.cuda import REGION
from tl_fast.kernels.masks import cuda as cuda_masks
from tl_fast.kernels.targets import cuda as cuda_targets
from tl_fast.kernels.targets import cuda_rows
from tl_fast.kernels.targets.crops import affines_of_crops
from tl_fast.labelmaps.format import MapSpec, encoded_sizes
from tl_fast.plan.boxes import Sides, both_sides
from tl_fast.plan.records import PLAN

SIMULATED_LANES = 8  # threads of a block in the simulator, which makes some 1,700 a second
# Rows that a warp makes of one sample, about. With fewer, most of the time goes to reading the map; with more, the last
# blocks run alone.
ROUNDS = 6


def token_targets(
    classes: Any,
    scores: Any,
    crops: Any,
    flips: Any,
    num_classes: int,
    grid: Sides,
    smoothing: float,
    out: Any = None,
    *,
    stream: int = 0,
) -> Any:
    """`tl_fast.kernels.cpu.token_targets` on device arrays -> out [B, 1 + h*w, C], float32 or bfloat16.

    classes: uint16 [B, k, H, W] (int16 with the same bits will do); scores: float32 [B, k, H, W]; crops: float32 [B,
    4]; flips: bool [B]; grid: (h, w), or a number for both; out: where to write, else a new float32 numba device array.
    Waits for the GPU: a class >= C is an error as on the CPU. Raises ValueError for shapes that do not fit, crops that
    are not finite or a class >= C.
    """
    shape, others = tuple(classes.shape), (tuple(scores.shape), tuple(crops.shape), tuple(flips.shape))
    if len(shape) != 4 or others != (shape, (shape[0], 4), (shape[0],)):
        raise ValueError(
            f"classes and scores must be [B, k, H, W], crops [B, 4] and flips [B]; got {shape}, {others[0]}, "
            f"{others[1]}, {others[2]}"
        )
    cuda.synchronize()  # crops and flips may still be on their way, on any stream
    crops, flips = to_host(_flat(crops, np.float32)).reshape(-1, 4), to_host(_flat(flips, np.bool_))
    affines = affines_of_crops(crops, flips)
    return warped_targets(classes, scores, affines, num_classes, grid, smoothing, out, cut=False, stream=stream)


def warped_targets(
    classes: Any,
    scores: Any,
    affines: Any,
    num_classes: int,
    grid: Sides,
    smoothing: float,
    out: Any = None,
    cut: bool = True,
    *,
    stream: int = 0,
) -> Any:
    """`tl_fast.kernels.cpu.warped_targets` on device arrays; affines float32 [B, 6] may be on the host. Otherwise as
    `token_targets`."""
    batch, k, height, width = classes.shape
    if out is None:
        out = cuda.device_array((batch, 1 + math.prod(both_sides(grid)), num_classes), np.float32)
    errors = cuda.to_device(np.zeros(batch, np.int32))
    if isinstance(affines, np.ndarray):
        affines = cuda.to_device(np.ascontiguousarray(affines, np.float32))
    source, shape = (_flat(classes, np.uint16), _flat(scores, np.float32)), (k, height, width, num_classes)
    cuda.synchronize()  # uploads go on the default stream, for which torch's streams do not wait, nor it for them
    _launch_targets("arrays", source, (0, 0), affines, shape, grid, smoothing, cut, out, errors, stream)
    cuda.synchronize()
    wrong = np.flatnonzero(errors.copy_to_host())
    if len(wrong):
        raise ValueError(f"the label map of sample {wrong[0]} holds a class >= num_classes {num_classes}")
    return out


def packed_targets(
    maps: Any,
    bounds: Any,
    ranges: Any,
    affines: Any,
    spec: MapSpec,
    grid: Sides,
    smoothing: float,
    cut: bool,
    out: Any,
    errors: Any,
    *,
    stream: int = 0,
) -> None:
    """Token targets of a batch from its label maps as they lie in a beton (docs/file_format.md), in one launch and
    without waiting.

    maps: uint8 [M], memory in which the maps lie; bounds: int64 [B, 2], the first byte of each and the one behind its
    last; ranges: float32 [B, 2] = (score_min, score_step); affines: float32 [B, 6] and cut: as of `cpu.warped_targets`;
    spec: of the maps; grid: (h, w), or a number for both; out: float32 or bfloat16 [B, 1 + h*w, C], written; errors:
    int32 [B], zeros.

    A damaged map (a size that is none of the layouts', a class >= C, a place outside its palette) puts one of
    `tl_fast.labelmaps.loops`' codes into `errors` and NaN into the sample's targets. Nothing is read or written out of
    bounds whatever the map holds. A class listed twice in one cell may count once. Raises ValueError for shapes that do
    not fit.
    """
    batch = len(errors)
    if tuple(bounds.shape) != (batch, 2) or tuple(ranges.shape) != (batch, 2):
        raise ValueError(f"bounds and ranges must be [{batch}, 2], got {tuple(bounds.shape)} and {tuple(ranges.shape)}")
    source = _flat(maps, np.uint8), _flat(bounds, np.int64), _flat(ranges, np.float32)
    sizes = encoded_sizes(spec)
    shape = spec.k, spec.height, spec.width, spec.num_classes
    _launch_targets("bytes", source, sizes[1:], affines, shape, grid, smoothing, cut, out, errors, stream)


def _launch_targets(kind, source, sizes, affines, shape, grid, smoothing, cut, out, errors, stream):
    """kind, source, sizes: of `cuda_maps.open_*`; shape: (k, H, W, C); the rest as of `packed_targets`."""
    k, height, width, num_classes = (int(n) for n in shape)
    batch, grid = len(errors), both_sides(grid)
    tokens_in_all = math.prod(grid)
    if tuple(out.shape) != (batch, 1 + tokens_in_all, num_classes) or tuple(affines.shape) != (batch, 6):
        raise ValueError(
            f"out must be [{batch}, {1 + tokens_in_all}, {num_classes}] and affines [{batch}, 6], "
            f"got {tuple(out.shape)} and {tuple(affines.shape)}"
        )
    if min(grid) < 1 or not 1 <= num_classes <= cuda_rows.NONE or k < 1 or not 0 <= smoothing < 1:
        raise ValueError(
            f"grid, k >= 1, 1 <= num_classes <= {cuda_rows.NONE} and smoothing in [0, 1) needed, "
            f"got {grid}, {k}, {num_classes}, {smoothing}"
        )
    if batch == 0:
        return
    bfloat16 = str(out.dtype) in ("torch.bfloat16", "uint16")
    target = _flat(out, np.uint16 if bfloat16 else np.float32)
    # Room for the cells of a crop of the whole map, rotated or a little larger than it; larger ones go a slower way.
    cells_a_bin = math.ceil(1.25 * max(height, width) / min(grid))
    reach = cells_a_bin + 1
    slots = -(-k * max(reach**2, 4 * cells_a_bin**2) // 8) * 8
    name = cuda_launch.targets_name(kind, bfloat16)
    groups, shared = _groups_that_fit(name, (k, height, width, num_classes), slots, grid, reach)
    rounds = -(-tokens_in_all // groups)
    tokens = groups * -(-rounds // -(-rounds // ROUNDS))
    vector = num_classes * (2 if bfloat16 else 4) % 16 == 0 and _pointer(target) % 16 == 0
    blocks = 1 + -(-tokens_in_all // tokens), batch
    settings = k, height, width, num_classes, *grid, np.float32(smoothing), bool(cut)
    arguments = source, sizes, _flat(affines, np.float32), settings, (slots, reach), tokens, vector, target
    lanes = SIMULATED_LANES if SIMULATED else cuda_rows.LANES
    cuda_launch.launch(name, blocks, (lanes, groups), (*arguments, _flat(errors, np.int32)), stream, shared)


def _groups_that_fit(
    name: str, shape: tuple[int, ...], slots: int, grid: tuple[int, int], reach: int
) -> tuple[int, int]:
    """How many rows a block can work on at once, and the bytes of shared memory that takes."""
    k, height, width, num_classes = shape
    limit = cuda_launch.shared_limit(name)
    groups = 1 if SIMULATED else cuda_rows.GROUPS
    while True:
        shared = cuda_targets.shared_bytes(groups, num_classes, slots, grid, reach, height * width)
        if shared <= limit:
            return groups, shared
        if groups == 1:
            raise ValueError(
                f"{num_classes} classes and label maps of {height} x {width} x {k} need {shared} bytes of shared memory"
                f" a block, this GPU has {limit}"
            )
        groups //= 2


def _flat(array: Any, dtype: type) -> Any:
    """A contiguous device array as a one-dimensional one of `dtype` that shares its memory. A number of `dtype` must
    have as many bytes as one of the array, or one byte."""
    dtype = np.dtype(dtype)
    if dtype.itemsize not in (1, array.dtype.itemsize):
        raise ValueError(f"an array for the GPU kernels must be {dtype}, got {array.dtype}")
    if isinstance(array, torch.Tensor):  # bfloat16 is no type of the CUDA array interface
        array = array.detach()
        if not array.is_contiguous():
            raise ValueError(
                f"arrays for the GPU kernels must be contiguous, got strides {array.stride()} of {tuple(array.shape)}"
            )
        array = array.reshape(-1).view(torch.uint8)
        array = array.numpy() if array.device.type == "cpu" else cuda.as_cuda_array(array, sync=False)
        return array.view(dtype)
    return array.reshape(-1).view(dtype)


def _pointer(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    return 0 if SIMULATED else int(array.device_ctypes_pointer.value)


def to_host(array: Any) -> np.ndarray:
    """A flat array of `_flat` as numpy has it; waits for the GPU."""
    return np.asarray(array) if isinstance(array, np.ndarray) else array.copy_to_host()


# --- images


def scratch_bytes(batch: int, rows: int, columns: int, normalised: bool) -> int:
    """Bytes of device memory that `augment` works in: one uint8 image a sample, two where the output is normalised."""
    return batch * 3 * rows * columns * (2 if normalised else 1)


def augment(
    pixels: Any,
    regions: Any,
    plans: Any,
    fill: Sequence[int],
    out: Any,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scratch: Any,
    stream: int = 0,
) -> None:
    """A batch of images as their plans say, without erasing: `tl_fast.kernels.cpu.augment` in two launches, without
    waiting.

    pixels: uint8 [M], memory in which all decoded regions lie; regions: `REGION` records [B] (or their bytes, uint8)
    with at least the pixels of `tl_fast.kernels.geometry.cpu.needed` (no others are read); plans: `tl_fast.plan.PLAN`
    records [B] (or their bytes), each crop and box with height and width > 0; fill: RGB, 0..255, of what lies outside
    the image; out, written: uint8 [B, 3, H, W], or, with mean and std (of each channel, for values 0..1), (x / 255 -
    mean) / std as float16 or bfloat16 [B, 3, H, W], contiguous or channels-last (torch's memory format; else an array
    [B, H, W, 3]); scratch: uint8, at least `scratch_bytes`. Raises ValueError for shapes that do not fit.
    """
    normalised = mean is not None or std is not None
    if normalised and (mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0):
        raise ValueError(f"mean and std must both be given, three each, std > 0; got {mean} and {std}")
    layout, batch, rows, columns, flat = _output(out, normalised)
    size = batch * 3 * rows * columns
    if rows * columns * 255 >= 1 << 31:
        raise ValueError(f"images of {rows} x {columns} pixels are too large: their grey values' sum must fit 32 bits")
    regions, plans, work = _records(regions, REGION), _records(plans, PLAN), _flat(scratch, np.uint8)
    wanted = scratch_bytes(batch, rows, columns, normalised)
    if len(regions) != batch or len(plans) != batch or work.size < wanted:
        raise ValueError(
            f"{batch} images need as many regions and plans and {wanted} bytes of scratch; "
            f"got {len(regions)}, {len(plans)} and {work.size}"
        )
    if len(fill) != 3 or not all(0 <= int(value) <= 255 for value in fill):
        raise ValueError(f"fill must be three numbers in 0..255, got {fill}")
    if batch == 0:
        return
    image, spare = (work[:size], work[size : 2 * size]) if normalised else (flat, work[:size])
    tile = cuda_geometry.TILE
    blocks = -(-columns // tile), -(-rows // tile), batch
    threads = (SIMULATED_LANES, 1) if SIMULATED else (32, cuda_geometry.BOUNDS[0] // 32)
    arguments = _flat(pixels, np.uint8), regions, plans, tuple(map(np.uint8, fill)), rows, columns, image
    cuda_launch.launch("images: geometry", blocks, threads, arguments, stream)
    unit = 4 if rows * columns % 4 == 0 and _pointer(image) % 4 == 0 else 1
    result = normal = spare[:2].view(np.uint16)  # not used
    if normalised:
        half = str(out.dtype).removeprefix("torch.") == "float16"
        normal = _normal(tuple(map(float, mean)), tuple(map(float, std)), half, cuda_launch.current_device())
        result = flat
    threads = (SIMULATED_LANES if SIMULATED else cuda_colour.BOUNDS[0],)
    arguments = image, spare, plans, rows, columns, unit, layout, normal, result
    cuda_launch.launch("images: colours", (batch,), threads, arguments, stream)


def _output(out: Any, normalised: bool) -> tuple[int, int, int, int, Any]:
    """Layout (of `cuda_colour`), B, H, W and the flat array of an output of `augment`. Raises ValueError for others."""
    kinds = ("float16", "bfloat16", "uint16") if normalised else ("uint8",)
    if str(out.dtype).removeprefix("torch.") not in kinds:
        raise ValueError(
            f"out must be {'float16 or bfloat16' if normalised else 'uint8 without mean and std'}, got {out.dtype}"
        )
    if isinstance(out, torch.Tensor) and not out.is_contiguous():
        if out.is_contiguous(memory_format=torch.channels_last):
            out = out.permute(0, 2, 3, 1)
    shape = tuple(int(n) for n in out.shape)
    if len(shape) == 4 and shape[1] != 3 and shape[3] == 3 and normalised:
        layout, (batch, rows, columns, _) = cuda_colour.CHANNELS_LAST, shape
    elif len(shape) == 4 and shape[1] == 3:
        layout, (batch, _, rows, columns) = cuda_colour.PLANES if normalised else cuda_colour.BYTES, shape
    else:
        raise ValueError(f"out must be [B, 3, H, W], or [B, H, W, 3] where it is normalised; got {shape}")
    return layout, batch, rows, columns, _flat(out, np.uint16 if normalised else np.uint8)


@functools.cache
def _normal(mean: tuple[float, ...], std: tuple[float, ...], half: bool, device: int) -> Any:
    """(value / 255 - mean) / std of each channel and value, the bits of float16 or bfloat16 -> uint16 [3 256] on the
    device."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = (torch.tensor(numbers, dtype=torch.float64)[:, None] for numbers in (mean, std))
    normal = ((values - means) / deviations).float().to(torch.float16 if half else torch.bfloat16)
    bits = normal.view(torch.int16).numpy().view(np.uint16).reshape(-1)
    if SIMULATED:
        return bits
    table = cuda.to_device(bits)
    cuda.synchronize()  # once: the kernels' stream does not wait for the default one
    return table


def show_masks(
    masks: Any,
    regions: Any,
    plans: Any,
    ignore_index: int,
    fill: Sequence[int],
    out: Any,
    images: Any,
    *,
    stream: int = 0,
) -> None:
    """A batch of masks as their plans say: `tl_fast.kernels.cpu.show_mask` to the bit, in one launch, without waiting.

    masks: uint8 [M], memory in which the masks' regions lie, one byte a pixel; regions: `REGION` records [B] (or their
    bytes, uint8) with at least the pixels under the outputs' centres, to which those of
    `tl_fast.kernels.geometry.cpu.needed` belong (no others are read); plans: `tl_fast.plan.PLAN` records [B] (or their
    bytes); ignore_index: 0..255, the class outside the image; fill: RGB, 0..255; out: uint8 [B, H, W], written; images:
    uint8 [B, 3, H, W] of `augment`, written outside the stored images. Raises ValueError for what does not fit.
    """
    shape = tuple(int(n) for n in out.shape)
    if len(shape) != 3 or str(out.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"out must be uint8 [B, H, W], got {out.dtype} {shape}")
    batch, rows, columns = shape
    of_images = tuple(int(n) for n in images.shape)
    if of_images != (batch, 3, rows, columns) or str(images.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"images must be uint8 {(batch, 3, rows, columns)}, got {images.dtype} {of_images}")
    if len(fill) != 3 or not all(0 <= int(value) <= 255 for value in fill):
        raise ValueError(f"fill must be three numbers in 0..255, got {fill}")
    regions, plans = _records(regions, REGION), _records(plans, PLAN)
    if len(regions) != batch or len(plans) != batch:
        raise ValueError(f"{batch} masks need as many regions and plans, got {len(regions)} and {len(plans)}")
    if rows * columns >= 1 << 30 or not 0 <= ignore_index <= 255:
        raise ValueError(
            f"H * W below 2**30 and ignore_index in 0..255 needed, got {rows} x {columns} and {ignore_index}"
        )
    if 0 in shape:
        return
    flat = _flat(out, np.uint8)
    unit = 4 if rows * columns % 4 == 0 and _pointer(flat) % 4 == 0 else 1
    threads = SIMULATED_LANES if SIMULATED else cuda_masks.BOUNDS[0]
    blocks = 1 if SIMULATED else -(-rows * columns // (threads * unit))
    colour = tuple(map(np.uint8, fill))
    arguments = _flat(masks, np.uint8), regions, plans, np.uint8(ignore_index), colour, rows, columns, unit, flat
    cuda_launch.launch("masks", (blocks, batch), (threads,), (*arguments, _flat(images, np.uint8)), stream)


def _records(array: Any, dtype: np.dtype) -> Any:
    if isinstance(array, torch.Tensor) or array.dtype == np.uint8:
        return _flat(array, np.uint8).view(dtype)
    if array.dtype != dtype:
        raise ValueError(f"records must be {dtype}, or their bytes as uint8; got {array.dtype}")
    return array
