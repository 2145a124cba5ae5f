"""Mixing on the device: equal to timm's Mixup for the same lambda or box, one graph, no read on the host."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm.data.mixup

from tl_fast.models.erase import erase
from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.lvvit import LVViT
from tl_fast.models.mixup import mix
from tl_fast.models.normalise import Normalise
from tl_fast.models.step import TrainStep

BATCH, HEIGHT, WIDTH, CLASSES, SMOOTHING = 4, 32, 48, 7, 0.1
WHOLE = (0, 0, HEIGHT, WIDTH)
MIXINGS = [
    (*WHOLE, 0.0),
    (*WHOLE, 0.3),
    (*WHOLE, 0.9),
    (*WHOLE, 1.0),
    (0, 0, 0, 0, 1.0),
    (5, 7, 21, 48, 1.0),
    (0, 3, 1, 4, 1.0),
]


def by_timm(monkeypatch, images: Tensor, labels: Tensor, mixing: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """timm's Mixup with its draws replaced by this one."""
    *box, share = mixing
    cutmix = share == 1.0 and tuple(box) != WHOLE
    top, left, bottom, right = box
    mixup = timm.data.mixup.Mixup(1.0, 1.0, label_smoothing=SMOOTHING, num_classes=CLASSES)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (0.5 if cutmix else 1.0 - share, cutmix))
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda *_, **__: (top, bottom, left, right))
    return mixup(images.clone(), labels)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and the labels smoothed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((BATCH, 3, HEIGHT, WIDTH), generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return images, labels, F.one_hot(labels, CLASSES) * (1 - SMOOTHING) + SMOOTHING / CLASSES


@pytest.mark.parametrize("mixing", MIXINGS)
def test_mixing_equals_timms(monkeypatch, mixing):
    images, labels, targets = batch()
    kept = images.clone(), targets.clone()
    ours = mix(images, targets, torch.tensor(mixing))
    for actual, expected in zip(ours, by_timm(monkeypatch, images, labels, mixing), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(images, kept[0]) and torch.equal(targets, kept[1])
    if mixing[4] in (0.0, 1.0):  # copies, bit for bit
        assert torch.equal(ours[0], by_timm(monkeypatch, images, labels, mixing)[0])


def test_no_value_is_read_on_the_host():
    """Meta tensors have no values, so a read raises."""
    with torch.device("meta"):
        images, targets = mix(torch.empty(2, 3, 16, 16), torch.empty(2, 5), torch.empty(5))
    assert images.shape == (2, 3, 16, 16) and targets.shape == (2, 5)


def make_step() -> TrainStep:
    torch.manual_seed(0)
    size = dict(img_size=(HEIGHT, WIDTH), embed_dim=32, depth=2, num_heads=2, stem_width=8, num_classes=CLASSES)
    normalise = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return TrainStep(LVViT(**size).train(), TokenLabelLoss(1.0, 0.0), normalise)


def erased() -> dict[str, Tensor]:
    boxes = torch.tensor([[0, 0, 0, 0], [3, 5, 20, 30], [20, 40, 12, 4], [0, 0, 32, 48]], dtype=torch.int32)
    return {"erase_boxes": boxes, "noise": torch.arange(BATCH)}


@pytest.mark.parametrize("mixing", [MIXINGS[1], MIXINGS[5]])
def test_a_step_trains_on_erased_images_that_timm_mixed(monkeypatch, mixing):
    step, (_, labels, targets) = make_step(), batch()
    pixels = torch.randint(256, (BATCH, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    loss, _ = step(pixels, targets, mixing=torch.tensor(mixing), **erased())
    loss.backward()
    gradients = [p.grad.clone() for p in step.model.parameters()]
    step.zero_grad()
    images, mixed = by_timm(monkeypatch, erase(step.normalise(pixels), *erased().values()), labels, mixing)
    expected = F.cross_entropy(step.model(images)[0], mixed)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, parameter in zip(gradients, step.model.parameters(), strict=True):
        if parameter.grad is None:
            assert not gradient.any()  # the token head's, which DDP waits for
        else:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_one_graph_serves_every_mixing():
    torch._dynamo.reset()
    step, counter = make_step(), CompileCounter()
    network = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    pixels = torch.zeros((BATCH, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    for mixing in MIXINGS:
        network(pixels, batch()[2], None, None, *erased().values(), torch.tensor(mixing))[0].backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()
    graph = torch.compile(step, backend="aot_eager", fullgraph=True)
    pixels = torch.randint(256, pixels.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    arguments = pixels, batch()[2], None, None, *erased().values(), torch.tensor(MIXINGS[5])
    torch.testing.assert_close(graph(*arguments)[0], step(*arguments)[0])
