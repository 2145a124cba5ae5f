"""What `tl_fast.convert.image.prepare` stores: pixels against Pillow and DALI, verdicts against libjpeg's (simplejpeg,
any warning an error)."""

from __future__ import annotations

import ctypes
import io
import random
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tl_fast.convert import image as jpeg
from tl_fast.convert import lossless as turbojpeg_transform
from tl_fast.jpeg import huffman
from tl_fast.jpeg import markers as marks
from tl_fast.jpeg.exif import exif_orientation

# `rotated` of orientation 6, as cameras write it: big-endian, one entry.
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
RESTARTS = ({}, {"restart_marker_blocks": 5}, {"restart_marker_rows": 1}, {"optimize": True})


@pytest.fixture(scope="module")
def scene(photos: Path) -> Image.Image:
    return Image.open(
        photos / "val" / "fish" / sorted(file.name for file in (photos / "val" / "fish").iterdir())[0]
    ).convert("RGB")


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def same_pixels(prepared: jpeg.Prepared, source: bytes) -> bool:
    """Bit for bit Pillow's, in Pillow and in simplejpeg, and all else that a Prepared says."""
    assert prepared.crc == zlib.crc32(prepared.data) and (prepared.height, prepared.width) == pixels(source).shape[:2]
    Image.open(io.BytesIO(prepared.data)).verify()
    header = jpeg._workspace.inspect(prepared.data, True)
    assert header[marks.STATUS] == marks.OK and header[marks.FRAME] == marks.SOF0 and header[marks.COMPONENTS] == 3
    assert header[marks.METADATA] == 0 and header[marks.END] == len(prepared.data)
    expected = pixels(source)
    return bool((pixels(prepared.data) == expected).all() and (simplejpeg.decode_jpeg(prepared.data) == expected).all())


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def insert(data: bytes, segments: bytes) -> bytes:
    """Behind the first segment."""
    end = 4 + int.from_bytes(data[4:6], "big")
    return data[:end] + segments + data[end:]


# --- copies


@pytest.mark.parametrize("decode_check", [True, False])
def test_photos_are_copied(photos: Path, decode_check: bool) -> None:
    files = sorted(photos.rglob("*.jpg"))
    assert len(files) == 116
    for file in files[:: 1 if decode_check else 4]:
        data = file.read_bytes()
        prepared = jpeg.prepare(data, decode_check=decode_check)
        assert prepared.action == "copied" and same_pixels(prepared, data), file
        assert prepared.stripped == len(data) - len(prepared.data) and (prepared.stripped or prepared.parts[0] is data)


def test_original_imagenet_files(shared: Path) -> None:
    files = sorted((shared / "data" / "imagenet_sample").rglob("*.JPEG"))
    if not files:
        pytest.skip(f"no imagenet_sample in {shared}")
    actions: Counter[str] = Counter()
    for file in files:
        data = file.read_bytes()
        prepared = jpeg.prepare(data)
        assert same_pixels(prepared, data), file
        assert prepared == jpeg.prepare(data, decode_check=False)
        actions[prepared.action] += 1
    assert actions == {"copied": 127, "transcoded": 6}


@pytest.mark.parametrize("options", RESTARTS)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_sizes_that_are_not_whole_mcus(scene: Image.Image, subsampling: int, options: dict) -> None:
    for size in ((1, 1), (7, 9), (16, 16), (17, 33), (64, 8), (31, 95)):
        data = encode(scene.resize(size), subsampling=subsampling, quality=97, **options)
        prepared = jpeg.prepare(data)
        assert prepared.parts[0] is data and same_pixels(prepared, data)


