"""Frozen layers: which parameters they hold, and that a run leaves them, their statistics and their average alone."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from layer_groups import MODELS, small_model
from tiny_runs import weights
from torch import nn

from tl_fast.training import checkpoint, network, optimiser
from tl_fast.training import loop as training
from tl_fast.training.config import parse_config
from tl_fast.training.freeze import freeze_layers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 3, -1])
def test_the_first_groups_are_frozen(tiny, name, count):
    model, (_, layer_of) = small_model(name), MODELS[name]
    layers = {parameter: layer_of(parameter) for parameter, _ in model.named_parameters()}
    number = max(layers.values()) + 1
    remark = freeze_layers(model, tiny(freeze=count))
    learning = {parameter for parameter, layer in layers.items() if layer >= count % number}
    assert {parameter for parameter, tensor in model.named_parameters() if tensor.requires_grad} == learning
    assert f"freeze {count}: {count % number} of {number} layer groups" in remark
    assert layers[remark.split()[-1]] == count % number
    # Layer decay counts the same groups, and no frozen parameter is the optimiser's.
    optimizer = optimiser.build_optimizer(model, tiny(layer_decay=0.5))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(learning)
    shares = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in learning:
        assert shares[id(model.get_parameter(parameter))] == 0.5 ** (number - 1 - layers[parameter])


@pytest.mark.parametrize("count", [6, 100, -6])
def test_freezing_all_or_nothing_is_refused(tiny, count):
    config = tiny(freeze=count, model="test_resnet", model_kwargs={})
    with pytest.raises(ValueError, match=f"freeze {count}: model 'test_resnet' has 6 layer groups.*1 to 5.*-1 to -5"):
        freeze_layers(small_model("test_resnet"), config)


def test_a_model_without_layer_groups_is_refused(tiny):
    with pytest.raises(ValueError, match=r"freeze 1: model 'lvvit_t' \(Linear\) has no layer groups.*null"):
        freeze_layers(nn.Linear(2, 2), tiny(freeze=1))


def test_a_negative_number_is_taken_from_the_command_line():
    assert parse_config(["--train_data", "x.beton", "--freeze", "-1"]).freeze == -1


def test_frozen_batch_norms_keep_their_statistics(tiny):
    """Of a ResNet whose stem and first two blocks are frozen, after a step with weight decay."""
    config = tiny(freeze=3, weight_decay=0.5)
    model = small_model("test_resnet")
    freeze_layers(model, config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network.set_train(model)
    assert model.training and model.layer3.training and not model.bn1.training
    optimizer = optimiser.build_optimizer(model, config)
    model(torch.randn(4, 3, 64, 64)).logsumexp(-1).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        kept = re.match(r"(conv1|bn1|layer[12])\.", name) is not None
        if kept or "running" in name or value.dim() > 1:  # scales of 1 may have no gradient yet
            assert torch.equal(value, before[name]) is kept, name


@pytest.mark.usefixtures("one_thread")
def test_a_run_leaves_frozen_layers_alone_and_resumes_exactly(tiny):
    settings = dict(freeze=2, weight_decay=0.5, epochs=2, layer_decay=0.7)
    whole = training.train(tiny("whole", **settings))
    config = tiny("parts", **settings, max_steps=3)
    training.train(config)
    again = dataclasses.replace(config, max_steps=None, resume="auto")
    resumed = weights(training.train(again)["checkpoint"])
    trained = weights(whole["checkpoint"])
    assert trained.keys() == resumed.keys() and all(torch.equal(trained[name], resumed[name]) for name in trained)

    torch.manual_seed(config.seed)
    model = network.build_network(dataclasses.replace(config, num_classes=4))
    parts = ("blocks.1.", "norm", "head", "aux_head")
    for name, value in model.state_dict().items():
        for file in (checkpoint.MODEL, checkpoint.EMA):
            assert torch.equal(trained[f"{file}:{name}"], value) is not name.startswith(parts), (file, name)
    moments = torch.load(Path(whole["checkpoint"]) / checkpoint.OPTIMIZER, weights_only=True)["state"]
    assert len(moments) == sum(name.startswith(parts) for name, _ in model.named_parameters())

    for other in (None, 1):
        with pytest.raises(checkpoint.CheckpointError, match=f"of another run: freeze 2 -> {other}.*--init_weights"):
            training.train(dataclasses.replace(again, freeze=other))


def test_the_run_says_what_is_frozen(tiny, capsys):
    training.train(tiny(max_steps=1, freeze=-1))
    said = capsys.readouterr().out
    assert "freeze -1: 3 of 4 layer groups keep their weights" in said
    assert "the first layer that learns holds norm.weight" in said


@pytest.mark.slow
@pytest.mark.usefixtures("compiler", "one_thread")
def test_a_compiled_run_leaves_the_same_layers_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    settings = dict(freeze=2, drop_path=0.0, max_steps=3)
    eager, compiled = (
        weights(training.train(tiny(f"compile-{compile}", compile=compile, **settings))["checkpoint"])
        for compile in (False, True)
    )
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(
            compiled[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
