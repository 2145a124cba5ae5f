"""The colour operations of RandAugment, equal to Pillow's to the bit."""

__all__: list[str] = []
