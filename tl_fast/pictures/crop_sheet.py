"""The sheet of a recipe's augmented crops: `python -m tl_fast.show --recipe lvvit_s_224`.

A tile is one sample as the model gets it, RandAugment and random erasing included, beside the same crop in grey under
its token targets. All comes from `pipeline.Loader` with the recipe's settings; only MixToken, which mixes two such
crops inside the model, is not shown. Beyond the image the grey is darker, and tokens whose sampling points are there
have no class's colour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tl_fast.beton.samples import expand
from tl_fast.maths.scalar import AUTO_CONTRAST, EQUALIZE, INVERT, NO_OP, POSTERIZE, ROTATE, SOLARIZE, SOLARIZE_ADD
from tl_fast.models.erase import erase
from tl_fast.models.normalise import Normalise
from tl_fast.pictures import bundled_photos, sheet
from tl_fast.pictures.sheet import GAP, LINE, MARGIN, PANEL, PAPER, SWATCH, Cells
from tl_fast.pipeline.batch import Batch
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.augment import INTERPOLATIONS
from tl_fast.plan.rand_augment import OPS
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides
from tl_fast.training.config import TrainConfig, parse_config
from tl_fast.training.network import grid_of

RECIPES = bundled_photos.ROOT / "recipes"
SAMPLES = 24
COLUMNS = 4
BETWEEN = 4  # pixels: a crop and its tokens, closer than two tiles are
OUTSIDE = 0.35  # of the brightness of what the image does not cover, below the tokens
UNITS = {ROTATE: "°", POSTERIZE: " bit"}


@dataclass(frozen=True)
class Tile:
    """What the sheet shows of one sample.

    name: of its image; label: class index; classes, operations, rest: pieces of text, a paragraph each.
    crop: uint8 [h, w, 3], its longer side PANEL.
    inside: bool [h, w], which pixels show the image rather than what is beyond it.
    tokens: None without label maps.
    """

    name: str
    label: int
    classes: list[str]
    operations: list[str]
    rest: list[str]
    crop: np.ndarray
    inside: np.ndarray
    tokens: Cells | None


def show_recipe(
    recipe: str,
    beton: str | Path | None = None,
    out: str | Path | None = None,
    *,
    samples: int = SAMPLES,
    first: int | None = None,
    ids: Sequence[int] | None = None,
    epoch: int = 0,
    seed: int | None = None,
    image_size: Sides | None = None,
    grid: Sides | None = None,
    smoothing: float | None = None,
) -> Path:
    """Write the sheet of augmented crops of a recipe (`find_recipe`) and return its path, `out` or runs/show/NAME.png.

    beton: by default what `find_data` finds. samples, first, ids, epoch: as for `sample_sheet.show`; the others replace
    what the recipe says. Raises ValueError for settings, recipes or sample ids that do not fit, FileNotFoundError
    without the file, DecodeError for a damaged JPEG; a recipe that is wrong itself ends the program with train.py's
    message.
    """
    path = find_recipe(recipe)
    out = Path(out) if out is not None else Path("runs", "show", f"{Path(recipe).stem}.png")
    sheet.check_name(out)
    config = parse_config(["--config", str(path), *([] if beton is None else ["--train_data", str(beton)])])
    replaced = {"seed": seed, "img_size": image_size, "smoothing": smoothing}
    config = dataclasses.replace(config, **{name: value for name, value in replaced.items() if value is not None})
    data = expand(config.train_data) if beton is not None else find_data(config)
    with Loader(
        data,
        1,
        image_size=config.img_size,
        grid=grid_of(config) if grid is None else grid,
        augment=config.augment,
        seed=config.seed,
        geometry=config.geometry,
        smoothing=config.smoothing,
        token_labels=config.token_label,
        threads=1,
    ) as loader:
        loader.set_epoch(epoch)
        chosen = sheet.choose(len(loader.samples), samples, first, ids, ", ".join(map(str, data)))
        tiles = [_tile(loader, int(sample_id), Normalise(config.mean, config.std)) for sample_id in chosen]
        header = [f"recipe {path.name}", *_augmentation(config), *sheet.describe(loader, epoch)]
        names = loader.samples.class_names
    colours = sheet.assign_colours(tile.tokens for tile in tiles)
    sheet.save(_draw(tiles, header, colours, names), out)
    return out


def find_recipe(name: str, folder: Path = RECIPES) -> Path:
    """The YAML file of a recipe: a path, or the name of one in `folder`, in full or its beginning where that is one
    recipe's alone.

    Raises ValueError naming the recipes there are.
    """
    if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    wanted = name.removesuffix(".yaml")
    beginning = [stem for stem in known if wanted and stem.startswith(f"{wanted}_")]
    meant = [wanted] if wanted in known else beginning
    if len(meant) == 1:
        return known[meant[0]]
    problem = f"recipe {name!r} may be any of {', '.join(meant)}" if meant else f"there is no recipe {name!r}"
    raise InputError(
        f"{problem}; known are {', '.join(known) or 'none'} (in {folder}), and YAML files are taken by their path"
    )


def find_data(config: TrainConfig, folder: Path = bundled_photos.FOLDER) -> list[Path]:
    """The recipe's betons where they exist, else the demo's in `folder`, which is made where it is missing; says which
    it takes."""
    try:
        return expand(config.train_data)
    except FileNotFoundError:
        beton = folder / "train.beton"
        missing = f"the recipe's data, {config.train_data}, is not here"
    if beton.is_file():
        print(f"{missing}: showing the demo's photos, {beton}", flush=True)
    else:
        print(
            f"{missing}, nor is the demo's: annotating and packing the bundled photos into {folder} (once; a minute or"
            " two)",
            flush=True,
        )
        bundled_photos.annotate_and_pack(folder)
    return [beton]


def pixels(batch: Batch, normalise: Normalise) -> Tensor:
    """The batch's images as the model gets them, normalised and then erased, back in uint8 [B, 3, H, W]; noise beyond
    0..255 is cut off."""
    images = normalise(batch.images)
    if batch.erase is not None:
        images = erase(images, batch.erase, batch.noise)
    return ((images - normalise.shift) / normalise.scale).round().clamp(0, 255).to(torch.uint8)


def inside_image(affine: np.ndarray, height: int, width: int, shown: tuple[int, int]) -> np.ndarray:
    """Which of the output's pixels, `shown` (rows, columns) of them, show the image of `height` x `width` pixels
    through a plan's affine, by their centres: bool."""
    v, u = np.meshgrid(*((np.arange(size) + 0.5) / size for size in shown), indexing="ij")
    x, y = (row[0] * u + row[1] * v + row[2] for row in np.asarray(affine, np.float64).reshape(2, 3))
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def operations(plan: np.void) -> list[str]:
    """The plan's operations in their order, such as "Rotate 21.3°": degrees, bits, levels, factors, shear or shares of
    the crop's side."""
    drawn = [
        (int(op), float(argument)) for op, argument in zip(plan["ops"], plan["arguments"], strict=True) if op != NO_OP
    ]
    return [
        OPS[op] if op in (AUTO_CONTRAST, EQUALIZE, INVERT) else f"{OPS[op]} {_number(op, argument)}{UNITS.get(op, '')}"
        for op, argument in drawn
    ]


