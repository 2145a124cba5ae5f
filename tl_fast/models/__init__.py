"""LV-ViT, the token-labeling loss and the training step."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": ["build_model"],
        "loss": ["TokenLabelLoss"],
        "lvvit": ["LVViT"],
        "step": ["TrainStep"],
    },
)
