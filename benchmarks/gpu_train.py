"""How many images/s does training LV-ViT-S take on one GPU, from synthetic batches and fed from a beton, beside the
published style?

    python benchmarks/gpu_train.py [--images FOLDER | --beton FILE] [--samples 4096] [--models lvvit_s:224]

benchmarks/train.py's contenders in a selection that ends within a stage of gpu_check.sh. Rows go to
benchmarks/results/gpu/rows.jsonl.
"""

from __future__ import annotations

import subprocess
import sys

from gpu_rows import add_data, beton_of, need_gpu, parser
from rows import ROOT


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_data(options)
    options.add_argument("--models", nargs="+", default=["lvvit_s:224"], metavar="NAME:SIZE")
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    need_gpu()
    try:
        import train  # what its processes import
    except ImportError as error:
        print(f"skipped: training needs what is not installed ({error})")
        return
    with beton_of(arguments) as beton:
        with_beton = [] if beton is None else [train.FED, train.BESIDE]
        contenders = ["tl_fast, compiled", *with_beton, "tl_fast, compiled, CUDA graphs", "published style, eager"]
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "train.py"),
            "--models",
            *arguments.models,
            "--batch",
            str(arguments.batch),
            "--rounds",
            str(arguments.rounds),
            "--steps",
            "20",
            "--results",
            str(arguments.results),
            "--contenders",
            *contenders,
        ]
        done = subprocess.run(command + (["--beton", str(beton)] if beton is not None else []))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
