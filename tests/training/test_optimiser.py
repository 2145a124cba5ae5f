"""Layer decay: every parameter's learning rate, compared with one computed from its name alone."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, weights
from torch import nn

import tl_fast.models.lvvit  # noqa: F401  registers lvvit_t with timm

# isort: split
import timm

from tl_fast.training import checkpoint, optimiser
from tl_fast.training import loop as training
from tl_fast.training.runlog import read_rows

DECAY = 0.6


def numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\.(\d+)", name)]


def layer_of_vit(name: str) -> int:
    """Two blocks; the last one's group has the final norm, too."""
    if name.startswith("blocks."):
        return 1 + numbers(name)[0]
    return {"head": 3, "norm": 2}.get(name.split(".")[0], 0)


def layer_of_lvvit(name: str) -> int:
    """Two blocks; the final norm is in the heads' group."""
    if name.startswith("blocks."):
        return 1 + numbers(name)[0]
    return 0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else 3


def layer_of_swin(name: str) -> int:
    """Stages of 1, 1, 2 and 1 blocks; a downsampling is in the group of the first block behind it."""
    if name.startswith("layers."):
        stage, *rest = numbers(name)
        return [1, 2, 3, 5][stage] + (rest[0] if ".blocks." in name else 0)
    return {"head": 6, "norm": 5, "patch_embed": 0}[name.split(".")[0]]


def layer_of_convnext(name: str) -> int:
    """Stages of 1, 1, 2 and 1 blocks, as in Swin; the final norm is in the head."""
    if name.startswith("stages."):
        stage, *rest = numbers(name)
        return [1, 2, 3, 5][stage] + (rest[0] if ".blocks." in name else 0)
    return {"head": 6, "stem": 0}[name.split(".")[0]]


def layer_of_resnet(name: str) -> int:
    """Four stages of one block."""
    stage = re.match(r"layer(\d)\.", name)
    return int(stage[1]) if stage else {"fc": 5, "conv1": 0, "bn1": 0}[name.split(".")[0]]


MODELS = {
    "lvvit_t": (dict(TINY, img_size=64), layer_of_lvvit),
    "vit_tiny_patch16_224": (dict(depth=2, img_size=64), layer_of_vit),
    "swin_tiny_patch4_window7_224": (
        dict(depths=(1, 1, 2, 1), embed_dim=16, num_heads=(1, 1, 2, 2), img_size=64, window_size=4),
        layer_of_swin,
    ),
    "convnext_atto": (dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), layer_of_convnext),
    "test_resnet": ({}, layer_of_resnet),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer_decay", [None, DECAY, 1.0])
def test_every_parameter_has_its_layers_learning_rate_at_every_step(tiny, name, layer_decay):
    """In warm-up, cosine and cooldown: the schedule's rate times a power of layer_decay; weight decay is that of a run
    without layer_decay."""
    options, layer_of = MODELS[name]
    model = timm.create_model(name, num_classes=4, **options)
    last = max(layer_of(parameter) for parameter, _ in model.named_parameters())
    config = tiny(epochs=10, warmup_epochs=2, cooldown_epochs=3, min_lr=1e-5, warmup_lr=1e-6, layer_decay=layer_decay)
    plain = optimiser.build_optimizer(model, dataclasses.replace(config, layer_decay=None))
    decays = {id(p): group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    optimizer = optimiser.build_optimizer(model, config)
    schedule = optimiser.build_schedule(optimizer, config, steps_per_epoch=5)
    for step in (0, 3, 10, 31, 49, 60):
        schedule.step_update(step)
        warm, falling = 1e-6 + (1e-3 - 1e-6) * step / 10, 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 50)) / 2
        rate = warm if step < 10 else falling if step < 50 else 1e-5
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for parameter, tensor in model.named_parameters():
            share = (layer_decay or 1.0) ** (last - layer_of(parameter))
            assert rates.pop(id(tensor)) == pytest.approx(rate * share, rel=1e-9), (step, parameter)
        assert not rates and optimiser.highest_lr(optimizer) == pytest.approx(rate, rel=1e-9)
    assert decays == {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_a_wrapper_names_its_own_groups(tiny):
    """A model under an attribute, with a head of its own beside it, says where its layers are."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model("test_resnet", num_classes=4)
            self.token_head = nn.Linear(8, 4)

        def group_matcher(self, coarse=False):
            return {"stem": r"^backbone\.(?:conv1|bn1)", "blocks": r"^backbone\.layer(\d+)\.(\d+)"}

    model = Wrapper()
    optimizer = optimiser.build_optimizer(model, tiny(layer_decay=DECAY))
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = 5 if name.startswith("token_head") else layer_of_resnet(name.removeprefix("backbone."))
        assert rates[id(parameter)] == pytest.approx(DECAY ** (5 - layer))


def test_a_model_without_layer_groups_is_refused(tiny):
    with pytest.raises(ValueError, match=r"layer_decay 0.6: model 'lvvit_t' \(Linear\) has no layer groups.*null"):
        optimiser.build_optimizer(nn.Linear(2, 2), tiny(layer_decay=DECAY))
    assert len(optimiser.build_optimizer(nn.Linear(2, 2), tiny()).param_groups) == 2


@pytest.mark.usefixtures("one_thread")
def test_a_run_with_layer_decay_resumes_exactly_and_logs_the_schedules_rate(tiny):
    settings = dict(layer_decay=DECAY, epochs=2)
    whole = training.train(tiny("whole", **settings))
    config = tiny("parts", **settings, max_steps=3)
    first = training.train(config)
    state = torch.load(Path(first["checkpoint"]) / checkpoint.OPTIMIZER, weights_only=True)
    assert {round(group["lr_scale"], 9) for group in state["param_groups"]} == {
        round(DECAY**power, 9) for power in range(4)
    }
    again = dataclasses.replace(config, max_steps=None, resume="auto")
    second = training.train(again)
    assert second["steps"] == whole["steps"]
    expected, actual = weights(whole["checkpoint"]), weights(second["checkpoint"])
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)
    plain = training.train(tiny("plain", epochs=2))
    lrs = [[row["lr"] for row in read_rows(Path(run["metrics"])) if row["kind"] == "train"] for run in (whole, plain)]
    assert lrs[0] == pytest.approx(lrs[1]) and len(lrs[0]) == whole["steps"]
    for other in (None, 0.7):
        with pytest.raises(checkpoint.CheckpointError, match=f"layer_decay 0.6 -> {other}.*--init_weights"):
            training.train(dataclasses.replace(again, layer_decay=other))
