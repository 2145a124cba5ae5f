"""What limits a compiled training step on a GPU, and what each of the step's switches gains there.

    python benchmarks/gpu_profile.py [--batches 128 256]      a profile of the step
    python benchmarks/gpu_profile.py --sweep [SWITCH ...]     images/s with each switch, and with all of them

The profile has milliseconds a step by kind of kernel, launches a step, the host's milliseconds to launch it, and
TFLOP/s beside those of a large matrix product on the same card. A kernel's kind is read from its name. Inductor fuses
across kinds and names a kernel after what it fuses, so "loss" and "norm" hold some elementwise work and the reverse.

Kinds that memory limits have GB and GB/s, beside those of a large copy on the same card. Inductor estimates what its
kernels move: every input and output once, so caches can take a rate above the copy's. The profiler states what a copy
moves, and the optimiser's bytes follow from the weights. No other kernel states its bytes; the figures then cover a
part of the kind's time, which is said, or the bytes are unknown.

Kernels that change a layout are listed, with those of inductor's that stand beside a convolution and may hold a change:
where there are none, channels-last reaches the stem's projection without a copy.

Every contender runs in a process of its own, so that one that fails costs its own row alone. Rows go to
benchmarks/results/gpu/rows.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu_rows import milliseconds, need_gpu, parser, write_row
from torch import nn
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from tl_fast.system.ranks import Ranks
from tl_fast.training.classification import Classification
from tl_fast.training.config import TrainConfig
from tl_fast.training.learner import build_learner
from tl_fast.training.network import build_step

# The first pattern found in a kernel's name says its kind. Names of CUDA kernels, and of torch's operators for the CPU.
# Inductor's own kernels (FUSED) are named after what they stand beside: one with "convolution" in its name casts or
# adds a bias.
FUSED = r"^(?!triton_(poi|red|per)_).*"
KINDS = (
    ("GEMM", r"^triton_tem_.*mm"),
    ("copies", r"^mem(cpy|set)|nchwToNhwc|nhwcToNchw|convertTensor|aten::(copy_|_to_copy|contiguous|clone)$"),
    ("attention", FUSED + r"(flash|fmha|sdpa|attention|mha_)"),
    ("loss", r"softmax|cross_entropy|nll_loss"),
    ("optimiser", r"multi_tensor_apply|adam|foreach|lerp"),
    ("norm", r"layer_norm|batch_norm|bn_(fw|bw)|layernorm|batchnorm"),
    ("convolution", FUSED + r"(conv|fprop|wgrad|dgrad)"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|splitk|::(addmm|mm|bmm|baddbmm|linear)$"),
    ("elementwise", r"^triton_|elementwise|reduce_kernel|distribution|aten::"),
)
# Changes of layout, and inductor's kernels that may hold one.
LAYOUT = r"nchwToNhwc|nhwcToNchw|convertTensor|convert_layout|transpose|permute|^triton_(poi|red|per)_.*convolution"
PRODUCTS = ("GEMM", "attention", "convolution")
MEMORY_BOUND = ("elementwise", "norm", "loss", "optimiser", "copies")
# With this in the environment inductor notes in each kernel how many GB it moves, and tells the profiler when it
# launches one.
STATE_BYTES = {"TORCHINDUCTOR_BENCHMARK_KERNEL": "1"}
MODEL, SIZE, CLASSES = "lvvit_s", 224, 1000
WARM_UP, PROFILED, ROUNDS, STEPS = 8, 5, 5, 20  # steps, steps, groups of steps, steps a group
SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    # Those that do not exclude one another, together.
    "all": {
        "stem_space_to_depth": True,
        "residual_dtype": "bfloat16",
        "drop_path_batched": True,
        "gelu": "tanh",
        "targets_dtype": "bfloat16",
        "compile_mode": "max-autotune-no-cudagraphs",
    },
    "stem_space_to_depth": {"stem_space_to_depth": True},
    "residual_dtype bfloat16": {"residual_dtype": "bfloat16"},
    "drop_path_batched": {"drop_path_batched": True},
    "attention_backend flash": {"attention_backend": "flash"},
    "attention_backend cudnn": {"attention_backend": "cudnn"},
    "attention_backend efficient": {"attention_backend": "efficient"},
    "gelu tanh": {"gelu": "tanh"},
    "targets_dtype bfloat16": {"targets_dtype": "bfloat16"},
    "compile_mode max-autotune-no-cudagraphs": {"compile_mode": "max-autotune-no-cudagraphs"},
    "compile_mode reduce-overhead": {"compile_mode": "reduce-overhead"},
}


def kind_of(kernel: str) -> str:
    """GEMM, attention, convolution, norm, elementwise, loss, optimiser, copies or other."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")


