"""Label maps: their format, stores that hold those of a data set, and readers of the published ones."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "format": ["LabelMapError", "MapSpec", "pack", "top_k_relative", "unpack"],
        "store": ["LabelMapStore", "write_store"],
        "published": ["PublishedMaps", "open_label_maps"],
    },
)
