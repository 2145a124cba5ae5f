"""A mask of class indices through an image's affine, by its nearest pixels."""

__all__: list[str] = []
