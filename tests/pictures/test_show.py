"""The sheets of samples: colours against cells and tokens found another way, crops against Pillow and the loader,
sizes, errors."""

from __future__ import annotations

import io
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from small_betons import write

from tests import reference
from tl_fast.beton.reader import BetonReader
from tl_fast.labelmaps.format import MapSpec, pack
from tl_fast.pictures import bundled_photos
from tl_fast.pictures.crop_sheet import find_data, find_recipe, inside_image, operations, show_recipe
from tl_fast.pictures.sample_sheet import show
from tl_fast.pictures.sheet import NO_CLASS, OTHER, PALETTE, best_of_map, best_of_targets, panel_of
from tl_fast.pipeline.loader import Loader
from tl_fast.plan import records as plan
from tl_fast.plan.rand_augment import OPS
from tl_fast.show import main
from tl_fast.training.config import parse_config

# The sheet's measures in pixels and its opacity, written down again: the tests say where things must be.
MARGIN, GAP, LINE, PANEL, WIDEST, OPACITY = 14, 12, 20, 224, 336, 0.55
COLUMNS, BETWEEN, PAPER = 4, 4, (238, 238, 238)  # of the sheet of crops
SIDE = 2 * PANEL + BETWEEN
CLASSES = 16
NAMES = [f"class-{c:02d}" for c in range(CLASSES)]
GRID = 7


def blobs(rng: np.random.Generator, spec: MapSpec) -> np.void:
    """A map on which some classes take many cells and most take few, so that colours and "other" both occur."""
    favour = 5 - np.arange(spec.num_classes) / 3
    logits = favour[:, None, None] + rng.normal(0, 3, (spec.num_classes, spec.height, spec.width))
    classes = np.argsort(-logits, axis=0)[: spec.k]
    return pack(classes, np.maximum(np.take_along_axis(logits, classes, axis=0), 0.1).astype(np.float32), spec)


def write_blobs(
    path: Path, photos: Path, spec: MapSpec | None, every: int = 9, names: list[str] = NAMES, suffix: str = ""
) -> Path:
    """A beton of every `every`-th photo, with label maps that are `blobs`."""
    rng = np.random.default_rng(5)
    files = sorted((photos / "train").glob("*/*.jpg"))[::every]
    sizes = [Image.open(file).size for file in files]
    assert {w > h for w, h in sizes} == {True, False}, "landscape and portrait photos are needed"
    return write(
        path,
        [file.read_bytes() for file in files],
        None if spec is None else [blobs(rng, spec) for _ in files],
        spec,
        class_names=names,
        ids=[f"{file.parent.name}/{file.stem}{suffix}.jpg" for file in files],
        annotator=None if spec is None else {"model": "blobs"},
        workers=1,
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory, photos) -> Path:
    return write_blobs(tmp_path_factory.mktemp("show") / "full.beton", photos, MapSpec(4, 5, 6, CLASSES))


@pytest.fixture(scope="module")
def square(tmp_path_factory, photos) -> Path:
    return write_blobs(
        tmp_path_factory.mktemp("show") / "square.beton", photos, MapSpec(4, 6, 6, CLASSES, "center_square")
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory, photos) -> Path:
    return write_blobs(tmp_path_factory.mktemp("show") / "bare.beton", photos, None)


@pytest.fixture(scope="module")
def many(tmp_path_factory, photos) -> Path:
    """More samples than a sheet of crops, and a hue for every class."""
    classes = len(PALETTE)
    return write_blobs(
        tmp_path_factory.mktemp("show") / "many.beton",
        photos,
        MapSpec(4, 5, 6, classes),
        every=3,
        names=NAMES[:classes],
    )


def drawn_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of an original on the sheet: as large as fits in PANEL x WIDEST."""
    return (
        (PANEL, round(width * PANEL / height))
        if width / height <= WIDEST / PANEL
        else (round(height * WIDEST / width), WIDEST)
    )


def panels(picture: Path, height: int, width: int) -> list[np.ndarray]:
    """The panels of a sheet of one sample, by where they must be: its last row."""
    sheet = np.asarray(Image.open(picture).convert("RGB")).astype(float)
    top, left = sheet.shape[0] - MARGIN - PANEL, MARGIN
    rows, columns = drawn_size(height, width)
    found = []
    while left < sheet.shape[1] - MARGIN:
        size = (rows, columns) if len(found) % 2 == 0 else (PANEL, PANEL)
        found.append(sheet[top : top + size[0], left : left + size[1]])
        left += size[1] + GAP
    return found


def softmax_map(classes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Probabilities [C, H, W]."""
    powers = np.exp(reference.dense_map(classes, scores, CLASSES).astype(np.float64))
    return powers / powers.sum(axis=0)


