"""The token-label loss against the published maths (golden file), under mixing, autocast and torch.compile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from tl_fast.models.loss import TokenLabelLoss, soft_cross_entropy, strongest_class

BATCH, TOKENS, CLASSES = 6, 16, 12


@pytest.fixture(scope="module")
def golden_loss():
    with np.load(Path(__file__).parents[1] / "golden" / "token_label_loss.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def inputs(golden_loss):
    """cls_logits, token_logits, targets with the class target first."""
    targets = torch.cat((golden_loss["cls_target"][:, None], golden_loss["token_target"]), 1)
    return golden_loss["cls_logits"].clone(), golden_loss["token_logits"].clone(), targets


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("case", ["nomix", "mix", "nomix_gt", "mix_gt"])
def test_value_and_gradients_equal_the_golden_file(golden_loss, inputs, case, as_tensor):
    cls_logits, token_logits, targets = inputs
    cls_logits.requires_grad_(), token_logits.requires_grad_()
    box = golden_loss[f"{case}.mix_box"] if as_tensor else tuple(golden_loss[f"{case}.mix_box"].tolist())
    criterion = TokenLabelLoss(dense_weight=float(golden_loss[f"{case}.dense_weight"]))
    loss = criterion(
        cls_logits, token_logits, targets, box, golden_loss["ground_truth"] if case.endswith("_gt") else None
    )
    loss.backward()
    close(loss, golden_loss[f"{case}.loss"])
    close(cls_logits.grad, golden_loss[f"{case}.grad_cls"])
    close(token_logits.grad, golden_loss[f"{case}.grad_tokens"])


@pytest.mark.parametrize("case", ["nomix", "mix", "nomix_gt", "mix_gt"])
def test_bfloat16_targets_are_rounded_and_nothing_else(golden_loss, inputs, case):
    """Near the golden file; and equal, gradients included, to the float32 loss of the rounded targets."""
    cls_logits, token_logits, targets = inputs
    cls_logits.requires_grad_(), token_logits.requires_grad_()
    criterion = TokenLabelLoss(dense_weight=float(golden_loss[f"{case}.dense_weight"]))
    truth, results = golden_loss["ground_truth"] if case.endswith("_gt") else None, []
    for rounded in (targets.bfloat16(), targets.bfloat16().float()):
        loss = criterion(cls_logits, token_logits, rounded, golden_loss[f"{case}.mix_box"], truth)
        results.append([loss, *torch.autograd.grad(loss, (cls_logits, token_logits))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True)) and loss.dtype == torch.float32
    golden = [golden_loss[f"{case}.{name}"] for name in ("loss", "grad_cls", "grad_tokens")]
    for actual, expected, tolerance in zip(results[0], golden, (1e-3, 4e-3, 4e-3), strict=True):
        assert (actual - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*(pytest.param(case, marks=pytest.mark.matrix) for case in ("nomix", "mix", "nomix_gt")), "mix_gt"]
)
@pytest.mark.usefixtures("compiler")
def test_inductor_gives_the_golden_value_and_gradients(golden_loss, inputs, case):
    """The compiler that trains on GPUs, here generating for the CPU."""
    torch._dynamo.reset()
    cls_logits, token_logits, targets = inputs
    cls_logits.requires_grad_(), token_logits.requires_grad_()
    criterion = TokenLabelLoss(dense_weight=float(golden_loss[f"{case}.dense_weight"]))
    truth = golden_loss["ground_truth"] if case.endswith("_gt") else None
    before = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
    loss = torch.compile(criterion, fullgraph=True, dynamic=False)(
        cls_logits, token_logits, targets, golden_loss[f"{case}.mix_box"], truth
    )
    loss.backward()
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] - before == 2, (
        "forward and backward"
    )
    close(loss, golden_loss[f"{case}.loss"])
    close(cls_logits.grad, golden_loss[f"{case}.grad_cls"])
    close(token_logits.grad, golden_loss[f"{case}.grad_tokens"])


def test_no_box_equals_an_empty_box(inputs):
    criterion = TokenLabelLoss()
    assert torch.equal(criterion(*inputs), criterion(*inputs, (0, 0, 0, 0))) and torch.equal(
        criterion(*inputs), criterion(*inputs, None)
    )


def test_soft_cross_entropy_of_one_hot_targets_is_the_ordinary_one():
    logits, labels = torch.randn(4, 7, 5), torch.randint(5, (4, 7))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    close(soft_cross_entropy(logits, torch.nn.functional.one_hot(labels, 5)), expected)


def test_hard_labels_give_the_ordinary_cross_entropy_of_the_strongest_class(inputs):
    _, logits, targets = inputs
    hard = strongest_class(targets[:, 1:], 0.1)
    assert hard.dtype == targets.dtype and hard.shape == targets[:, 1:].shape
    close(hard.sum(-1), torch.ones(BATCH, TOKENS))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[:, 1:].argmax(-1).flatten(), label_smoothing=0.1
    )
    close(soft_cross_entropy(logits, hard), expected)
    assert strongest_class(torch.tensor([0.5, 0.5, 0.0]), 0.0).tolist() == [1.0, 0.0, 0.0]  # the first of equals


def test_the_box_covering_everything_takes_the_flipped_class_target(inputs):
    cls_logits, token_logits, targets = inputs
    flipped = targets.clone()
    flipped[:, 0] = targets[:, 0].flip(0)
    criterion = TokenLabelLoss()
    close(
        criterion(cls_logits, token_logits, targets, torch.tensor([0, 0, 4, 4])),
        criterion(cls_logits, token_logits, flipped),
    )


def test_weights_scale_their_terms(inputs):
    cls_only, dense_only = TokenLabelLoss(1.0, 0.0)(*inputs), TokenLabelLoss(0.0, 1.0)(*inputs)
    close(cls_only, soft_cross_entropy(inputs[0], inputs[2][:, 0]))
    close(TokenLabelLoss(0.3, 2.0)(*inputs), 0.3 * cls_only + 2.0 * dense_only)


def test_one_target_serves_the_class_and_every_token(inputs):
    cls_logits, token_logits, targets = inputs
    image_targets = targets[:, 0]
    repeated = torch.stack([image_targets] * (1 + TOKENS), 1)
    once, many = (TokenLabelLoss()(cls_logits, token_logits, y, (0, 0, 2, 2)) for y in (image_targets, repeated))
    close(once, many)


def test_float32_under_autocast_and_with_bfloat16_logits(inputs):
    cls_logits, token_logits, targets = (tensor.bfloat16() for tensor in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = TokenLabelLoss()(cls_logits, token_logits, targets, torch.tensor([1, 0, 3, 2]))
    assert loss.dtype == torch.float32
    expected = TokenLabelLoss()(cls_logits.float(), token_logits.float(), targets.float(), (1, 0, 3, 2))
    close(loss, expected)
    close(TokenLabelLoss()(cls_logits, token_logits, targets, (1, 0, 3, 2)), expected)


def test_no_value_is_read_on_the_host(inputs, golden_loss):
    """Meta tensors have no values, so a read of the box (or of anything else) raises."""
    box, ground_truth = golden_loss["mix.mix_box"].to("meta"), golden_loss["ground_truth"].to("meta")
    assert TokenLabelLoss()(*(tensor.to("meta") for tensor in inputs), box, ground_truth).shape == ()


def test_one_graph_serves_every_box(inputs, golden_loss):
    counter, criterion = CompileCounter(), TokenLabelLoss()
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    for box in [(0, 0, 0, 0), (1, 0, 3, 2), (0, 0, 4, 4)]:
        close(
            compiled(*inputs, torch.tensor(box), golden_loss["ground_truth"]),
            criterion(*inputs, box, golden_loss["ground_truth"]),
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, t, y: (c, t, y[:, 1:]), r"\(6, 16, 12\).*\(6, 17, 12\)"),
        (lambda c, t, y: (c, t, y[..., :5]), "5"),
        (lambda c, t, y: (c[:3], t, y), r"\(3, 12\)"),
        (lambda c, t, y: (c, t, y, None, y), "ground_truth"),
    ],
)
def test_shapes_that_do_not_fit_are_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        TokenLabelLoss()(*change(*inputs))


@pytest.mark.parametrize("weights", [(-1.0, 1.0), (0.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_weights_out_of_range_are_refused(weights):
    with pytest.raises(ValueError, match="cls_weight"):
        TokenLabelLoss(*weights)
