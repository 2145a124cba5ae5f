"""The beton: against stock ffcv in both directions, against damage, and against hostile bytes."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from ffcv_batches import collect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_betons import random_maps

from tl_fast.beton import layout
from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert import write as beton_write
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.labelmaps.format import MapSpec, encode, unpack

SPEC = MapSpec(k=3, height=5, width=7, num_classes=300)
CLASSES = [f"class {i}" for i in range(300)]
PAGE = 1 << 21


def jpeg_of(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def make_samples(jpegs: list[bytes], maps: list[np.void] | None = None) -> list[Sample]:
    return [
        Sample(f"folder/é {i}.jpg", 7 * i % 300, lambda data=data: data, None if maps is None else lambda i=i: maps[i])
        for i, data in enumerate(jpegs)
    ]


@pytest.fixture(scope="module")
def jpegs(photos: Path) -> list[bytes]:
    """All photos at 160×120, so that ffcv's plain decoder, which needs one size, can read them."""
    return [jpeg_of(Image.open(file).resize((160, 120))) for file in sorted(photos.rglob("*.jpg"))]


@pytest.fixture(scope="module")
def maps(jpegs: list[bytes]) -> list[np.void]:
    return random_maps(len(jpegs), SPEC)


@pytest.fixture(scope="module")
def written(jpegs: list[bytes], maps: list[np.void], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """116 samples with label maps, repeated so that they fill more than one page."""
    path = tmp_path_factory.mktemp("beton") / "maps.beton"
    samples = make_samples(jpegs * 3, maps * 3)
    summary = write_beton(
        path, samples, class_names=CLASSES, spec=SPEC, annotator={"model": "none"}, page_size=PAGE, workers=2
    )
    assert summary.copied == summary.samples == len(samples) and summary.file_bytes == path.stat().st_size > PAGE
    return path


@pytest.fixture(scope="module")
def small(jpegs: list[bytes], maps: list[np.void], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("beton") / "small.beton"
    write_beton(
        path,
        make_samples([jpeg_of(Image.new("RGB", (16 + i, 8), (i * 9, 0, 0))) for i in range(5)], maps),
        class_names=CLASSES,
        spec=SPEC,
        workers=1,
    )
    return path.read_bytes()


def test_round_trip(written: Path, jpegs: list[bytes], maps: list[np.void]) -> None:
    with BetonReader(written) as reader:
        assert len(reader) == reader.num_samples == 3 * len(jpegs)
        assert reader.spec == SPEC and reader.class_names == CLASSES and reader.annotator == {"model": "none"}
        assert reader.source_ids[:2] == ["folder/é 0.jpg", "folder/é 1.jpg"] and len(reader.source_ids) == len(reader)
        assert reader.heights.dtype == reader.widths.dtype == np.int32 and reader.labels.dtype == np.int64
        assert (reader.heights == 120).all() and (reader.widths == 160).all()
        np.testing.assert_array_equal(reader.labels, 7 * np.arange(len(reader)) % 300)
        order = np.random.default_rng(1).permutation(len(reader))
        classes, scores = reader.label_maps(order)
        assert classes.dtype == np.uint16 and scores.dtype == np.float32
        for row, i in enumerate(order):
            expected = maps[i % len(maps)]
            assert bytes(reader.image(i)) == jpegs[i % len(jpegs)]
            assert reader.crc(i) == zlib.crc32(jpegs[i % len(jpegs)] + encode(expected, SPEC))
            for found, want in zip((classes[row], scores[row]), unpack(expected, SPEC), strict=True):
                np.testing.assert_array_equal(found, want)
        with pytest.raises(IndexError):
            reader.image(len(reader))
        again = pickle.loads(pickle.dumps(reader))
        assert bytes(again.image(3)) == jpegs[3]
    assert verify(written, decode=True, workers=2) == []


def test_readers_that_are_dropped_leave_no_descriptor(written: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2000):
        BetonReader(written).image(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_sample_crosses_a_page(written: Path) -> None:
    data = np.fromfile(written, np.uint8)
    table = data[int(data[:24].view(layout.HEADER)["alloc_table_ptr"][0]) :].view(layout.ALLOCATION)
    first = np.minimum.reduceat(table["ptr"], np.arange(0, len(table), 2)) // PAGE
    last = (np.maximum.reduceat(table["ptr"] + table["size"], np.arange(0, len(table), 2)) - 1) // PAGE
    np.testing.assert_array_equal(first, last)
    assert len(np.unique(first)) > 1


def test_same_bytes_for_any_number_of_workers(
    written: Path, jpegs: list[bytes], maps: list[np.void], tmp_path: Path
) -> None:
    def slow(data: bytes, i: int) -> bytes:  # finish out of order
        time.sleep(0.003 * (i % 3 == 0))
        return data

    for workers in (1, 3):
        samples = [
            Sample(s.source_id, s.label, lambda s=s, i=i: slow(s.image(), i), s.label_map)
            for i, s in enumerate(make_samples(jpegs * 3, maps * 3))
        ]
        path = tmp_path / f"{workers}.beton"
        write_beton(
            path, samples, class_names=CLASSES, spec=SPEC, annotator={"model": "none"}, page_size=PAGE, workers=workers
        )
        assert path.read_bytes() == written.read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("stock_ffcv")
@pytest.mark.parametrize("cache", ["os", "process"])
def test_stock_ffcv_loader_reads_image_label_and_map(written: Path, jpegs: list[bytes], cache: str) -> None:
    import ffcv
    import numba

    from tl_fast.beton.ffcv_field import LabelMapField

    shared = (
        numba.uint8[::1],
        numba.uint8[:, ::1],
        numba.uint64[::1],
        numba.uint32[::1],
    )  # numba's own objects, for the whole process
    options = {
        "os": {"os_cache": True, "order": ffcv.loader.OrderOption.SEQUENTIAL},
        "process": {"os_cache": False, "order": ffcv.loader.OrderOption.QUASI_RANDOM},
    }[cache]  # the latter relies on pages
    batches = collect(
        lambda: ffcv.Loader(
            str(written),
            batch_size=64,
            num_workers=1,
            drop_last=False,
            custom_fields={"label_map": LabelMapField},
            **options,
        )
    )
    images, labels, label_maps, crcs = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    reader = BetonReader(written)
    assert len(images) == len(reader)
    place = {
        (label, crc): i
        for i, (label, crc) in enumerate(zip(reader.labels.tolist(), map(reader.crc, range(len(reader))), strict=True))
    }
    order = [place[key] for key in zip(labels[:, 0].tolist(), crcs[:, 0].tolist(), strict=True)]
    assert sorted(order) == list(range(len(reader)))
    classes, scores = reader.label_maps(order)
    np.testing.assert_array_equal(label_maps[:, 1], classes)
    np.testing.assert_allclose(
        label_maps[:, 0], scores, rtol=0, atol=4e-6
    )  # ffcv compiles with fastmath: one fused multiply-add
    for image, i in zip(images, order, strict=True):
        data = jpegs[i % len(jpegs)]
        np.testing.assert_array_equal(image, simplejpeg.decode_jpeg(data, fastdct=True))
        # ffcv decodes with libjpeg's fast DCT: at quality 90 measured up to 8 levels from Pillow's exact one, mean 0.95
        # (75: 5, 95: 20)
        difference = np.abs(image.astype(int) - np.asarray(Image.open(io.BytesIO(data))))
        assert difference.max() <= 10 and difference.mean() < 2
    assert all(kind.mutable for kind in shared), "ffcv marked numba's types as read-only"


AFTER_THE_READER = """
import sys
import numpy as np
from ffcv.loader import Loader, OrderOption
from tl_fast.beton import BetonReader
from tl_fast.beton.ffcv_field import LabelMapField
reader = BetonReader(sys.argv[1])
expected = reader.label_maps(np.arange(len(reader)))[0]
loader = Loader(sys.argv[1], batch_size=64, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                custom_fields={"label_map": LabelMapField})
print((np.concatenate([batch[2].numpy()[:, 1].copy() for batch in loader]) == expected).all())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("stock_ffcv")
def test_stock_ffcv_loader_beside_the_reader(written: Path, tmp_path: Path) -> None:
    """In one process, with nothing compiled before: numba once inferred types for ever where both used one compiled
    function."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", AFTER_THE_READER, str(written)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=150
    )
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.usefixtures("stock_ffcv")
def test_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    from tl_fast.beton.ffcv_field import LabelMapField

    assert (
        layout.HEADER == types.HeaderType
        and layout.ALLOCATION == types.ALLOC_TABLE_TYPE
        and layout.VERSION == types.CURRENT_VERSION
    )
    assert layout.FIELD.itemsize == types.FieldDescType.itemsize
    assert [layout.FIELD.fields[name][1] for name in layout.FIELD.names] == [
        types.FieldDescType.fields[name][1] for name in types.FieldDescType.names
    ]
    field = LabelMapField(SPEC)
    handlers = [RGBImageField(), IntField(), field, IntField()]
    assert layout.metadata_dtype(
        [layout.IMAGE, np.dtype("<i8"), layout.LABEL_MAP, np.dtype("<i8")]
    ) == types.get_metadata_type(handlers)
    for kind, handler in types.TYPE_ID_HANDLER.items():
        if handler is not None and kind not in (4, 6):  # arrays take arguments; their entry is a pointer
            assert layout.STOCK_TYPES[kind] == handler().metadata_type
    assert LabelMapField.from_binary(field.to_binary()[0]).spec == SPEC


@pytest.fixture(scope="module")
def stock_file(stock_ffcv: None, jpegs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ffcv import writer
    from ffcv.fields import IntField, RGBImageField

    path = tmp_path_factory.mktemp("stock") / "stock.beton"
    images = [np.asarray(Image.open(io.BytesIO(data))) for data in jpegs[:40]]
    writer.DatasetWriter(
        str(path), {"image": RGBImageField("jpg", jpeg_quality=95), "label": IntField()}, num_workers=2
    ).from_indexed_dataset([(image[: 100 + i], i % 4) for i, image in enumerate(images)], chunksize=3)
    return path


def test_opens_files_of_the_stock_writer(stock_file: Path, jpegs: list[bytes]) -> None:
    reader = BetonReader(stock_file)
    assert (
        len(reader) == 40
        and reader.spec is None
        and reader.class_names == []
        and reader.source_ids[:2] == ["0", "1"]
        and not reader.has_crc
    )
    assert (reader.widths == 160).all()
    np.testing.assert_array_equal(reader.labels, np.arange(40) % 4)
    for i in range(40):
        decoded = simplejpeg.decode_jpeg(reader.image(i))
        original = np.asarray(Image.open(io.BytesIO(jpegs[i])))[: 100 + i]
        assert decoded.shape == original.shape == (reader.heights[i], reader.widths[i], 3)
        assert np.abs(decoded.astype(int) - original).mean() < 6
    assert verify(stock_file, decode=True) == []
    with pytest.raises(BetonError, match="no label maps"):
        reader.label_maps([0])
    with pytest.raises(BetonError, match="crc"):
        reader.crc(0)


@pytest.mark.usefixtures("stock_ffcv")
def test_raw_images_are_refused_with_the_remedy(tmp_path: Path) -> None:
    from ffcv import writer
    from ffcv.fields import IntField, RGBImageField

    path = tmp_path / "raw.beton"
    writer.DatasetWriter(
        str(path), {"image": RGBImageField("raw"), "label": IntField()}, num_workers=1
    ).from_indexed_dataset([(np.zeros((8, 8, 3), np.uint8), 0)] * 3)
    with pytest.raises(BetonError, match="raw.beton.*raw pixels.*write_mode='jpg'"):
        BetonReader(path)


def test_verify_finds_a_flipped_bit_in_any_sample(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.beton"
    path.write_bytes(small)
    reader = BetonReader(path)
    table = np.frombuffer(small, np.uint8)[reader._alloc_ptr :].view(layout.ALLOCATION)
    assert len(table) == 2 * len(reader)  # an image and a label map each
    for row in table:
        for place in (0, int(row["size"]) // 2, int(row["size"]) - 1):
            data = bytearray(small)
            data[int(row["ptr"]) + place] ^= 1
            path.write_bytes(data)
            problems = verify(path)
            assert (
                len(problems) == 1
                and f"sample {row['sample_id']} " in problems[0]
                and "flipped.beton: crc" in problems[0]
            )


def read_everything(path: Path) -> list[tuple]:
    """What a file says, sample by sample; `None` for samples whose bytes fail their CRC."""
    with BetonReader(path) as reader:
        ids = reader.source_ids
        result = []
        for i in range(min(len(reader), 100)):
            if reader.has_crc:
                try:
                    reader.check(i)
                except BetonError:
                    result.append(None)
                    continue
            maps = [part.tobytes() for part in reader.label_maps([i])] if reader.spec else []
            result.append(
                (
                    ids[i],
                    int(reader.labels[i]),
                    int(reader.heights[i]),
                    int(reader.widths[i]),
                    bytes(reader.image(i)),
                    maps,
                )
            )
        return result


HOSTILE = st.sampled_from([0, 1, 2, 23, 255, 1 << 16, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
PLACE = st.floats(0, 1, exclude_max=True)
MUTATION = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.just(0)),
    st.tuples(st.just("write"), PLACE, HOSTILE),
    st.tuples(st.just("table"), PLACE, HOSTILE),
    st.tuples(st.just("swap"), PLACE, st.integers(1, 40)),
)


def mutate(data: bytes, mutations: list[tuple]) -> bytes:
    data = bytearray(data)
    for kind, place, value in mutations:
        at = int(place * len(data))
        if kind == "flip" and data:
            data[at] ^= 1 << value
        elif kind == "cut":
            del data[at:]
        elif kind == "write" and len(data) >= 8:
            at = min(at, len(data) - 8)
            data[at : at + 8] = value.to_bytes(8, "little")
        elif len(data) >= 48:  # aim at the numbers: header, or what follows the field descriptors
            spots = [
                *range(0, 24, 2),
                *range(24 + 4 * layout.FIELD.itemsize, 24 + 4 * layout.FIELD.itemsize + 240, 2),
                *range(max(0, len(data) - 240), len(data) - 8),
            ]
            at = min(spots[int(place * len(spots))], len(data) - 8)
            other = min(at + value, len(data) - 8) if kind == "swap" else at
            data[at : at + 8] = data[other : other + 8] if kind == "swap" else value.to_bytes(8, "little")
    return bytes(data)


def reseal(data: bytes) -> bytes:
    """Put right CRCs on a mutated file, as one would who makes it on purpose, so that the bounds checks behind the CRCs
    are reached."""
    data = bytearray(data)
    head_size = 24 + 4 * layout.FIELD.itemsize
    if len(data) < head_size:
        return bytes(data)
    start = 24 + 3 * layout.FIELD.itemsize + 17
    index = np.frombuffer(data[start : start + layout.INDEX.itemsize], layout.INDEX).copy()
    header = np.frombuffer(data[:24], layout.HEADER)[0]
    rows = int(header["num_samples"]) * 48
    parts = {"metadata_crc": data[head_size : head_size + rows], "alloc_crc": data[int(header["alloc_table_ptr"]) :]}
    for name in ("info", "ids"):
        at = int(index[f"{name}_ptr"][0])
        parts[f"{name}_crc"] = data[at : at + int(index[f"{name}_size"][0])]
    for name, part in parts.items():
        index[name] = zlib.crc32(part)
    index["head_crc"] = 0
    data[start : start + layout.INDEX.itemsize] = index.tobytes()
    index["head_crc"] = zlib.crc32(data[:head_size])
    data[start : start + layout.INDEX.itemsize] = index.tobytes()
    return bytes(data)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(MUTATION, min_size=1, max_size=3))
def test_damaged_files_raise_or_read_right(small: bytes, tmp_path: Path, mutations: list[tuple]) -> None:
    path = tmp_path / "fuzz.beton"
    path.write_bytes(small)
    truth = read_everything(path)
    path.write_bytes(mutate(small, mutations))
    try:
        found = read_everything(path)
    except BetonError as error:
        assert "fuzz.beton: " in str(error)
        return
    assert len(found) == len(truth) and all(sample in (None, right) for sample, right in zip(found, truth, strict=True))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(MUTATION, min_size=1, max_size=3))
def test_hostile_files_never_crash_the_reader(small: bytes, tmp_path: Path, mutations: list[tuple]) -> None:
    path = tmp_path / "fuzz.beton"
    path.write_bytes(reseal(mutate(small, mutations)))
    try:
        read_everything(path)
    except BetonError as error:
        assert "fuzz.beton: " in str(error)


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (0, 3, "version"),
        (4, 12345, "page_size"),
        (8, 1 << 40, "num_samples"),
        (8, 0, "num_samples"),
        (16, 1 << 62, "alloc_table_ptr"),
        (16, 30, "alloc_table_ptr"),
        (24, 99, "type"),
        (24 + 4 * 1041 + 5, 1 << 50, "image"),
        (24 + 4 * 1041 + 16, 300, "label"),
        (24 + 2 * 1041 + 17 + 8, 5, "label_map"),
        (24 + 4 * 1041 + 24, 77, "label_map"),
    ],
)
def test_a_wrong_field_is_named(small: bytes, tmp_path: Path, at: int, value: int, field: str) -> None:
    width = {0: 2, 4: 4, 24: 1, 24 + 2 * 1041 + 17 + 8: 4}.get(at, 8)
    data = bytearray(small)
    data[at : at + width] = value.to_bytes(width, "little")
    path = tmp_path / "wrong.beton"
    path.write_bytes(reseal(bytes(data)))
    with pytest.raises(BetonError, match=rf"wrong\.beton: .*{field}"):
        BetonReader(path)


def test_stock_file_fuzz(stock_file: Path, tmp_path: Path) -> None:
    """Files without CRCs can be read wrong after damage, but not out of bounds."""
    whole = stock_file.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "fuzz.beton"
    head = 24 + 2 * layout.FIELD.itemsize + 40 * 24
    outcomes = {"error": 0, "read": 0}
    with open(path, "w+b") as file:
        file.write(whole)
        for _ in range(150):
            at = int(
                rng.choice(
                    [
                        rng.integers(0, 24),
                        rng.integers(24 + 2 * layout.FIELD.itemsize, head),
                        rng.integers(len(whole) - 40 * 24, len(whole) - 1),
                    ]
                )
            )
            file.seek(at)
            file.write(bytes([whole[at] ^ int(rng.integers(1, 256))]))
            file.flush()
            try:
                read_everything(path)
                outcomes["read"] += 1
            except BetonError:
                outcomes["error"] += 1
            file.seek(at)
            file.write(whole[at : at + 1])
    assert min(outcomes.values()) > 10


def folder_content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_names_the_first_bad_sample_and_leaves_nothing(
    jpegs: list[bytes], tmp_path: Path, workers: int
) -> None:
    read = []
    samples = make_samples(jpegs)
    samples = [
        Sample(s.source_id, s.label, lambda s=s: read.append(s.source_id) or s.image(), origin=f"photos/{s.source_id}")
        for s in samples
    ]
    for bad in (40, 41):
        samples[bad] = Sample(f"bad {bad}.jpg", 0, lambda: b"no image at all", origin=f"photos/bad {bad}.jpg")
    with pytest.raises(BetonError, match=r"photos/bad 40\.jpg: not an image"):
        write_beton(tmp_path / "out.beton", samples, class_names=CLASSES, workers=workers)
    assert folder_content(tmp_path) == [] and len(read) < 40 + beton_write.CHUNK * (2 * workers + 1)


def large_jpeg() -> bytes:
    """More than a page of 2 MiB."""
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), dtype=np.uint8)
    return jpeg_of(Image.fromarray(noise), quality=98, subsampling=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: Sample("folder/é 0.jpg", s.label, s.image, s.label_map), "second sample with the id"),
        (lambda s: Sample(s.source_id, 300, s.image, s.label_map), "label 300 is not in 0..299"),
        (lambda s: Sample(s.source_id, s.label, s.image), "no label map"),
        (
            lambda s: Sample(s.source_id, s.label, s.image, lambda: np.zeros((), MapSpec(3, 5, 8, 300).dtype)[()]),
            "dtype",
        ),
        (
            lambda s: Sample(
                s.source_id, s.label, s.image, lambda: np.array((0, 1, np.full(SPEC.shape, 300), 0), SPEC.dtype)[()]
            ),
            "class 300 of 300",
        ),
        (
            lambda s: Sample(s.source_id, s.label, s.image, lambda: np.array((np.nan, 1, 0, 0), SPEC.dtype)[()]),
            "finite",
        ),
        (
            lambda s: Sample(s.source_id, s.label, lambda: Path("/no/such/file").read_bytes(), s.label_map),
            "No such file",
        ),
        (lambda s: Sample(s.source_id, s.label, large_jpeg, s.label_map), "--page-size 4194304"),
    ],
)
def test_bad_samples_are_refused_by_name(
    jpegs: list[bytes], maps: list[np.void], tmp_path: Path, change, message: str
) -> None:
    samples = make_samples(jpegs, maps)[:5]
    samples[3] = change(samples[3])
    with pytest.raises(BetonError, match=f"^{samples[3].source_id}: .*{message}"):
        write_beton(tmp_path / "out.beton", samples, class_names=CLASSES, spec=SPEC, page_size=PAGE)
    assert folder_content(tmp_path) == []