def grey(pixel: np.ndarray) -> float:
    return float(pixel @ (0.299, 0.587, 0.114))


def crop_in_map(plan: np.void, height: int, width: int, extent: str) -> tuple[float, float, float, float]:
    side = min(height, width)
    rows, columns = (side, side) if extent == "center_square" else (height, width)
    top, left = plan["top"] - (height - rows) / 2, plan["left"] - (width - columns) / 2
    return top / rows, left / columns, plan["height"] / rows, plan["width"] / columns


@pytest.mark.parametrize("extent", ["full", "center_square"])
def test_cells_and_tokens_have_the_colour_of_their_class(request, tmp_path, extent):
    beton = request.getfixturevalue("full" if extent == "full" else "square")
    seen = set()
    with Loader(beton, 1, grid=GRID) as loader, BetonReader(beton) as reader:
        for sample in range(len(reader)):
            picture = show(beton, tmp_path / f"{sample}.png", ids=[sample], grid=GRID)
            height, width = int(reader.heights[sample]), int(reader.widths[sample])
            classes, scores = reader.label_maps(np.array([sample]))
            plan = loader.draw(np.array([sample]))[0]
            seen.add((bool(plan["flip"]), bool(width > height)))
            cells = softmax_map(classes[0], scores[0])
            crop = np.array([crop_in_map(plan, height, width, extent)])
            tokens = reference.token_targets(classes, scores, crop, [plan["flip"]], CLASSES, GRID, 0.0)[0, 1:]
            tokens = tokens.T.reshape(CLASSES, GRID, GRID)
            named = [
                p.max(axis=0) > p.min(axis=0) * 1.0001 for p in (cells, tokens)
            ]  # tokens beyond the map are uniform

            found = zip((cells, tokens), named, strict=True)
            share = sum(np.bincount(p.argmax(axis=0)[some], minlength=CLASSES) / some.size for p, some in found)
            ranked = sorted(np.flatnonzero(share), key=lambda c: (-share[c], c))
            colour = {c: PALETTE[i] if i < 12 else OTHER for i, c in enumerate(ranked)}

            original, cropped, over_original, over_crop = panels(picture, height, width)
            assert over_original.shape == original.shape and over_crop.shape == cropped.shape == (PANEL, PANEL, 3)
            covered = (min(height, width),) * 2 if extent == "center_square" else (height, width)
            grids = (
                (original, over_original, cells, named[0], (height, width), covered),
                (cropped, over_crop, tokens, named[1], (1, 1), (1, 1)),
            )
            for under, over, p, some, size, span in grids:
                checked = 0
                for i, j in np.ndindex(p.shape[1:]):
                    best = int(p[:, i, j].argmax())
                    alpha = OPACITY * p[best, i, j] if some[i, j] else 0.0
                    base = colour[best].astype(float) if some[i, j] else np.zeros(3)
                    ys, xs = (
                        cell_pixels(cell, count, length, part, pixels)
                        for cell, count, length, part, pixels in zip(
                            (i, j), p.shape[1:], size, span, over.shape, strict=False
                        )
                    )
                    for y, x in zip(ys, xs, strict=True):
                        if over is over_original and near_box(y, x, plan, height, width, over.shape):
                            continue
                        expected = grey(under[y, x]) * (1 - alpha) + base * alpha
                        where = f"sample {sample}, cell {i}, {j}, pixel {y}, {x}: {over[y, x]}, not {expected}"
                        assert np.abs(over[y, x] - expected).max() <= 1.5, where
                        checked += 1
                assert checked > p.shape[1] * p.shape[2]
            if extent == "center_square" and width > height * 1.2:
                y, x = original.shape[0] // 2, 2
                if not near_box(y, x, plan, height, width, original.shape):
                    np.testing.assert_allclose(over_original[y, x], 0.35 * grey(original[y, x]), rtol=0, atol=1)
    assert {flip for flip, _ in seen} == {True, False} and {wide for _, wide in seen} == {True, False}