def test_metadata_and_what_follows_the_end_are_left_out(scene: Image.Image) -> None:
    plain = encode(scene.resize((83, 61)))
    thumbnail = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\2\2" + bytes(12))
    junk = segment(0xE1, EXIF) + segment(0xE2, b"ICC_PROFILE\0" + bytes(500)) + segment(0xFE, b"a comment")
    junk += segment(0xED, b"Photoshop 3.0\0")
    for noisy in (
        insert(plain, junk),
        insert(plain, segment(0xE0, b"JFXX\0\x10" + bytes(80))),
        plain[:2] + junk + thumbnail + plain[20:],
        plain + bytes(1000),
        plain + plain,  # as phones append previews
        insert(plain, junk) + b"garbage\xff\xd9",
        insert(plain, b"\xff\xff\xff" + junk + b"\xff\x01"),  # fill bytes, and a marker without a payload
    ):
        for decode_check in (True, False):
            prepared = jpeg.prepare(noisy, decode_check=decode_check)
            assert prepared.action == "copied" and len(prepared.parts) == 2 and prepared.data == plain
            assert prepared.stripped == len(noisy) - len(plain) and prepared.rotated == (EXIF in noisy)
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")
    assert adobe in jpeg.prepare(insert(plain, adobe + junk)).data


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_tags() -> None:
    def orientation(payload: bytes) -> int:
        return exif_orientation(np.frombuffer(payload, np.uint8), 0, len(payload))

    def exif(value: int, little: bool, offset: int = 8, count: int = 2) -> bytes:
        order = "little" if little else "big"
        fields = [(0x010F, 2, 3, 0), (0x0112, 3, 1, value)]
        entries = b"".join(
            tag.to_bytes(2, order) + kind.to_bytes(2, order) + n.to_bytes(4, order) + v.to_bytes(2, order) + b"\0\0"
            for tag, kind, n, v in fields
        )
        start = b"II*\0" if little else b"MM\0*"
        return b"Exif\0\0" + start + offset.to_bytes(4, order) + count.to_bytes(2, order) + entries

    for little in (True, False):
        for value in range(1, 9):
            assert orientation(exif(value, little)) == value
            image = Image.open(io.BytesIO(insert(encode(Image.new("RGB", (8, 8))), segment(0xE1, exif(value, little)))))
            assert image.getexif()[0x0112] == value
        assert orientation(exif(9, little)) == orientation(exif(0, little)) == 0
        for offset in (0, 30, 0x7FFFFFFF, 0xFFFFFFFF):
            assert orientation(exif(6, little, offset)) == 0
        assert orientation(exif(6, little, count=0)) == 0 and orientation(exif(6, little, count=65_535)) == 6
        whole = exif(6, little)
        assert [orientation(whole[:i]) for i in range(len(whole))] == [0] * len(whole)


