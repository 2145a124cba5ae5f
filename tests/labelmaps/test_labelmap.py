"""The label-map format: quantisation, records, their layouts in a beton, stores."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tl_fast.annotation.annotator import squash
from tl_fast.annotation.weights import build_annotator
from tl_fast.beton import layout
from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.kernels.cpu import token_targets
from tl_fast.labelmaps import format as labelmap
from tl_fast.labelmaps import loops as kernels
from tl_fast.labelmaps import store as map_store
from tl_fast.labelmaps.format import (
    LabelMapError,
    MapSpec,
    dequantise,
    encode,
    encoded_sizes,
    pack,
    quantise,
    top_k_relative,
    unpack,
)
from tl_fast.labelmaps.store import LabelMapStore, write_store
from tl_fast.plan.augment import Augment
from tl_fast.plan.records import draw

scores_strategy = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


@pytest.mark.parametrize(
    "bad",
    [
        dict(k=0),
        dict(height=0),
        dict(width=-1),
        dict(num_classes=65_536),
        dict(k=11),
        dict(extent="half"),
        dict(k=2.0),
        dict(k=True),
    ],
)
def test_spec_refuses(bad):
    with pytest.raises(LabelMapError, match=next(iter(bad))):
        MapSpec(**{**dict(k=5, height=7, width=7, num_classes=10), **bad})


def test_spec_round_trip_and_record_layout():
    spec = MapSpec(5, 7, 9, 65_535, "center_square")
    assert MapSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.dtype.itemsize == 8 + 3 * 5 * 7 * 9
    assert [spec.dtype.fields[name][1] for name in ("score_min", "score_step", "classes", "scores")] == [
        0,
        4,
        8,
        8 + 2 * 5 * 7 * 9,
    ]
    with pytest.raises(LabelMapError, match="depth"):
        MapSpec.from_dict({**spec.to_dict(), "depth": 1})
    with pytest.raises(LabelMapError, match="num_classes"):
        MapSpec.from_dict({"k": 1, "height": 1, "width": 1})


@settings(max_examples=200, deadline=None)
@given(scores_strategy)
def test_quantise_errs_by_at_most_one_level_and_keeps_the_best_class(scores):
    levels, low, step = quantise(scores)
    restored = dequantise(levels, low, step)
    assert levels.dtype == np.uint8 and restored.dtype == np.float32 and restored.shape == scores.shape
    span = float(scores.max()) - float(scores.min())
    exact = np.sqrt(np.clip((scores.astype(np.float64) - low) / max(span, 1e-33), 0, 1)) * 255
    error = np.abs(levels - exact)
    rounding = 1e-3 + 255 * np.sqrt(1e-6)  # step is float32: near level 0 that is amplified by the square root
    assert restored.min() == low and (step == 0) == (span < 1e-33)
    if step == 0:
        return
    assert error.max() <= 1 + rounding
    np.testing.assert_allclose(restored.max(), scores.max(), atol=1e-6 * max(abs(scores).max(), 1e-6))
    best = scores.argmax(0)
    assert (np.take_along_axis(levels, best[None], 0)[0] == levels.max(0)).all()
    if len(scores) > 1:
        top = np.sort(scores, axis=0)[-2:].astype(np.float64)
        clear = top[1] - top[0] > 1e-5 * np.abs(scores).max()
        assert (np.sort(levels, axis=0)[-1] > np.sort(levels, axis=0)[-2])[
            clear
        ].all()  # the best two classes of a cell never tie


def slow_quantise(scores: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """The definition in numpy, to compare the compiled one with bit for bit."""
    wide = np.asarray(scores, np.float64)
    score_min, score_step = np.float32(wide.min()), np.float32((wide.max() - wide.min()) / 255**2)
    if score_step < np.finfo(np.float32).tiny:
        return np.zeros(wide.shape, np.uint8), score_min, np.float32(0)
    exact = np.sqrt(np.clip((wide - score_min) / np.float64(score_step), 0, 255**2))
    levels = np.rint(exact)
    if len(levels) > 1:
        order = np.argsort(-exact, axis=0, kind="stable")
        exact, by_score = np.take_along_axis(exact, order, 0), np.take_along_axis(levels, order, 0)
        tied = (by_score[0] == by_score[1]) & (exact[0] > exact[1])
        best_up = tied & (exact[0] + exact[1] > 2 * by_score[0])
        by_score[0] += best_up
        by_score[1] -= tied & ~best_up
        by_score[2:] = np.minimum(by_score[2:], by_score[1])
        np.put_along_axis(levels, order, by_score, 0)
    return levels.astype(np.uint8), score_min, score_step


whole_numbers = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.integers(0, 12).map(float)
)
nearly_tied = st.tuples(whole_numbers, st.sampled_from([0, 1e-9, 1e-3, 0.3]), st.integers(0, 2**32 - 1))


@settings(max_examples=300, deadline=None)
@given(scores_strategy | nearly_tied)
def test_quantise_is_its_definition_bit_for_bit(scores):
    if isinstance(scores, tuple):  # scores around few levels, so that cells have ties of two and three
        base, noise, seed = scores
        scores = base**2 + noise * np.random.default_rng(seed).normal(size=base.shape)
    for found, right in zip(quantise(scores), slow_quantise(scores), strict=True):
        assert found.dtype == right.dtype
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_constant_map(value):
    levels, low, step = quantise(np.full((2, 1, 3), value, np.float32))
    assert step == 0 and (dequantise(levels, low, step) == np.float32(value)).all()


@pytest.mark.parametrize(
    "scores", [[[[np.nan]]], [[[np.inf]]], np.zeros((0, 1, 1)), np.zeros((2, 2)), [[[-3e38, 3e38]]], [[[-1e300]]]]
)
def test_quantise_refuses(scores):
    with pytest.raises(LabelMapError):
        quantise(np.asarray(scores, np.float64))


def test_dequantise_takes_a_batch():
    rng = np.random.default_rng(0)
    packed = [quantise(rng.normal(size=(3, 2, 4)).astype(np.float32)) for _ in range(5)]
    levels, low, step = (np.stack(part) for part in zip(*packed, strict=True))
    np.testing.assert_array_equal(dequantise(levels, low, step), np.stack([dequantise(*one) for one in packed]))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([5, 1000, 65_535]),
    st.integers(0, 2**32 - 1),
)
def test_pack_unpack(k, height, width, num_classes, seed):
    rng = np.random.default_rng(seed)
    spec = MapSpec(k, height, width, num_classes)
    classes = np.stack([rng.choice(num_classes, k, replace=False) for _ in range(height * width)], 1).reshape(
        spec.shape
    )
    scores = rng.normal(size=spec.shape).astype(np.float32)
    record = pack(classes, scores, spec)
    assert isinstance(record, np.void) and record.dtype == spec.dtype
    got_classes, got_scores = unpack(record, spec)
    assert got_classes.dtype == np.uint16 and got_scores.dtype == np.float32
    np.testing.assert_array_equal(got_classes, classes)
    np.testing.assert_array_equal(got_scores, dequantise(*quantise(scores)))
    with pytest.raises(LabelMapError, match="dtype"):
        unpack(record, MapSpec(k, height + 1, width, num_classes))


def test_pack_refuses():
    spec = MapSpec(2, 1, 2, 10)
    classes, scores = np.array([[[1, 2]], [[3, 4]]]), np.zeros((2, 1, 2), np.float32)
    pack(classes, scores, spec)
    for bad_classes, bad_scores, message in [
        (classes[:1], scores, "shape"),
        (classes, scores[:, :, :1], "shape"),
        (classes + 0.5, scores, "integers, got 1.5"),
        (classes * np.nan, scores, "integers, got nan"),
        (classes.astype(str), scores, "integers, got dtype"),
        (classes + 6, scores, r"0\.\.9, got 7\.\.10"),
        (classes - 2, scores, r"got -1"),
        (classes % 2, scores, "class 1 twice in cell .row 0, column 0"),
        (classes, scores + np.nan, "finite"),
        (classes, np.where(classes == 4, -np.inf, scores), "1 non-finite"),
    ]:
        with pytest.raises(LabelMapError, match=message):
            pack(bad_classes, bad_scores, spec)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.int8, np.int64, np.uint64, np.float16, np.float64]), (3, 2, 2), elements=st.integers(0, 12)
    ),
    st.integers(0, 2),
    st.sampled_from([-1, 10, 127, 0.5, np.nan, np.inf]),
)
def test_pack_takes_exactly_the_classes_that_exist_once_a_cell(classes, changes, value):
    spec = MapSpec(3, 2, 2, 10)
    if changes and (classes.dtype.kind == "f" or value in (10, 127)):
        classes[changes, 0, 1] = value
    cells = classes.reshape(3, 4).T.tolist()
    good = all(c in range(10) for cell in cells for c in cell) and all(len(set(cell)) == 3 for cell in cells)
    if good:
        np.testing.assert_array_equal(pack(classes, np.zeros(spec.shape), spec)["classes"], classes)
    else:
        with pytest.raises(LabelMapError, match="integers, got|must lie in 0..9|twice in cell"):
            pack(classes, np.zeros(spec.shape), spec)


def slow_expand(data: bytes, spec: MapSpec) -> tuple[np.ndarray, np.ndarray] | None:
    """docs/file_format.md read aloud: classes and levels of a map in a file, None for bytes that are none."""
    cells = spec.k * spec.height * spec.width
    bitmap = (spec.num_classes + 7) // 8
    levels = np.frombuffer(data[-cells:], np.uint8).reshape(spec.shape)
    if len(data) == 3 * cells:
        classes = np.frombuffer(data[: 2 * cells], "<u2")
        return None if (classes >= spec.num_classes).any() else (classes.reshape(spec.shape), levels)
    bits = np.unpackbits(np.frombuffer(data[:bitmap], np.uint8), bitorder="little")
    palette = np.flatnonzero(bits)
    index = np.frombuffer(data[bitmap : bitmap + cells], np.uint8).astype(int)
    if len(data) > bitmap + 2 * cells:
        index += 256 * np.unpackbits(np.frombuffer(data[bitmap + cells : -cells], np.uint8), bitorder="little")[
            :cells
        ].astype(int)
    if len(palette) > 512 or (palette >= spec.num_classes).any() or (index >= len(palette)).any():
        return None
    return palette[index].reshape(spec.shape), levels


def record_of(spec: MapSpec, pool: int, rng: np.random.Generator) -> np.void:
    """Any classes (a cell may list one twice: encode keeps what it is given), of at most `pool` different ones, and any
    levels."""
    record = np.zeros((), spec.dtype)
    record["classes"] = rng.choice(rng.permutation(spec.num_classes)[:pool], spec.shape)
    record["scores"] = rng.integers(0, 256, spec.shape)
    record["score_min"], record["score_step"] = rng.normal(size=2).astype(np.float32) ** 2
    return record[()]


specs = st.builds(
    lambda k, h, w, c, e: MapSpec(min(k, c), h, w, c, e),
    st.integers(1, 6),
    st.integers(1, 18),
    st.integers(1, 18),
    st.one_of(st.integers(1, 40), st.integers(250, 1100), st.integers(1, 65_535)),
    st.sampled_from(labelmap.EXTENTS),
)


@settings(max_examples=300, deadline=None)
@given(specs, st.sampled_from([1, 2, 100, 256, 257, 300, 512, 513, 65_535]), st.integers(0, 2**32 - 1))
def test_a_map_comes_back_from_the_file_as_it_was(spec, pool, seed):
    record = record_of(spec, pool, np.random.default_rng(seed))
    data = encode(record, spec)
    n, cells = len(np.unique(record["classes"])), spec.cells
    bitmap = (spec.num_classes + 7) // 8
    assert len(data) == min(
        3 * cells, bitmap + 2 * cells + (0 if n <= 256 else (cells + 7) // 8 if n <= 512 else cells)
    )
    for found, right in zip(slow_expand(data, spec), (record["classes"], record["scores"]), strict=True):
        np.testing.assert_array_equal(found, right)
    classes = np.full(cells + 2, 7, np.uint16)
    assert kernels.expand(np.frombuffer(data, np.uint8), spec.num_classes, encoded_sizes(spec), classes[1:-1]) == 0
    np.testing.assert_array_equal(classes[1:-1].reshape(spec.shape), record["classes"])
    assert classes[0] == classes[-1] == 7


@settings(max_examples=300, deadline=None)
@given(
    specs,
    st.sampled_from(["plain", "small", "large", "any"]),
    st.integers(0, 4000),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
)
def test_any_bytes_are_read_right_or_refused(spec, kind, length, seed, density):
    """Bytes as long as a map's and others; with `density` of the bits set in front, so that palettes of all sizes
    occur."""
    rng = np.random.default_rng(seed)
    sizes = dict(zip(("plain", "small", "large"), encoded_sizes(spec), strict=True))
    length = sizes.get(kind, length)
    data = rng.integers(0, 256, length, np.uint8)
    front = data[: (spec.num_classes + 7) // 8]
    front[:] = np.packbits(rng.random(8 * len(front)) < density)
    classes = np.full(spec.cells + 2, 7, np.uint16)
    wrong = kernels.expand(data, spec.num_classes, encoded_sizes(spec), classes[1:-1])
    assert classes[0] == classes[-1] == 7
    right = slow_expand(data.tobytes(), spec) if length in sizes.values() else None
    assert (wrong == 0) == (right is not None)
    if right is not None:
        np.testing.assert_array_equal(classes[1:-1].reshape(spec.shape), right[0])


def test_encode_refuses():
    spec = MapSpec(2, 3, 3, 10)
    good = record_of(spec, 5, np.random.default_rng(0))
    for field, value, message in (
        ("classes", 10, "class 10 of 10"),
        ("score_min", np.nan, "finite"),
        ("score_step", np.inf, "finite"),
        ("score_step", -1, "not negative"),
    ):
        record = good.copy()
        record[field] = value
        with pytest.raises(LabelMapError, match=message):
            encode(record, spec)
    with pytest.raises(LabelMapError, match="dtype"):
        encode(good, MapSpec(2, 3, 4, 10))


READ_SPEC = MapSpec(5, 18, 18, 1000)  # 4,860, 3,365 or 3,568 bytes


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> tuple[Path, list[np.void]]:
    """12 samples with 100, 400 or 900 different classes in their maps: the three layouts."""
    path, rng = tmp_path_factory.mktemp("maps") / "maps.beton", np.random.default_rng(0)
    records = [record_of(READ_SPEC, (100, 400, 900)[i % 3], rng) for i in range(12)]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    samples = [Sample(f"{i}.jpg", i, buffer.getvalue, lambda i=i: records[i]) for i in range(12)]
    write_beton(path, samples, class_names=[str(c) for c in range(1000)], spec=READ_SPEC, workers=1)
    return path, records


def test_the_reader_gives_what_was_packed(beton):
    path, records = beton
    with BetonReader(path) as reader:
        assert [len(reader._map_bytes(i)) for i in range(3)] == [3365, 3568, 4860]
        for indices in (np.arange(12), [7], [11, 0, 0, 4], np.array([], int)):
            classes, scores = reader.label_maps(indices)
            assert (
                classes.dtype == np.uint16
                and scores.dtype == np.float32
                and classes.shape == scores.shape == (len(indices), 5, 18, 18)
            )
            for row, i in enumerate(indices):
                np.testing.assert_array_equal(classes[row], records[i]["classes"])
                np.testing.assert_array_equal(  # the same float32, not nearly the same
                    scores[row].view(np.uint32),
                    dequantise(records[i]["scores"], records[i]["score_min"], records[i]["score_step"]).view(np.uint32),
                )


@pytest.mark.parametrize(
    "sample, at, value, message",
    [
        (0, 0, b"\xff" * 125, "palette has more than 512"),
        (1, 0, bytes(125), "beyond its palette"),
        (0, 125 + 77, b"\xff", "beyond its palette"),
        (1, 125 + 1620, b"\xff" * 100, "beyond its palette"),
        (2, 2 * 55, b"\xe8\x03", "class outside 0..999"),
    ],
)
def test_the_reader_names_the_sample_with_a_damaged_map(beton, tmp_path, sample, at, value, message):
    data = bytearray(beton[0].read_bytes())
    with BetonReader(beton[0]) as reader:
        start = int(reader._map_ptr[sample]) + at
    data[start : start + len(value)] = value
    (tmp_path / "damaged.beton").write_bytes(data)
    with BetonReader(tmp_path / "damaged.beton") as reader:
        reader.label_maps([i for i in range(12) if i != sample])
        with pytest.raises(BetonError, match=rf"damaged\.beton: label_map: sample {sample}\b.*{message}"):
            reader.label_maps([5, sample, 3])


@pytest.mark.parametrize("size", [1, 3240, 3364, 3366, 3567, 4859])
def test_a_map_of_another_size_is_refused_when_the_file_is_opened(beton, tmp_path, size):
    data = bytearray(beton[0].read_bytes())
    header = np.frombuffer(data[:24], layout.HEADER)[0]
    table = np.frombuffer(data[int(header["alloc_table_ptr"]) :], layout.ALLOCATION).copy()
    assert (table["size"][1::2] == [3365, 3568, 4860] * 4).all()
    table["size"][5] = size  # the third sample's map, which has room
    data[int(header["alloc_table_ptr"]) :] = table.tobytes()
    start, head_size = 24 + 3 * layout.FIELD.itemsize + 17, 24 + 4 * layout.FIELD.itemsize
    index = np.frombuffer(data[start : start + layout.INDEX.itemsize], layout.INDEX).copy()
    index["alloc_crc"], index["head_crc"] = zlib.crc32(table.tobytes()), 0
    data[start : start + layout.INDEX.itemsize] = index.tobytes()
    index["head_crc"] = zlib.crc32(data[:head_size])
    data[start : start + layout.INDEX.itemsize] = index.tobytes()
    (tmp_path / "odd.beton").write_bytes(data)
    with pytest.raises(BetonError, match=rf"odd\.beton: .*{size} bytes"):
        BetonReader(tmp_path / "odd.beton")


@pytest.mark.parametrize("num_classes,k", [(1000, 5), (1000, 1), (6, 5), (5, 5), (1, 1)])
def test_scores_relative_to_the_tail_keep_the_mass(num_classes, k):
    logits = 6 * torch.randn(3, num_classes, 2, 4, generator=torch.Generator().manual_seed(1)) - 4
    logits[0, 0] += 60  # a cell whose rest is less than float32's resolution of the whole
    classes, scores = top_k_relative(logits, k)
    assert classes.shape == scores.shape == (3, k, 2, 4) and scores.dtype == torch.float32 and (scores >= 0).all()
    truth = logits.double().softmax(1)
    sparse = torch.zeros(logits.shape, dtype=torch.float64).scatter(1, classes, scores.double()).softmax(1)
    torch.testing.assert_close(sparse.gather(1, classes), truth.gather(1, classes), rtol=1e-4, atol=0)
    rest = torch.ones(logits.shape, dtype=torch.bool).scatter(1, classes, False)
    if k < num_classes:
        even = (truth * rest).sum(1, keepdim=True) / (num_classes - k)
        torch.testing.assert_close(sparse[rest], even.expand_as(truth)[rest], rtol=1e-4, atol=0)
    with pytest.raises(LabelMapError, match="k = "):
        top_k_relative(logits, num_classes + 1)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of 10 samples in parts of 4; yields (folder, ids, records)."""
    monkeypatch.setattr(map_store, "PART_SIZE", 4)
    rng = np.random.default_rng(0)
    spec = MapSpec(2, 2, 3, 10)
    ids = [f"class {i % 2}/bildé-{i}.jpg" for i in range(10)]
    records = [
        pack(np.stack([np.full((2, 3), i % 9), np.full((2, 3), 9)]), rng.normal(size=spec.shape), spec)
        for i in range(10)
    ]
    write_store(tmp_path, ids, records, spec, [f"name {i}" for i in range(10)], model="none")
    return tmp_path, ids, records


