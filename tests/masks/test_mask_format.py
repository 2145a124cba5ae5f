"""Masks: what is stored is what was there, whatever it was; damaged bytes are refused or give a right mask."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from small_betons import polygon_mask

from tl_fast.masks import loops
from tl_fast.masks.format import MaskError, MaskSpec, decode, encode

SPEC = MaskSpec(150, 255)


def png(mask: np.ndarray) -> bytes:
    Image.fromarray(mask).save(buffer := io.BytesIO(), "PNG", optimize=True)
    return buffer.getvalue()


def round_trip(mask: np.ndarray, spec: MaskSpec = SPEC) -> bytes:
    data = encode(mask, spec)
    read = decode(data, *mask.shape, spec)
    assert read.dtype == np.uint8 and read.flags.c_contiguous and read.flags.writeable
    np.testing.assert_array_equal(read, mask)
    return data


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Rectangles and noise over one another, with few or many values, thin and wide."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = np.append(rng.permutation(150)[: draw(st.integers(1, 150))], 255).astype(np.uint8)
    mask = np.full((height, width), rng.choice(values), np.uint8)
    for _ in range(draw(st.integers(0, 12))):
        top, left = rng.integers(height), rng.integers(width)
        part = mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)]
        part[:] = rng.choice(values, part.shape) if rng.random() < 0.2 else rng.choice(values)
    return mask


@settings(max_examples=150, deadline=None)
@given(masks())
def test_a_mask_is_stored_without_loss(mask: np.ndarray) -> None:
    assert len(round_trip(mask)) <= 1 + mask.size


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((1, 1), np.uint8),
        np.full((3, 400), 255, np.uint8),
        np.tile(np.arange(600) % 2, (5, 1)).astype(np.uint8),  # more runs than the encoder compares
        np.random.default_rng(0).integers(0, 150, (300, 400)).astype(np.uint8),
        np.arange(150, dtype=np.uint8).repeat(20).reshape(50, 60),
        np.zeros((40, 60), np.uint8).T[:, ::2],
        np.repeat(np.array([[0], [1]], np.uint8), 65_535, axis=1),
    ],
)
def test_masks_at_the_edge_of_what_there_is(mask: np.ndarray) -> None:
    round_trip(mask)


@pytest.mark.parametrize("drawn", [True, False])
def test_masks_are_smaller_than_png(photos: Path, drawn: bool) -> None:
    """Of regions as ADE20K's, and of photos' levels, whose outlines are ragged."""
    if drawn:
        samples = [polygon_mask(512, 683, 150, regions=15, seed=seed) for seed in range(4)]
    else:
        images = [Image.open(path).convert("L") for path in sorted((photos / "val").rglob("*.jpg"))[:6]]
        samples = [np.asarray(image.filter(ImageFilter.GaussianBlur(3))) // 32 for image in images]
    assert sum(len(round_trip(mask)) for mask in samples) < 0.8 * sum(len(png(mask)) for mask in samples)


@settings(max_examples=300, deadline=None)
@given(masks(), st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4), st.integers(-6, 6))
def test_damaged_bytes_are_refused_or_give_a_mask(mask: np.ndarray, changes: list, more: int) -> None:
    data = bytearray(encode(mask, SPEC))
    for place, value in changes:
        data[place % len(data)] = value
    data = data + bytes(more) if more >= 0 else data[:more]
    try:
        read = decode(bytes(data), *mask.shape, SPEC)
    except MaskError as error:
        assert str(error).startswith(f"mask of {mask.shape[1]}×{mask.shape[0]}: it")
    else:
        assert SPEC.allowed[read].all() and more <= 0


def test_noise_is_read_within_bounds() -> None:
    """Any bits behind a right head; the memory around the output stays as it is."""
    rng, wrong = np.random.default_rng(0), set()
    for size in range(4, 1200):
        head = [loops.RUNS, 3, 0, 1, 2, 255]
        data = np.concatenate([head, rng.integers(0, 256, size)]).astype(np.uint8)
        data[6:] &= rng.integers(0, 256, size).astype(np.uint8) if size % 2 else np.uint8(255)
        data.flags.writeable = False
        memory = np.full((7, 65), 77, np.uint8)
        wrong.add(loops.decode(data, SPEC.allowed, memory[2:5].reshape(-1)[: 3 * 40].reshape(3, 40)))
        assert (memory[:2] == 77).all() and (memory[5:] == 77).all()
    assert wrong >= {loops.BAD_CODE, loops.BAD_RUN}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes end too early"),
        (bytes([loops.PLAIN, *range(5)]), "6 bytes end too early or too late"),
        (bytes([loops.PLAIN, *range(148, 154)]), "a value other than"),
        (bytes([loops.RUNS]), "1 bytes end too early"),
        (bytes([loops.RUNS, 9, 1]), "3 bytes end too early"),
        (bytes([loops.RUNS, 0, 200]), "a value other than"),
        (bytes([7, 0, 0]), "no code word"),
        (bytes([loops.RUNS, 0, 3, 0b10000000]), "not within its row"),  # a row without runs
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        decode(data, 2, 3, SPEC)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((2, 2), 150, np.uint8), "the value 150; values are 0..149, and 255"),
        (np.zeros((2, 2), np.int64), "got int64"),
        (np.zeros((2, 2, 1), np.uint8), "got uint8"),
        (np.zeros((0, 2), np.uint8), "got uint8"),
    ],
)
def test_masks_that_cannot_be_stored(mask: np.ndarray, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        encode(mask, SPEC)


def test_the_description_of_masks() -> None:
    spec = MaskSpec(2, 254, ["road", "sky"], [[1, 2, 3], [4, 5, 6]])
    assert MaskSpec.from_dict(spec.to_dict()) == spec and hash(spec)
    assert spec.class_names == ("road", "sky") and spec.colours == ((1, 2, 3), (4, 5, 6))
    assert np.flatnonzero(spec.allowed).tolist() == [0, 1, 254]
    for values in (
        {"num_classes": 0},
        {"num_classes": 256},
        {"num_classes": True},
        {"num_classes": 3, "ignore_index": 2},
        {"num_classes": 3, "class_names": ("a",)},
        {"num_classes": 1, "class_names": (1,)},
        {"num_classes": 1, "colours": ((1, 2),)},
        {"num_classes": 1, "colours": ((1, 2, 256),)},
        {"num_classes": 1, "more": 2},
        {},
        [],
    ):
        with pytest.raises(MaskError, match=r"^mask spec: "):
            MaskSpec.from_dict(values)