@pytest.mark.usefixtures("turbojpeg")
def test_a_stricter_reader_than_libjpeg_is_satisfied(scene: Image.Image) -> None:
    """What libjpeg reads without a warning though other decoders may not is written anew, without loss."""
    plain = encode(scene.resize((83, 61)), restart_marker_rows=2)
    start = plain.index(b"\xff\xdb")
    steps = plain.index(b"\xff\xdb") + 5
    wide = b"".join(b"\0" + plain[steps + i : steps + i + 1] for i in range(64))
    frame, scan = plain.index(b"\xff\xc0"), plain.index(b"\xff\xda")
    other_ids = bytearray(plain[:2] + plain[20:])  # without JFIF, and ids 0, 1, 2
    for i in range(3):
        other_ids[frame - 18 + 10 + 3 * i] = other_ids[scan - 18 + 5 + 2 * i] = i
    for odd, action in (
        (plain[:frame] + b"\xff\xc1" + plain[frame + 2 :], "copied"),
        (plain[:start] + segment(0xDB, b"\x10" + wide) + plain[steps + 64 :], "transcoded"),
        (bytes(other_ids), "transcoded"),
        (insert(plain, segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")), "transcoded"),  # says RGB, while JFIF says YCbCr
        (plain[:-2] + b"\0\xff\xd9", "transcoded"),
        (plain[:-2] + b"\xff\xff\xd9", "transcoded"),
        (plain[:-2] + b"\xff\xd1\xff\xd9", "transcoded"),
        (plain[:-2] + segment(0xFE, b"late") + b"\xff\xd9", "transcoded"),
        (plain.replace(b"\xff\x00", b"\xff\xff\x00", 1), "transcoded"),
    ):
        prepared = jpeg.prepare(odd)
        assert prepared.action == action and same_pixels(prepared, odd)
    no_tables = plain[: plain.index(b"\xff\xc4")] + plain[scan - 6 :]  # as motion JPEG, but for DRI
    assert jpeg.prepare(no_tables).action == "transcoded" and same_pixels(jpeg.prepare(no_tables), plain)


# --- without loss


def non_interleaved(image: Image.Image) -> bytes:
    """A sequential JPEG of three scans, put together from three greyscale ones with the same tables."""
    planes = [encode(plane, quality=85) for plane in image.convert("YCbCr").split()]
    cuts = [(plane.index(b"\xff\xda"), plane) for plane in planes]
    frame, first = planes[0].index(b"\xff\xc0"), planes[0]
    head = first[: frame + 9] + b"\3\1\x11\0\2\x11\0\3\x11\0" + first[frame + 13 : cuts[0][0]]
    head = head.replace(first[frame : frame + 4], b"\xff\xc0\0\x11")
    return (
        head
        + b"".join(b"\xff\xda\0\x08\1" + bytes([i + 1]) + plane[at + 6 : -2] for i, (at, plane) in enumerate(cuts))
        + b"\xff\xd9"
    )


@pytest.mark.usefixtures("turbojpeg")
def test_progressive_and_multi_scan_files_keep_their_pixels(scene: Image.Image) -> None:
    image = scene.resize((131, 77))
    files = [
        encode(image, progressive=True, quality=quality, subsampling=s) for quality in (5, 60, 100) for s in (0, 1, 2)
    ]
    files += [encode(image, progressive=True, restart_marker_rows=1), non_interleaved(image)]
    for data in files:
        noisy = insert(data, segment(0xE1, EXIF)) + b"tail"
        for decode_check in (True, False):
            prepared = jpeg.prepare(noisy, decode_check=decode_check)
            assert prepared.action == "transcoded" and prepared.rotated and prepared.stripped == len(noisy) - len(data)
            assert same_pixels(prepared, data)
        for cut in (len(data) // 3, len(data) - 2):
            for decode_check in (True, False):
                with pytest.raises(ValueError, match="truncated|damaged"):
                    jpeg.prepare(data[:cut], decode_check=decode_check)


@pytest.mark.usefixtures("turbojpeg")
def test_arithmetic_coding(scene: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TJ_ARITHMETIC", "1")  # read by libturbojpeg's compressor
    library = turbojpeg_transform._library()
    image = np.ascontiguousarray(scene.resize((131, 77)))
    library.tjInitCompress.restype = ctypes.c_void_p
    handle, output, size = ctypes.c_void_p(library.tjInitCompress()), ctypes.c_void_p(), ctypes.c_ulong()
    arguments = (131, 0, 77, 0, ctypes.byref(output), ctypes.byref(size), 2, 90, 0)
    assert library.tjCompress2(handle, image.ctypes.data_as(ctypes.c_char_p), *arguments) == 0
    data = ctypes.string_at(output, size.value)
    library.tjFree(output)
    library.tjDestroy(handle)
    if b"\xff\xc9" not in data:
        pytest.skip("this libturbojpeg writes no arithmetic coding")
    prepared = jpeg.prepare(data)
    assert prepared.action == "transcoded" and same_pixels(prepared, data)


def test_missing_scans_look_as_in_pillow(scene: Image.Image) -> None:
    """libjpeg smooths a progressive image whose later scans are missing, without a warning; so such a file is encoded
    anew."""
    data = encode(scene.resize((131, 77)), progressive=True, quality=30)
    last = data.rindex(b"\xff\xda")
    cut = data[: data.rindex(b"\xff\xc4", 0, last)] + b"\xff\xd9"
    prepared = jpeg.prepare(cut, quality=100)
    assert prepared.action == "re-encoded" and np.abs(pixels(prepared.data).astype(int) - pixels(cut)).mean() < 2


@pytest.mark.usefixtures("turbojpeg")
def test_grey(scene: Image.Image) -> None:
    from nvidia.dali import fn, pipeline_def, types

    sources = []
    for size in ((8, 8), (61, 43), (160, 121)):
        for options in (*RESTARTS, {"quality": 100}, {"quality": 3}, {"progressive": True}):
            sources.append(encode(scene.resize(size).convert("L"), **options))
    factors = bytearray(sources[0])
    factors[factors.index(b"\xff\xc0") + 11] = 0x22  # a single component's sampling factors mean nothing
    white = encode(Image.new("L", (64, 64), 255), quality=100, restart_marker_blocks=3)
    noise = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 77), dtype=np.uint8)), quality=100)
    sources += [bytes(factors), white, noise]
    stored = []
    for data in sources:
        prepared = jpeg.prepare(insert(data, segment(0xE1, EXIF)))
        assert prepared.action == "transcoded" and prepared.rotated and prepared.stripped == len(EXIF) + 4
        assert same_pixels(prepared, data)
        assert prepared == jpeg.prepare(insert(data, segment(0xE1, EXIF)), decode_check=False)
        assert (b"\xff\xdd" in prepared.data) == (b"\xff\xdd" in data and b"\xff\xc2" not in data)
        stored.append(np.frombuffer(prepared.data, np.uint8))

    @pipeline_def(batch_size=len(stored), num_threads=1, device_id=None, exec_dynamic=False)
    def decode():
        return fn.decoders.image(fn.external_source(lambda: stored, batch=True), device="cpu", output_type=types.RGB)

    graph = decode()
    graph.build()
    (decoded,) = graph.run()
    for i, data in enumerate(sources):
        np.testing.assert_array_equal(np.asarray(decoded.at(i)), pixels(data))