class Step:
    """One rank's training step as the training loop makes it, on one synthetic batch that stays on the device.

    switches: fields of TrainConfig besides model, size and batch.
    """

    def __init__(self, device: torch.device, batch: int, classes: int = CLASSES, **switches: Any) -> None:
        common = {"model": MODEL, "img_size": SIZE, "min_lr": 0.0, "warmup_lr": 0.0} | switches
        self.config = TrainConfig(train_data="none", batch_size=batch, num_classes=classes, **common)
        self.ranks = Ranks(0, 1, device)
        task = Classification(self.config, self.ranks)
        self.learner, _ = build_learner(task, 1000, load_init_weights=False)
        self.network = task.build_step(self.learner.model)
        self.learner.schedule.step_update(500)  # before, the learning rate is 0
        task.set_train(self.learner.model)
        size, tokens = self.config.img_size, math.prod(self.learner.model.grid_size)
        targets = torch.rand((batch, 1 + tokens, classes), device=device).softmax(2)
        boxes = torch.zeros((batch, 4), dtype=torch.int32, device=device)
        boxes[::4] = size // 3  # every fourth image is erased, as the recipe has it
        self.arguments = (
            torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device),
            targets.to(getattr(torch, self.config.targets_dtype)),
            torch.tensor([2, 2, 4, 4], dtype=torch.int32, device=device),
            None,
            boxes,
            torch.arange(batch, device=device),
        )
        self.number = 0

    def __call__(self) -> None:
        model, optimizer, ema = self.learner.model, self.learner.optimizer, self.learner.ema
        loss, _ = self.network(*self.arguments)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), self.config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, step=self.number + 2)
        self.number += 1

    def flops(self) -> int:
        """FLOPs of the matrix products of a forward and backward pass, attention and convolutions included, and what
        drop path skips. Counted with two images in an eager step."""
        eager = build_step(self.learner.model, dataclasses.replace(self.config, compile=False), self.ranks)
        images, targets, box, truth, boxes, noise = self.arguments
        with FlopCounterMode(display=False) as counter:
            eager(images[:2], targets[:2], box, truth, boxes[:2], noise[:2])[0].backward()
        self.learner.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops() * len(images) // 2

    def optimiser_bytes(self) -> int:
        """Bytes that clipping, AdamW and the moving average read and write; each does so in kernels of its own."""
        weights = sum(weight.nbytes for weight in self.learner.model.parameters() if weight.requires_grad)
        values = self.learner.ema.module.state_dict().values()
        averaged = sum(value.nbytes for value in values if value.is_floating_point())
        # Clipping reads the gradients for their norm, then reads and writes them. AdamW reads the weights, the
        # gradients and two moments, and writes all but the gradients. The average is read with the weights, and
        # written.
        return 3 * weights + 7 * weights + 3 * averaged


def copied_bytes(event: Any) -> int:
    """Bytes that a profiler's event of a copy or fill reads and writes in the device's memory; 0 for other events, and
    where the profiler does not say."""
    # Torch 2.11 has the text alone, and 2.13 warns when it is asked for.
    if hasattr(event, "event_metadata"):
        size = event.event_metadata.bytes if event.event_metadata else None
    else:
        stated = re.search(r'"bytes": *(\d+)', event.metadata_json or "")
        size = int(stated[1]) if stated else None
    return (size or 0) * (2 if "DtoD" in event.name else 1)