def test_store_round_trip(store):
    folder, ids, records = store
    opened = pickle.loads(pickle.dumps(LabelMapStore(folder)))
    assert opened.complete and len(opened) == 10 and opened.ids == ids and opened.manifest["model"] == "none"
    assert opened.spec == MapSpec(2, 2, 3, 10) and opened.class_names[3] == "name 3"
    for i in (9, 0, 4, 3):
        assert opened.record(ids[i]) == records[i]
    assert sorted(path.name for path in folder.iterdir()) == [
        "ids.jsonl",
        "manifest.json",
        *(f"maps-0000{i}.npy" for i in range(3)),
    ]
    with pytest.raises(LabelMapError, match="'other.jpg'"):
        opened.record("other.jpg")


def test_a_store_is_read_by_place_from_many_threads(store, monkeypatch):
    folder, ids, records = store
    monkeypatch.setattr(map_store, "MAX_OPEN", 1)  # threads then take the parts from each other all the time
    opened = LabelMapStore(folder)
    order = np.random.default_rng(0).integers(0, 10, 2000).tolist()
    with ThreadPoolExecutor(4) as pool:
        for i, record in zip(order, pool.map(opened.record, order), strict=True):
            assert record == records[i]
    for bad in (-1, 10):
        with pytest.raises(LabelMapError, match=f"no label map {bad}"):
            opened.record(bad)