def test_without_libturbojpeg(scene: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    turbojpeg_transform._library.cache_clear()
    monkeypatch.setattr(turbojpeg_transform, "_find_library", lambda: "libturbojpeg-of-nobody.so.0")
    remedies = "apt-get install libturbojpeg0.*without root.*apt-get download libturbojpeg0 && dpkg -x.*conda.*LD_LIB"
    try:
        with pytest.raises(turbojpeg_transform.TurboJpegMissing, match=remedies):
            jpeg.prepare(encode(scene.resize((64, 64)), progressive=True))
        assert jpeg.prepare(encode(scene.resize((64, 64)))).action == "copied"
        assert jpeg.prepare(encode(scene.resize((64, 64)).convert("L"))).action == "transcoded"
    finally:
        turbojpeg_transform._library.cache_clear()


@pytest.mark.parametrize("place", ["lib", "usr/lib/x86_64-linux-gnu"])
def test_libturbojpeg_is_found_where_a_user_without_root_can_put_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    library = tmp_path / place / "libturbojpeg.so.0.2.0"
    assert turbojpeg_transform._find_library() != str(library)
    library.parent.mkdir(parents=True)
    library.touch()
    assert turbojpeg_transform._find_library() == str(library)


# --- everything else


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_other_files_are_encoded_anew(scene: Image.Image) -> None:
    image = scene.resize((97, 61))
    frames = {"save_all": True, "append_images": [Image.new("RGB", image.size)]}
    deep = np.linspace(0, 65_535, 97 * 61).reshape(61, 97).astype(np.uint16)
    for data in (
        encode(image.convert("CMYK")),
        encode(image, keep_rgb=True),
        encode(image, "PNG", exif=EXIF),
        encode(Image.fromarray(deep), "PNG"),
        encode(image, "WEBP", lossless=True, exif=EXIF),
        encode(image, "BMP"),
        encode(image, "TIFF"),
        encode(image, "PPM"),
        encode(image, "GIF", **frames),
        encode(image, "PNG", **frames),
    ):
        for decode_check in (True, False):
            prepared = jpeg.prepare(data, quality=95, decode_check=decode_check)
            assert prepared.action == "re-encoded" and prepared.rotated == (EXIF[6:] in data) and prepared.stripped == 0
            assert prepared.crc == zlib.crc32(prepared.data) and pixels(prepared.data).shape == (61, 97, 3)
        expected = (
            np.repeat((deep >> 8)[..., None], 3, -1)
            if Image.open(io.BytesIO(data)).mode.startswith("I")
            else pixels(data)
        )
        assert np.abs(pixels(prepared.data).astype(int) - expected).mean() < 4  # 4:2:0 at quality 95 of a noisy photo
        for cut in (len(data) // 2, 20):
            with pytest.raises(ValueError, match="truncated|damaged|not an image"):
                jpeg.prepare(data[:cut])


def test_shrinking(scene: Image.Image) -> None:
    for image, options in (
        (scene, {}),
        (scene, {"progressive": True}),
        (scene.convert("L"), {}),
        (scene.convert("CMYK"), {}),
    ):
        data = insert(encode(image, **options), segment(0xE1, EXIF))
        prepared = jpeg.prepare(data, max_resolution=100, quality=95)
        expected = (
            Image.open(io.BytesIO(data))
            .convert("RGB")
            .resize((prepared.width, prepared.height), Image.Resampling.LANCZOS)
        )
        assert prepared.action == "resized" and max(prepared.width, prepared.height) == 100 and prepared.rotated
        assert np.abs(pixels(prepared.data).astype(int) - np.asarray(expected)).mean() < 3
        damaged = bytearray(data)
        damaged[-200:-150] = bytes(50)
        with pytest.raises(ValueError, match="damaged|truncated"):
            jpeg.prepare(bytes(damaged), max_resolution=100)


def test_unreadable_jpegs_say_why(scene: Image.Image) -> None:
    data = encode(scene.resize((64, 64)))
    frame = data.index(b"\xff\xc0")
    with pytest.raises(ValueError, match="12 bits a sample; convert"):
        jpeg.prepare(data[: frame + 4] + b"\x0c" + data[frame + 5 :])
    for kind in (b"\xff\xc3", b"\xff\xcb"):
        with pytest.raises(ValueError, match="damaged"):
            jpeg.prepare(data[:frame] + kind + data[frame + 2 :])
    for options in ({}, {"progressive": True}):
        huge = encode(scene.resize((64, 64)), **options)
        frame = huge.index(b"\xff\xc2" if options else b"\xff\xc0")
        for decode_check in (True, False):
            with pytest.raises(
                ValueError, match="65000 × 65000 pixels from" if options else "ends before the last row"
            ):
                jpeg.prepare(huge[: frame + 5] + b"\xfd\xe8\xfd\xe8" + huge[frame + 9 :], decode_check=decode_check)


# --- verdicts


def tiny(codes: dict[int, str], bits: str) -> bytes:
    """An 8 × 8 greyscale JPEG whose AC table has `codes` (symbol: bits), DC difference 0 being 0, and the given image
    data."""
    lengths = [sum(len(code) == n for code in codes.values()) for n in range(1, 17)]
    symbols = sorted(codes, key=lambda symbol: (len(codes[symbol]), codes[symbol]))
    bits += "1" * (-len(bits) % 8)
    scan = b"".join(int(bits[i : i + 8], 2).to_bytes(1, "big") for i in range(0, len(bits), 8)).replace(
        b"\xff", b"\xff\0"
    )
    tables = segment(0xC4, b"\0\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10" + bytes(lengths) + bytes(symbols))
    frame = segment(0xC0, b"\x08\0\x08\0\x08\1\1\x11\0")
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + b"\1" * 64)
        + frame
        + tables
        + segment(0xDA, b"\1\1\0\0\x3f\0")
        + scan
        + b"\xff\xd9"
    )


