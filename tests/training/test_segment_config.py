"""The configuration of a segmentation run."""

from __future__ import annotations

import json

import pytest
import torch

from tl_fast.training.config import TrainConfig, parse_config
from tl_fast.training.milestones import Milestones
from tl_fast.training.optimiser import build_poly_schedule
from tl_fast.training.read_config import parse_command, save_config
from tl_fast.training.run_config import RunConfig
from tl_fast.training.segment_config import SegmentConfig


def parse(*arguments: str) -> SegmentConfig:
    return parse_command(SegmentConfig, ["--train_data", "x.beton", *arguments], "segment.py", "")[0]


def test_a_config_reads_back_from_yaml_and_json(tmp_path):
    config = parse("--crop_size", "[64,96]", "--out_indices", "[1,2,3,4]", "--base_size", "[2048,512]", "--lr", "1e-4")
    assert (config.crop_size, config.out_indices, config.base_size) == ((64, 96), (1, 2, 3, 4), (2048, 512))
    save_config(config, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    assert SegmentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown configuration keys.*crop_size"):
        TrainConfig.from_dict(config.to_dict())


def test_equal_sides_are_one_number_and_windows_overlap_by_a_third():
    assert parse("--crop_size", "[512,512]") == parse()
    assert parse().window_stride == (341, 341) and parse("--crop_size", "[96,64]").window_stride == (64, 42)


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"train_data": ""}, "train_data is required"),
        ({"crop_size": 8}, r"crop_size must be in \[16, 4096\], got 8"),
        ({"num_classes": 256}, r"num_classes must be in \[1, 255\], got 256"),
        ({"warmup_steps": 20, "steps": 10}, "warmup_steps is part of steps: 20 > 10"),
        ({"min_lr": 1e-4}, "peak lr 6e-05 is below min_lr 0.0001"),
        ({"eval_mode": "tiles"}, "eval_mode must be one of 'slide', 'whole', got 'tiles'"),
        ({"eval_steps": 0}, "eval_steps must be in"),
        ({"model_kwargs": {"img_size": 96}}, "model_kwargs must not set img_size: set crop_size itself"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6.*accumulate 4"),
        ({"device": "cpu", "sync_bn": True}, "sync_bn needs GPUs"),
        ({"init_ema": False}, "init_ema false has no effect without init_weights"),
    ],
)
def test_values_that_make_no_sense_are_named(bad, named):
    with pytest.raises(ValueError, match=named):
        SegmentConfig(**{"train_data": "x.beton", **bad})


def test_a_batch_of_any_size_has_the_same_learning_rate():
    assert parse("--batch_size", "4").peak_lr == parse("--batch_size", "64").peak_lr == 6e-5


def test_a_run_validates_and_saves_by_steps():
    milestones = parse("--steps", "100", "--warmup_steps", "0", "--eval_steps", "30").milestones(7)
    assert milestones == Milestones(100, 7, eval_steps=30, checkpoint_steps=16_000)
    assert parse("--max_steps", "40").milestones(7).end == 40


def test_both_tasks_have_the_shared_fields_and_their_own():
    shared = set(RunConfig.__dataclass_fields__)
    assert shared < set(TrainConfig.__dataclass_fields__) and shared < set(SegmentConfig.__dataclass_fields__)
    assert not hasattr(SegmentConfig, "mix_token") and not hasattr(TrainConfig, "crop_size")
    assert parse_config(["--train_data", "x.beton"]).weight_decay == 0.05 and parse().weight_decay == 0.01


def mmseg_rate(step: int, lr: float, min_lr: float, steps: int, power: float, warm_up: int, ratio: float) -> float:
    """The learning rate as mmcv's PolyLrUpdaterHook states it."""
    regular = (lr - min_lr) * (1 - step / steps) ** power + min_lr
    if step >= warm_up:
        return regular
    k = (1 - step / warm_up) * (1 - ratio)
    return regular * (1 - k)


@pytest.mark.parametrize("power, min_lr", [(1.0, 0.0), (0.9, 1e-6)])
def test_the_learning_rate_is_that_of_mmsegmentation(power, min_lr):
    """In any order of steps, for it depends on nothing else; lr_scale of layer decay counts."""
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.25}], lr=6e-5)
    config = SegmentConfig(train_data="x.beton", poly_power=power, min_lr=min_lr)
    schedule = build_poly_schedule(optimizer, config)
    for step in (0, 159_999, 1, 750, 1_499, 1_500, 80_000):
        schedule.step_update(step)
        expected = mmseg_rate(step, 6e-5, min_lr, 160_000, power, 1_500, 1e-6)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected, expected / 4], rel=1e-12)
    schedule.step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(6e-11, rel=1e-9)
    for step in (160_000, 170_000):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == min_lr
