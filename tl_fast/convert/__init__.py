"""Any source of images to one `.beton` file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "selection": ["Conversion"],
        "encode": ["Sample"],
        "options": ["EncodeOptions", "RunOptions"],
        "run": ["Inputs", "convert"],
        "write": ["TooManyRejects", "WriteSummary", "write_beton"],
    },
)
