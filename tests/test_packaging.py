"""Set-up: pyproject.toml, constraints.txt and environment.yml agree, the extras divide as promised, and make bootstraps
once."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from needs import need_stock_ffcv
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
DIRECT = BASE + [requirement for group in EXTRAS.values() for requirement in group]

# conda-forge's names for what PyPI calls otherwise.
CONDA_NAMES = {"pytorch": "torch", "opencv": "opencv-python-headless"}


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def read_pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {}
    for line in filter(None, lines):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line)
        assert match, f"constraints.txt: {line!r} is not an exact pin `name==version`"
        name = canonicalize_name(match[1])
        assert name not in pins, f"constraints.txt pins {name} twice"
        pins[name] = match[2]
    return pins


PINS = read_pins()


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_pinned_within_its_range(requirement):
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin, f"{requirement.name} of pyproject.toml has no line in constraints.txt"
    assert requirement.specifier.contains(pin), (
        f"constraints.txt has {requirement.name}=={pin}, pyproject.toml asks for {requirement}"
    )
    assert any(clause.operator == ">=" for clause in requirement.specifier), f"{requirement} states no lower bound"


def test_a_training_host_needs_neither_ffcv_nor_opencv():
    assert not names(BASE) & {"ffcv", "opencv-python", "opencv-python-headless", "opencv-contrib-python"}
    assert names(EXTRAS["interop"]) == {"ffcv", "opencv-python-headless", "tqdm"}
    others = [requirement for name, group in EXTRAS.items() if name != "interop" for requirement in group]
    assert not names(others) & names(EXTRAS["interop"])


def test_set_up_installs_every_extra_but_interop_and_then_interop():
    script = (ROOT / ".ci/setup").read_text()
    (extras,) = re.findall(r"pip_install -e '\.\[([a-z,]+)\]'", script)
    assert {*extras.split(",")} == {*EXTRAS} - {"interop"}
    (interop,) = re.findall(r"pip_install --no-deps ([a-z -]+) \|\|", script)
    assert {*interop.split()} == names(EXTRAS["interop"])


def test_torch_2_11_is_within_range():
    """The newest build that many GPU hosts come with."""
    specifier = next(requirement.specifier for requirement in BASE if requirement.name == "torch")
    assert specifier.contains("2.11.0")


def environment() -> tuple[dict[str, SpecifierSet], list[str]]:
    """environment.yml's conda packages (PyPI names) with their ranges, and its pip lines."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {}
    for line in (entry for entry in listed if isinstance(entry, str)):
        name, versions = re.fullmatch(r"([a-z0-9_-]+)(.*)", line).groups()
        # conda's `=3.11` means every 3.11.x.
        conda[CONDA_NAMES.get(name, name)] = SpecifierSet(re.sub(r"^=([0-9.]+)$", r"==\1.*", versions))
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    return conda, pip


def test_environment_agrees_with_the_pins():
    conda, pip = environment()
    assert pip[-1] == "-e .", "environment.yml installs tl_fast itself last"
    installed_by_pip = [Requirement(line) for line in pip[:-1]]
    for requirement in installed_by_pip:
        assert str(requirement.specifier) == f"=={PINS[canonicalize_name(requirement.name)]}", (
            f"environment.yml: {requirement}"
        )
    for requirement in BASE:
        chosen = [
            other for other in installed_by_pip if canonicalize_name(other.name) == canonicalize_name(requirement.name)
        ]
        assert not chosen or chosen[0].extras == requirement.extras, (
            f"environment.yml: {chosen[0]} lacks the extras of {requirement}"
        )
    for requirement in DIRECT:
        name = canonicalize_name(requirement.name)
        assert (name in conda) != (name in names(installed_by_pip)), f"environment.yml lists {name} not once"
        if name in conda:
            assert conda[name].contains(PINS[name]), (
                f"environment.yml's {name}{conda[name]} refuses the pin {PINS[name]}"
            )
            assert set(requirement.specifier) <= set(conda[name]), (
                f"environment.yml's {name}{conda[name]} is wider than {requirement}"
            )
    assert {"python", "pip", "compilers", "pkg-config", "libjpeg-turbo"} <= set(conda)
    assert conda["python"].contains("3.11.7")


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="not running in .venv, which alone promises the pinned versions"
)
@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_the_pinned_version_is_installed(requirement, request):
    if requirement in EXTRAS["interop"]:
        request.getfixturevalue("stock_ffcv")
    installed = Version(importlib.metadata.version(requirement.name))
    assert installed.public == PINS[canonicalize_name(requirement.name)]