def test_stamps_change_with_the_parts(store):
    folder, ids, records = store
    before = LabelMapStore(folder).stamps
    assert before.shape == (10, 2) and (before[:4] == before[0]).all() and before[9, 0] < before[0, 0]
    map_store.write_part(folder, 1, np.array(records[4:8]))
    changed = (LabelMapStore(folder).stamps != before).any(1)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 2
    (folder / "maps-00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match="maps-00001"):
        LabelMapStore(folder).stamps  # noqa: B018


def test_a_store_finds_exact_ids_first(store):
    folder, ids, _ = store
    opened = LabelMapStore(folder)
    classes = ["class 0", "class 1"]
    wanted = [
        ids[3],
        "elsewhere/class 1/bildé-5.png",
        "bildé-8.webp",
        "class 0/bildé-3.jpg",
        "new.jpg",
        "class 1/bildé-3.png",
    ]
    found = opened.locate(wanted, classes, np.array([1, 1, 0, 0, 0, 1]))
    assert found.dtype == np.int64 and found.tolist() == [
        3,
        5,
        8,
        -1,
        -1,
        -1,
    ]  # class 1/bildé-3's map belongs to the .jpg
    with pytest.raises(LabelMapError, match=r"class 1/bildé-5\.png and class 1/bildé-5\.gif.*fits both"):
        opened.locate(["class 1/bildé-5.png", "class 1/bildé-5.gif"], classes, np.array([1, 1]))


def test_store_names_the_missing_or_damaged_part(store):
    folder, ids, records = store
    (folder / "maps-00001.npy").unlink()
    opened = LabelMapStore(folder)
    assert not opened.complete and opened.missing_parts == ["maps-00001.npy"] and opened.record(ids[8]) == records[8]
    with pytest.raises(LabelMapError, match=r"maps-00001\.npy is missing.*again to resume"):
        opened.record(ids[5])
    whole = (folder / "maps-00000.npy").read_bytes()
    for damage in (whole[:-1], whole[:40], b"", b"x" + whole):
        (folder / "maps-00000.npy").write_bytes(damage)
        with pytest.raises(LabelMapError, match=r"maps-00000\.npy is damaged"):
            LabelMapStore(folder).record(ids[0])
    np.savez(folder / "archive.npz", np.zeros(3))
    (folder / "maps-00000.npy").write_bytes((folder / "archive.npz").read_bytes())
    with pytest.raises(LabelMapError, match=r"maps-00000\.npy holds an archive"):
        LabelMapStore(folder).record(ids[0])
    (folder / "maps-00000.npy").write_bytes(whole)
    opened = LabelMapStore(folder)
    assert opened.record(0) == records[0]
    (folder / "maps-00000.npy").write_bytes(whole[:-1])
    with pytest.raises(LabelMapError, match=r"maps-00000\.npy is damaged .cut off"):
        opened.record(3)
    (folder / "maps-00000.npy").write_bytes((folder / "maps-00002.npy").read_bytes())
    with pytest.raises(LabelMapError, match=r"maps-00000\.npy holds"):
        LabelMapStore(folder).record(ids[0])


def test_store_refuses_contradictions(store, tmp_path):
    folder, ids, _ = store
    with pytest.raises(LabelMapError, match="is missing"):
        LabelMapStore(tmp_path / "nowhere")
    map_store.write_ids(folder, ids[:-1])
    with pytest.raises(LabelMapError, match="9 lines"):
        LabelMapStore(folder)
    map_store.write_ids(folder, [*ids[:-1], ids[0]])
    with pytest.raises(LabelMapError, match="9 of them different"):
        LabelMapStore(folder)
    for damage in (b'"a", "b"\n', b"7\n", b"{\n", b"]\n", b'"a"]["b"\n', b'"\xe9"\n'):
        (folder / "ids.jsonl").write_bytes(damage + b'"x"\n' * 9)
        with pytest.raises(LabelMapError, match="damaged|10 lines"):
            LabelMapStore(folder)
    map_store.write_ids(folder, ids)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(LabelMapError, match="version 2"):
        LabelMapStore(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(LabelMapError, match="damaged"):
        LabelMapStore(folder)


@pytest.mark.slow
def test_quantisation_hardly_changes_the_token_targets_of_real_maps(photos):
    """KL <= 1e-3, and the top class of 99 % of the token targets unchanged: efficientnet-lite0, C = 1,000, k = 5, 14 x
    14 tokens."""
    annotator = build_annotator("efficientnet-lite0", img_size=224)
    images = [
        squash(path.read_bytes(), annotator.preprocessing)[0] for path in sorted((photos / "train").rglob("*.jpg"))[::2]
    ]
    with torch.inference_mode():
        dense = torch.cat([annotator(torch.from_numpy(image[None]))[0] for image in images])
    count, num_classes, height, width = dense.shape
    spec = MapSpec(5, height, width, num_classes)
    classes, scores = (values.numpy() for values in top_k_relative(dense, spec.k))
    classes = classes.astype(np.uint16)
    restored = [unpack(pack(c, s, spec), spec) for c, s in zip(classes, scores, strict=True)]
    np.testing.assert_array_equal(np.stack([c for c, _ in restored]), classes)
    plans = draw(0, 0, np.arange(count), np.full(count, 240), np.full(count, 320), Augment())
    crops = np.stack(
        [plans["top"] / 240, plans["left"] / 320, plans["height"] / 240, plans["width"] / 320], axis=1
    ).astype(np.float32)
    true, stored = (
        token_targets(classes, values, crops, plans["flip"], num_classes, 14, 0.0).astype(np.float64)
        for values in (scores, np.stack([s for _, s in restored]))
    )
    divergence = (true * np.log(true / stored)).sum(2).mean()
    unchanged = (true[:, 1:].argmax(2) == stored[:, 1:].argmax(2)).mean()
    print(f"mean KL {divergence:.2e}, top class unchanged {unchanged:.2%}")
    assert count == 44 and divergence <= 1e-3 and unchanged >= 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: [1], "not an object"),
        (lambda manifest: {key: value for key, value in manifest.items() if key != "spec"}, "spec missing"),
        (lambda manifest: {**manifest, "complete": "yes"}, "complete missing or of a wrong type"),
        (lambda manifest: {**manifest, "class_names": ["a"]}, "class_names are not 4 strings"),
        (lambda manifest: {**manifest, "spec": {**manifest["spec"], "k": 0}}, "manifest.json: .*k must be"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, change, message):
    spec = MapSpec(2, 1, 1, 4)
    write_store(tmp_path, ["a.jpg"], [pack(np.array([[[0]], [[1]]]), np.zeros(spec.shape), spec)], spec, list("abcd"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(LabelMapError, match=f"{tmp_path}.*{message}"):
        LabelMapStore(tmp_path)