def test_codes_that_encoders_do_not_write() -> None:
    codes = {0x00: "00", 0x01: "01", 0xF0: "100", 0x0B: "1010", 0x30: "1011", 0xF1: "1100"}
    runs = "0" + "100" * 3
    for bits in (
        "000",
        "0" + "011" * 63,
        runs + "011" * 15,
        "0" + "011" * 15 + "100" * 2 + "11001",
        runs + "011" * 2 + "00",
    ):
        data = tiny(codes, bits)
        assert same_pixels(jpeg.prepare(data), data), bits
    for bits in (
        "01111" + "0" * 60,  # no such code
        runs + "11001" + "00",  # to the 65th coefficient
        runs + "011" + "11001" + "00",
        "01010" + "1" * 11 + "00",  # a coefficient of 11 bits
        "01011" + "00",  # a run of three with nothing behind it
    ):
        with pytest.raises(ValueError, match="damaged JPEG: .*Huffman code"):
            jpeg.prepare(tiny(codes, bits))
    for bits in ("0", "0" + "011" * 40, ""):
        with pytest.raises(ValueError, match="truncated JPEG|damaged JPEG: .* premature end"):
            jpeg.prepare(tiny(codes, bits))


@pytest.mark.parametrize("options", RESTARTS)
def test_truncation_is_found_at_any_byte(scene: Image.Image, options: dict) -> None:
    data = encode(scene.resize((40, 24)), **options)
    for decode_check in (True, False):
        for size in range(len(data)):
            with pytest.raises(ValueError, match="truncated|damaged|not an image"):
                jpeg.prepare(data[:size], decode_check=decode_check)
    with pytest.raises(ValueError, match="truncated"):
        jpeg.prepare(data[: len(data) * 2 // 3] + b"\xff\xd9")


def mutate(data: bytes, rng: random.Random) -> bytes:
    mutant, scan = bytearray(data), max(1, data.find(b"\xff\xda") + 14)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        low, high = rng.choice(
            ((0, len(mutant)), (2, min(scan, len(mutant))), (min(scan, len(mutant) - 1), len(mutant)))
        )
        start, other, size = rng.randrange(low, high), rng.randrange(low, high), rng.choice((1, 2, 5, 50))
        kind = rng.randrange(10)
        if kind < 3:
            mutant[start] ^= 1 << rng.randrange(8)
        elif kind == 3:
            mutant[start] = rng.choice((0, 0xFF, 0xD9, 0xD0, 0xDA, 0xFE, rng.randrange(256)))
        elif kind == 4:
            del mutant[start : start + size]
        elif kind == 5:
            mutant[start:start] = mutant[other : other + size]
        elif kind == 6:
            mutant[start:start] = rng.choice(
                (b"\xff", b"\0", b"\xff\0", b"\xff\xff", b"\xff\xd0", b"\xff\xd9", b"\xff\xfe\0\4ab", b"\xff\x01")
            )
        elif kind == 7:
            mutant = mutant[:start] + rng.choice((b"", b"\xff\xd9"))
        elif kind == 8 and mutant[-2:] == b"\xff\xd9":
            extra = rng.randbytes(rng.randrange(1, 9))
            mutant[-2:-2] = rng.choice(
                (b"\0", b"\xff\xff", extra, b"\xff\xd0", b"\xff\xfe\0\4ab", b"\xff\xdc\0\4\0\x10")
            )
        else:
            mutant[start], mutant[other] = mutant[other], mutant[start]
        if len(mutant) < 8:
            break
    return bytes(mutant)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_verdicts_equal_libjpegs_or_are_stricter(scene: Image.Image, seed: int) -> None:
    """8,000 damaged files a seed: what our decoder accepts libjpeg decodes without a warning, to the same pixels once
    stripped.

    The other way round, libjpeg is silent only on bad codes (libjpeg-turbo's fast loop ignores them) and on oddities it
    is asked about.
    """
    rng, outcomes = random.Random(seed), Counter()
    whole = [
        encode(
            scene.resize((rng.randrange(17, 90), rng.randrange(17, 90))),
            quality=quality,
            subsampling=subsampling,
            **options,
        )
        for quality in (20, 75, 98)
        for subsampling in (0, 1, 2)
        for options in RESTARTS
    ]
    whole += [encode(scene.resize((300, 200)), quality=90, **options) for options in RESTARTS]
    whole += [encode(scene.resize((53, 41)).convert("L"), quality=90, **options) for options in RESTARTS]
    for case in range(8000):
        data = mutate(rng.choice(whole), rng)
        if data[:3] != b"\xff\xd8\xff":
            continue
        record = jpeg._workspace.inspect(data, True)
        status, single = record[marks.STATUS], record[marks.SINGLE]
        if single and record[marks.COLOUR] == marks.GREY and status in (marks.OK, marks.BAD_RESTART):
            status = jpeg._workspace.check_grey(data, splice=rng.random() < 0.5)[0]
        accepted = status == marks.OK and bool(single)
        if record[marks.HEIGHT] * record[marks.WIDTH] > 4_000_000 and not accepted:
            continue
        try:
            reference = simplejpeg.decode_jpeg(data, "GRAY" if record[marks.COMPONENTS] == 1 else "RGB")
        except ValueError as error:
            assert not accepted or "subsampling" in str(error), (
                seed,
                case,
                error,
            )  # a layout that TurboJPEG cannot decode at all
            outcomes["damaged"] += 1
            continue
        if accepted:
            outcomes["whole"] += 1
            if record[marks.COLOUR] == marks.YCBCR and record[marks.SURE] and record[marks.KNOWN_SAMPLING]:
                assert (simplejpeg.decode_jpeg(jpeg.prepare(data).data) == reference).all(), (seed, case)
        else:
            outcomes["stricter"] += 1
            assert status in (marks.ODD, marks.BAD_CODE) or not single, (seed, case, status)
    assert outcomes["whole"] > 1000 and outcomes["damaged"] > 3000 and outcomes["stricter"] < 1000


@pytest.mark.usefixtures("turbojpeg")
def test_the_transform_refuses_what_libjpeg_warns_of(scene: Image.Image) -> None:
    rng, outcomes = random.Random(5), Counter()
    whole = [encode(scene.resize((61, 43)), progressive=True, quality=quality) for quality in (30, 95)]
    for case in range(1000):
        data = mutate(rng.choice(whole), rng)
        record = jpeg._workspace.inspect(data, True)
        if record[marks.STATUS] != marks.OK or record[marks.HEIGHT] * record[marks.WIDTH] > 4_000_000:
            continue
        try:
            turbojpeg_transform.lossless_baseline(data)
        except ValueError:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
            try:
                simplejpeg.decode_jpeg(data, "GRAY" if record[marks.COMPONENTS] == 1 else "RGB")
            except ValueError as error:
                # Transforming does not look at sizes that only decoding does; what comes out is decoded in the next
                # test.
                assert "Unsupported color conversion" in str(error) or "subsampling" in str(error), (case, error)
    assert outcomes["accepted"] > 50 and outcomes["refused"] > 50


@pytest.mark.usefixtures("turbojpeg")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")
def test_hostile_files_of_every_kind(scene: Image.Image, seed: int, capfd: pytest.CaptureFixture) -> None:
    """6,000 damaged files a seed: ValueError, or a JPEG that decodes without a warning to the stated size."""
    rng, outcomes = random.Random(100 + seed), Counter()
    image = scene.resize((61, 43))
    grey, palette = image.convert("L"), image.quantize(32)
    whole = [
        encode(image),
        encode(image, progressive=True),
        encode(grey),
        encode(grey, progressive=True),
        encode(image.convert("CMYK")),
    ]
    whole += [
        encode(image, keep_rgb=True),
        encode(grey, restart_marker_blocks=2),
        insert(encode(image), segment(0xE1, EXIF)),
    ]
    whole += [encode(image, kind) for kind in ("PNG", "WEBP", "BMP", "TIFF", "PPM")] + [
        encode(palette, kind) for kind in ("PNG", "GIF")
    ]
    whole += [
        encode(image, "TIFF", compression="tiff_lzw"),
        encode(image, "WEBP", lossless=True),
        encode(image, "PNG", exif=EXIF),
    ]
    for case in range(6000):
        data, decode_check = mutate(rng.choice(whole), rng), rng.random() < 0.8
        try:
            prepared = jpeg.prepare(data, max_resolution=rng.choice((None, None, 40, 500)), decode_check=decode_check)
        except ValueError:
            outcomes["refused"] += 1
            continue
        outcomes[prepared.action] += 1
        try:
            assert simplejpeg.decode_jpeg(prepared.data).shape == (prepared.height, prepared.width, 3)
        except ValueError:
            assert not decode_check and prepared.action == "copied", (seed, case)
    assert min(outcomes[action] for action in ("copied", "transcoded", "re-encoded", "resized", "refused")) > 5
    capfd.readouterr()  # libtiff writes to stderr


# --- how it runs


@pytest.mark.usefixtures("turbojpeg")
def test_threads_do_not_share_working_memory(scene: Image.Image) -> None:
    files = [
        encode(scene.resize((150 + i, 100)), quality=80 + i, optimize=i % 2 == 0, progressive=i % 5 == 0)
        for i in range(12)
    ]
    files += [encode(scene.resize((90, 120 + i)).convert("L"), optimize=True) for i in range(6)]
    expected = [jpeg.prepare(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(jpeg.prepare, files * 20)) == expected * 20


def test_the_gil_is_free_while_decoding() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), dtype=np.uint8)
    data, ticks = encode(Image.fromarray(noise), quality=97), 0
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(huffman.check_scan, *_scan_arguments(data))  # some 50 ms in one call
        while not call.done():
            time.sleep(0.001)
            ticks += 1
    assert call.result()[0] == marks.OK and ticks > 10


def _scan_arguments(data: bytes) -> tuple:
    work = jpeg._Workspace()
    assert work.inspect(data, True)[marks.STATUS] == marks.OK  # also compiles what is to be called
    arguments = (np.frombuffer(data, np.uint8), work.scan, None, None)
    huffman.check_scan(*arguments)
    return arguments


def test_tables_left_by_a_refused_file_are_not_taken_for_the_next(scene: Image.Image) -> None:
    good = encode(scene.resize((64, 48)))
    counts = good.index(b"\xff\xc4") + 5
    bad = good[:counts] + bytes([3]) + good[counts + 1 :]  # more codes of one bit than there are
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            jpeg.prepare(bad)
        assert same_pixels(jpeg.prepare(good), good)
    assert jpeg._Workspace().inspect(bad, True)[marks.STATUS] == marks.BAD_TABLE
