"""LV-ViT, a token head or a segmentation decoder on any timm model, losses and training steps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": ["build_model"],
        "loss": ["TokenLabelLoss"],
        "lvvit": ["LVViT"],
        "segmentation": ["Segmenter", "build_segmenter"],
        "segmentation_loss": ["SegmentationLoss"],
        "segmentation_step": ["SegmentStep"],
        "step": ["TrainStep"],
        "token_label": ["TokenLabelModel", "backbone_state_dict"],
    },
)
