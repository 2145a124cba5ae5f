"""The demo: the project's own commands end to end, shortened."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tl_fast import demo
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.pictures import bundled_photos

ROOT = Path(__file__).resolve().parent.parent


def test_sparkline_spans_the_values():
    assert demo.sparkline([3.0, 1.0, 2.0]) == "█ ▄"
    assert demo.sparkline([1.0, 1.0]) == "  "


def test_a_failing_command_is_named():
    with pytest.raises(SystemExit, match="no_such_module"):
        bundled_photos.run("-m", "tl_fast.no_such_module")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(SystemExit, match="not an earlier demo's"):
        demo.demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_path_runs_twice_into_one_folder(tmp_path, capfd):
    """The demo on fewer pixels and epochs, which must learn something; then two short epochs of the control, which
    replace it."""
    control = ["--img_size", "64", "--epochs", "2", "--warmup_epochs", "0"]
    command = [sys.executable, "-m", "tl_fast.demo", "--out", str(tmp_path), "--img_size", "64", "--epochs", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Five photos of 29 more than the majority class; 79 % is expected.
    assert summary(done.stdout, tmp_path, token_label=True) > 100 * (8 / 29) + 15
    demo.main(["--out", str(tmp_path), "--no-token-label", *control])
    summary(capfd.readouterr().out, tmp_path, token_label=False)
    for name, samples in (("train", 87), ("val", 29)):
        assert verify(tmp_path / f"{name}.beton", decode=True) == []
        with BetonReader(tmp_path / f"{name}.beton") as reader:
            assert len(reader) == samples and reader.class_names == ["animal", "fish", "monument", "tool"]
            assert (reader.spec is None) == (name == "val")


def summary(output: str, folder: Path, *, token_label: bool) -> float:
    """Top-1 in percent by the last line of the demo's output, which is checked against the files in its folder."""
    pattern = r"demo: val top-1 (\d+\.\d) % \(majority (\d+\.\d) %\), (\d+) images/s, picture at (.+)"
    top1, majority, speed, picture = re.fullmatch(pattern, output.strip().splitlines()[-1]).groups()
    assert float(majority) == pytest.approx(100 * 8 / 29, abs=0.1) and 0 <= float(top1) <= 100 and int(speed) > 0
    with Image.open(picture) as sheet:
        assert min(sheet.size) > 400
    figures = json.loads((folder / "report.json").read_text())
    assert figures["token_label"] is token_label and len(figures["loss"]) >= 2
    assert f"{figures['top1']:.1f} %" in (folder / "report.md").read_text()
    return float(top1)


@pytest.mark.slow
def test_one_command_trains_and_fine_tunes(tmp_path, capfd):
    model = ["--model", "vit_tiny_patch16_224", "--model_kwargs", "{depth: 2}"]
    demo.main(["--fine-tune", "--out", str(tmp_path), *model])
    output = capfd.readouterr().out
    assert re.fullmatch(rf"demo: top-1 \d+\.\d % after fine-tuning, files in {tmp_path}", output.splitlines()[-1])
    # The heads are made anew for three classes, and evaluation finds what the run itself found.
    assert re.search(r"left out .*\(4 classes\).* as the model has 3 classes", output)
    assert "resized pos_embed from [1, 37, 192] to [1, 65, 192]" in output
    (validated,) = re.findall(r"step 20: val top-1 (\d+\.\d) % \(EMA\)", output)[1:]
    evaluated = float(re.search(r"\(ema\): top-1 (\d+\.\d+) %", output)[1])
    assert evaluated == pytest.approx(float(validated), abs=0.05)