def test_bad_settings_and_existing_output(jpegs: list[bytes], tmp_path: Path) -> None:
    samples, path = make_samples(jpegs[:3]), tmp_path / "out.beton"
    for options, message in (
        ({"page_size": 3 << 20}, "page_size"),
        ({"quality": 0}, "quality"),
        ({"workers": 0}, "workers"),
        ({"max_resolution": 0}, "max_resolution"),
        ({"spec": MapSpec(3, 5, 7, 1000)}, "--fit-head"),
    ):
        with pytest.raises(BetonError, match=message):
            write_beton(path, samples, class_names=CLASSES, **options)
    with pytest.raises(BetonError, match="no samples"):
        write_beton(path, [], class_names=CLASSES)
    path.write_bytes(b"precious")
    with pytest.raises(BetonError, match="exists.*--overwrite"):
        write_beton(path, samples, class_names=CLASSES)
    assert path.read_bytes() == b"precious"
    write_beton(path, samples, class_names=CLASSES, overwrite=True)
    assert verify(path) == []


def test_write_error_ends_the_run(jpegs: list[bytes], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # the write then fails with EFBIG, as it does with ENOSPC on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BetonError, match=r"out\.beton: cannot be written"):
            write_beton(tmp_path / "out.beton", make_samples(jpegs), class_names=CLASSES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert folder_content(tmp_path) == []


SLOW_WRITER = """
import sys, time
from pathlib import Path
from tl_fast.convert import Sample, write_beton
data = Path(sys.argv[1]).read_bytes()
def image():
    time.sleep(0.01)
    return data
write_beton(sys.argv[2], [Sample(str(i), 0, image) for i in range(100_000)], class_names=["a"], workers=1,
            progress=lambda samples, rejected, size: samples == 32 and print("writing", flush=True))
"""


def test_killed_and_concurrent_writers(jpegs: list[bytes], tmp_path: Path) -> None:
    source, path = tmp_path / "image.jpg", tmp_path / "out.beton"
    source.write_bytes(jpegs[0])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, source, path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(BetonError, match="another process is writing"):
            write_beton(path, make_samples(jpegs[:3]), class_names=CLASSES)
    finally:
        process.kill()
        process.communicate()
    assert folder_content(tmp_path) == [".out.beton.journal", ".out.beton.partial", "image.jpg"]
    with pytest.raises(BetonError, match="header|version"):
        BetonReader(tmp_path / ".out.beton.partial")
    write_beton(path, make_samples(jpegs[:3]), class_names=CLASSES)
    assert folder_content(tmp_path) == ["image.jpg", "out.beton"] and verify(path) == []
