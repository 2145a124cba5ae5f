"""Our JPEG decoder for the CPU, which makes the pixels of a crop alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "region": ["RegionDecoder", "RegionQueue"],
    },
)
