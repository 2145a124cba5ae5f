"""One small model of every family of timm's that a token head is tested on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """img_size: pixels a side; grid: tokens a side; options: what makes the model small; kind: what its features and
    head are like."""

    img_size: int
    grid: int
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


SHALLOW = {"depth": 2}
NARROW = {"depth": 2, "embed_dim": 96, "num_heads": 3}
ONE_EACH = (1, 1, 1, 1)  # blocks in each of four stages
HIERARCHY = {"depths": ONE_EACH, "embed_dim": 24}
FAMILIES = {
    "vit_tiny_patch16_224": Family(64, 4, "class token", SHALLOW),
    "vit_wee_patch16_reg1_gap_256": Family(64, 4, "a register, average pooling", SHALLOW),
    "vit_pe_core_tiny_patch16_384": Family(64, 4, "attention pooling, rotary positions", SHALLOW),
    "vit_tiny_r_s16_p8_224": Family(64, 2, "convolutional stem", SHALLOW),
    "deit_tiny_distilled_patch16_224": Family(64, 4, "class and distillation token, two heads", SHALLOW),
    "deit3_small_patch16_224": Family(64, 4, "class token behind the positions", NARROW),
    "beit_base_patch16_224": Family(64, 4, "average pooling, relative positions", NARROW),
    "eva02_tiny_patch14_224": Family(70, 5, "average pooling, rotary positions", SHALLOW),
    "swin_tiny_patch4_window7_224": Family(128, 4, "map [B,h,w,D], windows", HIERARCHY),
    "swinv2_tiny_window8_256": Family(128, 4, "map [B,h,w,D], windows", HIERARCHY),
    "convnext_atto": Family(96, 3, "map [B,D,h,w], a norm in the head", {"depths": ONE_EACH}),
    "coatnet_nano_rw_224": Family(96, 3, "map [B,D,h,w]", {"depths": ONE_EACH, "embed_dim": (32, 64, 128, 256)}),
    "volo_d1_224": Family(64, 4, "class token, a token head of its own", {"mlp_ratio": 1.0}),
    "resnet18": Family(96, 3, "map [B,D,h,w]", {"layers": ONE_EACH, "channels": (16, 32, 64, 128)}),
    "mobilenetv3_small_050": Family(96, 3, "map [B,D,h,w], a hidden layer in the head"),
    "xcit_nano_12_p16_224": Family(64, 4, "class token, attention over channels", SHALLOW),
    "cait_xxs24_224": Family(64, 4, "class token from the last layers", SHALLOW),
    "pvt_v2_b0": Family(96, 3, "map [B,D,h,w]", {"depths": ONE_EACH}),
    "twins_pcpvt_small": Family(96, 3, "tokens without prefix, average pooling", {"depths": ONE_EACH}),
    "naflexvit_base_patch16_gap": Family(64, 4, "registers, average pooling", NARROW),
    "mixer_s16_224": Family(64, 4, "tokens without prefix, average pooling", {"mlp_ratio": (0.5, 1.0)}),
}
