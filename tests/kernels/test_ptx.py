"""Every CUDA kernel compiles for sm_80, sm_90 and sm_90a without a GPU: no double precision, no local memory, and
docs/kernels.md says what it takes."""

import re
import shutil

import pytest

from tests import kernel_figures
from tl_fast.kernels.cuda_device import SIMULATED

LAUNCHED = ("images: geometry", "images: colours", "masks", "targets: bytes, float32")

pytestmark = pytest.mark.skipif(SIMULATED, reason="NUMBA_ENABLE_CUDASIM is set: nothing is compiled")
CASES = [(name, architecture) for architecture in kernel_figures.ARCHITECTURES for name in kernel_figures.KERNELS]
SLACK = 8  # registers more than the table says, as another compiler may take


@pytest.mark.parametrize(
    "name, architecture",
    [
        # Every time what the loader launches, for the newest architecture.
        pytest.param(
            name,
            architecture,
            id=f"{name}, {kernel_figures.target(architecture)}",
            marks=() if architecture == CASES[-1][1] and name in LAUNCHED else pytest.mark.slow,
        )
        for name, architecture in CASES
    ],
)
def test_kernel_compiles_lean(name, architecture, tmp_path):
    text = kernel_figures.ptx(name, architecture)
    assert f".target {kernel_figures.target(architecture)}\n" in text and ".visible .entry" in text
    doubles = [line.strip() for line in text.splitlines() if re.search(r"\.f64\b", line)]
    assert not doubles, doubles[:3]
    assert not re.search(r"^\s*\.local", text, re.M), "local memory"
    assert not re.search(r"^\s*call", text, re.M), "a device function that was not inlined"
    if name.startswith("targets"):
        assert re.search(r"st\.global\.v4\.[fub]32", text) and "ld.shared.v4.f32" in text, (
            "rows are written 16 bytes at a time"
        )
    if not shutil.which("ptxas"):
        pytest.skip("PTX checked; ptxas, for registers and spills, is not on PATH (it comes with the CUDA toolkit)")
    figures = kernel_figures.assemble(text, architecture, tmp_path)
    assert figures["spilled"] == figures["stack"] == 0, figures
    (row,) = [row for row in kernel_figures.table() if row[:2] == (name, kernel_figures.target(architecture))]
    assert abs(figures["registers"] - row[2]) <= SLACK and abs(figures["shared"] - row[3]) <= 256, (
        f"docs/kernels.md has {row}, ptxas {figures}: run python -m tests.kernel_figures"
    )
    bounds = kernel_figures.KERNELS[name].bounds
    assert kernel_figures.occupancy(figures["registers"], bounds[0]) >= bounds[1]


def test_the_table_lists_every_kernel():
    assert sorted(row[:2] for row in kernel_figures.table()) == sorted(
        (name, kernel_figures.target(architecture)) for name, architecture in CASES
    )