def cell_pixels(cell: int, count: int, length: float, part: float, pixels: int) -> tuple[int, int, int]:
    """Along one axis, drawn pixels that belong to a cell: its second, as the first has the line, one in its middle, and
    its last.

    count cells span the middle `part` of an image's `length`, which is drawn in `pixels`. A pixel belongs to the cell
    its centre is in.
    """
    start, stop = (((length - part) / 2 + part * edge / count) * pixels / length - 0.5 for edge in (cell, cell + 1))
    first, last = (
        math.ceil(start + 1e-3),
        math.ceil(stop - 1e-3) - 1,
    )  # a centre right on the edge may be rounded to either side
    return first + 1, (first + last) // 2, last


def near_box(y: int, x: int, plan: np.void, height: int, width: int, shape: tuple[int, ...]) -> bool:
    """Whether a pixel of the drawn original may lie under the crop's outline."""
    sy, sx = shape[0] / height, shape[1] / width
    rows, columns = (plan["top"], plan["top"] + plan["height"]), (plan["left"], plan["left"] + plan["width"])
    return any(abs(edge * sy - y) < 5 for edge in rows) or any(abs(edge * sx - x) < 5 for edge in columns)


def test_crop_and_box_are_the_plans(full, tmp_path):
    with Loader(full, 1) as loader, BetonReader(full) as reader:
        loader.set_epoch(3)
        for sample in (0, 5):
            plan = loader.draw(np.array([sample]))[0]
            top, left, height, width = (int(plan[name]) for name in ("top", "left", "height", "width"))
            picture = show(full, tmp_path / "sheet.png", ids=[sample], epoch=3)
            original, cropped, *_ = panels(picture, int(reader.heights[sample]), int(reader.widths[sample]))
            photo = Image.open(io.BytesIO(reader.image(sample))).convert("RGB")
            expected = photo.resize(
                (PANEL, PANEL), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
            )
            expected = np.asarray(expected)[:, ::-1] if plan["flip"] else np.asarray(expected)
            assert np.abs(cropped - expected).max() <= 1
            sy, sx = original.shape[0] / photo.height, original.shape[1] / photo.width
            y0, x0, y1, x1 = (
                round(top * sy),
                round(left * sx),
                round((top + height) * sy) - 1,
                round((left + width) * sx) - 1,
            )
            for y, x in ((y0, x0), (y0, x1), (y1, x0), (y1, x1)):
                assert (original[y, x] == 0).all()
            for y, x in (
                (y0 + 1, (x0 + x1) // 2),
                (y1 - 1, (x0 + x1) // 2),
                ((y0 + y1) // 2, x0 + 1),
                ((y0 + y1) // 2, x1 - 1),
            ):
                assert (original[y, x] == 255).all()


def test_size_of_the_sheet(full, tmp_path):
    with BetonReader(full) as reader:
        widest = max(drawn_size(int(h), int(w))[1] for h, w in zip(reader.heights, reader.widths, strict=True))
        many = Image.open(show(full, tmp_path / "many.png", samples=500))
        one = Image.open(show(full, tmp_path / "one.png", first=len(reader) - 1))
        assert many.width == 2 * MARGIN + 2 * (widest + PANEL) + 3 * GAP
        assert (
            one.width
            == 2 * MARGIN + 2 * (drawn_size(int(reader.heights[-1]), int(reader.widths[-1]))[1] + PANEL) + 3 * GAP
        )
        # Header, legend and titles above; a row is its caption, its panels and a gap. Captions take one or two lines.
        assert 0 < many.height - len(reader) * (LINE + PANEL + GAP) < 200 + len(reader) * LINE


def test_other_image_sizes_keep_the_panels(full, tmp_path):
    small = show(full, tmp_path / "small.png", ids=[2], image_size=64, grid=4, smoothing=0.1)
    large = show(full, tmp_path / "large.png", ids=[2], image_size=320, grid=20, smoothing=0.1)
    assert Image.open(small).size == Image.open(large).size


@pytest.mark.parametrize("size, grid, panel", [((64, 128), (4, 8), (112, 224)), ((160, 80), (10, 5), (224, 112))])
def test_rectangles_are_drawn_in_their_shape(full, tmp_path, size, grid, panel):
    """The crop at the left upper corner of its panel, in the pixels that the loader gives; paper beside it."""
    picture = np.asarray(Image.open(show(full, tmp_path / "one.png", ids=[2], image_size=size, grid=grid)))
    with Loader(full, 1, image_size=size, grid=grid, threads=1) as loader, BetonReader(full) as reader:
        crop = panel_of(loader.batch(np.array([2])).images[0])
        left = MARGIN + drawn_size(int(reader.heights[2]), int(reader.widths[2]))[1] + GAP
    assert crop.shape == (*panel, 3)
    top = picture.shape[0] - MARGIN - PANEL
    shown = picture[top : top + PANEL, left : left + PANEL]
    assert (shown[: panel[0], : panel[1]] == crop).all()
    assert (shown[panel[0] :] == PAPER).all() and (shown[:, panel[1] :] == PAPER).all()


def test_files_without_label_maps_show_images_only(bare, tmp_path):
    picture = show(bare, tmp_path / "deeper" / "bare.png", first=1, samples=2)
    with BetonReader(bare) as reader:
        widest = max(drawn_size(int(reader.heights[i]), int(reader.widths[i]))[1] for i in (1, 2))
    assert Image.open(picture).width == 2 * MARGIN + widest + GAP + PANEL


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"ids": [0, 99]}, r"sample 99 is not in .*full\.beton, which has samples 0\.\.\d+"),
        ({"ids": [-1]}, "sample -1 is not in"),
        ({"ids": []}, "ids is empty"),
        ({"first": 99}, "sample 99 is not in"),
        ({"first": -3}, "sample -3 is not in"),
        ({"first": 0, "ids": [1]}, "either ids or first"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"grid": 0}, "grid"),
        ({"smoothing": 1.5}, "smoothing"),
        ({"epoch": -1}, "epoch"),
    ],
)
def test_bad_settings_say_what_is_wrong(full, tmp_path, settings_, message):
    with pytest.raises(ValueError, match=message):
        show(full, tmp_path / "sheet.png", **settings_)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_picture(full, tmp_path):
    with pytest.raises(ValueError, match=r"'\.beton'; use \.png"):
        show(full, full)


