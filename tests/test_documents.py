"""Documents: their tables come from the rows, their lines fit, and what they name exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_rooms import MAY_IMPORT

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
EACH_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@pytest.mark.slow
def test_tables_come_from_the_rows():
    """All in one process, which imports torch once."""
    script = """
import runpy, sys
sys.path.insert(0, "benchmarks")
tables = "loaders cold segment_loaders planes_fidelity convert train choice segment_evidence summary"
for benchmark in tables.split():
    sys.argv = [benchmark] if benchmark == "choice" else [benchmark, "--table"]
    runpy.run_path(f"benchmarks/{benchmark}.py", run_name="__main__")
    print("end of a table")
"""
    command = [sys.executable, "-c", script]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    *tables, choice, evidence, summary, rest = text.split("end of a table\n")
    assert len(tables) == 6 and not rest
    for table in tables:
        assert table.count("\n|") > 4 and table in (ROOT / "docs/benchmarks.md").read_text()
    assert choice.count("\n|") == 4 and choice in (ROOT / "docs/converting.md").read_text()
    assert evidence.count("\n|") == 4 and evidence in (ROOT / "docs/segmentation.md").read_text()
    assert summary.count("\n|") == 4 and summary in (ROOT / "README.md").read_text()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@EACH_DOCUMENT
def test_lines_fit(document):
    lines = enumerate(document.read_text().splitlines(), 1)
    assert not [number for number, line in lines if len(line) > 120 and not line.lstrip().startswith("|")]


@EACH_DOCUMENT
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    assert not [link for link in links if "://" not in link and not (document.parent / link).exists()]


def missing_file(name: str, test: str) -> bool:
    return not (ROOT / name).exists() or bool(test) and f"def {test}(" not in (ROOT / name).read_text()


def missing_module(name: str) -> bool:
    """Whether `tl_fast.a.b` is neither a module nor a name that stands in the text of one."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        path = ROOT.joinpath(*parts[:length])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if source.exists():
            return length < len(parts) and not re.search(rf"\b{parts[length]}\b", source.read_text())
    return True


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_what_a_document_names_exists(document):
    """Between backticks: paths that begin with a folder of ours, tests as FILE::NAME, modules and names of tl_fast. The
    changelog names what is gone, too."""
    text = document.read_text()
    files = re.findall(r"`((?:tl_fast|converters|benchmarks|recipes|tests|docs)/[\w./-]*)(?:::(\w+))?`", text)
    assert not [(name, test) for name, test in files if missing_file(name, test)]
    assert not [name for name in re.findall(r"`(tl_fast(?:\.\w+)+)`", text) if missing_module(name)]


def test_a_missing_name_is_noticed():
    assert missing_file("tl_fast/pipeline.py", "") and missing_file("tests/test_documents.py", "test_" + "nothing")
    assert missing_module("tl_fast.warp") and missing_module("tl_fast.pipeline.loader.Lader")
    assert not missing_file("tl_fast/pipeline/", "") and not missing_module("tl_fast.pipeline.Loader")


def test_the_architecture_names_every_room_and_what_it_may_import():
    text = (ROOT / "docs/architecture.md").read_text()
    (tree,) = re.findall(r"```\n(tl_fast/\n.*?)^converters/", text, re.DOTALL | re.MULTILINE)
    rooms = [path.parent.name for path in (ROOT / "tl_fast").glob("*/**/__init__.py")]
    assert sorted(re.findall(r"^ +([a-z]+)/ ", tree, re.MULTILINE)) == sorted(rooms)
    table = re.findall(r"^\| `([a-z]+)/` \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    assert {room: set(re.findall(r"[a-z]+", allowed)) for room, allowed in table} == MAY_IMPORT


def texts() -> list[str]:
    """The texts of our code, `\0` where a value is put in."""
    everything = []
    for folder in ("tl_fast", "converters"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    everything.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    everything.append(node.value)
    return everything


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    """`...` in a message stands for what differs; the rest stands in texts of the code."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    messages = [" ".join(block.split()) for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)]
    assert len(messages) == 10
    known = "\n".join(texts())
    for message in messages:
        pieces = [piece.strip(" :") for piece in re.split(r"\.\.\.|;", message)]
        missing = [piece for piece in pieces if piece not in known]
        assert not missing, f"no text of the code reads {missing} of {message!r}"
