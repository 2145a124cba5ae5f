"""The house itself: which room may import which, and what every room offers (docs/architecture.md)."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tl_fast.maths.compile import COMPILED

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tl_fast"
DOORS = {"annotate", "train", "segment", "evaluate", "show", "demo", "command"}

# Bottom floor first. A room may import what stands here, and nothing else of ours.
MAY_IMPORT = {
    "system": set(),
    "maths": set(),
    "jpeg": {"maths"},
    "sources": {"jpeg", "system"},
    "plan": {"maths", "system"},
    "models": {"system"},
    "labelmaps": {"sources", "maths", "system"},
    "masks": {"sources", "maths", "system"},
    "beton": {"labelmaps", "masks", "jpeg", "sources", "system"},
    "kernels": {"plan", "labelmaps", "maths", "system"},
    "pipeline": {"beton", "kernels", "plan", "jpeg", "masks", "sources", "maths", "system"},
    "convert": {"beton", "labelmaps", "masks", "jpeg", "sources", "system"},
    "training": {"pipeline", "models", "beton", "masks", "plan", "sources", "system"},
    "annotation": {"training", "labelmaps", "sources", "models", "beton", "system"},
    "pictures": {"pipeline", "training", "models", "beton", "masks", "plan", "sources", "maths", "system"},
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in its text: within functions too."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports are not used here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in MODULES}


GRAPH = {module: imports(module) for module in MODULES}


def room_of(module: str) -> str:
    """The room of a module; '' for the package itself and for doors."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def test_every_room_is_in_the_table():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    assert folders == set(MAY_IMPORT)


def test_the_table_itself_has_no_circle():
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert set(order) == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_the_table_allows(room):
    for module in (module for module in MODULES if room_of(module) == room):
        rooms = {room_of(name) for name in GRAPH[module] if name != "tl_fast"}
        assert rooms <= MAY_IMPORT[room] | {room}, f"{module} imports {sorted(rooms - MAY_IMPORT[room] - {room})}"


def test_nobody_imports_a_door():
    doors = {f"tl_fast.{door}" for door in DOORS}
    assert not [(module, name) for module in MODULES for name in GRAPH[module] & doors if module != "tl_fast.command"]


def test_no_modules_import_each_other():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_the_package_has_few_files_beside_its_rooms():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files <= DOORS | {"__init__"} and len(files) <= 8


def test_no_room_or_module_hides_a_package_from_a_script():
    """`torchrun tl_fast/train.py` puts tl_fast/ first on sys.path."""
    names = {module.split(".")[1] for module in MODULES if "." in module}
    packages = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert not names & packages


@pytest.mark.parametrize("room", [module for module, path in MODULES.items() if path.name == "__init__.py"])
def test_a_room_says_what_it_is_and_what_it_offers(room):
    if room == "tl_fast.convert":
        pytest.importorskip("simplejpeg")
    module = importlib.import_module(room)
    assert ast.get_docstring(ast.parse(MODULES[room].read_text()))
    assert isinstance(module.__all__, list) and set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert f"{room}.{name}" not in MODULES, "a name that is a module's too: which one it gives depends on the order"
        assert getattr(module, name).__module__.startswith(room), f"{room} offers {name} of another room"


# Statements, and what each may import of the packages that take long to import or need not be installed. A process
# runs one list in its order, so that a statement may import what those before it may.
READING = {
    "import tl_fast, tl_fast.beton, tl_fast.plan, tl_fast.pipeline": set(),
    "from tl_fast.beton import BetonReader; reader = BetonReader({beton!r})": {"numpy"},
    "reader.check(3); reader.label_maps([0, 3]); reader.image(3)": {"numba", "scipy"},  # scipy: numba imports it
}
CONVERTING = {
    "import tl_fast.sources.image": {"numpy", "PIL"},
    "import tl_fast.convert.image": {"numba", "scipy", "simplejpeg"},
}
HEAVY = {"numpy", "PIL", "numba", "simplejpeg", "torch", "torchvision", "timm", "nvidia", "ffcv", "cv2", "scipy"}


@pytest.mark.parametrize("allowed", [READING, CONVERTING], ids=["reading", "converting"])
def test_what_is_imported_early_imports_little(betons, allowed):
    if allowed is CONVERTING:
        pytest.importorskip("simplejpeg")
    statements = [statement.format(beton=str(betons / "train.beton")) for statement in allowed]
    code = f"import sys\nfor line in {statements}:\n    exec(line); print('imported', *{HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    so_far = set()
    for (statement, more), line in zip(allowed.items(), done.stdout.splitlines(), strict=True):
        so_far |= more
        imported = set(line.split()) - {"imported"}
        assert imported <= so_far, f"{statement} imports {imported - so_far}"


def compiles(module: str) -> bool:
    """Whether a module compiles functions: by njit, cuda.jit, compile_scalar or an intrinsic."""
    return bool(re.search(r"@(njit|intrinsic|cuda\.jit)|compile_scalar\(", MODULES[module].read_text()))


def test_what_is_compiled_lies_where_the_cache_looks():
    """Kernels are kept on disk under the content of these rooms; functions compiled elsewhere would be served stale."""
    compiling = [module for module in MODULES if compiles(module)]
    assert {"tl_fast.kernels.cpu", "tl_fast.maths.memory", "tl_fast.plan.records"} <= set(compiling)
    for module in compiling:
        called = {room_of(name) for name in {module} | GRAPH[module]} - {""}
        assert called <= set(COMPILED), f"{module} compiles; it and what it imports must lie in the rooms {COMPILED}"


def test_a_wheel_holds_every_module(tmp_path):
    source = tmp_path / "source"  # a build leaves folders, which a later one would pack
    shutil.copytree(PACKAGE, source / "tl_fast", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("tl_fast-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".py", ".csv"))}
    assert packed == {str(path.relative_to(ROOT)) for path in [*MODULES.values(), *PACKAGE.rglob("*.csv")]}
