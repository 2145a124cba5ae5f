"""Segmentation's loss against a slow float64 oracle, and the step from pixels to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tl_fast.models.normalise import Normalise
from tl_fast.models.segmentation import build_segmenter
from tl_fast.models.segmentation_loss import SegmentationLoss
from tl_fast.models.segmentation_step import SegmentStep

CLASSES, HEIGHT, WIDTH = 3, 12, 20


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of stride 4, auxiliary ones of stride 5 by 4, and masks, a third of them without label."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, CLASSES, 3, 5, generator=generator) * 5
    aux_logits = torch.randn(2, CLASSES, 2, 4, generator=generator)
    masks = torch.randint(CLASSES, (2, HEIGHT, WIDTH), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 1 / 3] = 255
    return logits, aux_logits, masks.to(torch.uint8)


def weights_between(size: int, cells: int) -> list[list[tuple[int, float]]]:
    """For every pixel of a line, the cells that bilinear interpolation mixes, and their shares."""
    lines = []
    for pixel in range(size):
        centre = min(max((pixel + 0.5) * cells / size - 0.5, 0), cells - 1)
        low = math.floor(centre)
        lines.append([(low, 1 - (centre - low)), (min(low + 1, cells - 1), centre - low)])
    return lines


def oracle(logits: Tensor, masks: Tensor, ignore_index: int = 255) -> float:
    """Mean cross-entropy over labelled pixels, pixel by pixel in Python's float64."""
    rows, columns = weights_between(HEIGHT, logits.shape[2]), weights_between(WIDTH, logits.shape[3])
    cells, total, labelled = logits.double().tolist(), 0.0, 0
    for image, mask in enumerate(masks.tolist()):
        for y in range(HEIGHT):
            for x in range(WIDTH):
                if mask[y][x] == ignore_index:
                    continue
                values = [
                    sum(a * b * plane[row][column] for row, a in rows[y] for column, b in columns[x])
                    for plane in cells[image]
                ]
                total += math.log(sum(map(math.exp, values))) - values[mask[y][x]]
                labelled += 1
    return total / labelled


@pytest.mark.parametrize("ignore_index, aux_weight", [(255, 0.4), (1, 0.4), (255, 0.0)])
def test_loss_equals_a_slow_oracle(ignore_index, aux_weight):
    logits, aux_logits, masks = batch()
    if ignore_index != 255:
        masks[masks == 255] = ignore_index
    expected = [oracle(part, masks, ignore_index) for part in (logits, aux_logits)]
    loss, terms = SegmentationLoss(ignore_index, aux_weight)(logits, aux_logits, masks, with_terms=True)
    assert terms.tolist() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected[0] + aux_weight * expected[1], rel=1e-5)
    assert loss.dtype == torch.float32 and not terms.requires_grad
    half = SegmentationLoss(ignore_index, aux_weight)(logits.bfloat16(), aux_logits.bfloat16(), masks)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=1e-2)


def test_what_is_not_labelled_does_not_count():
    logits, aux_logits, masks = batch()
    masks[1] = 255
    logits.requires_grad_(), aux_logits.requires_grad_()
    loss = SegmentationLoss()(logits, aux_logits, masks)
    loss.backward()
    alone = SegmentationLoss()(logits[:1], aux_logits[:1], masks[:1])
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == aux_logits.grad[1].abs().sum() == 0


def test_a_batch_without_labels_has_a_loss_and_a_gradient_of_0():
    logits, aux_logits, masks = batch()
    logits.requires_grad_(), aux_logits.requires_grad_()
    loss, terms = SegmentationLoss()(logits, aux_logits, torch.full_like(masks, 255), with_terms=True)
    loss.backward()
    assert loss.item() == 0 and terms.tolist() == [0, 0]
    assert logits.grad.abs().max() == aux_logits.grad.abs().max() == 0


def test_what_does_not_fit_is_named():
    logits, aux_logits, masks = batch()
    with pytest.raises(ValueError, match="2 images have 1 masks"):
        SegmentationLoss()(logits, aux_logits, masks[:1])
    with pytest.raises(ValueError, match=r"auxiliary logits \(2, 2, 2, 4\)"):
        SegmentationLoss()(logits, aux_logits[:, :2], masks)
    with pytest.raises(ValueError, match="ignore_index 256"):
        SegmentationLoss(ignore_index=256)
    with pytest.raises(ValueError, match="aux_weight nan"):
        SegmentationLoss(aux_weight=math.nan)


def tiny_step(dtype: str = "float32") -> SegmentStep:
    torch.manual_seed(0)
    options = dict(embed_dim=16, depth=4, num_heads=2, stem_width=8)
    model = build_segmenter(
        "lvvit_t",
        crop_size=(32, 48),
        num_classes=CLASSES,
        drop_path=0.2,
        options=options,
        decoder_channels=8,
        aux_channels=8,
    )
    return SegmentStep(model.train(), SegmentationLoss(), Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), dtype)


def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (2, 3, 32, 48), generator=generator).to(torch.uint8)
    return images, torch.randint(CLASSES, (2, 32, 48), generator=generator).to(torch.uint8)


def run(step, images: Tensor, masks: Tensor, model) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(2)
    model.zero_grad()
    loss, terms = step(images, masks)
    loss.backward()
    assert loss.item() == pytest.approx(float(terms[0] + 0.4 * terms[1]), rel=1e-5)
    return loss, [parameter.grad.clone() for parameter in model.parameters()]


def test_a_step_normalises_and_gives_every_parameter_a_gradient():
    step, (images, masks) = tiny_step(), pixels()
    loss, gradients = run(step, images, masks, step.model)
    assert len(gradients) == len(list(step.model.parameters())) and all(g.isfinite().all() for g in gradients)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.manual_seed(2)
    expected = SegmentationLoss()(*step.model((images / 255 - mean) / std), masks)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_the_model_and_not_the_loss_in_it():
    step, (images, masks) = tiny_step("bfloat16"), pixels()
    dtypes = []
    step.model.classifier.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    loss, terms = step(images, masks)
    assert dtypes == [torch.bfloat16] and loss.dtype == terms.dtype == torch.float32


@pytest.mark.slow
def test_the_step_is_one_graph_whose_gradients_are_the_eager_ones():
    """Captured forward and backward; inductor's code for it takes too long here."""
    step, (images, masks) = tiny_step(), pixels()
    expected, gradients = run(step, images, masks, step.model)
    captured = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    loss, captured_gradients = run(captured, images, masks, step.model)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for actual, reference in zip(captured_gradients, gradients, strict=True):
        assert (actual - reference).norm() <= 1e-3 * reference.norm() + 1e-6
