"""The measured rows of README's table, from the newest rows of benchmarks/results. Measures nothing.

python benchmarks/summary.py
"""

from __future__ import annotations

import json

from rows import ROOT

RESULTS = ROOT / "benchmarks" / "results"
ORIGINALS = {"images": "imagenet_sample"}  # original ImageNet files
PUBLISHED_TARGETS = "torch: scatter + RoIAlign + softmax"


def newest(benchmark: str, contender: str, **facts: object) -> float:
    """The median of the last row of `contender` in benchmarks/results/BENCHMARK.jsonl that was measured on `facts`.
    LookupError where there is none."""
    rows = map(json.loads, (RESULTS / f"{benchmark}.jsonl").read_text().splitlines())
    medians = [
        row["median"]
        for row in rows
        if row["benchmark"] == benchmark and row["contender"] == contender and facts.items() <= row.items()
    ]
    if not medians:
        raise LookupError(f"{benchmark}.jsonl has no row of {contender!r} with {facts}")
    return medians[-1]


def table() -> str:
    """One line of Markdown a measurement: what was measured, our median, others' medians in the same run."""

    def loaders(contender: str) -> str:
        return f"{newest('loaders', contender, **ORIGINALS):,.0f}"

    def targets(contender: str) -> str:
        return f"{newest('targets', contender, num_classes=1000):,.0f}"

    def convert(contender: str) -> str:
        return f"{newest('convert', contender, **ORIGINALS):,.0f}"

    def step(contender: str) -> str:
        return f"{newest('train', contender, model='lvvit_t', size=224):.1f}"

    others = ", ".join(
        f"{name} {loaders(f'{contender}: crop + flip, no label maps')}"
        for name, contender in (("stock FFCV", "stock FFCV"), ("DALI", "DALI"), ("timm", "timm + DataLoader"))
    )
    lines = [
        (
            "loader: crop, flip, token targets",
            loaders("tl_fast: crop + flip, token targets"),
            f"{others}, without label maps",
        ),
        (
            "loader: LV-ViT-S's full recipe",
            loaders("tl_fast: full recipe, token targets"),
            f"published style {loaders('published style: full recipe, token targets')}",
        ),
        (
            "token targets of 1,000 classes",
            targets("tl_fast"),
            f"scatter, RoIAlign and softmax, compiled {targets(PUBLISHED_TARGETS)}",
        ),
        (
            "convert, every image decoded",
            convert("tl_fast: every image decoded"),
            f"stock FFCV's writer {convert('stock FFCV writer')}",
        ),
        (
            "a training step of LV-ViT-T, float32",
            step("tl_fast, eager"),
            f"published style {step('published style, eager')}",
        ),
    ]
    return "\n".join(f"| {name} | {ours} images/s | {beside} |" for name, ours, beside in lines)


if __name__ == "__main__":
    print(table())
