"""Pictures to look at: samples with their labels, crops of a recipe, curves of a run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "crop_sheet": ["show_recipe"],
        "curves": ["draw_curves"],
        "sample_sheet": ["show"],
    },
)