def _number(op: int, argument: float) -> str:
    if op in (POSTERIZE, SOLARIZE, SOLARIZE_ADD):
        return f"{argument:.0f}"
    return f"{argument:.1f}" if op == ROTATE else f"{argument:.2f}"


def _tile(loader: Loader, sample_id: int, normalise: Normalise) -> Tile:
    """One sample with the loader's own crop, operations and targets."""
    samples, one = loader.samples, np.array([sample_id])
    batch, plan = loader.batch(one), loader.draw(one)[0]
    reader, index = samples.locate(sample_id)
    label, names = int(batch.labels[0]), samples.class_names
    classes, tokens = [f"label: {sheet.class_name(names, label)}"], None
    if batch.targets is not None:
        targets = batch.targets[0].numpy()
        tokens = sheet.best_of_targets(targets[1:], loader.grid)
        classes.append(sheet.class_token(targets[0], names))
    top, left, height, width = (0, 0, 0, 0) if batch.erase is None else batch.erase[0].tolist()
    erased = f"erased {height} x {width} at {top}, {left}" if height else "not erased"
    rest = ["flipped" if plan["flip"] else "not flipped", INTERPOLATIONS[plan["interpolation"]], erased]
    name = sheet.plain(reader.source_ids[index])
    crop = sheet.panel_of(pixels(batch, normalise)[0])
    height, width = int(samples.heights[sample_id]), int(samples.widths[sample_id])
    inside = inside_image(plan["affine"], height, width, crop.shape[:2])
    return Tile(name, label, classes, operations(plan) or ["no operation"], rest, crop, inside, tokens)


