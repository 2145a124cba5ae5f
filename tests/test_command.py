"""`tl-fast`, the command in front of the doors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tl_fast import command
from tl_fast.beton.reader import BetonReader

ROOT = Path(__file__).resolve().parent.parent
LIGHT = """
import sys
from tl_fast import command
try:
    command.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted(name for name in {heavy} if name in sys.modules))
"""


def light(heavy: tuple[str, ...], *words: str) -> list[str]:
    """The lines that a command prints, which imports none of `heavy`."""
    script = LIGHT.replace("{heavy}", repr(heavy))
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    *lines, imported = done.stdout.splitlines() or [""]
    assert done.returncode == 0 and imported.strip() == "imported:", done.stdout + done.stderr
    return lines


def test_help_has_a_line_for_each_command():
    lines = light(("numpy", "torch", "numba", "rich", "PIL"), "--help")
    assert "usage: tl-fast" in lines[0]
    for name, (_, help_line) in command.COMMANDS.items():
        assert any(line.split() == [name, *help_line.split()] for line in lines), name


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_has_its_help(name):
    lines = light(("torch", "numba", "timm", "pyarrow", "nvidia.dali"), name, "--help")
    assert f"usage: tl-fast {name}" in lines[0] and "--traceback" in "\n".join(lines)


@pytest.mark.parametrize("words", (["pack"], []), ids=("unknown", "none"))
def test_an_unknown_command_is_refused_with_the_list(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: tl-fast" in said
    assert not words or all(name in said for name in ["pack", *command.COMMANDS])


def test_convert_packs_photos_and_gives_its_exit_code(photos, tmp_path, capsys):
    out = tmp_path / "val.beton"
    assert command.main(["convert", str(photos / "val"), str(out)]) == 0
    with BetonReader(out) as reader:
        assert len(reader) == len(list((photos / "val").rglob("*.jpg")))
    assert command.main(["convert", "verify", str(out)]) == 0 and "sound" in capsys.readouterr().out
    assert command.main(["convert", str(photos / "val"), str(out)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tl-fast convert: {out} exists")


def test_mistakes_bear_the_name_that_was_typed(tmp_path, capsys):
    for words in (["show", "nowhere.beton", "--out", str(tmp_path / "x.png")], ["evaluate", "x", "--checkpoint", "no"]):
        with pytest.raises(SystemExit) as stop:
            command.main(words)
        assert stop.value.code == 1 and capsys.readouterr().err.startswith(f"tl-fast {words[0]}: ")


def test_results_are_no_exit_codes(monkeypatch):
    monkeypatch.setattr("tl_fast.evaluate.main", lambda arguments, prog: {"top1": 1.0, "arguments": arguments})
    assert command.main(["evaluate", "x"]) == 0


def test_the_installed_command_has_the_converter(betons, tmp_path):
    """In another folder, where converters/ is not. It packs too, but compiles its kernels anew there for a minute."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "tl_fast", source / "tl_fast", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", site, source], check=True, capture_output=True, text=True)
    command_line = [sys.executable, site / "bin" / "tl-fast", "convert", "info", betons / "val.beton"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "animal, fish, monument, tool" in done.stdout, done.stderr