def test_command_line(full, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    main([str(full), "--out", str(out), "--ids", "3,1", "--epoch", "2", "--grid", "4"])
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == show(full, tmp_path / "same.png", ids=[3, 1], epoch=2, grid=4).read_bytes()
    bad = {
        "--ids=99": "sample 99 is not in",
        "--ids=1,two": "'1,two' is not a list",
        "--first=1 --ids=1": "not allowed",
    }
    for arguments, message in bad.items():
        with pytest.raises(SystemExit) as stop:
            main([str(full), "--out", str(out), *arguments.split()])
        assert stop.value.code == (1 if "sample" in message else 2) and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.beton"), "--out", str(out)])
    assert "none.beton" in capsys.readouterr().err


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([-3.0, 0.0, 3.0]))
def test_best_of_map_is_the_dense_softmax(seed, k, shift):
    rng = np.random.default_rng(seed)
    classes = np.argsort(rng.random((6, 3, 4)), axis=0)[:k].astype(np.uint16)
    scores = (rng.normal(0, 3, classes.shape) + shift).astype(np.float32)
    cells = best_of_map(classes, scores, 6)
    powers = np.exp(reference.dense_map(classes, scores, 6).astype(np.float64))
    p = powers / powers.sum(axis=0)
    for y, x in np.ndindex(3, 4):
        if cells.best[y, x] == NO_CLASS:  # only where a class that is not listed is at least as probable
            assert k < 6 and scores[:, y, x].max() <= 0
        else:
            assert cells.best[y, x] == p[:, y, x].argmax()
            np.testing.assert_allclose(cells.probability[y, x], p[:, y, x].max(), rtol=1e-5)


