"""What the operating system and other processes are asked for."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "mistakes": ["InputError"],
        "progress": ["ProgressDisplay"],
        "ranks": ["Ranks"],
    },
)