def test_python_range_is_the_same_everywhere():
    requires = SpecifierSet(PROJECT["requires-python"])
    low, high = re.search(
        r"\((\d+, \d+)\) <= sys\.version_info\[:2\] < \((\d+, \d+)\)", (ROOT / ".ci/setup").read_text()
    ).groups()
    assert requires == SpecifierSet(f">={low.replace(', ', '.')},<{high.replace(', ', '.')}")
    assert requires.contains("3.11") and requires.contains("3.12")


# --- Imports
# ---------------------------------------------------------------------------------------------------------------


def imported_packages(file: Path) -> set[str]:
    """Top-level names of the third-party packages that `file` imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "pytest.importorskip",
        ):
            if isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    own = {
        "tl_fast",
        "converters",
        "benchmarks",
        "tests",
        *(file.stem for folder in ("benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")),
    }
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - own


@functools.cache
def providers() -> Mapping[str, list[str]]:
    """What can be imported, and the distributions that it comes from: 0.1 s to find out."""
    return importlib.metadata.packages_distributions()


def source_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(
    "file", source_files("tl_fast", "converters", "benchmarks", "tests"), ids=lambda file: str(file.relative_to(ROOT))
)
def test_every_import_is_a_declared_dependency(file):
    allowed = names(DIRECT) if file.is_relative_to(ROOT / "tests") else names(DIRECT) - names(EXTRAS["test"])
    for package in imported_packages(file):
        if package in INTEROP and not importlib.util.find_spec(package):
            continue  # declared, and not installed here
        offered_by = {canonicalize_name(name) for name in providers().get(package, [])}
        assert offered_by & allowed, (
            f"{file.relative_to(ROOT)} imports {package} (from {offered_by or 'nowhere'}), undeclared"
        )


# What the import system calls the packages of the extra `interop`.
INTEROP = {"ffcv", "cv2", "tqdm"}


# Hide the extras from the import system, as if they were not installed, in a process of its own.
WITHOUT_EXTRAS = """
import importlib, importlib.machinery, sys

