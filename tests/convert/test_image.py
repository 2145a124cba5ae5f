"""`tl_fast.sources.image.open_rgb`: pixels of every kind, alike in annotation, conversion and the loader; refusals;
EXIF."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from tests.decoding import Files, show
from tl_fast.beton.samples import Samples
from tl_fast.convert import image as jpeg
from tl_fast.convert.encode import Sample
from tl_fast.convert.lossless import lossless_baseline
from tl_fast.convert.write import write_beton
from tl_fast.jpeg import markers as marks
from tl_fast.jpeg.exif import exif_orientation
from tl_fast.jpeg.region import RegionDecoder
from tl_fast.jpeg.restarts import splice
from tl_fast.pictures import sample_sheet
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.nvjpeg import NvjpegDecoder
from tl_fast.pipeline.regions import DecodeError
from tl_fast.sources.image import FORMATS, TURNS, check_size, open_rgb, read_jpeg_header, tiff_orientation

HEIGHT, WIDTH = 48, 64


def waves(channels: int, phase: float = 0.0) -> np.ndarray:
    """Smooth values 0..1, [HEIGHT, WIDTH, channels], which JPEG keeps well."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [0.5 + 0.45 * np.sin(x * (0.05 + 0.02 * c) + y * 0.04 * (c + 1) + phase + c) for c in range(channels)]
    return np.stack(planes, axis=-1)


COLOUR = (255 * waves(3)).round().astype(np.uint8)
GREY = COLOUR[:, :, 0]
DEEP = (65_535 * waves(1)[:, :, 0]).round().astype(np.uint16)
ALPHA = (255 * waves(1, 2.0)).round().astype(np.uint8)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(pixels: bytes, bits: int | tuple[int, ...], photometric: int, order: str = "<", **tags: int) -> bytes:
    """An uncompressed TIFF of HEIGHT x WIDTH. tags: TIFF tags by number as `t274`, one SHORT each."""
    bits = bits if isinstance(bits, tuple) else (bits,)
    fields = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 277: len(bits), 278: HEIGHT}
    fields |= {279: len(pixels)} | {int(name[1:]): value for name, value in tags.items()}
    start = 8 + 2 + 12 * (len(fields) + 1) + 4
    wide = b"".join(struct.pack(f"{order}H", value) for value in bits)
    fields[273] = start + len(wide)
    entries = b""
    for tag, value in sorted(fields.items()):
        if tag == 258 and len(bits) > 2:
            entries += struct.pack(f"{order}HHII", tag, 3, len(bits), start)
        elif tag == 258:
            entries += struct.pack(f"{order}HHI4s", tag, 3, len(bits), wide.ljust(4, b"\0"))
        elif tag in (273, 279):
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
        else:
            entries += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(fields))
    return head + entries + bytes(4) + wide + pixels


def twelve_bits(values: np.ndarray) -> bytes:
    """Two 12-bit values in three bytes."""
    a, b = values.reshape(-1, 2).T.astype(np.uint32)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=-1).astype(np.uint8).tobytes()


def repeat(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=-1).astype(np.uint8)


def with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reencoded(pixels: np.ndarray, quality: int) -> np.ndarray:
    """What another encoder, Pillow's, leaves of the pixels in 4:2:0."""
    return with_pillow(encode(Image.fromarray(pixels), "JPEG", quality=quality, subsampling=2))


def cmyk_pixels(inks: np.ndarray) -> np.ndarray:
    """Pillow's simple conversion of CMYK, 0 for no ink: what is left of each colour, less black."""
    return np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))


