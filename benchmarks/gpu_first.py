"""Does this machine have what the other GPU benchmarks need? An answer within a minute, without DALI, ffcv or
jsonargparse.

    python benchmarks/gpu_first.py

Versions and where libNVVM lies; one kernel of ours compiled and compared with its CPU twin; one small compiled training
step compared with the same step run eagerly; the bandwidth of a device copy. A part that fails is named and does not
stop the next. Rows go to benchmarks/results/gpu/rows.jsonl.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpu_rows import NO_DEVICE, PACKAGES, milliseconds, parser, write_row
from rows import version

COPY_BYTES = 1 << 30


def facts() -> dict[str, object]:
    """What is installed, and what the machine is."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        card = "nvidia-smi is not there"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "triton": version("triton"),
        "torch's CUDA": torch.version.cuda,
        "torch's cuDNN": torch.backends.cudnn.version(),
        "card": card,
        "capability": capability,
        "cores": len(os.sched_getaffinity(0)),
        "CUDA_HOME": os.environ.get("CUDA_HOME"),
        "libNVVM": libnvvm(),
    }


def libnvvm() -> str | None:
    """Where libNVVM is, which numba's CUDA target compiles with: CUDA_HOME's, else that of pip's nvidia-nvvm."""
    folders = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    packages = importlib.util.find_spec("nvidia")
    folders += [Path(place) / "cu13" for place in (packages.submodule_search_locations or [])] if packages else []
    found = [file for folder in folders for file in sorted(folder.glob("**/libnvvm.so*"))]
    return str(found[0]) if found else None


def kernel_differs_by(device: torch.device) -> float:
    """The largest difference between token targets of the kernel and of its CPU twin, on four maps of 100 classes."""
    from tl_fast.kernels import cpu, cuda
    from tl_fast.labelmaps.format import MapSpec, encode, pack, unpack
    from tl_fast.plan import records
    from tl_fast.plan.boxes import map_affines

    spec, grid, batch = MapSpec(k=5, height=9, width=9, num_classes=100), 7, 4
    rng = np.random.default_rng(0)
    classes = np.argsort(rng.random((batch, spec.num_classes, 9, 9)), axis=1)[:, : spec.k].astype(np.uint16)
    packed = [pack(label_map, rng.uniform(0, 12, spec.shape).astype(np.float32), spec) for label_map in classes]
    maps = [np.frombuffer(encode(record, spec), np.uint8) for record in packed]
    ranges = np.array([(record["score_min"], record["score_step"]) for record in packed], np.float32)
    sizes = np.full(batch, 375), np.full(batch, 500)
    affines = map_affines(records.draw(0, 0, np.arange(batch), *sizes, records.Augment()), *sizes, "full", "correct")

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    out = torch.full((batch, 1 + grid**2, spec.num_classes), float("nan"), device=device)
    errors = torch.zeros(batch, dtype=torch.int32, device=device)
    ends = np.cumsum([0] + [len(label_map) for label_map in maps]).astype(np.int64)
    bounds = np.stack([ends[:-1], ends[1:]], axis=1)
    tensors = (put(np.concatenate(maps)), put(bounds), put(ranges), put(affines))
    cuda.packed_targets(*tensors, spec, grid, 0.1, False, out, errors)
    read = [unpack(record, spec) for record in packed]
    classes, scores = (np.ascontiguousarray(np.stack(arrays)) for arrays in zip(*read, strict=True))
    expected = cpu.warped_targets(classes, scores, affines, spec.num_classes, grid, 0.1, cut=False)
    if errors.any():
        raise RuntimeError(f"the kernel calls sound maps damaged: codes {errors.tolist()}")
    return float(np.abs(out.cpu().numpy() - expected).max())  # NaN where a target was not written


def step_differs_by(device: torch.device) -> tuple[float, float]:
    """The largest difference between the gradients of a compiled and an eager step of a network with two blocks,
    relative to the largest gradient, in float32; and the seconds that the compiled one's first call took."""
    from tl_fast.models.build import build_model
    from tl_fast.models.loss import TokenLabelLoss
    from tl_fast.models.normalise import Normalise
    from tl_fast.models.step import TrainStep, compiled

    torch.manual_seed(0)
    size, grid, classes, batch = 64, 4, 10, 8
    options = {"embed_dim": 64, "depth": 2, "num_heads": 2, "stem_width": 16}
    model = build_model("lvvit_t", img_size=size, num_classes=classes, options=options)
    model.to(device)
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).to(device)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    targets = torch.rand((batch, 1 + grid**2, classes), device=device).softmax(2)
    gradients, seconds = [], 0.0
    for compile_it in (False, True):
        own = copy.deepcopy(model).train()
        step = TrainStep(own, TokenLabelLoss(1.0, 0.5), normalise, "float32")
        begin = time.perf_counter()
        loss, _ = (compiled(step, device) if compile_it else step)(images, targets)
        loss.backward()
        gradients.append(torch.cat([weight.grad.reshape(-1) for weight in own.parameters()]).cpu())
        seconds = time.perf_counter() - begin
    eager, fast = gradients
    return float((fast - eager).abs().max() / eager.abs().max()), seconds


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    arguments = options.parse_args()
    for name, value in facts().items():
        print(f"{name}: {value}", flush=True)
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    failed: list[str] = []

    def part(name: str, run: Callable[[], tuple[float, str, dict]]) -> None:
        """A row of a figure, its unit and further columns; a part that fails is named."""
        begin = time.perf_counter()
        try:
            value, unit, columns = run()
        except Exception as error:  # whatever it is, the other parts say more about it
            print(f"{name}: FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            failed.append(name)
            return
        seconds = round(time.perf_counter() - begin, 1)
        write_row(arguments.results, "first", name, [value], unit, seconds=seconds, **columns)

    def kernel() -> tuple[float, str, dict]:
        difference = kernel_differs_by(device)
        if not difference <= 1e-4:
            raise ArithmeticError(f"the kernel differs from its CPU twin by {difference}")
        return difference, "", {}

    def step() -> tuple[float, str, dict]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        difference, seconds = step_differs_by(device)
        if not difference <= 1e-3:
            raise ArithmeticError(f"the compiled step's gradients differ from the eager one's by {difference:.1%}")
        return difference, "", {"compile_seconds": round(seconds, 1)}

    def bandwidth() -> tuple[float, str, dict]:
        source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = milliseconds(lambda _: target.copy_(source), 1)
        return 2 * COPY_BYTES / float(np.median(times)) / 1e6, "GB/s", {}

    part("device copy, 1 GiB", bandwidth)
    part("token targets: largest difference from the CPU's", kernel)
    part("compiled step: largest difference from eager", step)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
