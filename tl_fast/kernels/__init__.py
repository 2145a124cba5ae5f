"""Loops and memory for each backend; the maths they share is `tl_fast.scalar`, compiled here for whichever backend asks."""
from __future__ import annotations

import types
from collections.abc import Callable

from tl_fast import scalar


def compile_scalar(decorate: Callable) -> types.SimpleNamespace:
    """Compile every function of `tl_fast.scalar` with `decorate` (e.g. `numba.njit(nogil=True)` or `numba.cuda.jit(device=True)`).

    Numba cannot call an undecorated function, so each copy gets a namespace of its own in which the names it calls are the compiled
    ones. Functions must therefore be defined after those they call.
    """
    namespace = dict(vars(scalar))
    for name, function in vars(scalar).items():
        if isinstance(function, types.FunctionType) and function.__module__ == scalar.__name__:
            copy = types.FunctionType(function.__code__, namespace, name, function.__defaults__)
            copy.__module__, copy.__qualname__, copy.__doc__ = function.__module__, function.__qualname__, function.__doc__
            namespace[name] = decorate(copy)
    return types.SimpleNamespace(**namespace)
