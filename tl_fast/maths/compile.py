"""How `tl_fast.maths.scalar` and the CPU loops over it are compiled: for any backend, and once a machine."""

from __future__ import annotations

import functools
import hashlib
import os
import types
from collections.abc import Callable
from pathlib import Path

import numba

from tl_fast.maths import scalar

# The rooms whose functions are compiled or called by compiled ones. A change in any of them makes a new cache.
COMPILED = ("jpeg", "kernels", "labelmaps", "masks", "maths", "plan")


def njit(function: Callable) -> Callable:
    """`numba.njit` as all our CPU code uses it: without the GIL, without fastmath, compiled once a machine and kept on
    disk.

    Numba's cache notices changes of a function's own file only, and ours call across files. So the cache's folder is
    named for the contents of all of them. NUMBA_CACHE_DIR or XDG_CACHE_HOME choose where; where nothing can be written,
    every process compiles anew.
    """
    folder = _cache_folder()
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, folder or ""
    try:
        return numba.njit(nogil=True, fastmath=False, cache=folder is not None)(function)
    finally:
        numba.config.CACHE_DIR = before


@functools.cache
def _cache_folder() -> str | None:
    package = Path(__file__).resolve().parent.parent
    sources = [path for room in COMPILED for path in sorted((package / room).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    try:
        base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "tl_fast" / f"kernels-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


def compile_scalar(decorate: Callable, real: type = float, **replaced: Callable) -> types.SimpleNamespace:
    """Compile every function of `tl_fast.maths.scalar` with `decorate` (`njit`, or `numba.cuda.jit(device=True)`).

    Numba cannot call an undecorated function, so the copies share a namespace of their own, in which every name is a
    compiled function. Functions must therefore be defined after those they call. real: what the name `real` means in
    the copies, and the type of all floating constants: np.float32 leaves no double precision in them. replaced:
    compiled functions that take the place of scalar's of that name.
    """
    namespace = {name: _constant(value, real) for name, value in vars(scalar).items()}
    namespace["real"] = real
    for name, function in vars(scalar).items():
        if name in replaced:
            namespace[name] = replaced[name]
        elif isinstance(function, types.FunctionType) and function.__module__ == scalar.__name__:
            code = function.__code__
            if real is not float:
                code = code.replace(co_consts=tuple(_constant(value, real) for value in code.co_consts))
            copy = types.FunctionType(code, namespace, name, function.__defaults__)
            copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
            copy.__doc__ = function.__doc__
            namespace[name] = decorate(copy)
    return types.SimpleNamespace(**namespace)


def _constant(value: object, real: type) -> object:
    if isinstance(value, tuple):
        return tuple(_constant(item, real) for item in value)
    return real(value) if isinstance(value, float) else value
