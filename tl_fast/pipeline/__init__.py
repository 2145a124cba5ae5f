"""The loader: a beton's samples to batches of pixels and token targets, or of pixels and masks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "decode": ["DecodeError"],
        "batch": ["Batch"],
        "loader": ["Loader"],
        "segment_loader": ["SegmentLoader"],
    },
)
