"""How the CUDA kernels are compiled and launched: each for the types of arguments named here, when a process first
launches it.

Link-time optimisation is off. numba-cuda turns it on wherever nvJitLink is installed, and it allots registers anew; but
what runs shall be what tests/kernels/test_ptx.py has looked at. Named types also spare each launch numba's look at
every argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import cuda, types
from numba.np import numpy_support

from tl_fast.kernels.colour import cuda as cuda_colour
from tl_fast.kernels.cuda_device import SIMULATED
from tl_fast.kernels.geometry import cuda as cuda_geometry
from tl_fast.kernels.masks import cuda as cuda_masks
from tl_fast.kernels.targets import cuda as cuda_targets
from tl_fast.plan.records import PLAN


@dataclass(frozen=True)
class Kernel:
    """function: not compiled; bounds: threads of a block, at most, and how many such blocks a multiprocessor shall have
    registers for; arguments: their types."""

    function: Callable
    bounds: tuple[int, int]
    arguments: tuple[types.Type, ...]


def _array(kind: types.Type) -> types.Array:
    return types.Array(kind, 1, "C")


def _targets(kind: str, bfloat16: bool) -> Kernel:
    number, whole = types.float32, types.int64
    source = {
        "arrays": (_array(types.uint16), _array(number)),
        "bytes": (_array(types.uint8), _array(whole), _array(number)),
    }[kind]
    sizes = room = types.UniTuple(whole, 2)
    settings = types.Tuple((*[whole] * 6, number, types.boolean))
    out = _array(types.uint16 if bfloat16 else number)
    arguments = types.Tuple(source), sizes, _array(number), settings, room, whole, types.boolean, out
    errors = _array(types.int32)
    return Kernel(cuda_targets.KERNELS[kind, bfloat16], cuda_targets.BOUNDS, (*arguments, errors))


def targets_name(kind: str, bfloat16: bool) -> str:
    """The name in KERNELS, from the source of the maps (arrays or bytes) and whether the output is bfloat16."""
    return f"targets: {kind}, {'bfloat16' if bfloat16 else 'float32'}"


_BYTES, _WORDS, _WHOLE = _array(types.uint8), _array(types.uint16), types.int64
_REGIONS, _PLANS = _array(numpy_support.from_dtype(cuda_geometry.REGION)), _array(numpy_support.from_dtype(PLAN))
_SHOW = _BYTES, _REGIONS, _PLANS, types.UniTuple(types.uint8, 3), _WHOLE, _WHOLE, _BYTES
_FINISH = _BYTES, _BYTES, _PLANS, _WHOLE, _WHOLE, _WHOLE, _WHOLE, _WORDS, _WORDS
_MASKS = _BYTES, _REGIONS, _PLANS, types.uint8, types.UniTuple(types.uint8, 3), *[_WHOLE] * 3, _BYTES, _BYTES
KERNELS = {
    "images: geometry": Kernel(cuda_geometry.SHOW, cuda_geometry.BOUNDS, _SHOW),
    "images: colours": Kernel(cuda_colour.finish, cuda_colour.BOUNDS, _FINISH),
    "masks": Kernel(cuda_masks.show, cuda_masks.BOUNDS, _MASKS),
    **{targets_name(kind, bfloat16): _targets(kind, bfloat16) for kind, bfloat16 in cuda_targets.KERNELS},
}


def launch(name: str, blocks: tuple, threads: tuple, arguments: tuple, stream: int = 0, shared: int = 0) -> None:
    """Launch a kernel of KERNELS and return. stream: its handle; shared: bytes of dynamic shared memory, at most
    `shared_limit`."""
    handle = 0 if SIMULATED or not stream else _stream(int(stream))
    _compiled(KERNELS[name], current_device())[blocks, threads, handle, shared](*arguments)


def shared_limit(name: str) -> int:
    """Bytes of dynamic shared memory that a block of a kernel may have here."""
    return _allow_shared(KERNELS[name], current_device())


def current_device() -> int:
    """Number of the device that launches go to."""
    return 0 if SIMULATED else cuda.get_current_device().id


@functools.cache
def _compiled(kernel: Kernel, device: int) -> Any:
    if SIMULATED:
        return cuda.jit(kernel.function)
    return cuda.jit(types.void(*kernel.arguments), launch_bounds=kernel.bounds, lto=False)(kernel.function)


@functools.cache
def _allow_shared(kernel: Kernel, device: int) -> int:
    """Allow a kernel all shared memory that its own arrays leave -> bytes. More than 48 KB in all must be asked for,
    which numba-cuda does not do."""
    if SIMULATED:
        return 225 << 10
    from numba.cuda.cudadrv.driver import binding, driver

    (compiled,) = _compiled(kernel, device).overloads.values()
    function = compiled._codelibrary.get_cufunc()
    limit = cuda.get_current_device().MAX_SHARED_MEMORY_PER_BLOCK_OPTIN - function.attrs.shared
    attribute = binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.cuKernelSetAttribute(attribute, limit, function.handle, function.device.id)
    return limit


@functools.cache
def _stream(handle: int) -> Any:
    """One object for a handle: numba-cuda keeps a launch's configuration by it."""
    return cuda.external_stream(handle)
