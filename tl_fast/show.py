"""Pictures to look at.

    python -m tl_fast.show FILE.beton --out picture.png         a sheet of samples (tl_fast.pictures.sample_sheet)
    python -m tl_fast.show FILE.beton --masks --out picture.png     masks, predictions (tl_fast.pictures.mask_sheet)
    python -m tl_fast.show --recipe lvvit_s_224                 a recipe's crops (tl_fast.pictures.crop_sheet)
    python -m tl_fast.show RUN_DIR                          the curves of a training run (tl_fast.pictures.curves)

Mistakes end it with one sentence: exit code 2 for the command line, 1 for data and files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tl_fast.system.mistakes import in_a_sentence
from tl_fast.system.sides import read_sides

PROG = "python -m tl_fast.show"


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sample ids such as 1,2,3") from None


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(
            "Draw a sheet of a beton's samples with their labels; with --masks, of their masks; with --recipe, of"
            " crops augmented as that recipe trains on them; or the curves of a run."
        ),
    )
    parser.add_argument(
        "beton",
        metavar="FILE.beton|RUN_DIR",
        nargs="?",
        help=(
            "the file to look into; with --recipe by default its train_data, or else the bundled photos; or a run's"
            " folder, whose curves are drawn"
        ),
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="such as lvvit_s_224, of recipes/, or a YAML file: show crops with all of its augmentation",
    )
    parser.add_argument(
        "--out",
        metavar="picture.png",
        help="where to write the picture (by default with --recipe runs/show/NAME.png, of a run RUN_DIR/curves.png)",
    )
    parser.add_argument(
        "--samples", type=int, help="how many, spread evenly over the file (default 8, with --recipe 24)"
    )
    parser.add_argument("--masks", action="store_true", default=None, help="show masks for segmentation, not crops")
    parser.add_argument(
        "--predictions",
        nargs="+",
        metavar="DIR",
        help="beside the masks, what `segment --evaluate --save-predictions` wrote into these folders",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--first", type=int, metavar="ID", help="show samples in sequence from this one")
    chosen.add_argument("--ids", type=_ids, metavar="1,2,3", help="show these samples (--samples does not count then)")
    parser.add_argument("--epoch", type=int, help="whose crops, flips and operations (default 0)")
    parser.add_argument("--seed", type=int, help="of what is drawn (default 0, or the recipe's)")
    parser.add_argument(
        "--image-size",
        type=read_sides,
        metavar="PIXELS",
        help="side of the crops, or [height,width] (default 224, or the recipe's)",
    )
    parser.add_argument(
        "--grid",
        type=read_sides,
        metavar="TOKENS",
        help="tokens a side, or [rows,columns] (default 14, with --recipe its model's)",
    )
    parser.add_argument(
        "--smoothing", type=float, help="label smoothing of the token targets (default 0, or the recipe's)"
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """The command line; a mistake ends it with one line that says what to change, and status 2 where the arguments show
    it, else 1. prog: what messages call the command.
    """
    parser = build_parser(prog)
    settings = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    show_traceback = settings.pop("traceback")
    recipe, beton, out = (settings.pop(name, None) for name in ("recipe", "beton", "out"))
    run = recipe is None and beton is not None and Path(beton).is_dir()
    if recipe is None and not run and (beton is None or out is None):
        parser.error("FILE.beton and --out are needed, or --recipe, or a run's folder")
    if run and settings:
        parser.error(f"{beton} is a run's folder: {_flags(settings)} is for betons")
    masks = settings.pop("masks", False) or "predictions" in settings
    of_crops = [name for name in settings if name not in ("predictions", "samples", "first", "ids")]
    if masks and (recipe is not None or of_crops):
        parser.error(f"masks are shown whole: {_flags(of_crops or ['recipe'])} is for crops")
    with in_a_sentence(parser.prog, show_traceback):  # the imports are here because they take seconds
        if run:
            from tl_fast.pictures.curves import draw_curves

            print(draw_curves(Path(beton), Path(out) if out else None))
        elif masks:
            from tl_fast.pictures.mask_sheet import show_masks

            print(show_masks(beton, out, **settings))
        elif recipe is None:
            from tl_fast.pictures.sample_sheet import show

            print(show(beton, out, **settings))
        else:
            from tl_fast.pictures.crop_sheet import show_recipe

            print(show_recipe(recipe, beton, out, **settings))


if __name__ == "__main__":
    main()
