"""tl_fast: vision transformers trained with token labeling (LV-ViT, arXiv 2104.10858) from one FFCV .beton file.

The everyday names below are imported at their first use; `import tl_fast` alone imports neither torch nor numba.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "beton.reader": ["BetonReader"],
        "convert.encode": ["Sample"],
        "convert.write": ["write_beton"],
        "models.loss": ["TokenLabelLoss"],
        "models.lvvit": ["LVViT"],
        "models.token_label": ["TokenLabelModel"],
        "pipeline.batch": ["Batch"],
        "pipeline.loader": ["Loader"],
        "pipeline.segment_loader": ["SegmentLoader"],
        "plan.augment": ["Augment"],
        "plan.segment": ["SegmentAugment"],
    },
)
