"""The configuration: recipes, flags, and the refusal of what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tl_fast.training.config import TrainConfig, parse_config
from tl_fast.training.read_config import parse_command, save_config
from tl_fast.training.segment_config import SegmentConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SEGMENTATION = [path for path in RECIPES if path.stem.startswith("segment_")]


def test_flags_override_files_and_later_files_earlier_ones(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "train_data: [x.beton, y.beton]\nlr: 1e-3\nbatch_size: 64\nscale: [0.2, 0.9]\nmodel_kwargs: {depth: 2}\n"
    )
    second.write_text("lr: 2e-3\n")
    flags = ["--batch_size", "32", "--token_label", "false", "--resume", "auto"]
    config = parse_config(["--config", str(first), "--config", str(second), *flags])
    assert config.train_data == ["x.beton", "y.beton"]
    assert (
        config.lr == 2e-3
        and config.batch_size == 32
        and config.scale == (0.2, 0.9)
        and config.model_kwargs == {"depth": 2}
    )
    assert config.token_label is False and config.resume == "auto"
    assert config.peak_lr == pytest.approx(2e-3 * 32 / 1024)


def test_unknown_keys_are_refused(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train_data: x.beton\nlearning_rate: 1e-3\n")
    for arguments in (["--config", str(recipe)], ["--train_data", "x.beton", "--learning_rate", "1e-3"]):
        with pytest.raises(SystemExit):
            parse_config(arguments)
        assert "learning_rate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="learning_rate"):
        TrainConfig.from_dict({"train_data": "x.beton", "learning_rate": 1e-3})


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"img_size": 8}, "img_size.*16.*8"),
        ({"img_size": (224, 5000)}, r"img_size must be in \[16, 4096\], got \(224, 5000\)"),
        ({"img_size": (224,)}, r"a whole number or two, \(height, width\), got \(224,\)"),
        ({"pretrained": True, "init_weights": "w.pth"}, "pretrained would be overwritten by init_weights w.pth"),
        ({"eval_token_weight": -0.5}, "eval_token_weight must be in"),
        ({"batch_size": 0}, r"batch_size.*\[1, .*0"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6.*accumulate 4"),
        ({"smoothing": 1.0}, "smoothing.*1.0"),
        ({"drop_path": -0.1}, "drop_path.*-0.1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"lr": float("nan")}, "lr.*nan"),
        ({"lr": 1e-5, "batch_size": 64}, "peak lr"),
        ({"warmup_epochs": 400}, "warmup_epochs"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"num_classes": 70_000}, "num_classes.*65535"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \[1e-06, 1\], got 0.0"),
        ({"mixup": -0.1}, r"mixup must be in \[0, .*-0.1"),
        ({"cutmix": float("nan")}, "cutmix.*nan"),
        ({"mixup_prob": 1.1}, "mixup_prob.*1.1"),
        ({"mixup_switch_prob": -1.0}, "mixup_switch_prob.*-1.0"),
        ({"mixup": 0.8}, "mixup 0.8, cutmix 0.0: .*no token labels.*set both 0, or token_label false"),
        ({"cutmix": 1.0, "token_label": False}, "mixup 0.0, cutmix 1.0: mix_token true .*set mix_token false"),
        ({"mixup_prob": 0.5}, "mixup_prob 0.5 has no effect: set mixup or cutmix"),
        (
            {"cutmix": 1.0, "token_label": False, "mix_token": False, "mixup_switch_prob": 0.3},
            "mixup_switch_prob 0.3 has no effect with mixup 0.0, cutmix 1.0",
        ),
        ({"freeze": 0}, "freeze 0 would freeze nothing: set null"),
        ({"layer_decay": 1.5}, "layer_decay.*1.5"),
        ({"train_data": ""}, "train_data"),
        ({"token_label": False, "ground_truth": True}, "ground_truth"),
        ({"token_label": False, "labels": "argmax"}, "labels argmax .*token_label true"),
        ({"labels": "hard"}, "labels must be one of 'soft', 'argmax'"),
        ({"token_label": False, "cls_weight": 0.0}, "nothing to train on"),
        ({"model_kwargs": {"depth": 2, "img_size": 96}}, "model_kwargs must not set img_size"),
        ({"model_kwargs": {"drop_path_rate": 0.1}}, "model_kwargs must not set drop_path_rate: set drop_path itself"),
        ({"compile": False, "compile_mode": "reduce-overhead"}, "compile_mode 'reduce-overhead'.*compile false"),
        ({"accumulate": 2, "compile_mode": "reduce-overhead"}, "CUDA graphs.*accumulate 2"),
        ({"sync_bn": True, "freeze_stem_bn": True}, "sync_bn.*freeze_stem_bn"),
        ({"sync_bn": True, "device": "cpu"}, "sync_bn needs GPUs"),
        ({"decode": "hybrid", "hybrid_share": 1.5}, "hybrid_share must be in"),
        ({"hybrid_share": 0.5}, "with decode='hybrid' alone; got 0.5, decode='auto'"),
        ({"decode": "hybrid", "deterministic": True}, "deterministic needs a hybrid_share"),
        ({"resume": "runs/x", "init_weights": "w.pth"}, "w.pth would be overwritten by resume runs/x"),
        ({"init_ema": False}, "init_ema false has no effect without init_weights"),
        ({"schedule_by": "batch"}, "schedule_by must be one of 'step', 'epoch', got 'batch'"),
        ({"auto_augment": "rand-m9", "color_jitter": 0.3}, "color_jitter.*auto_augment"),
        ({"checkpoint_steps": 0}, r"checkpoint_steps.*\[1, "),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes"),
        ({"max_skipped": -1}, "max_skipped"),
        ({"bucket_mb": 0.0}, "bucket_mb"),
        ({"timeout_minutes": 0.0}, "timeout_minutes"),
        (
            {"compile_mode": "fastest"},
            "compile_mode must be one of 'default'.*'max-autotune-no-cudagraphs', got 'fastest'",
        ),
        ({"order": "random"}, "order must be one of 'shuffled', 'grouped', got 'random'"),
        ({"gelu": "erf"}, "gelu must be one of 'exact', 'tanh', got 'erf'"),
        ({"residual_dtype": "float16"}, "residual_dtype must be one of 'float32', 'bfloat16'"),
        ({"targets_dtype": "float16"}, "targets_dtype must be one of 'float32', 'bfloat16'"),
        ({"attention_backend": "fused"}, "attention_backend must be one of .*'cudnn'.*'fused'"),
        (
            {"stem_space_to_depth": True, "model_kwargs": {"stem_space_to_depth": True}},
            "set stem_space_to_depth itself",
        ),
    ],
)
def test_values_out_of_range_are_named(bad, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig(**{"train_data": "x.beton", **bad})


def test_a_config_of_tuples_is_stored_as_its_yaml_reads():
    config = TrainConfig(train_data="x.beton", model_kwargs={"depths": (1, 2)})
    assert config.to_dict()["model_kwargs"] == {"depths": [1, 2]} and config.to_dict()["betas"] == [0.9, 0.999]
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode_of_torch_compile_is_accepted(mode):
    """Those without CUDA graphs together with accumulation, too."""
    assert parse_config(["--train_data", "x.beton", "--compile_mode", mode]).compile_mode == mode
    accumulating = {"train_data": "x.beton", "compile_mode": mode, "accumulate": 2}
    if mode in ("default", "max-autotune-no-cudagraphs"):
        assert TrainConfig(**accumulating).compile_mode == mode
    else:
        with pytest.raises(ValueError, match="accumulate 2"):
            TrainConfig(**accumulating)


def test_a_recipe_that_names_no_switch_computes_as_before():
    config = TrainConfig(train_data="x.beton", model_kwargs={"depth": 2})
    assert config.model_options == {"depth": 2}
    switches = dict(stem_space_to_depth=True, residual_dtype="bfloat16", drop_path_batched=True, gelu="tanh")
    assert TrainConfig(train_data="x.beton", **switches).model_options == switches


def test_an_image_size_is_a_side_or_height_and_width(tmp_path):
    for text, size in (("192", 192), ("[192,256]", (192, 256)), ("[192, 192]", 192)):
        config = parse_config(["--train_data", "x.beton", "--img_size", text])
        assert config.img_size == size
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "a.yaml").write_text("img_size: [192, 256]")
    config = parse_config(["--config", str(tmp_path / "a.yaml"), "--train_data", "x.beton"])
    assert config.img_size == (192, 256) and config.to_dict()["img_size"] == [192, 256]


def test_a_bad_value_on_the_command_line_ends_with_its_name(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--train_data", "x.beton", "--img_size", "8"])
    assert "img_size must be in [16, 4096]" in capsys.readouterr().err


def test_saved_config_reads_back(tmp_path):
    config = TrainConfig(
        train_data=["a.beton"], model_kwargs={"depth": 3}, num_classes=4, lr=3.3e-4, min_lr=0.0, ratio=(0.5, 2.0)
    )
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path not in SEGMENTATION], ids=lambda path: path.stem)
def test_recipes_parse(recipe):
    parse_config(["--config", str(recipe)])


@pytest.mark.parametrize("recipe", SEGMENTATION, ids=lambda path: path.stem)
def test_recipes_of_segmentation_parse(recipe):
    parse_command(SegmentConfig, ["--config", str(recipe)], "segment.py", "")
