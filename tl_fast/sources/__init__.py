"""Data sets of images: folders, ImageNet's tars, WebDataset shards and parquet files, read without unpacking."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "open": ["open_source"],
        "source": ["Source", "SourceError"],
    },
)
