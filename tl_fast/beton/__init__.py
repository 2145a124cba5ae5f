"""The `.beton` file: its layout on disk, and its readers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "layout": ["BetonError"],
        "reader": ["BetonReader"],
        "samples": ["Samples"],
        "source": ["open_images"],
    },
)
