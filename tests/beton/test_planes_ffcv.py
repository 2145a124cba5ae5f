"""Files with planes in stock FFCV: refused without our field class, right with it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from ffcv_batches import collect
from PIL import Image

from tl_fast.beton.reader import BetonReader
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.jpeg.planes_loops import to_rgb

pytestmark = pytest.mark.usefixtures("stock_ffcv")
COUNT, HEIGHT, WIDTH = 40, 60, 81


@pytest.fixture(scope="module")
def mixed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of one size, every third a JPEG."""
    path, samples = tmp_path_factory.mktemp("mixed") / "mixed.beton", []
    for i, file in enumerate(sorted(photos.rglob("*.jpg"))[:COUNT]):
        Image.open(file).convert("RGB").resize((WIDTH, HEIGHT)).save(buffer := io.BytesIO(), "JPEG", quality=90)
        samples.append(Sample(file.name, i % 4, buffer.getvalue, as_planes=i % 3 > 0))
    write_beton(path, samples, class_names=list("abcd"), workers=1)
    return path


def first_epoch(make_loader) -> list[np.ndarray]:
    """Each field of all samples."""
    return [np.concatenate(parts) for parts in zip(*collect(make_loader), strict=True)]


def options(path: Path, **more) -> dict:
    from ffcv.loader import OrderOption

    return {"fname": str(path), "batch_size": 16, "order": OrderOption.SEQUENTIAL, "drop_last": False, **more}


def test_stock_ffcv_refuses_the_file_without_our_class(mixed: Path):
    from ffcv.fields import RGBImageField
    from ffcv.loader import Loader
    from ffcv.reader import Reader

    with pytest.raises(ValueError, match="Must specify a custom_field entry for custom field image"):
        Loader(**options(mixed))
    reader = Reader(str(mixed), {"image": RGBImageField})  # its class, images left alone: labels need nothing of ours
    assert reader.metadata["f1"].tolist() == [i % 4 for i in range(COUNT)]


def test_the_field_reads_and_writes_its_arguments(mixed: Path):
    from ffcv.reader import Reader

    from tl_fast.beton.ffcv_field import PlanesImageField
    from tl_fast.beton.layout import CUSTOM, IMAGE, BetonError

    reader = Reader(str(mixed), {"image": PlanesImageField})
    descriptor = reader.field_descriptors[0]
    assert descriptor["type_id"] == CUSTOM and reader.handlers["image"].metadata_type == IMAGE
    assert (PlanesImageField().to_binary()[0] == descriptor["arguments"]).all()
    with pytest.raises(BetonError, match="not tl_fast's"):
        PlanesImageField.from_binary(np.full(1024, 7, np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_whole_images(mixed: Path, workers: int):
    from ffcv.loader import Loader

    from tl_fast.beton.ffcv_field import PlanesImageField

    fields = {"custom_fields": {"image": PlanesImageField}}
    images, labels, crcs = first_epoch(lambda: Loader(**options(mixed, num_workers=workers, **fields)))
    with BetonReader(mixed) as reader:
        np.testing.assert_array_equal(labels[:, 0], reader.labels)
        np.testing.assert_array_equal(crcs[:, 0], reader.crcs)
        for i, image in enumerate(images):
            if reader.stored_as_planes[i]:
                np.testing.assert_array_equal(image, to_rgb(reader.image(i), HEIGHT, WIDTH))
            else:  # ffcv decodes with libjpeg's fast DCT
                expected = np.asarray(Image.open(io.BytesIO(bytes(reader.image(i)))), int)
                assert np.abs(image - expected).max() <= 10


@pytest.mark.slow
def test_crops(mixed: Path):
    import cv2
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    from tl_fast.beton.ffcv_field import CenterCropPlanesDecoder, PlanesImageField, RandomResizedCropPlanesDecoder

    def pipeline(decoder) -> dict:
        return {"custom_fields": {"image": PlanesImageField}, "pipelines": {"image": [decoder, ToTensor()]}}

    def load(decoder) -> np.ndarray:
        return first_epoch(lambda: Loader(**options(mixed, num_workers=1, **pipeline(decoder))))[0]

    whole = load(RandomResizedCropPlanesDecoder((32, 32), scale=(1.0, 1.0), ratio=(WIDTH / HEIGHT, WIDTH / HEIGHT)))
    centre = load(CenterCropPlanesDecoder((HEIGHT // 2, HEIGHT // 2), 0.5))
    top, left = (HEIGHT - HEIGHT // 2) // 2, (WIDTH - HEIGHT // 2) // 2
    with BetonReader(mixed) as reader:
        for i in np.flatnonzero(reader.stored_as_planes):
            pixels = to_rgb(reader.image(i), HEIGHT, WIDTH)
            small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA).astype(int)
            assert np.abs(whole[i] - small).max() <= 1
            np.testing.assert_array_equal(centre[i], pixels[top : top + HEIGHT // 2, left : left + HEIGHT // 2])


@pytest.mark.slow
def test_ffcvs_writer_takes_the_field(tmp_path: Path, photos: Path):
    from ffcv.fields import IntField
    from ffcv.writer import DatasetWriter

    from tl_fast.beton.ffcv_field import PlanesImageField

    pixels = np.asarray(Image.open(photos / "val" / "animal" / "dog.jpg").convert("RGB").resize((33, 20)))
    fields = {"image": PlanesImageField(), "label": IntField()}
    DatasetWriter(str(tmp_path / "x.beton"), fields, num_workers=1).from_indexed_dataset([(pixels, 3)] * 4)
    with BetonReader(tmp_path / "x.beton") as reader:
        assert reader.stored_as_planes.all() and reader.labels.tolist() == [3] * 4
        difference = np.abs(to_rgb(reader.image(2), 20, 33).astype(int) - pixels)
        assert difference.mean() < 4
