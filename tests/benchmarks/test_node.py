"""benchmarks/node.py's hours and limits against sums done by hand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 310 * (1_281_167 // 1024)  # of lvvit_s_224: 300 epochs and 10 of cooldown at a global batch of 1,024
GRADIENTS = 26.15e6 * 4 / 1e9  # GB


@pytest.fixture
def node(monkeypatch, capsys):
    """Runs the command on lvvit_s_224; the words of the table's lines, and everything printed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    main = importlib.import_module("node").main

    def run(*arguments: str) -> tuple[list[list[str]], str]:
        main(["--recipes", str(ROOT / "recipes" / "lvvit_s_224.yaml"), *arguments])
        out = capsys.readouterr().out
        return [line.split() for line in out.splitlines() if line.startswith("lvvit_s_224")], out

    return run


def test_hours_cost_and_limit_of_each_part(node):
    fast = ["--rate", "lvvit_s:224=2000", "--cores", "1000", "--loader", "1000", "--storage", "1000"]
    (one, two), out = node(*fast, "--nodes", "1", "2", "--price", "3", "--link", "100", "--network", "10")
    for words, nodes in ((one, 1), (two, 2)):
        reduce = 2 * 7 / 8 * GRADIENTS / 100 + 2 * (nodes - 1) / nodes * GRADIENTS / 8 / 10
        hours = STEPS * (1024 / (8 * nodes) / 2000 + reduce) / 3600
        assert words[1] == str(8 * nodes) and words[5] == "compute"
        assert float(words[3]) == pytest.approx(hours, abs=0.006)
        assert float(words[4].replace(",", "")) == pytest.approx(hours * 8 * nodes * 3, abs=0.6)
    assert "given by --rate" in out and "no validation" in out


def test_the_bytes_of_an_all_reduce_are_printed(node):
    """7/4 of the gradients by a ring of 8 GPUs; of each GPU's eighth 1 and 3/2 times by rings of 2 and 4 nodes; nothing
    by one of 1."""
    _, out = node("--nodes", "1", "2", "4", "--rate", "lvvit_s:224=2000")
    line = next(line for line in out.splitlines() if "MB of gradients" in line)
    found = [float(number) for number in re.findall(r"([\d.]+) MB", line)]
    size = 1e3 * GRADIENTS
    assert found == pytest.approx([size, 7 / 4 * size, size / 8, 3 / 2 * size / 8], abs=0.06)


@pytest.mark.parametrize(
    "slow, limit, step",
    [
        (("--loader", "10", "--cores", "16"), "loader", 1024 / 160),
        (("--storage", "0.01", "--image-kb", "100"), "storage", 1024 * 1e-4 / 0.01),
        (("--link", "0.1"), "all-reduce", 1024 / 8 / 9000 + 2 * 7 / 8 * GRADIENTS / 0.1),
    ],
)
def test_the_slowest_part_sets_the_pace(node, slow, limit, step):
    (words,), _ = node("--nodes", "1", "--rate", "lvvit_s:224=9000", *slow)
    assert words[5] == limit and float(words[3]) == pytest.approx(STEPS * step / 3600, rel=2e-3)


def test_a_fine_tuned_recipe_takes_its_own_epochs_batch_and_size(monkeypatch, capsys):
    """30 epochs at 512 images; published, 310. The FLOPs, hence the rate, are those of 384 px."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    main = importlib.import_module("node").main
    recipes = [str(ROOT / "recipes" / folder / "lvvit_s_384.yaml") for folder in (".", "published")]
    main(["--recipes", *recipes, "--rate", "lvvit_s:384=1000", "--nodes", "1", "--link", "1e9"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "lvvit_s_384 " in line]
    assert [words[0] for words in lines[:2]] == ["lvvit_s_384", "published/lvvit_s_384"]
    for words, epochs in zip(lines, (30, 310), strict=False):
        assert float(words[3]) == pytest.approx(epochs * (1_281_167 // 512) * 64 / 1000 / 3600, abs=0.006)
    train = importlib.import_module("train")
    main(["--recipes", recipes[0], "--nodes", "1", "--results", str(ROOT / "none.jsonl")])
    rate = 0.36 * 989e12 / train.flops("lvvit_s", 384, 1000)
    assert f"lvvit_s_384: {rate:,.0f} images/s" in capsys.readouterr().out


def test_another_models_published_recipe_is_taken(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    recipe = str(ROOT / "recipes" / "published" / "volo_d1_224.yaml")
    rate = ["--rate", "volo_d1_224:224=1000", "--nodes", "1", "--link", "1e9"]
    importlib.import_module("node").main(["--recipes", recipe, *rate])
    (_, line, *_) = capsys.readouterr().out.splitlines()
    name, gpus, _, hours, *_ = line.split()
    assert (name, gpus) == ("published/volo_d1_224", "8")
    assert float(hours) == pytest.approx(STEPS * 128 / 1000 / 3600, abs=0.006)


@pytest.mark.slow
def test_the_estimates_in_the_recipes_are_node_pys(monkeypatch, capsys, tmp_path):
    """Counting the FLOPs of all models takes ten seconds."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importlib.import_module("node").main(["--nodes", "1", "--results", str(tmp_path / "none.jsonl")])
    table = capsys.readouterr().out.split("\nAssumed")[0]
    lines = [line.split() for line in table.splitlines()[1:]]
    assert {words[0] for words in lines} == {path.stem for path in (ROOT / "recipes").glob("*_[0-9]*.yaml")}
    for words in lines:
        text = (ROOT / "recipes" / f"{words[0]}.yaml").read_text()
        estimate = re.search(r"~([\d.]+) h on 8 x H100\. ESTIMATE", text)
        if estimate is not None:  # once measured, it says so instead
            assert float(estimate[1]) == pytest.approx(float(words[3]), abs=0.051), words[0]


def test_an_estimate_says_that_it_is_one(node, tmp_path):
    assert "NOT MEASURED: 36% of 989 TFLOP/s" in node("--nodes", "1", "--results", str(tmp_path / "none.jsonl"))[1]