def test_nothing_stands_out_in_uniform_cells_and_tokens():
    assert (best_of_map(np.zeros((1, 2, 2), np.uint16), np.zeros((1, 2, 2), np.float32), 5).best == NO_CLASS).all()
    assert (
        best_of_map(np.arange(2, dtype=np.uint16).reshape(2, 1, 1), np.full((2, 1, 1), 4, np.float32), 2).best
        == NO_CLASS
    ).all()
    assert (best_of_targets(np.full((4, 3), 1 / 3, np.float32), (2, 2)).best == NO_CLASS).all()
    assert (best_of_targets(np.ones((4, 1), np.float32), (2, 2)).best == 0).all()


def test_colours_are_distinct():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    colours = Image.fromarray(np.vstack([PALETTE, OTHER])[None])
    lab = np.asarray(ImageCms.applyTransform(colours, to_lab)).view(np.uint8)[0].astype(float)
    lab[:, 0] *= 100 / 255
    lab[:, 1:] = (lab[:, 1:] + 128) % 256  # a and b are stored as signed bytes
    nearest = min(np.linalg.norm(a - b) for a, b in combinations(lab, 2))
    assert nearest > 30  # CIE76; 2.3 is just noticeable


RECIPES = Path(__file__).parents[2] / "recipes"


def test_recipes_by_name(tmp_path):
    for path in RECIPES.glob("*.yaml"):
        for name in (path.stem, path.name, str(path)):
            assert find_recipe(name) == path
    assert find_recipe("lvvit_t") == RECIPES / "lvvit_t_224.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("train_data: x.beton\n")
    assert find_recipe(str(own)) == own
    for name in ("lvvit_x", "", "lvvit_s_", "lvvit_", str(tmp_path / "none.yaml")):
        with pytest.raises(
            ValueError, match="there is no recipe .*known are convnext_tiny_224, deit_small_224, demo_photos, lv"
        ):
            find_recipe(name)
    for name in ("vit_224", "vit_384"):
        (tmp_path / f"{name}.yaml").touch()
    assert find_recipe("vit_384", tmp_path) == tmp_path / "vit_384.yaml"
    with pytest.raises(ValueError, match="'vit' may be any of vit_224, vit_384"):
        find_recipe("vit", tmp_path)


