"""Label maps: their quantised form, stores of them on disk, and the published ones."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "format": ["LabelMapError", "MapSpec"],
        "store": ["LabelMapStore", "write_store"],
        "published": ["PublishedMaps", "open_label_maps"],
    },
)
