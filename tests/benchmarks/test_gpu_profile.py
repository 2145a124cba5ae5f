"""benchmarks/gpu_profile.py: kinds of kernels by their names, the profile of a small step on the CPU, the sweep."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    profile.show(row, 256)
    said = capsys.readouterr().out
    assert "GEMM           20.000 ms   50.0% of the step" in said and "no kernel       6.000 ms   15.0%" in said
    assert "181 TFLOP/s, 302 during products" in said and "may hold one: none" in said
