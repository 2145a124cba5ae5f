"""The commands' doors: --help without heavy imports, mistakes in one sentence and by one rank, tracebacks for bugs."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import pytest
from tiny_runs import ROOT, flags, torchrun

from tl_fast import evaluate, show, train
from tl_fast.system import mistakes
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks
from tl_fast.training import learner

HEAVY = ("torch", "torchvision", "timm", "numba", "nvidia.dali", "cupy", "pyarrow", "cv2", "ffcv")
COMMANDS = [  # as they are typed, without `python`
    "-m tl_fast.annotate",
    "converters/to_beton.py",
    "converters/to_beton.py verify",
    "tl_fast/train.py",
    "tl_fast/segment.py",
    "tl_fast/segment.py --evaluate",
    "-m tl_fast.evaluate",
    "-m tl_fast.show",
    "-m tl_fast.demo",
]

# Run commands with --help, one after the other in one process, and say which heavy packages that has imported.
HELP = """
import contextlib, io, json, runpy, sys
path = sys.path[:]
helps = {}
for command in map(str.split, sys.argv[1:]):
    sys.argv = [*command[command[0] == "-m":], "--help"]
    sys.path[:] = path
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            if command[0] == "-m":
                runpy.run_module(command[1], run_name="__main__")
            else:
                sys.path[0] = command[0].rpartition("/")[0]
                runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    imported = [name for name in {heavy} if name in sys.modules]
    helps[" ".join(command)] = text.getvalue(), imported
