"""Scalar maths that every backend compiles, and how it is compiled."""

__all__: list[str] = []
