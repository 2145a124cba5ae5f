"""Crop, flip, resize and the geometric operations of RandAugment in one affine."""

__all__: list[str] = []
