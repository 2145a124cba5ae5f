"""Loops and memory for each backend; the maths they share is `tl_fast.scalar`."""
