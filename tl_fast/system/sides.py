"""Sizes in two dimensions, as settings and command lines state them."""

from __future__ import annotations

import argparse
import operator

from tl_fast.system.mistakes import InputError

Sides = int | tuple[int, int]  # of a square, or (height, width): pixels of an image, tokens of a grid


def both_sides(sides: Sides) -> tuple[int, int]:
    """(height, width). Raises InputError for what is neither a whole number nor two of them."""
    try:
        height, width = sides if isinstance(sides, (tuple, list)) else (sides, sides)
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError) as error:
        raise InputError(f"a size is a whole number or two, (height, width), got {sides}") from error


def one_if_square(sides: Sides) -> Sides:
    """The sizes as one number where both are equal, so that equal sizes are equal values."""
    height, width = both_sides(sides)
    return height if height == width else (height, width)


def read_sides(text: str) -> Sides:
    """An option's value such as "224" or "[192,256]", height first; as argparse's `type`."""
    try:
        numbers = [int(part) for part in text.strip("[]").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give a number, such as 224, or [height,width]")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
