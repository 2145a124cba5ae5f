"""LV-ViT, a token head on any timm model, the token-labeling loss and the training step."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": ["build_model"],
        "loss": ["TokenLabelLoss"],
        "lvvit": ["LVViT"],
        "step": ["TrainStep"],
        "token_label": ["TokenLabelModel", "backbone_state_dict"],
    },
)