def test_data_of_a_recipe(full, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = []

    def annotate_and_pack(folder: Path) -> None:  # the real one takes minutes; test_demo runs it
        made.append(folder)
        folder.mkdir()
        (folder / "train.beton").touch()

    monkeypatch.setattr(bundled_photos, "annotate_and_pack", annotate_and_pack)
    recipe = str(RECIPES / "lvvit_s_224.yaml")
    assert find_data(parse_config(["--config", recipe, "--train_data", str(full)])) == [full]
    config = parse_config(["--config", recipe])
    for expected in ("annotating and packing the bundled photos", "showing the demo's photos"):
        assert find_data(config, tmp_path / "demo") == [tmp_path / "demo" / "train.beton"]
        said = capsys.readouterr().out
        assert "imagenet_train.beton, is not here" in said and expected in said
    assert made == [tmp_path / "demo"]
    (tmp_path / "imagenet_train.beton").touch()
    assert find_data(config, tmp_path / "demo") == [Path("imagenet_train.beton")]


def tiles(picture: Path, count: int, lines: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """(crop, tokens over it) of every tile of a sheet of crops, by where they must be, counted from the sheet's end."""
    sheet = np.asarray(Image.open(picture).convert("RGB")).astype(float)
    rows = -(-count // COLUMNS)
    assert sheet.shape[1] == 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP
    found = []
    for n in range(count):
        top = sheet.shape[0] - MARGIN - (rows - n // COLUMNS) * (PANEL + lines * LINE + GAP) + GAP
        left = MARGIN + n % COLUMNS * (SIDE + GAP)
        crop, tokens = (sheet[top : top + PANEL, x : x + PANEL] for x in (left, left + PANEL + BETWEEN))
        assert (sheet[top - 1, left : left + SIDE] == PAPER).all()
        found.append((crop, tokens))
    return found


@pytest.fixture(scope="module")
def lvvit_s(many, tmp_path_factory) -> Path:
    return show_recipe("lvvit_s_224", many, tmp_path_factory.mktemp("crops") / "lvvit_s.png")


def the_recipes_loader(beton: Path) -> Loader:
    """What the paper's recipe says, written down again."""
    augment = plan.Augment(interpolation="random", auto_augment="rand-m9-mstd0.5-inc1", erase=0.25)
    return Loader(beton, 1, augment=augment, smoothing=0.1, threads=1)


def test_crops_are_the_loaders_with_the_recipes_augmentation(many, lvvit_s):
    mean = 255 * np.array((0.485, 0.456, 0.406))
    erased, drawn = 0, set()
    with the_recipes_loader(many) as loader:
        chosen = np.linspace(0, len(loader.samples) - 1, 24).round().astype(int)
        for sample, (crop, _) in zip(chosen, tiles(lvvit_s, 24), strict=True):
            batch = loader.batch(np.array([sample]))
            drawn |= set(loader.draw(np.array([sample]))[0]["ops"].tolist())
            expected = batch.images[0].permute(1, 2, 0).numpy().astype(float)
            top, left, height, width = batch.erase[0].tolist()
            kept = np.ones((PANEL, PANEL), bool)
            kept[top : top + height, left : left + width] = False
            assert (crop[kept] == expected[kept]).all(), f"sample {sample}"
            if height:  # noise of the data set's mean and deviation, of which 3 % are cut off
                erased += 1
                np.testing.assert_allclose(crop[~kept].mean(axis=0), mean, atol=6)
                np.testing.assert_allclose(crop[~kept].std(axis=0), 255 * np.array((0.229, 0.224, 0.225)), atol=6)
    assert 1 <= erased <= 14 and len(drawn) > 6


def test_fill_has_no_colour_and_the_image_has(many, lvvit_s):
    """Tokens a map's half cell and more beyond the image know nothing; those well inside it know a class."""
    outside = inside = 0
    with the_recipes_loader(many) as loader:
        chosen = np.linspace(0, len(loader.samples) - 1, 24).round().astype(int)
        for sample, (crop, tokens) in zip(chosen, tiles(lvvit_s, 24), strict=True):
            drawn = loader.draw(np.array([sample]))[0]
            height, width = loader.samples.heights[sample], loader.samples.widths[sample]
            linear = drawn["affine"].astype(float).reshape(2, 3)
            for i, j in np.ndindex(14, 14):
                # Fractions of the image at the token's corners: an affine has its extremes there.
                corners = (
                    np.array([[(j + a) / 14, (i + b) / 14, 1] for a in (0, 1) for b in (0, 1)])
                    @ linear.T
                    / (width, height)
                )
                middle = (
                    slice(16 * i + 2, 16 * i + 14),
                    slice(16 * j + 2, 16 * j + 14),
                )  # without the lines between tokens
                token, below = tokens[middle], crop[middle]
                if ((corners < -0.51 / np.array((6, 5))) | (corners > 1 + 0.51 / np.array((6, 5)))).all(axis=0).any():
                    assert np.ptp(token, axis=2).max() == 0, f"sample {sample}, token {i}, {j}"
                    np.testing.assert_allclose(token[..., 0], 0.35 * below @ (0.299, 0.587, 0.114), atol=1.5)
                    outside += 1
                elif (corners > 0).all() and (corners < 1).all():
                    assert np.ptp(token, axis=2).min() > 5, f"sample {sample}, token {i}, {j}"
                    inside += 1
    assert outside > 30 and inside > 2000


def test_what_is_beyond_the_image_is_what_is_filled(many):
    fill = (255, 0, 255)
    augment = plan.Augment(auto_augment="rand-m9-n1-p1.0-inc1", fill=fill)
    filled = 0
    with Loader(many, 1, augment=augment, threads=1, token_labels=False) as loader:
        for sample in range(len(loader.samples)):
            drawn = loader.draw(np.array([sample]))[0]
            if not OPS[drawn["ops"][0]].startswith(("Rotate", "Shear", "Translate")):
                continue
            image = loader.batch(np.array([sample])).images[0].numpy()
            height, width = int(loader.samples.heights[sample]), int(loader.samples.widths[sample])
            beyond = ~inside_image(drawn["affine"], height, width, (PANEL, PANEL))
            # A pixel may be filled or not where its centre is as good as on the image's edge.
            differ = (image == np.array(fill)[:, None, None]).all(axis=0) != beyond
            assert differ.sum() <= 2, f"sample {sample}: {differ.sum()} pixels"
            filled += bool(beyond.any())
    assert filled >= 3


def test_same_seed_same_picture(many, tmp_path):
    def picture(**changed) -> bytes:
        return show_recipe("lvvit_s_224", many, tmp_path / "again.png", samples=4, **changed).read_bytes()

    pictures = [picture(), picture(epoch=1), picture(seed=1)]
    assert picture(seed=0) == pictures[0] and picture(epoch=1) == pictures[1] and len(set(pictures)) == 3


def test_operations_in_words():
    record = plan.of_boxes(np.array([[0, 0, 4, 4]]))[0]
    assert operations(record) == []
    drawn = [
        ("Rotate", -21.34),
        ("Color", 1.537),
        ("Equalize", 0),
        ("Posterize", 3),
        ("Solarize", 17),
        ("TranslateX", -0.449),
    ]
    record["ops"][:6] = [OPS.index(name) for name, _ in drawn]
    record["arguments"][:6] = [argument for _, argument in drawn]
    assert operations(record) == [
        "Rotate -21.3°",
        "Color 1.54",
        "Equalize",
        "Posterize 3 bit",
        "Solarize 17",
        "TranslateX -0.45",
    ]


def test_captions_stay_below_their_tiles(photos, tmp_path):
    """With the most operations, long names of images and of classes."""
    names = [f"{name}, which is a class of a name that nobody would want to read in full" for name in NAMES]
    beton = write_blobs(
        tmp_path / "long.beton", photos, MapSpec(4, 5, 6, CLASSES), names=names, suffix="-of-a-name-that-is-long" * 6
    )
    recipe = tmp_path / "strong.yaml"
    recipe.write_text("train_data: long.beton\nauto_augment: rand-m9-n8-p1.0-mstd0.5-inc1\nsmoothing: 0.1\n")
    picture = np.asarray(Image.open(show_recipe(str(recipe), beton, tmp_path / "strong.png", samples=8)).convert("RGB"))
    first = picture.shape[0] - MARGIN - PANEL  # the last row has its captions below
    below = np.ones(picture.shape[:2], bool)
    for column in range(COLUMNS):
        left = MARGIN + column * (SIDE + GAP)
        below[:, left - 1 : left + SIDE + 1] = False  # letters may reach a pixel further than their widths
        text = picture[first:, left : left + SIDE]
        assert (text != PAPER).any()
    below[:first] = False
    assert (picture[below] == PAPER).all() and (picture[-MARGIN:] == PAPER).all()


def test_crops_of_files_without_label_maps(bare, tmp_path):
    picture = Image.open(show_recipe("lvvit_s_224", bare, tmp_path / "bare.png", samples=5))
    assert picture.width == 2 * MARGIN + COLUMNS * PANEL + (COLUMNS - 1) * GAP


def test_command_line_of_a_recipe(full, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([str(full), "--recipe", "lvvit_s_224", "--ids", "3,1", "--epoch", "2"])
    assert capsys.readouterr().out == "runs/show/lvvit_s_224.png\n"
    same = show_recipe("lvvit_s_224", full, tmp_path / "same.png", ids=[3, 1], epoch=2)
    assert Path("runs/show/lvvit_s_224.png").read_bytes() == same.read_bytes()
    main([str(full), "--recipe", "lvvit_s_224", "--ids", "3", "--image-size", "64", "--out", "small.png"])
    assert Image.open("small.png").width == Image.open(same).width
    bad = {
        "--recipe lvvit_q": "there is no recipe 'lvvit_q'; known are convnext_tiny_224, deit_small_224, demo_photos,",
        "--recipe lvvit_s_224 --ids 99": "sample 99 is not in",
        "--recipe lvvit_s_224 --image-size 100": "multiples of 16",
        "--recipe lvvit_s_224 --out x.txt": "use .png",
        "": "FILE.beton and --out are needed, or --recipe",
    }
    for arguments, message in bad.items():
        with pytest.raises(SystemExit) as stop:
            main([str(full), *arguments.split()])
        assert stop.value.code == (1 if arguments else 2) and message in capsys.readouterr().err
