"""Calls to the operating system and to the other processes of a job."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "mistakes": ["InputError"],
        "progress": ["ProgressDisplay"],
        "ranks": ["Ranks"],
    },
)
