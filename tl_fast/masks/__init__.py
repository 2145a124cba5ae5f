"""Masks: the class of every pixel, as a beton stores them, and where they come from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "classes": ["MaskClasses", "read_classes"],
        "folder": ["MaskFolder"],
        "format": ["MaskError", "MaskSpec"],
    },
)
