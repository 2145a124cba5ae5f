"""Layer decay: every parameter's learning rate, compared with one computed from its name alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from layer_groups import MODELS, layer_of_resnet, small_model
from tiny_runs import weights
from torch import nn

from tl_fast.training import checkpoint, optimiser
from tl_fast.training import loop as training
from tl_fast.training.runlog import read_rows

DECAY = 0.6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer_decay", [None, DECAY, 1.0])
def test_every_parameter_has_its_layers_learning_rate_at_every_step(tiny, name, layer_decay):
    """In warm-up, cosine and cooldown: the schedule's rate times a power of layer_decay; weight decay is that of a run
    without layer_decay."""
    model, (_, layer_of) = small_model(name), MODELS[name]
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
            self.backbone = small_model("test_resnet")
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