def moved(micros: dict[str, float], stated: dict[str, float], steps: int, optimiser_bytes: int) -> dict[str, Any]:
    """GB a step and GB/s of each kind in MEMORY_BOUND that has kernels, with the share of its time that they cover;
    None for a kind of whose kernels no bytes are known.

    micros, stated: microseconds and bytes by kernel, of all steps; optimiser_bytes: of one, 0 where unknown.
    """
    kinds: dict[str, Any] = {}
    for kind in MEMORY_BOUND:
        times = {name: time_of_kernel for name, time_of_kernel in micros.items() if kind_of(name) == kind}
        if not times:
            continue
        known = [name for name in times if stated.get(name)]
        size, seconds = sum(stated[name] for name in known), sum(times[name] for name in known) / 1e6
        if kind == "optimiser" and optimiser_bytes:
            size, seconds = optimiser_bytes * steps, sum(times.values()) / 1e6
        kinds[kind] = None
        if size and seconds:
            share = round(1e6 * seconds / sum(times.values()), 3)
            kinds[kind] = {"gb": round(size / steps / 1e9, 4), "gb_s": round(size / seconds / 1e9, 1), "share": share}
    return kinds


def profiled(
    step: Callable[[], None], device: torch.device, steps: int = PROFILED, optimiser_bytes: int = 0
) -> dict[str, Any]:
    """`summary` of so many steps."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # Without record_shapes the profiler drops what inductor states of its kernels.
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    return summary(profile.events(), on_gpu, steps, optimiser_bytes)


def summary(events: Iterable[Any], on_gpu: bool, steps: int, optimiser_bytes: int) -> dict[str, Any]:
    """Milliseconds a step by kind, what `moved` says of the kinds, launches a step, the ten kernels that take longest
    and those that change layouts.

    On the CPU kernels are torch's operators, each without those that it calls.
    """
    micros: Counter[str] = Counter()
    stated: Counter[str] = Counter()
    launches = 0
    for event in events:
        # Inductor states a kernel's bytes with the host's event of the launch, which has the kernel's name.
        stated[event.name] += 1e9 * (event.kwinputs or {}).get("kernel_num_gb", 0.0)
        # An annotation spans kernels that are counted by themselves.
        if (event.device_type == torch.autograd.DeviceType.CUDA) != on_gpu or event.is_user_annotation:
            continue
        micros[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        stated[event.name] += copied_bytes(event)
        launches += 1
    kinds: Counter[str] = Counter()
    for name, time_of_kernel in micros.items():
        kinds[kind_of(name)] += time_of_kernel

    def rounded(times: list[tuple[str, float]]) -> dict[str, float]:
        return {name[:120]: round(value / steps / 1e3, 4) for name, value in times if value > 0}

    layouts = [(name, value) for name, value in micros.most_common() if re.search(LAYOUT, name, re.IGNORECASE)]
    return {
        "kinds": rounded(kinds.most_common()),
        "moved": moved(micros, stated, steps, optimiser_bytes),
        "launches": launches / steps,
        "longest": rounded(micros.most_common(10)),
        "layout_changes": rounded(layouts[:10]),
    }


def host_milliseconds(step: Callable[[], None], device: torch.device, steps: int = PROFILED) -> float:
    """What launching a step takes the host while the device has nothing else to do."""
    times = []
    for _ in range(steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[steps // 2]


def rates(step: Callable[[], None], batch: int, device: torch.device, rounds: int, steps: int) -> list[float]:
    """Images/s of groups of steps."""
    values = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        values.append(batch * steps / (time.perf_counter() - begin))
    return values


def peaks(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large bfloat16 matrix product, and GB/s of a copy that reads and writes a gibibyte."""
    side, size = 8192, 1 << 30
    a, b = (torch.randn((side, side), dtype=torch.bfloat16, device=device) for _ in range(2))
    product = sorted(milliseconds(lambda _: a @ b, 1, repeats=20))[10]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = sorted(milliseconds(lambda _: target.copy_(source), 1, repeats=20))[10]
    return {"peak_tflops": round(2 * side**3 / product / 1e9, 1), "copy_gb_s": round(2 * size / copied / 1e6, 1)}


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """A contender's figures, in its own process: images/s, and with `profile` all else that a profile says."""
    device = torch.device("cuda", torch.cuda.current_device())
    batch = options["batch"]
    step = Step(device, batch, **options["switches"])
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    figures = {"warm_up_seconds": round(time.perf_counter() - begin, 1)}
    figures["rates"] = rates(step, batch, device, ROUNDS, STEPS)
    figures["memory_mb"] = torch.cuda.max_memory_allocated() >> 20
    if options["profile"]:
        figures |= profiled(step, device, optimiser_bytes=step.optimiser_bytes()) | peaks(device)
        figures["host_ms"] = round(host_milliseconds(step, device), 3)
        figures["flops"] = step.flops()
    return figures


