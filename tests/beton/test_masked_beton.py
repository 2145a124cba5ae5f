"""Masks in a beton: written and read back, beside label maps, in several files, damaged, and by stock ffcv."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_betons import masked_beton, masked_samples, write

from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.samples import Samples
from tl_fast.beton.verify import verify
from tl_fast.convert import resumable
from tl_fast.convert import write as write_module
from tl_fast.convert.encode import Sample
from tl_fast.convert.report import print_info
from tl_fast.convert.write import write_beton
from tl_fast.labelmaps.format import MapSpec
from tl_fast.masks.format import MaskSpec
from tl_fast.system.mistakes import InputError

SIZES = ((96, 128), (61, 97))
SPEC = MapSpec(k=2, height=3, width=4, num_classes=7)


@pytest.mark.parametrize("spec", [None, SPEC])
def test_masks_are_read_as_they_were(tmp_path: Path, spec: MapSpec | None, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "masks.beton"
    masks = masked_beton(path, 40, SIZES, spec=spec, workers=2)
    samples = Samples(path)
    with BetonReader(path) as reader:
        assert reader.fields == ["image", "label", *(["label_map"] if spec else []), "mask", "crc"]
        assert reader.mask_spec == samples.mask_spec == MaskSpec(5, 255, tuple(f"class {c}" for c in range(5)))
        assert reader.spec == spec and (spec is None or reader.label_maps([3])[0].shape == (1, 2, 3, 4))
        for i, mask in enumerate(masks):
            assert mask.shape == (reader.heights[i], reader.widths[i])
            read = reader.mask(i)
            assert read.dtype == np.uint8 and read.flags.c_contiguous and read.flags.writeable
            np.testing.assert_array_equal(read, mask)
            np.testing.assert_array_equal(samples.mask(i), mask)
            parts = [reader.image(i), *([reader._map_bytes(i)] if spec else []), reader.mask_bytes(i)]
            assert reader.crc(i) == zlib.crc32(b"".join(map(bytes, parts)))
            reader.check(i)
        assert reader.mask_sizes.tolist() == [len(reader.mask_bytes(i)) for i in range(40)]
    assert verify(path, decode=True, workers=2) == []
    masked_beton(tmp_path / "one.beton", 40, SIZES, spec=spec, workers=1)
    assert (tmp_path / "one.beton").read_bytes() == path.read_bytes()
    print_info(path)
    assert "masks │ 5 classes, 255 = ignored: class 0, class 1" in " ".join(capsys.readouterr().out.split())


def test_files_of_other_masks_are_refused_together(tmp_path: Path) -> None:
    masks = masked_beton(tmp_path / "a.beton", 3)
    masks += masked_beton(tmp_path / "b.beton", 3, seed=7)
    masked_beton(tmp_path / "other.beton", 3, num_classes=4)
    write(tmp_path / "none.beton", [image for image, _ in masked_samples(3)], class_names=["class 0"])
    samples = Samples([tmp_path / "a.beton", tmp_path / "b.beton"])
    assert all((samples.mask(i) == mask).all() for i, mask in enumerate(masks))
    for other, words in (("other", "4 classes"), ("none", "masks are none")):
        with pytest.raises(InputError, match=rf"{other}.beton: .*{words}.*--mask-classes"):
            Samples([tmp_path / "a.beton", tmp_path / f"{other}.beton"])
    with BetonReader(tmp_path / "none.beton") as reader:
        assert reader.mask_spec is reader.mask_sizes is None
        with pytest.raises(BetonError, match=r"none.beton: mask: .*convert with --masks"):
            reader.mask(0)


def test_a_damaged_mask_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "masks.beton"
    masked_beton(path, 6)
    data = bytearray(path.read_bytes())
    with BetonReader(path) as reader:
        start = int(reader._mask_ptr[4])
    data[start + 3] ^= 64
    path.write_bytes(data)
    assert [problem.split(" (")[0] for problem in verify(path)] == [f"{path}: crc: sample 4"]
    with BetonReader(path) as reader, pytest.raises(BetonError, match="crc: sample 4"):
        reader.check(4)
    # As if the damage had been there when the CRC was computed: what the mask says is checked too.
    monkeypatch.setattr(BetonReader, "has_crc", property(lambda self: False))
    for place, value, message in (
        (0, 9, "it has bits that are no code word"),
        (2, 77, "it has a value other than 0..4 and 255"),
        (1, 200, "end too early"),
    ):
        changed = data.copy()
        changed[start + 3] ^= 64
        changed[start + place] = value
        path.write_bytes(changed)
        (problem,) = verify(path)
        assert problem.startswith(f"{path}: mask: sample 4 (image-4.jpg): mask of 128×96: ") and message in problem
        with BetonReader(path) as reader, pytest.raises(BetonError, match=message):
            reader.mask(4)


def test_bad_masks_are_bad_samples(tmp_path: Path) -> None:
    good = [
        Sample(f"{i}.jpg", 0, lambda image=image: image, mask=lambda mask=mask: mask)
        for i, (image, mask) in enumerate(masked_samples(5))
    ]
    unknown = good[3].mask().copy()
    unknown[0, 0] = 9
    samples = [
        good[0],
        dataclasses.replace(good[1], mask=None),
        dataclasses.replace(good[2], mask=lambda: np.zeros((128, 96), np.uint8)),
        dataclasses.replace(good[3], mask=lambda: unknown),
        good[4],
    ]
    path, options = tmp_path / "out.beton", {"class_names": ["any"], "masks": MaskSpec(5), "workers": 1}
    summary = write_beton(path, samples, on_error="quarantine", **options)
    assert (summary.samples, summary.rejected) == (2, 3)
    with BetonReader(path) as reader:
        assert summary.mask_bytes == reader.mask_sizes.sum()
    reasons = (tmp_path / "out.beton.rejects.jsonl").read_text()
    for words in (
        r"has no mask",
        r"its mask is 96\u00d7128 pixels, the image 128\u00d796",
        "the value 9; values are 0..4",
    ):
        assert words in reasons
    with pytest.raises(BetonError, match=r"1\.jpg: has no mask"):
        write_beton(tmp_path / "stop.beton", samples, **options)


def test_a_run_that_ended_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "COMMIT_SECONDS", 0.0)
    masked_beton(tmp_path / "whole.beton", 80, SIZES, spec=SPEC)
    path, broken = tmp_path / "out.beton", MaskSpec(5).allowed  # what is no mask ends the run
    with pytest.MonkeyPatch.context() as patch:
        right = write_module.encode

        def encode(sample: Sample, *others: object) -> object:
            if sample.source_id == "image-60.jpg":
                sample = dataclasses.replace(sample, mask=lambda: broken)
            return right(sample, *others)

        patch.setattr(write_module, "encode", encode)
        with pytest.raises(BetonError, match=r"image-60.jpg: its mask is 256 pixels") as error:
            masked_beton(path, 80, SIZES, spec=SPEC, workers=1)
    assert "--resume" in error.value.__notes__[0] and not path.exists()
    masked_beton(path, 80, SIZES, spec=SPEC, resume=True)
    assert path.read_bytes() == (tmp_path / "whole.beton").read_bytes()


def test_a_shrunk_image_has_a_shrunk_mask(tmp_path: Path) -> None:
    """Nearest pixels, as Pillow takes them; a mask of the size that the image shrinks to does not fit."""
    image, mask = masked_samples(1, [(211, 333)])[0]
    path, options = tmp_path / "out.beton", {"class_names": ["any"], "masks": MaskSpec(5), "max_resolution": 100}
    write_beton(path, [Sample("0.jpg", 0, lambda: image, mask=lambda: mask)], workers=1, **options)
    with BetonReader(path) as reader:
        stored = reader.mask(0)
        assert stored.shape == (reader.heights[0], reader.widths[0]) == (63, 100)
    np.testing.assert_array_equal(stored, Image.fromarray(mask).resize((100, 63), Image.Resampling.NEAREST))
    with pytest.raises(BetonError, match="its mask is 100×63 pixels, the image 333×211"):
        write_beton(tmp_path / "b.beton", [Sample("0.jpg", 0, lambda: image, mask=lambda: stored)], **options)


@pytest.mark.slow
@pytest.mark.usefixtures("stock_ffcv")
def test_stock_ffcv_opens_a_file_with_masks(tmp_path: Path) -> None:
    """Its own loader, with no field of ours: a mask's bytes come as they lie in the file, then zeros."""
    path = tmp_path / "masks.beton"
    masked_beton(path, 10)
    code = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from tl_fast.beton import BetonReader
reader, i = BetonReader(sys.argv[1]), 0
for image, label, mask, crc in Loader(sys.argv[1], batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL,
                                      drop_last=False):
    for row in np.asarray(mask):
        stored = reader.mask_bytes(i)
        assert (row[: len(stored)] == stored).all()
        i += 1
print(i, *image.shape[1:])
"""
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=250)
    assert result.stdout.split() == ["10", "96", "128", "3"], result.stderr