print(json.dumps(helps))
"""


def test_help_imports_nothing_heavy():
    script = HELP.replace("{heavy}", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", script, *COMMANDS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout)
    assert list(helps) == COMMANDS
    for command, (text, imported) in helps.items():
        assert text.startswith("usage:") and "--help" in text, (command, text)
        assert not imported, (command, imported)


def mistaken(main, capsys) -> tuple[int, str]:
    """How a command ends: its exit code, and what it says on stderr."""
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, code, said",
    [
        ({"train_data": "nowhere.beton"}, 1, "no beton at nowhere.beton"),
        ({"train_data": "README.md"}, 1, "README.md"),
        ({"num_classes": "10"}, 1, "has 4 classes, the model 10"),
        ({"model": "resnet_of_dreams"}, 1, "resnet_of_dreams' is not known to timm; near it: .*resnet"),
        ({"model_kwargs": "{depth: many}"}, 1, "model_kwargs .*'many'"),
        ({"batch_size": "512"}, 1, "lower the batch size"),
        ({"init_weights": "nowhere.pth"}, 1, "nowhere.pth does not exist"),
        ({"resume": "nowhere"}, 1, "nowhere does not exist"),
        ({"output_dir": "README.md"}, 1, "README.md: File exists"),
        ({"img_size": "100"}, 1, "lvvit_t at 100 px .*multiples of 16"),
        ({"img_size": "8"}, 2, "img_size must be in .*got 8"),
        ({"batch_size": "many"}, 2, "batch_size"),
        ({"bach_size": "16"}, 2, "bach_size"),
        ({"config": "nowhere.yaml"}, 2, "nowhere.yaml"),
    ],
)
def test_a_mistake_ends_training_in_one_sentence(tiny, tmp_path, capsys, monkeypatch, changes, code, said):
    monkeypatch.chdir(ROOT)
    options = [word for name, value in changes.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(tiny(), tmp_path / "c.yaml"), *options])
    status, text = mistaken(train.main, capsys)
    assert status == code and re.search(said, text) and "Traceback" not in text, text
    assert re.fullmatch(r"train\.py: .+\n", text), text


def test_tracebacks_stay_for_bugs_and_on_demand(tiny, tmp_path, monkeypatch):
    command = ["train.py", *flags(tiny(), tmp_path / "c.yaml"), "--train_data", "nowhere.beton"]
    monkeypatch.setattr(sys, "argv", [*command, "--traceback"])
    with pytest.raises(FileNotFoundError, match="nowhere.beton"):
        train.main()
    monkeypatch.setattr(sys, "argv", [*command, "--img_size", "100", "--traceback"])
    with pytest.raises(InputError, match="img_size"):
        train.main()

    def bug(*_):
        raise ValueError("of torch's, about something inside")

    monkeypatch.setattr(learner, "build_optimizer", bug)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(tiny(), tmp_path / "c.yaml")])
    with pytest.raises(ValueError, match="about something inside"):
        train.main()


def test_a_mistake_ends_evaluation_in_one_sentence(betons, tmp_path, capsys):
    beton, new = str(betons / "val.beton"), tmp_path / "new"
    new.mkdir()
    (new / "config.yaml").touch()
    (tmp_path / "weights.pth").touch()
    for arguments, code, said in (
        ([beton, "--checkpoint", "runs/nowhere"], 1, "runs/nowhere does not exist"),
        ([beton, "--checkpoint", str(new)], 1, "new is the folder of a run that has not saved a checkpoint yet"),
        ([beton, "--checkpoint", str(betons)], 1, "is neither a run's folder"),
        ([beton, "--checkpoint", str(tmp_path / "weights.pth")], 1, "weights.pth does not say which model it is"),
        ([beton], 2, "--checkpoint"),
    ):
        status, text = mistaken(functools.partial(evaluate.main, arguments), capsys)
        assert status == code and said in text and "Traceback" not in text, text
        assert code == 2 or re.fullmatch(r"python -m tl_fast\.evaluate: .+\n", text), text
    with pytest.raises(InputError, match="does not exist"):
        evaluate.main([beton, "--checkpoint", "runs/nowhere", "--traceback"])


def test_a_mistake_ends_show_in_one_sentence(betons, tmp_path, capsys):
    out = str(tmp_path / "x.png")
    for arguments, code, said in (
        (["nowhere.beton", "--out", out], 1, "no beton at nowhere.beton"),
        (["nowhere.beton"], 2, "--out are needed"),
        ([str(betons / "val.beton"), "--out", out, "--ids", "99"], 1, "sample 99 is not in"),
    ):
        status, text = mistaken(functools.partial(show.main, arguments), capsys)
        assert status == code and said in text, text
        assert code == 2 or re.fullmatch(r"python -m tl_fast\.show: .+\n", text), text
    with pytest.raises(FileNotFoundError, match="nowhere.beton"):
        show.main(["nowhere.beton", "--out", out, "--traceback"])


def test_an_error_of_the_system_begins_with_its_file():
    error = PermissionError(13, "Permission denied", "maps/part-0")
    assert mistakes.sentence(error) == "maps/part-0: Permission denied"
    assert mistakes.sentence(OSError(28, "cannot write checkpoint:\n  no space")) == "cannot write checkpoint: no space"
    assert mistakes.sentence(mistakes.share(InputError("a is wrong"), "rank 1 on b: ")) == "rank 1 on b: a is wrong"


@pytest.mark.parametrize(
    "own, others, raised, said",
    [
        (InputError("no x"), [InputError("no x")], "no x", "no x"),
        (None, [InputError("no x")], "no x", "rank 1 on host1: no x"),
        (InputError("no a"), [InputError("no b")], "no a", "rank 0 on .*: no a"),
    ],
)
def test_ranks_that_set_up_together_raise_one_mistake(own, others, raised, said):
    class Several(Ranks):
        def gather(self, value):
            return [value, *((error, f"rank {rank} on host{rank}: ") for rank, error in enumerate(others, 1))]

    def set_up():
        if own is not None:
            raise own

    with pytest.raises(InputError, match=raised) as caught:
        Several(0, 2, None).agree(set_up)
    assert mistakes.is_shared(caught.value) and re.fullmatch(said, mistakes.sentence(caught.value))


@pytest.mark.parametrize(
    "where, option, code, said",
    [
        pytest.param(
            "everywhere",
            ("--train_data", "nowhere.beton"),
            1,
            "train.py: no beton at nowhere.beton; make one with .*",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "on one rank",
            ("--train_data", "train.beton"),
            1,
            r"train.py: rank 1 on \S+: no beton at train.beton; .*",
            marks=pytest.mark.slow,
        ),
        ("on the command line", ("--img_size", "8"), 2, "train.py: img_size must be in .*"),
    ],
)
def test_of_several_ranks_one_says_it(tiny, betons, tmp_path, scattered, where, option, code, said):
    """By the real torchrun, whose own report of the failure has no traceback of ours."""
    os.symlink(betons / "train.beton", tmp_path / "node0" / "train.beton")
    run = torchrun([str(scattered), *flags(tiny(), tmp_path / "c.yaml"), *option], 2)
    assert run.returncode != 0 and "tl_fast/training/loop.py" not in run.stderr, run.stderr
    assert len(re.findall(rf"^{said}$", run.stderr, re.MULTILINE)) == 1, run.stderr
    assert run.stderr.count("no beton at" if code == 1 else "img_size must be") == 1, run.stderr
    codes = re.findall(r"exitcode +: (-?\d+)", run.stderr)  # torchrun ends the rank that waits for the other to speak
    assert str(code) in codes and set(codes) <= {str(code), "-15"}, run.stderr
