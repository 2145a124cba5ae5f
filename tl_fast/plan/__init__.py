"""Every random decision of a batch, drawn from (seed, epoch, step) before any pixel is touched."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "augment": ["Augment"],
        "rand_augment": ["RandAugment"],
        "segment": ["SegmentAugment"],
    },
)
