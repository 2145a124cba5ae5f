"""The label-map format: quantisation, records, stores."""
from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tl_fast import labelmap
from tl_fast.annotator import SquashedImages, build_annotator
from tl_fast.image_folder import list_images
from tl_fast.kernels.cpu import token_targets
from tl_fast.labelmap import LabelMapError, LabelMapStore, MapSpec, dequantise, pack, quantise, top_k_relative, unpack, write_store
from tl_fast.plan import Augment, draw

scores_strategy = hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
                             elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))


@pytest.mark.parametrize("bad", [dict(k=0), dict(height=0), dict(width=-1), dict(num_classes=65_536), dict(k=11),
                                 dict(extent="half"), dict(k=2.0), dict(k=True)])
def test_spec_refuses(bad):
    with pytest.raises(LabelMapError, match=next(iter(bad))):
        MapSpec(**{**dict(k=5, height=7, width=7, num_classes=10), **bad})


def test_spec_round_trip_and_record_layout():
    spec = MapSpec(5, 7, 9, 65_535, "center_square")
    assert MapSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.dtype.itemsize == 8 + 3 * 5 * 7 * 9
    assert [spec.dtype.fields[name][1] for name in ("score_min", "score_step", "classes", "scores")] == [0, 4, 8, 8 + 2 * 5 * 7 * 9]
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
        assert (np.sort(levels, axis=0)[-1] > np.sort(levels, axis=0)[-2])[clear].all()  # the best two classes of a cell never tie


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_constant_map(value):
    levels, low, step = quantise(np.full((2, 1, 3), value, np.float32))
    assert step == 0 and (dequantise(levels, low, step) == np.float32(value)).all()


@pytest.mark.parametrize("scores", [[[[np.nan]]], [[[np.inf]]], np.zeros((0, 1, 1)), np.zeros((2, 2)), [[[-3e38, 3e38]]]])
def test_quantise_refuses(scores):
    with pytest.raises(LabelMapError):
        quantise(np.asarray(scores, np.float32))


def test_dequantise_takes_a_batch():
    rng = np.random.default_rng(0)
    packed = [quantise(rng.normal(size=(3, 2, 4)).astype(np.float32)) for _ in range(5)]
    levels, low, step = (np.stack(part) for part in zip(*packed))
    np.testing.assert_array_equal(dequantise(levels, low, step), np.stack([dequantise(*one) for one in packed]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.sampled_from([5, 1000, 65_535]), st.integers(0, 2**32 - 1))
def test_pack_unpack(k, height, width, num_classes, seed):
    rng = np.random.default_rng(seed)
    spec = MapSpec(k, height, width, num_classes)
    classes = np.stack([rng.choice(num_classes, k, replace=False) for _ in range(height * width)], 1).reshape(spec.shape)
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
        (classes[:1], scores, "shape"), (classes, scores[:, :, :1], "shape"), (classes + 0.5, scores, "integers, got 1.5"), (classes * np.nan, scores, "integers, got nan"),
        (classes.astype(str), scores, "integers, got dtype"),
        (classes + 6, scores, r"0\.\.9, got 7\.\.10"), (classes - 2, scores, r"got -1"),
        (classes % 2, scores, "class 1 twice in cell .row 0, column 0"),
        (classes, scores + np.nan, "finite"), (classes, np.where(classes == 4, -np.inf, scores), "1 non-finite"),
    ]:
        with pytest.raises(LabelMapError, match=message):
            pack(bad_classes, bad_scores, spec)


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
    monkeypatch.setattr(labelmap, "PART_SIZE", 4)
    rng = np.random.default_rng(0)
    spec = MapSpec(2, 2, 3, 10)
    ids = [f"class {i % 2}/bildé-{i}.jpg" for i in range(10)]
    records = [pack(np.stack([np.full((2, 3), i % 9), np.full((2, 3), 9)]), rng.normal(size=spec.shape), spec) for i in range(10)]
    write_store(tmp_path, ids, records, spec, [f"name {i}" for i in range(10)], model="none")
    return tmp_path, ids, records


def test_store_round_trip(store):
    folder, ids, records = store
    opened = pickle.loads(pickle.dumps(LabelMapStore(folder)))
    assert opened.complete and len(opened) == 10 and opened.ids == ids and opened.manifest["model"] == "none"
    assert opened.spec == MapSpec(2, 2, 3, 10) and opened.class_names[3] == "name 3"
    for i in (9, 0, 4, 3):
        assert opened.record(ids[i]) == records[i]
    assert sorted(path.name for path in folder.iterdir()) == ["ids.jsonl", "manifest.json", *(f"maps-0000{i}.npy" for i in range(3))]
    with pytest.raises(LabelMapError, match="'other.jpg'"):
        opened.record("other.jpg")


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
    (folder / "maps-00000.npy").write_bytes((folder / "maps-00002.npy").read_bytes())
    with pytest.raises(LabelMapError, match=r"maps-00000\.npy holds"):
        LabelMapStore(folder).record(ids[0])


def test_store_refuses_contradictions(store, tmp_path):
    folder, ids, _ = store
    with pytest.raises(LabelMapError, match="is missing"):
        LabelMapStore(tmp_path / "nowhere")
    labelmap.write_ids(folder, ids[:-1])
    with pytest.raises(LabelMapError, match="9 lines"):
        LabelMapStore(folder)
    labelmap.write_ids(folder, [*ids[:-1], ids[0]])
    with pytest.raises(LabelMapError, match="9 of them different"):
        LabelMapStore(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(LabelMapError, match="version 2"):
        LabelMapStore(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(LabelMapError, match="damaged"):
        LabelMapStore(folder)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "kept").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        labelmap.write_atomic(tmp_path / "kept", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_bytes() == b"old"


@pytest.mark.slow
def test_quantisation_hardly_changes_the_token_targets_of_real_maps(photos):
    """KL <= 1e-3, and the top class of at least 99 % of the token targets unchanged: efficientnet-lite0, C = 1,000, k = 5, 14 x 14 tokens."""
    annotator = build_annotator("efficientnet-lite0", img_size=224)
    images = SquashedImages(list_images(photos / "train"), annotator.preprocessing)
    with torch.inference_mode():
        dense = torch.cat([annotator(images[i][None])[0] for i in range(0, len(images), 2)])
    count, num_classes, height, width = dense.shape
    spec = MapSpec(5, height, width, num_classes)
    classes, scores = (values.numpy() for values in top_k_relative(dense, spec.k))
    classes = classes.astype(np.uint16)
    restored = [unpack(pack(c, s, spec), spec) for c, s in zip(classes, scores, strict=True)]
    np.testing.assert_array_equal(np.stack([c for c, _ in restored]), classes)
    plans = draw(0, 0, np.arange(count), np.full(count, 240), np.full(count, 320), Augment())
    crops = np.stack([plans["top"] / 240, plans["left"] / 320, plans["height"] / 240, plans["width"] / 320], axis=1).astype(np.float32)
    true, stored = (
        token_targets(classes, values, crops, plans["flip"], num_classes, 14, 0.0).astype(np.float64)
        for values in (scores, np.stack([s for _, s in restored]))
    )
    divergence = (true * np.log(true / stored)).sum(2).mean()
    unchanged = (true[:, 1:].argmax(2) == stored[:, 1:].argmax(2)).mean()
    print(f"mean KL {divergence:.2e}, top class unchanged {unchanged:.2%}")
    assert count == 44 and divergence <= 1e-3 and unchanged >= 0.99
