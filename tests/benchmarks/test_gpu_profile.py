"""benchmarks/gpu_profile.py: kinds of kernels by their names, the profile of a small step on the CPU, the sweep."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._profiler import _RecordFunctionFast

from tl_fast.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "GEMM": (
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNT",
        "cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "triton_tem_fused_addmm_12",
        "aten::addmm",
        "aten::mm",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x64_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
    "convolution": (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64",
        "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc",
        "aten::mkldnn_convolution",
    ),
    "norm": (
        "triton_per_fused__to_copy_native_layer_norm_3",
        "triton_red_fused_native_layer_norm_backward_12",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
        "triton_red_fused__native_batch_norm_legit_functional_1",
        "aten::native_layer_norm",
    ),
    "loss": ("triton_red_fused__log_softmax_mul_sum_40", "aten::_log_softmax_backward_data"),
    "optimiser": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
        "aten::_foreach_lerp_",
    ),
    "copies": (
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>",
        "void cudnn::ops::convertTensor_kernel<float, __nv_bfloat16>",
        "aten::copy_",
    ),
    "elementwise": (
        "triton_poi_fused_gelu_7",
        "triton_red_fused_add_sum_3",
        "triton_poi_fused__to_copy_convolution_0",
        "triton_poi_fused__scaled_dot_product_flash_attention_7",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>",
        "aten::gelu",
    ),
    "other": ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "radixSortKVInPlace"),
}

# Prints the Triton kernels of a compiled function, and the GB that each states, as JSON. Inductor can write them for
# the CPU, without Triton but for a hash of its version; nothing compiles or runs them here.
TRITON_CODE = """
import json, re, torch, torch.utils._triton
import torch.nn.functional as F
from torch._inductor import config
from torch._inductor.utils import get_code

