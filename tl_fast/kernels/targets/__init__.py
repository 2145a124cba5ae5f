"""Label map of a sample to the soft labels of its crop's tokens."""

__all__: list[str] = []