class WithoutExtras(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutExtras
for module in {modules}:
    importlib.import_module(module)
assert not set({hidden}) & set(sys.modules)
"""


# The modules that only stock FFCV, and that only writing and checking betons needs.
INTEROP_ONLY = {"tl_fast.beton.ffcv_field"}
CONVERT_ONLY = {"tl_fast.convert.image", "tl_fast.convert.planes", "tl_fast.sources.parquet_files"}


def import_without(hidden: set[str], modules: list[str]) -> None:
    code = WITHOUT_EXTRAS.format(hidden=sorted(hidden), modules=modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_packing_can_be_imported_without_interop():
    """So no part of the main job needs stock FFCV: the next test hides it from all other modules."""
    import_without({"ffcv", "cv2"}, [*sorted(CONVERT_ONLY), "converters.to_beton"])
    files = [file for file in source_files("tl_fast", "converters") if file.stem != "ffcv_field"]
    # tqdm comes with other packages too, and so is not hidden.
    assert not INTEROP & {package for file in files for package in imported_packages(file)}


@pytest.mark.slow
def test_a_host_without_extras_can_import_all_of_training():
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in source_files("tl_fast")]
    modules = [name.removesuffix(".__init__") for name in modules if name not in INTEROP_ONLY | CONVERT_ONLY]
    extras = names([requirement for group in EXTRAS.values() for requirement in group])
    # These come with timm and DALI too, so a training host has them.
    hidden = {
        package for package, owners in providers().items() if {canonicalize_name(name) for name in owners} & extras
    }
    hidden -= {"tqdm", "packaging", "huggingface_hub"}
    assert {"simplejpeg", "pytest", "scipy"} <= hidden
    import_without(hidden | {"ffcv", "cv2"}, modules)


# --- make and .ci/setup
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The set-up files alone in a folder of their own, so that no test can touch the project's .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "environment.yml", ".ci/setup", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def run_make(checkout: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    # As from a shell: `make test` itself hands its own variables (ARGS, PY) and flags to every make below it.
    inherited = {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS", "PY"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited} | (environment or {})
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
    )


def dry_run(checkout: Path, *arguments: str) -> str:
    done = run_make(checkout, "-n", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_sets_up_once(checkout):
    for target in ("setup", "demo", "test"):
        assert ".ci/setup" in dry_run(checkout, target), f"make {target} has to set up a fresh checkout"
    assert dry_run(checkout, "demo").index(".ci/setup") < dry_run(checkout, "demo").index("-m tl_fast.demo")

    assert "--interop" not in dry_run(checkout, "demo"), "the demo needs no stock FFCV"
    assert re.search(r"\.ci/setup\n.*\.ci/setup --interop\n.*-m pytest", dry_run(checkout, "test"), re.DOTALL)

    ready, interop = checkout / ".venv/.ready", checkout / ".venv/.interop"
    ready.parent.mkdir()
    ready.touch()
    for target in ("setup", "demo"):
        assert ".ci/setup" not in dry_run(checkout, target), f"make {target} sets up a second time"
    assert dry_run(checkout, "test").count(".ci/setup") == 1, "make test adds stock FFCV to a .venv that has none"
    interop.touch()
    assert dry_run(checkout, "test").strip() == ".venv/bin/python -m pytest -q"
    assert dry_run(checkout, "test-all").splitlines() == [
        ".venv/bin/python -m pytest -q ",
        ".venv/bin/python -m pytest -q -m 'slow or matrix' ",
    ]
    assert (
        dry_run(checkout, "demo", "ARGS=--no-token-label").strip()
        == ".venv/bin/python -m tl_fast.demo --no-token-label"
    )

    for name in ("pyproject.toml", "constraints.txt", ".ci/setup"):
        newer = ready.stat().st_mtime + 10
        os.utime(checkout / name, (newer, newer))
        assert ".ci/setup" in dry_run(checkout, "setup"), f"an edit of {name} has to bring the set-up up to date"
        os.utime(checkout / name, (0, 0))


def test_make_leaves_an_active_environment_alone(checkout):
    assert dry_run(checkout, "test", "PY=python").strip() == "python -m pytest -q"


def test_bench_without_benchmarks_says_so(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.ready").touch()
    (checkout / ".venv/.interop").touch()
    done = run_make(checkout, "bench")
    assert done.returncode != 0 and "no benchmarks/*.py" in done.stderr


def test_ci_runs_the_readmes_test_command():
    commands = [
        line
        for line in (ROOT / ".ci/run").read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    # On CI, tests against stock FFCV may not skip.
    assert commands == ["export TLFAST_REQUIRE_INTEROP=1", "make lint", "make test-all"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    readme = ROOT / "README.md"
    assert re.search(r"^\W*make test\b", readme.read_text(), re.MULTILINE), "README.md does not give `make test`"


def test_what_compiles_kernels_is_installed_with_the_package():
    """Not only with this machine's CUDA toolkit, which a training host need not have."""
    script = (
        "from numba.cuda.cuda_paths import get_cuda_paths as find; paths = find(); print(*(paths[name].info for name in"
        " ('nvrtc', 'nvvm', 'libdevice')))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert len(found) == 3 and all("site-packages/nvidia" in path for path in found), found
    assert importlib.metadata.version("nvidia-cuda-runtime")


# An interpreter whose `venv` makes a .venv of itself, and whose pip logs what it is asked for.
FAKE_PYTHON = """
case "$*" in
    "-c import ensurepip, venv") {ensurepip} ;;
    "-c import pip, venv") {pip} ;;
    *-m*venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "$*" >> pip.log ;;
    *-m*pip*) echo "$*" >> pip.log ;;
    *_base_executable*) echo "$0" ;;
    *"print("*) echo 3.11 ;;
    *sys.base_prefix*) {debians} ;;
    "-m pytest"*) echo "pytest runs" ;;
    *) exit 0 ;;
esac
"""


def fake_python(ensurepip: bool = True, pip: bool = True, debians: bool = True) -> str:
    return FAKE_PYTHON.format(**{name: "exit 0" if here else "exit 1" for name, here in locals().items()})


def put_tools(folder: Path, tools: dict[str, str]) -> None:
    """Shell scripts `tools`, by name, as executable files of `folder`."""
    folder.mkdir(parents=True)
    for name, script in tools.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


def run_setup(checkout: Path, tools: dict[str, str], *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """`.ci/setup` with a fake interpreter, which installs nothing, and the shell scripts `tools` in front of PATH."""
    shims = checkout / "shims"
    put_tools(shims, {"python": fake_python(), "g++": "exit 0"} | tools)
    path = f"{shims}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHON": str(shims / "python"), "PATH": path, "TLFAST_REQUIRE_INTEROP": ""} | variables
    command = ["bash", ".ci/setup", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


SYSTEM = ("--interop", "--system-only")
# pkg-config as it answers before and, once the file `installed` exists, after `apt-get install`.
PKG_CONFIG = "test -e installed"
APT_GET = 'echo "$*" >> apt.log; if [ "$1" = install ]; then touch installed; fi'
LOGGED = 'echo "$0 $*" >> touched.log; exit 1'
PLAIN_USER = {"id": "echo 1000"} | {name: LOGGED for name in ("apt-get", "sudo", "g++", "gcc", "cc", "pkg-config")}
APT_INSTALL = "sudo apt-get update && sudo apt-get install -y --no-install-recommends"


def test_set_up_asks_a_plain_user_for_no_compiler_and_no_apt(checkout):
    done = run_setup(checkout, PLAIN_USER)
    assert done.returncode == 0, done.stderr
    assert not (checkout / "touched.log").exists(), "set-up called a compiler, pkg-config, sudo or apt-get"
    assert (checkout / ".venv/.ready").exists() and not (checkout / ".venv/.interop").exists()
    asked = (checkout / "pip.log").read_text()
    assert "-e .[convert,annotators,test]" in asked and "ffcv" not in asked and "opencv" not in asked


def test_a_python_without_ensurepip_uses_its_own_pip(checkout):
    done = run_setup(checkout, PLAIN_USER | {"python": fake_python(ensurepip=False)})
    assert done.returncode == 0, done.stderr
    first, second, *_ = (checkout / "pip.log").read_text().splitlines()
    assert first == "-m venv --clear --without-pip .venv"
    assert second.endswith("--python .venv/bin/python install --quiet pip")


@pytest.mark.parametrize("debians", [True, False])
def test_a_python_without_ensurepip_and_pip_is_told_what_helps(checkout, debians):
    done = run_setup(checkout, PLAIN_USER | {"python": fake_python(ensurepip=False, pip=False, debians=debians)})
    assert done.returncode == 1 and not (checkout / ".venv").exists()
    for remedy in ("get-pip.py --user", "make setup PYTHON=...", "conda env create"):
        assert remedy in done.stderr
    if Path("/etc/debian_version").exists():
        assert (f"{APT_INSTALL} python3.11-venv" in done.stderr) == debians


def test_a_user_without_root_goes_on_without_stock_ffcv_and_is_told_the_commands(checkout):
    done = run_setup(checkout, {"pkg-config": "exit 1", "id": "echo 1000", "apt-get": APT_GET}, *SYSTEM)
    assert done.returncode == 0, done.stderr
    assert f"{APT_INSTALL} libopencv-dev libturbojpeg0-dev" in done.stderr
    assert "conda env create -f environment.yml && conda activate tl_fast" in done.stderr
    assert "going on without stock FFCV" in done.stdout
    assert not (checkout / "apt.log").exists() and not (checkout / ".venv").exists()


@pytest.mark.parametrize(("required", "status"), [("", 0), ("1", 2)])
def test_make_test_goes_on_where_stock_ffcv_is_impossible_and_ci_does_not(checkout, required, status):
    put_tools(checkout / "shims", PLAIN_USER)
    put_tools(checkout / ".venv/bin", {"python": fake_python()})
    (checkout / ".venv/.ready").touch()
    path = f"{checkout / 'shims'}:{os.environ['PATH']}"
    done = run_make(checkout, "test", environment={"PATH": path, "TLFAST_REQUIRE_INTEROP": required})
    assert done.returncode == status, done.stderr
    assert ("pytest runs" in done.stdout) == (status == 0)
    assert "system packages are missing: libopencv-dev" in done.stderr and not (checkout / ".venv/.interop").exists()


def test_stock_ffcv_is_added_where_it_can_be_compiled(checkout):
    put_tools(checkout / ".venv/bin", {"python": fake_python()})
    (checkout / ".venv/.ready").touch()
    done = run_setup(checkout, {"pkg-config": "exit 0"}, "--interop")
    assert done.returncode == 0, done.stderr
    assert "--no-deps opencv-python-headless tqdm ffcv" in (checkout / "pip.log").read_text()
    assert (checkout / ".venv/.interop").exists()


def test_root_gets_the_missing_packages_installed(checkout):
    done = run_setup(checkout, {"pkg-config": PKG_CONFIG, "id": "echo 0", "apt-get": APT_GET}, *SYSTEM)
    assert done.returncode == 0, done.stderr
    update, install = (checkout / "apt.log").read_text().splitlines()
    assert update.startswith("update") and install.startswith("install -y --no-install-recommends")
    assert install.endswith(" libopencv-dev libturbojpeg0-dev")


def test_ci_stops_where_apt_fails(checkout):
    tools = {"pkg-config": PKG_CONFIG, "id": "echo 0", "apt-get": "exit 100"}
    done = run_setup(checkout, tools, *SYSTEM, TLFAST_REQUIRE_INTEROP="1")
    assert done.returncode == 1
    for word in ("libopencv-dev", "conda env create", "TLFAST_REQUIRE_INTEROP"):
        assert word in done.stderr


def test_nothing_is_installed_when_nothing_is_missing(checkout):
    (checkout / "installed").touch()
    done = run_setup(checkout, {"pkg-config": PKG_CONFIG, "id": "echo 0", "apt-get": APT_GET}, *SYSTEM)
    assert done.returncode == 0, done.stderr
    assert not (checkout / "apt.log").exists()


def test_tests_of_stock_ffcv_skip_with_the_command_and_fail_on_ci(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for required, outcome in (("", pytest.skip.Exception), ("1", pytest.fail.Exception)):
        monkeypatch.setenv("TLFAST_REQUIRE_INTEROP", required)
        with pytest.raises(outcome, match="stock FFCV is not set up.*`bash .ci/setup --interop`"):
            need_stock_ffcv()


def test_an_unusable_python_is_named(checkout):
    done = run_setup(checkout, {"python3.10": "exit 1"}, PYTHON="python3.10")
    assert done.returncode == 1
    assert "PYTHON=python3.10" in done.stderr and "3.11" in done.stderr