def contend(name: str, options: dict[str, Any], limit: float) -> dict[str, Any] | None:
    """`measure` in a process of its own; None, and the reason said, where that fails."""
    command = [sys.executable, __file__, "--worker", json.dumps(options)]
    environment = os.environ | (STATE_BYTES if options["profile"] else {})
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{name}: FAILED: not done after {limit:.0f} s", flush=True)
        return None
    if done.returncode:
        print(f"{name}: FAILED with status {done.returncode}; see above", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--batches", type=int, nargs="+", default=[128, 256], help="images a step; a sweep takes the last"
    )
    options.add_argument("--sweep", nargs="*", choices=list(SWITCHES), metavar="SWITCH", help="none named: all")
    options.add_argument("--limit", type=float, default=180, help="seconds a contender")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.worker:
        print(json.dumps(measure(json.loads(arguments.worker))))
        return
    need_gpu()
    failed = False
    if arguments.sweep is None:
        contenders = [("compiled step", {}, batch, True) for batch in arguments.batches]
    else:
        names = arguments.sweep or list(SWITCHES)
        contenders = [(name, SWITCHES[name], arguments.batches[-1], False) for name in names]
    for name, switches, batch, profile in contenders:
        label = f"{name}, {MODEL} {SIZE}, batch {batch}"
        figures = contend(label, {"switches": switches, "batch": batch, "profile": profile}, arguments.limit)
        if figures is None:
            failed = True
            continue
        benchmark = "profile" if profile else "sweep"
        values = figures.pop("rates")
        row = write_row(arguments.results, benchmark, label, values, "images/s", switches=switches, **figures)
        if profile:
            show(row, batch)
    sys.exit(failed)


def said_of_bytes(kind: str, row: dict[str, Any]) -> str:
    """What a profile's table says of the bytes of a kind."""
    if kind not in row["moved"]:
        return ""
    figures = row["moved"][kind]
    if figures is None:
        return ", bytes unknown"
    rate = f"{figures['gb_s']:,.0f} GB/s, {figures['gb_s'] / row['copy_gb_s']:.0%} of a copy's"
    part = "" if figures["share"] > 0.995 else f" (known for {figures['share']:.0%} of its time)"
    return f", {figures['gb']:.2f} GB at {rate}{part}"


def show(row: dict[str, Any], batch: int) -> None:
    """Print a profile's table."""
    step_ms, kinds = 1e3 * batch / row["median"], row["kinds"]
    for kind, ms in kinds.items():
        print(f"  {kind:12} {ms:8.3f} ms  {ms / step_ms:6.1%} of the step{said_of_bytes(kind, row)}")
    idle = step_ms - sum(kinds.values())
    print(f"  {'no kernel':12} {idle:8.3f} ms  {idle / step_ms:6.1%} (below 0: kernels overlap)")
    products = sum(kinds.get(kind, 0.0) for kind in PRODUCTS)
    tflops = row["flops"] / 1e9
    print(
        f"  {row['launches']:.0f} launches a step, {row['host_ms']:.1f} ms of the host to launch them; "
        f"{tflops / step_ms:.0f} TFLOP/s, {tflops / max(products, 1e-9):.0f} during products; "
        f"a large product {row['peak_tflops']:.0f} TFLOP/s, a copy {row['copy_gb_s']:,.0f} GB/s"
    )
    for name, ms in row["longest"].items():
        print(f"  {ms:8.3f} ms  {name}")
    changes = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row["layout_changes"].items())
    print(f"  changes of layout, or kernels that may hold one: {changes or 'none'}", flush=True)


if __name__ == "__main__":
    main()