def _augmentation(config: TrainConfig) -> list[str]:
    """The recipe's settings that decide what the crops look like."""
    augment = config.augment
    colours = f"color jitter {augment.color_jitter:g}" if augment.color_jitter else "no RandAugment"
    return [
        augment.auto_augment or colours,
        f"random erasing {augment.erase:g}",
        f"interpolation {augment.interpolation}",
        f"crops of {augment.scale[0]:g} to {augment.scale[1]:g} of the image",
        "dark below tokens: beyond the image",
    ]


def _draw(tiles: Sequence[Tile], header: list[str], colours: dict[int, np.ndarray], names: list[str]) -> Image.Image:
    """The sheet: header, legend, rows of COLUMNS tiles."""
    side = PANEL if tiles[0].tokens is None else 2 * PANEL + BETWEEN
    width = 2 * MARGIN + COLUMNS * side + (COLUMNS - 1) * GAP
    top = sheet.Top(header, colours, names, width - 2 * MARGIN)
    texts = [_lines(tile, side, colours) for tile in tiles]
    rows = [range(start, min(start + COLUMNS, len(tiles))) for start in range(0, len(tiles), COLUMNS)]
    heights = [PANEL + LINE * max(len(texts[n]) for n in row) for row in rows]
    picture = Image.new("RGB", (width, top.height + sum(heights) + GAP * (len(rows) - 1) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    top.draw(draw)
    y = top.height
    for row, height in zip(rows, heights, strict=True):
        for column, n in enumerate(row):
            x, tile = MARGIN + column * (side + GAP), tiles[n]
            picture.paste(Image.fromarray(tile.crop), (x, y))
            if tile.tokens is not None:
                picture.paste(Image.fromarray(_tokens(tile, colours)), (x + PANEL + BETWEEN, y))
            if tile.label in colours:
                sheet.swatch(draw, x, y + PANEL + LINE, colours[tile.label])
            for i, (indent, line) in enumerate(texts[n]):
                sheet.write_text(draw, x + indent, y + PANEL + LINE * i, line)
        y += height + GAP
    return picture


def _lines(tile: Tile, side: int, colours: dict[int, np.ndarray]) -> list[tuple[int, str]]:
    """The text below a tile `side` pixels wide: (indent, line). The second line, of the label, leaves room for its
    colour."""
    indent = SWATCH + 6 if tile.label in colours else 0
    classes = [(indent, line) for line in sheet.wrap(tile.classes, side - indent)]
    return [
        (0, sheet.fit(tile.name, side)),
        *classes,
        *((0, line) for line in [*sheet.wrap(tile.operations, side, ", "), *sheet.wrap(tile.rest, side)]),
    ]


def _tokens(tile: Tile, colours: dict[int, np.ndarray]) -> np.ndarray:
    """The crop in grey, darker beyond the image, under its tokens."""
    dimmed = np.where(tile.inside[:, :, None], tile.crop, (OUTSIDE * tile.crop).astype(np.uint8))
    return sheet.overlay(dimmed, tile.tokens, np.array([0, 0, 1, 1]), colours)