def kinds() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """Name → (file, its RGB pixels; None: what Pillow makes of it)."""
    rgb, grey = Image.fromarray(COLOUR), Image.fromarray(GREY)
    bilevel = Image.fromarray(np.where(np.mgrid[:HEIGHT, :WIDTH][1] < 30, 255, 0).astype(np.uint8)).convert("1")
    rgba, inks = np.concatenate([COLOUR, ALPHA], axis=-1), np.concatenate([COLOUR, ALPHA // 4], axis=-1)
    palette = rgb.quantize(64, dither=Image.Dither.NONE)
    palette_rgb = np.asarray(palette.convert("RGB"))
    palette_alpha = palette.convert("PA")
    palette_alpha.putalpha(Image.fromarray(ALPHA[:, :, 0]))
    luma = np.array(rgb.convert("YCbCr"))
    return {
        "1.png": (encode(bilevel, "PNG"), repeat(np.asarray(bilevel) * 255)),
        "1.tiff": (encode(bilevel, "TIFF"), repeat(np.asarray(bilevel) * 255)),
        "L.png": (encode(grey, "PNG"), repeat(GREY)),
        "L.jpg": (encode(grey, "JPEG", quality=95), None),
        "LA.png": (encode(Image.fromarray(np.concatenate([GREY[:, :, None], ALPHA], -1), "LA"), "PNG"), repeat(GREY)),
        "I;16.png": (encode(Image.fromarray(DEEP), "PNG"), repeat(DEEP >> 8)),
        "I;16.tiff": (tiff(DEEP.astype("<u2").tobytes(), 16, 1), repeat(DEEP >> 8)),
        "I;16B.tiff": (tiff(DEEP.astype(">u2").tobytes(), 16, 1, ">"), repeat(DEEP >> 8)),
        "I;16 white is zero.tiff": (tiff(DEEP.astype("<u2").tobytes(), 16, 0), repeat(255 - (DEEP >> 8))),
        "I;16 compressed.tiff": (encode(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"), repeat(DEEP >> 8)),
        "I;12.tiff": (tiff(twelve_bits(DEEP >> 4), 12, 1), repeat(DEEP >> 8)),
        "I of signed 16 bit.tiff": (tiff((DEEP >> 1).astype("<i2").tobytes(), 16, 1, t339=2), repeat(DEEP >> 9)),
        "I.pgm": (b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP.astype(">u2").tobytes(), repeat(DEEP >> 8)),
        "P transparent colour.png": (encode(palette, "PNG", transparency=3), palette_rgb),
        "P transparent bytes.png": (encode(palette, "PNG", transparency=bytes(range(0, 256, 4))), palette_rgb),
        "P.gif": (encode(palette, "GIF", transparency=3), palette_rgb),
        "PA.tiff": (encode(palette_alpha, "TIFF"), palette_rgb),
        "RGB.png": (encode(rgb, "PNG"), COLOUR),
        "RGB.webp": (encode(rgb, "WEBP", lossless=True), COLOUR),
        "RGB.bmp": (encode(rgb, "BMP"), COLOUR),
        "RGB.ppm": (encode(rgb, "PPM"), COLOUR),
        "RGB named otherwise.jpg": (encode(rgb, "JPEG", quality=95, keep_rgb=True), None),
        "RGB, usual.jpg": (encode(rgb, "JPEG", quality=95), None),
        "RGBA.png": (encode(Image.fromarray(rgba), "PNG"), COLOUR),
        "RGBA.webp": (encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), COLOUR),
        "CMYK.jpg": (encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=95), None),
        "CMYK.tiff": (encode(Image.fromarray(inks, "CMYK"), "TIFF"), cmyk_pixels(inks)),
        "YCCK.jpg": (simplejpeg.encode_jpeg(255 - inks, quality=95, colorspace="CMYK", colorsubsampling="444"), None),
        "LAB.tiff": (tiff((COLOUR // np.array([1, 8, 8], np.uint8)).tobytes(), (8, 8, 8), 8), None),
        "YCbCr.tiff": (tiff(luma.tobytes(), (8, 8, 8), 6), np.asarray(Image.fromarray(luma, "YCbCr").convert("RGB"))),
    }


KINDS = kinds()


@pytest.mark.parametrize("name", KINDS)
def test_annotator_converter_and_loader_see_the_same_pixels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, expected = KINDS[name]
    image, orientation = open_rgb(data)  # what the annotator shows to its network
    seen = np.asarray(image)
    assert image.mode == "RGB" and orientation == 1 and not image.info
    np.testing.assert_array_equal(seen, with_pillow(data) if expected is None else expected)

    jpeg.compile_kernels()
    encoded: list[np.ndarray] = []
    encoder = simplejpeg.encode_jpeg

    def note(pixels: np.ndarray, **options) -> bytes:
        encoded.append(pixels)
        return encoder(pixels, **options)

    monkeypatch.setattr(simplejpeg, "encode_jpeg", note)
    write_beton(tmp_path / "one.beton", [Sample("one", 0, lambda: data)], class_names=["class"], workers=1, quality=95)
    if name in ("L.jpg", "RGB, usual.jpg"):
        assert not encoded
    else:
        np.testing.assert_array_equal(encoded[0], seen)

    decoder = Decoder(Samples(tmp_path / "one.beton"), 1)
    region = decoder(np.array([0]), np.array([[0, 0]]), np.array([[HEIGHT, WIDTH]]))[0].numpy().astype(int)
    decoder.close()
    stored = reencoded(seen, 95) if encoded else seen
    difference = np.abs(region - stored)
    assert difference.mean() <= (1.5 if encoded else 0), (difference.mean(), difference.max())
    # Bytes that our decoder leaves to Pillow, as a beton of stock FFCV may hold them.
    fallback = Decoder(Files([data]), 1)
    starts, shapes = np.array([[5, 9]]), np.array([[20, 30]])
    np.testing.assert_array_equal(fallback(np.array([0]), starts, shapes)[0], seen[5:25, 9:39])
    shown = show(fallback.pixels(0, starts[0], shapes[0]), starts[0], shapes[0])
    np.testing.assert_array_equal(shown, seen[5:25, 9:39])
    fallback.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(DEEP.astype("<u4").tobytes(), 32, 1), "32-bit integers have no fixed range"),
        (tiff(DEEP.astype("<i4").tobytes(), 32, 1, t339=2), "32-bit integers have no fixed range"),
        (tiff(DEEP.astype("<f4").tobytes(), 32, 1, t339=3), "floating-point image has no fixed range"),
        (tiff((-1 - (DEEP >> 1).astype("<i2")).tobytes(), 16, 1, t339=2), r"grey values -\d+..-\d+ are outside 16 bit"),
        (b"P5 9 9 65535\n" + bytes(100), "damaged image: .*truncated|damaged image: .*[Nn]ot enough"),
        (KINDS["RGB.png"][0][:300], "damaged image: .*truncated"),
        (KINDS["RGB, usual.jpg"][0][:900], "damaged image: .*truncated"),
        (tiff(DEEP.tobytes(), 16, 1)[:200], "damaged image|not an image"),
        (b"", "not an image that can be read .0 bytes; readable formats: JPEG, PNG"),
        (b"plain text", "not an image that can be read .10 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_say_why_in_one_line(data: bytes, reason: str) -> None:
    for reader in (open_rgb, jpeg.prepare):
        is_jpeg = data.startswith(b"\xff\xd8")  # `prepare` reads JPEGs' markers itself
        with pytest.raises(ValueError, match="truncated" if is_jpeg else reason) as refusal:
            reader(data)
        assert "\n" not in str(refusal.value)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
0 0 20 20 rectfill
showpage
%%EOF
"""


def test_eps_named_jpg_reaches_no_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript; each of the doors refuses it by its content."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("EPS content was parsed")

    assert Image.open(io.BytesIO(EPS)).format == "EPS"  # so the refusals below are ours
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", started)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    for reader in (open_rgb, jpeg.prepare):
        with pytest.raises(ValueError, match="not an image that can be read"):
            reader(EPS)
    decoder = Decoder(Files([EPS]), 1)
    with pytest.raises(DecodeError, match="cannot decode sample 0"):
        decoder.pixels(0, np.array([0, 0]), np.array([8, 8]))
    decoder.close()
    nvjpeg = NvjpegDecoder(Files([EPS]), 1, 1, None)
    assert nvjpeg._damaged(np.array([0]), "DALI's message without a number") == 0
    nvjpeg.close()

    stored = KINDS["RGB, usual.jpg"][0]
    write_beton(tmp_path / "one.beton", [Sample("one", 0, lambda: stored)], class_names=["class"], workers=1)
    with Loader(tmp_path / "one.beton", 1, image_size=32, threads=1) as loader:
        monkeypatch.setattr(loader, "batch", lambda ids: None)  # which decodes and would refuse first
        monkeypatch.setattr(loader.samples, "image_file", lambda sample_id: EPS)
        with pytest.raises(DecodeError, match="cannot decode .*not an image that can be read"):
            sample_sheet._row(loader, 0)


def sized(width: int, height: int, progressive: bool = False) -> bytes:
    """A JPEG of about 1 KB that states this size."""
    data = encode(Image.new("RGB", (64, 64)), "JPEG", progressive=progressive)
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    return data[: frame + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[frame + 9 :]


def test_a_small_jpeg_of_many_pixels_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """13,000 x 13,000 pixels, 507 MB in RGB, are fewer than Pillow refuses."""
    for progressive in (False, True):
        bomb = sized(13_000, 13_000, progressive)
        assert len(bomb) < 1100 and 13_000**2 < 2 * Image.MAX_IMAGE_PIXELS
        monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory for the pixels was taken"))
        with pytest.raises(ValueError, match=f"damaged JPEG: 13000 × 13000 pixels from {len(bomb)} bytes"):
            open_rgb(bomb)
        with pytest.raises(ValueError, match="damaged JPEG: 13000 × 13000 pixels from|truncated JPEG"):
            jpeg.prepare(bomb)
        decoder = Decoder(Files([bomb]), 1)
        with pytest.raises(DecodeError):
            decoder.pixels(0, np.array([0, 0]), np.array([13_000, 8]))
        decoder.close()
        monkeypatch.undo()
    hidden = sized(13_000, 13_000)
    with pytest.raises(ValueError, match="13000 × 13000 pixels"):  # bytes between segments, which Pillow skips
        open_rgb(hidden[:20] + b"\0\0" + hidden[20:])


def test_size_limits() -> None:
    check_size(512, 100, 100, huffman=True)
    check_size(5_000, 5_000, 100, huffman=False)
    too_large = ((513, 100, 100, True), (30_000, 30_000, 10**9, True), (30_000, 30_000, 9, False))
    for width, height, size, huffman in too_large:
        with pytest.raises(ValueError, match=f"{width} × {height} pixels from {size} bytes"):
            check_size(width, height, size, huffman)
    with pytest.raises(ValueError, match="damaged image: .*exceeds limit"):
        open_rgb(b"P5 30000 30000 255\n")


def test_large_images_are_opened_without_a_warning() -> None:
    code = """
import io
from PIL import Image
from tl_fast.sources.image import open_rgb
Image.MAX_IMAGE_PIXELS = 1000
for side in range(32, 44):
    Image.new("RGB", (side, side)).save(file := io.BytesIO(), "PNG")
    assert open_rgb(file.getvalue())[0].size == (side, side)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_formats_and_exif_are_these() -> None:
    assert FORMATS == ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
    with pytest.raises(ValueError, match="exif 'turn' is not one of ignore, apply"):
        open_rgb(KINDS["RGB.png"][0], exif="turn")


# --- EXIF orientation -----------------------------------------------------------------------------------------------


def exif_segment(orientation: int, order: str = "big") -> bytes:
    """The payload of an Exif segment with a maker's tag before the orientation."""
    entries = ((0x010F, 2, 3, 0), (0x0112, 3, 1, orientation))
    directory = b"".join(
        tag.to_bytes(2, order) + kind.to_bytes(2, order) + count.to_bytes(4, order) + value.to_bytes(2, order) + b"\0\0"
        for tag, kind, count, value in entries
    )
    start = b"MM\0*" if order == "big" else b"II*\0"
    return b"Exif\0\0" + start + (8).to_bytes(4, order) + len(entries).to_bytes(2, order) + directory + bytes(4)


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def with_orientation(data: bytes, orientation: int, order: str = "big") -> bytes:
    """A JPEG with an Exif segment in front."""
    return data[:2] + segment(0xE1, exif_segment(orientation, order)) + data[2:]


def upright(data: bytes) -> np.ndarray:
    """Pillow's answer."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def grey_with_factors(size: tuple[int, int]) -> bytes:
    """A grey JPEG whose only component states 2 x 2 sampling, which means nothing."""
    data = bytearray(encode(Image.fromarray(GREY).resize(size), "JPEG"))
    data[data.index(b"\xff\xc0") + 11] = 0x22
    return bytes(data)


def sampled(size: tuple[int, int], sampling: str, **options) -> bytes:
    image = Image.fromarray(COLOUR).resize(size)
    if sampling in ("4:4:0", "4:1:1"):
        return simplejpeg.encode_jpeg(np.asarray(image), 90, "RGB", sampling.replace(":", ""))
    return encode(image, "JPEG", quality=90, subsampling=sampling, **options)


WHOLE, ODD = (64, 48), (61, 43)  # 4 x 3 MCUs of 16 x 16 pixels; no whole number of blocks
INKS = Image.fromarray(np.concatenate([COLOUR, ALPHA // 4], axis=-1), "CMYK")
JPEGS = {  # name → (JPEG, EXIF orientations that are turned without loss)
    "4:2:0": (sampled(WHOLE, "4:2:0"), set(range(2, 9))),
    "4:2:0 of 8 x 8 more": (sampled((72, 56), "4:2:0"), {5}),
    "4:2:0, wide MCUs whole": (sampled((64, 43), "4:2:0"), {2, 5, 8}),
    "4:2:0, high MCUs whole": (sampled((61, 48), "4:2:0"), {4, 5, 6}),
    "4:2:2": (sampled((64, 40), "4:2:2"), set(range(2, 9))),
    "4:4:0": (sampled((56, 48), "4:4:0"), set(range(2, 9))),
    "4:4:4": (sampled((56, 40), "4:4:4"), set(range(2, 9))),
    "4:1:1": (sampled((64, 40), "4:1:1"), {2, 3, 4}),
    "odd": (sampled(ODD, "4:2:0"), {5}),
    "progressive": (sampled(WHOLE, "4:2:0", progressive=True), set(range(2, 9))),
    "progressive, odd": (sampled(ODD, "4:2:0", progressive=True), {5}),
    "grey": (encode(Image.fromarray(GREY).resize((56, 40)), "JPEG"), set(range(2, 9))),
    "grey, odd": (encode(Image.fromarray(GREY).resize(ODD), "JPEG"), {5}),
    "grey, progressive": (encode(Image.fromarray(GREY).resize((56, 40)), "JPEG", progressive=True), set(range(2, 9))),
    "grey, 2 x 2": (grey_with_factors((56, 40)), set(range(2, 9))),
    "CMYK": (encode(INKS, "JPEG", quality=90), set()),
    "RGB": (encode(Image.fromarray(COLOUR), "JPEG", quality=90, keep_rgb=True), set()),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_are_turned_upright(name: str, orientation: int) -> None:
    plain, lossless = JPEGS[name]
    data = with_orientation(plain, orientation)
    stored, ignored = jpeg.prepare(plain), jpeg.prepare(data)
    assert ignored.data == stored.data and ignored.action == stored.action  # `ignore` leaves the image as it lies
    np.testing.assert_array_equal(np.asarray(open_rgb(data)[0]), with_pillow(plain))

    applied, expected = jpeg.prepare(data, exif="apply"), upright(data)
    image, stated = open_rgb(data, "apply")
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert stated == orientation and applied.rotated == ignored.rotated == (orientation > 1)
    assert (applied.height, applied.width) == expected.shape[:2] and b"Exif" not in applied.data
    record = jpeg._workspace.inspect(applied.data, True)
    assert record[marks.STATUS] == marks.OK and record[marks.FRAME] == marks.SOF0
    assert record[marks.COLOUR] == marks.YCBCR and record[marks.KNOWN_SAMPLING]
    assert record[marks.ORIENTATION] == record[marks.METADATA] == 0
    seen = with_pillow(applied.data)
    region = RegionDecoder().decode(np.frombuffer(applied.data, np.uint8), np.array([0, 0]), np.array(seen.shape[:2]))
    np.testing.assert_array_equal(region, seen)  # our decoder reads it, in whatever layout

    difference = np.abs(seen.astype(int) - expected)
    if orientation == 1:
        assert applied.data == stored.data
    elif orientation in lossless:  # the inverse DCT of rows and columns, and of the chroma between, rounds otherwise
        assert applied.action == "transcoded"
        assert difference.max() <= (1 if "grey" in name else 4) and difference.mean() < 0.5
    else:
        difference = np.abs(seen.astype(int) - reencoded(expected, 90))
        assert applied.action == "re-encoded" and difference.mean() < 1.5


@pytest.mark.parametrize(
    ("name", "orientation"), [(name, orientation) for name in JPEGS for orientation in sorted(JPEGS[name][1])]
)
def test_turning_back_gives_the_same_bytes(name: str, orientation: int) -> None:
    """So no coefficient was lost."""
    plain, _ = JPEGS[name]
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    there = jpeg.prepare(with_orientation(plain, orientation), exif="apply")
    back = jpeg.prepare(with_orientation(there.data, inverse), exif="apply")
    assert back.action == "transcoded"
    np.testing.assert_array_equal(with_pillow(back.data), with_pillow(plain))
    if "grey" not in name:  # which is stored as three components
        assert back.data == lossless_baseline(plain)


OTHERS: dict[str, Callable[[int], bytes]] = {
    "png": lambda orientation: encode(Image.fromarray(COLOUR), "PNG", exif=exif_segment(orientation)),
    "grey png": lambda orientation: encode(Image.fromarray(DEEP), "PNG", exif=exif_segment(orientation, "little")),
    "webp": lambda orientation: encode(
        Image.fromarray(COLOUR), "WEBP", lossless=True, exif=exif_segment(orientation)[6:]
    ),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_turned_upright(name: str, orientation: int) -> None:
    data = OTHERS[name](orientation)
    stored = repeat(DEEP >> 8) if name == "grey png" else COLOUR
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    expected = repeat(turned >> 8) if name == "grey png" else turned
    for exif, pixels in (("ignore", stored), ("apply", expected)):
        image, stated = open_rgb(data, exif)
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert stated == orientation
        prepared = jpeg.prepare(data, quality=95, exif=exif)
        assert prepared.action == "re-encoded" and prepared.rotated == (orientation > 1)
        assert np.abs(with_pillow(prepared.data).astype(int) - reencoded(pixels, 95)).mean() < 1.5


def test_orientation_in_a_png_of_imagemagick() -> None:
    """Hexadecimal digits in a text, also damaged ones."""
    digits = exif_segment(6).hex()
    for text, expected in ((digits, 6), (digits[:40] + "\n" + digits[40:], 6), (digits[:41], 1), ("no digits", 1)):
        info = PngInfo()
        info.add_text("Raw profile type exif", f"\nexif\n{len(digits) // 2:8}\n{text}\n", zip=True)
        data = encode(Image.fromarray(COLOUR), "PNG", pnginfo=info)
        image, orientation = open_rgb(data, "apply")
        assert orientation == expected and image.size == ((HEIGHT, WIDTH) if expected == 6 else (WIDTH, HEIGHT))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_orientation_is_ignored_or_applied(order: str, compression: str | None) -> None:
    """Pillow itself turns TIFFs when it loads them, by XMP too where the tag is missing."""
    for orientation in range(1, 9):
        data = tiff(COLOUR.tobytes(), (8, 8, 8), 2, order, t274=orientation)
        if compression is not None:
            data = encode(Image.fromarray(COLOUR), "TIFF", compression=compression, tiffinfo={274: orientation})
        np.testing.assert_array_equal(np.asarray(open_rgb(data)[0]), COLOUR)
        image, stated = open_rgb(data, "apply")
        turned = Image.fromarray(COLOUR).transpose(TURNS[orientation]) if orientation > 1 else Image.fromarray(COLOUR)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(turned))
        assert stated == orientation and jpeg.prepare(data, exif="apply").width == turned.width
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(Image.fromarray(COLOUR), "TIFF", compression=compression, tiffinfo={700: xmp})
    for exif in ("ignore", "apply"):
        image, stated = open_rgb(data, exif)
        np.testing.assert_array_equal(np.asarray(image), COLOUR)
        assert stated == 1


def test_orientation_together_with_other_options() -> None:
    data = with_orientation(JPEGS["4:2:2"][0], 6)
    small = jpeg.prepare(data, max_resolution=32, quality=95, exif="apply")
    expected = Image.fromarray(upright(data)).resize((20, 32), Image.Resampling.LANCZOS)
    assert small.action == "resized" and small.rotated and (small.width, small.height) == (20, 32)
    assert np.abs(with_pillow(small.data).astype(int) - reencoded(np.asarray(expected), 95)).mean() < 1.5

    large = Image.fromarray(COLOUR).resize((512, 384))
    for options in ({"subsampling": 2}, {"subsampling": 1}, {"subsampling": 1, "progressive": True}):
        data = with_orientation(encode(large, "JPEG", **options), 8)
        whole, rows = jpeg.prepare(data, exif="apply"), jpeg.prepare(data, exif="apply", row_index=True)
        assert rows.row_index and rows.action == "transcoded" and rows.rotated
        np.testing.assert_array_equal(with_pillow(rows.data), with_pillow(whole.data))
        part, origin = splice(np.frombuffer(rows.data, np.uint8), np.array([100, 120]), np.array([200, 180]))
        assert part.size < len(rows.data) / 2
        offset = np.array([100, 120]) - origin
        cut = with_pillow(part.tobytes())[offset[0] : offset[0] + 100, offset[1] : offset[1] + 60]
        np.testing.assert_array_equal(cut, with_pillow(whole.data)[100:200, 120:180])

    for decode_check in (True, False):
        prepared = jpeg.prepare(data, exif="apply", decode_check=decode_check)
        assert prepared == jpeg.prepare(data, exif="apply")
    with pytest.raises(ValueError, match="exif 'rotate': must be ignore or apply"):
        jpeg.prepare(data, exif="rotate")


@pytest.mark.parametrize("name", ["4:2:0", "odd", "grey", "grey, odd", "progressive", "CMYK"])
def test_damaged_jpegs_are_refused_though_they_would_be_turned(name: str) -> None:
    plain, _ = JPEGS[name]
    for orientation in (2, 5, 6):
        data = with_orientation(plain, orientation)
        scan = data.index(b"\xff\xda") + 14
        half = scan + (len(data) - scan) // 2
        restart = data[:half] + bytes(20) + b"\xff\xd4" + data[half + 22 :]
        for damaged in (data[:half], data[:half] + b"\xff\xd9", restart):
            with pytest.raises(ValueError, match="truncated|damaged"):
                jpeg.prepare(damaged, exif="apply")


ORDERS = st.sampled_from(["big", "little"])


@st.composite
def exif_payloads(draw: st.DrawFn) -> bytes:
    """Exif segments, whole or damaged: any directory offset, count, type and value; bytes changed; cut off."""
    order = draw(ORDERS)
    payload = bytearray(exif_segment(draw(st.integers(0, 10)), order))
    if draw(st.booleans()):
        start, size = draw(st.sampled_from([(10, 4), (14, 2), (28, 2), (30, 2), (32, 4), (36, 4), (6, 4), (0, 6)]))
        payload[start : start + size] = draw(st.integers(0, 300)).to_bytes(size, draw(ORDERS))
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        payload[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
    return bytes(payload[: draw(st.sampled_from([len(payload), draw(st.integers(0, len(payload)))]))])


XMP = b'http://ns.adobe.com/xap/1.0/\0<x><rdf:Description tiff:Orientation="6"/></x>'
SEGMENTS = st.one_of(
    exif_payloads().map(lambda payload: segment(0xE1, payload)),
    exif_payloads().map(lambda payload: segment(0xE1, payload)),
    st.sampled_from([segment(0xE1, XMP), segment(0xFE, b"comment"), b"\xff"]),
    st.sampled_from([b"\xff\x01", b"\xff\xd0", b"\xff\xe1", b"\0", segment(0xE0, b"JFIF"), segment(0xEE, b"Adobe")]),
    exif_payloads().map(lambda payload: segment(0xE2, payload)),
)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@pytest.mark.filterwarnings("error")
@given(st.lists(SEGMENTS, max_size=5), st.integers(0, 40), st.sampled_from(["odd", "progressive"]))
@example([segment(0xE1, exif_segment(9)), segment(0xE1, XMP), segment(0xE1, exif_segment(6, "little"))], 0, "odd")
@example([segment(0xE1, exif_segment(1)), segment(0xE1, exif_segment(6))], 0, "odd")
def test_both_readers_find_the_same_orientation(segments: list[bytes], cut: int, name: str) -> None:
    """Annotation reads it in Python, conversion in compiled code, of one file the same."""
    plain = JPEGS[name][0]
    head = plain[:20] + b"".join(segments) + plain[20:]
    data = head[: head.index(b"\xff\xda") - cut] if cut > 30 else head
    record = np.zeros(marks.MARKERS, np.int64)
    status = marks.read_markers(np.frombuffer(data, np.uint8), record, np.zeros(marks.HEAD_BYTES, np.uint8))
    frame, orientation, bare = read_jpeg_header(data)
    assert (orientation, frame) == (max(record[marks.ORIENTATION], 1), record[marks.FRAME])
    if status == marks.OK:
        np.testing.assert_array_equal(with_pillow(bare), with_pillow(plain))
        prepared = jpeg.prepare(data, exif="apply")
        image, stated = open_rgb(data, "apply")
        assert stated == orientation and prepared.rotated == (orientation > 1)
        assert (prepared.width, prepared.height) == image.size


@pytest.mark.parametrize("metadata", [segment(0xE0, b"JFIF"), b"\xff\x01"])
def test_metadata_alone_makes_no_jpeg_unreadable(metadata: bytes) -> None:
    """Pillow refuses these, libjpeg reads them, and conversion copies them."""
    plain = JPEGS["odd"][0]
    data = plain[:20] + metadata + plain[20:]
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(open_rgb(data)[0]), with_pillow(plain))
    assert jpeg.prepare(data).data == plain


@settings(max_examples=500, deadline=None)
@given(exif_payloads())
def test_both_readers_find_the_same_orientation_in_a_segment(payload: bytes) -> None:
    compiled = exif_orientation(np.frombuffer(payload, np.uint8), 0, len(payload))
    plain = tiff_orientation(payload[6:]) if payload.startswith(b"Exif\0\0") else 0
    assert compiled == plain
