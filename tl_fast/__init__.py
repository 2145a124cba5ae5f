"""tl_fast: vision transformers trained with token labeling (LV-ViT, arXiv 2104.10858) from one FFCV .beton file."""

__version__ = "0.1.0"
