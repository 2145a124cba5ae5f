"""The patch of every LV-ViT; apart, so that a config can be read without torch."""

PATCH = 16
"""Pixels a side of one token (arXiv 2104.10858); the strides of the stem, 2 and then 8, fix it."""