torch.utils._triton.triton_hash_with_backend = lambda: "none"
config.cpu_backend, config.force_disable_caches, config.compile_threads = "triton", True, 1
compiled = torch.compile(lambda images, weight: F.layer_norm(F.gelu(images) @ weight, (64,)))
code = get_code(compiled, torch.zeros(128, 64), torch.zeros(64, 64))[0]
kernels = re.findall("'kernel_name': '(\\\\w+)'", code), re.findall("'kernel_num_gb': ([-+.0-9e]+)", code)
print(json.dumps([*zip(kernels[0], map(float, kernels[1]), strict=True)]))
"""


@pytest.fixture
def profile(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_profile")


@pytest.mark.parametrize("kind, kernel", [(kind, kernel) for kind, names in KERNELS.items() for kernel in names])
def test_the_kind_of_a_kernel_is_read_from_its_name(profile, kind, kernel):
    assert profile.kind_of(kernel) == kind


def test_changes_of_layout_are_told_from_kernels_in_a_layout(profile):
    changes = [
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>",
        "void cudnn::ops::convertTensor_kernel<float, __nv_bfloat16>",
        "triton_poi_fused__to_copy_convolution_0",
    ]
    others = [*KERNELS["convolution"], *KERNELS["norm"], *KERNELS["GEMM"], "triton_poi_fused_gelu_7"]
    assert [name for name in [*changes, *others] if re.search(profile.LAYOUT, name, re.IGNORECASE)] == changes


def test_a_small_step_is_profiled_on_the_cpu(profile):
    device = torch.device("cpu")
    small = {"classes": 10, "model": "lvvit_t", "img_size": 64, "model_kwargs": {"depth": 2}, "compile": False}
    step = profile.Step(device, 4, **small)
    before = [weight.clone() for weight in step.learner.model.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.learner.model.parameters(), strict=True))
    figures = profile.profiled(step, device, steps=2)
    expected = {"GEMM", "attention", "convolution", "norm", "elementwise", "loss", "optimiser", "copies"}
    assert expected <= set(figures["kinds"])
    assert figures["launches"] > 100 and len(figures["longest"]) == 10
    assert 0 < max(figures["longest"].values()) < sum(figures["kinds"].values())
    assert profile.host_milliseconds(step, device, steps=3) > 0
    assert len(profile.rates(step, 4, device, rounds=3, steps=1)) == 3
    # Another block: four products forward, and twice as many FLOPs backward. Attention is counted on a GPU alone.
    model = step.learner.model
    images, tokens, width, hidden = 4, 17, model.embed_dim, model.blocks[0].mlp.fc1.out_features
    products = 2 * images * tokens * width * (4 * width + 2 * hidden)
    deeper = profile.Step(device, 4, **small | {"model_kwargs": {"depth": 3}})
    assert 3 * products == deeper.flops() - step.flops()
    # Of each weight of the other block, all trained: 28 bytes by AdamW, 12 each by clipping and the moving average.
    count = sum(weight.numel() for weight in deeper.learner.model.blocks[2].parameters())
    assert deeper.optimiser_bytes() - step.optimiser_bytes() == 52 * count
    assert figures["moved"]["elementwise"] is None and figures["moved"]["optimiser"] is None


def event(name, micros=0.0, on_gpu=True, gb=None, **metadata):
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    facts = {"name": name, "device_type": device, "is_user_annotation": False, "self_device_time_total": micros}
    return SimpleNamespace(**facts, kwinputs={} if gb is None else {"kernel_num_gb": gb}, **metadata)


def test_bytes_moved_by_kinds_that_memory_limits(profile):
    size = SimpleNamespace(bytes=50_000_000)  # as torch 2.13 tells it; others as 2.11 does
    events = [
        # Launches by the host, one of a kernel's two with other sizes, as a forward and a backward kernel of one name.
        event("triton_poi_fused_gelu_7", on_gpu=False, gb=0.02),
        event("triton_poi_fused_gelu_7", on_gpu=False, gb=0.04),
        event("triton_poi_fused_gelu_7", 10.0, event_metadata=None),
        event("triton_poi_fused_gelu_7", 20.0, event_metadata=None),
        event("void at::native::vectorized_elementwise_kernel<4, Fill>", 10.0, event_metadata=None),
        event("void cudnn::bn_fw_tr_1C11_kernel_NCHW", 5.0, event_metadata=None),
        event("void at::native::multi_tensor_apply_kernel<FusedAdam>", 100.0, event_metadata=None),
        event("Memcpy DtoD (Device -> Device)", 40.0, event_metadata=size),
        event("Memset (Device)", 10.0, metadata_json='"stream": 7, "bytes": 25000000, "memory bandwidth (GB/s)": 2.5'),
        event("Memcpy HtoD (Pageable -> Device)", 150.0, metadata_json=None),
        event("nvjet_hsh_128x256", 30.0, event_metadata=None),
    ]
    moved = profile.summary(events, True, 2, 140_000_000)["moved"]
    assert moved == {
        "elementwise": {"gb": 0.03, "gb_s": 2000.0, "share": 0.75},
        "norm": None,
        "optimiser": {"gb": 0.14, "gb_s": 2800.0, "share": 1.0},
        "copies": {"gb": 0.0625, "gb_s": 2500.0, "share": 0.25},
    }
    assert profile.summary(events, True, 2, 0)["moved"]["optimiser"] is None


def test_inductor_states_the_bytes_of_its_kernels_to_the_profiler(profile):
    environment = os.environ | profile.STATE_BYTES
    done = subprocess.run([sys.executable, "-c", TRITON_CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout.splitlines()[-1])
    gb = {profile.kind_of(name): size for name, size in kernels}
    read_and_written = pytest.approx(2 * 128 * 64 * 4 / 1e9)
    assert gb == {"elementwise": read_and_written, "norm": read_and_written}

    def launch():
        for name, size in kernels:  # as inductor does it where a profiler runs
            with _RecordFunctionFast(name, [], {"kernel_file": "none", "kernel_num_gb": 1000 * size, "stream": 0}):
                torch.zeros(1000)

    moved = profile.profiled(launch, torch.device("cpu"), steps=2)["moved"]
    assert moved["norm"]["gb"] == pytest.approx(1000 * gb["norm"], abs=1e-4) and moved["norm"]["share"] == 1


def test_only_a_profile_lets_inductor_state_bytes(profile, monkeypatch):
    environments = []

    def run(command, *, env, **_):
        environments.append(env)
        return SimpleNamespace(returncode=0, stdout="{}\n")

    stand_in = SimpleNamespace(run=run, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(profile, "subprocess", stand_in)
    for with_profile in (False, True):
        assert profile.contend("step", {"profile": with_profile}, 7) == {}
    assert environments[0] == dict(os.environ)
    assert set(environments[1].items()) - set(environments[0].items()) == {("TORCHINDUCTOR_BENCHMARK_KERNEL", "1")}


def test_every_switch_of_the_sweep_is_a_field_with_another_value(profile):
    for name, switches in profile.SWITCHES.items():
        config = TrainConfig(train_data="none", **switches)  # TypeError for what is no field
        same = [field for field in switches if getattr(config, field) == getattr(TrainConfig, field)]
        assert not same, f"{name}: {same} have their default"
    alone = {field for name, switches in profile.SWITCHES.items() if name != "all" for field in switches}
    assert set(profile.SWITCHES["all"]) == alone - {"attention_backend"}
    assert alone <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_contender_that_fails_costs_its_own_row_alone(profile, monkeypatch, tmp_path, capsys):
    def run(command, **_):
        options = json.loads(command[-1])
        if "gelu" in options["switches"]:
            return SimpleNamespace(returncode=1, stdout="")
        if "targets_dtype" in options["switches"]:
            raise subprocess.TimeoutExpired(command, 7)
        return SimpleNamespace(returncode=0, stdout=json.dumps({"rates": [100.0, 110.0, 90.0], "memory_mb": 5}) + "\n")

    monkeypatch.setattr(profile, "need_gpu", lambda: None)
    stand_in = SimpleNamespace(run=run, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(profile, "subprocess", stand_in)
    rows = tmp_path / "rows.jsonl"
    names = ["as it is", "gelu tanh", "targets_dtype bfloat16", "drop_path_batched"]
    monkeypatch.setattr(sys, "argv", ["gpu_profile", "--results", str(rows), "--limit", "7", "--sweep", *names])
    with pytest.raises(SystemExit) as end:
        profile.main()
    assert end.value.code
    said = capsys.readouterr().out
    assert "gelu tanh, lvvit_s 224, batch 256: FAILED with status 1" in said and "not done after 7 s" in said
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["contender"].split(",")[0] for row in written] == ["as it is", "drop_path_batched"]
    assert written[1]["switches"] == {"drop_path_batched": True} and written[0]["median"] == 100


def test_the_table_of_a_profile(profile, capsys):
    kinds = {"GEMM": 20.0, "elementwise": 10.0, "attention": 4.0}
    row = {"median": 6400.0, "kinds": kinds, "launches": 300.4, "host_ms": 7.25, "flops": 28.3e9 * 256}
    row |= {"peak_tflops": 700.0, "copy_gb_s": 3000.0, "longest": {"nvjet": 12.0}, "layout_changes": {}}
    row["moved"] = {"elementwise": {"gb": 21.0, "gb_s": 2250.0, "share": 0.933}, "loss": None}
    kinds["loss"] = 0.5
    profile.show(row, 256)
    said = capsys.readouterr().out
    assert "GEMM           20.000 ms   50.0% of the step" in said and "no kernel       5.500 ms   13.8%" in said
    assert "of the step, 21.00 GB at 2,250 GB/s, 75% of a copy's (known for 93% of its time)\n" in said
    assert "loss            0.500 ms    1.2% of the step, bytes unknown\n" in said
    assert "181 TFLOP/s, 302 during products" in said and "may hold one: none" in said
