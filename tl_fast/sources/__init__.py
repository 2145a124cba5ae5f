"""Where images come from: folders, tars, WebDataset shards, parquet files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "open": ["open_source"],
        "source": ["Source", "SourceError"],
    },
)
