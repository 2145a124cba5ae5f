"""Random erasing: noise that depends on seed and place alone, the same however a device fills it in."""

import types

import numpy as np
import pytest
import torch

from tl_fast.models import erase as module
from tl_fast.models.erase import erase, noise
from tl_fast.plan import records as plan

SIZE = 48


def seeds_of(n: int, seed: int = 0) -> torch.Tensor:
    plans = plan.draw(seed, 0, np.arange(n), np.full(n, 300), np.full(n, 400), plan.Augment(erase=1.0))
    return torch.from_numpy(plans["noise"].view(np.int64).copy()), torch.from_numpy(plan.erase_boxes(plans, SIZE))


def splitmix(seed: int, place: int) -> int:
    """Output number `place` of SplitMix64 (Steele et al. 2014) begun at `seed`, in Python integers."""
    mask = (1 << 64) - 1
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def test_noise_is_splitmix_and_box_muller():
    seeds, _ = seeds_of(20)
    places = [0, 1, 77, 3 * 224 * 224, 2**40]
    for seed in seeds.tolist():
        words = [splitmix(seed % 2**64, place) for place in places]
        expected = [
            np.sqrt(-2 * np.log((w // 2**40 + 0.5) / 2**24)) * np.cos(2 * np.pi * (w % 2**24 + 0.5) / 2**24)
            for w in words
        ]
        np.testing.assert_allclose(noise(torch.tensor(seed), torch.tensor(places)), expected, atol=2e-5)
    assert splitmix(1234567, 0) == 6457827717110365317  # the generator's published answer


def test_noise_is_standard_normal_and_uncorrelated():
    seeds, _ = seeds_of(40)
    values = noise(seeds[:, None], torch.arange(5000)).double().numpy()
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    assert min(stats.kstest(row, "norm").pvalue for row in values) > 1e-5
    assert np.isfinite(values).all() and 4 < np.abs(values).max() < 6
    limit = 5 / np.sqrt(values.shape[1])
    correlations = np.corrcoef(values)
    assert np.abs(correlations - np.eye(40)).max() < limit
    for lag in (1, 2, SIZE, SIZE * SIZE):
        assert np.abs(np.mean(values[:, lag:] * values[:, :-lag])) < 5 / np.sqrt(40 * 2000)
    neighbours = noise(torch.arange(40)[:, None], torch.arange(5000)).numpy()  # seeds that are not random either
    assert np.abs(np.corrcoef(neighbours) - np.eye(40)).max() < limit


def test_only_the_box_is_filled():
    seeds, boxes = seeds_of(32)
    boxes[::4] = torch.tensor([5, 3, 0, 0])
    images = torch.randn(32, 3, SIZE, SIZE)
    before = images.clone()
    assert erase(images, boxes, seeds) is images
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        changed = images[b] != before[b]
        assert changed[:, top : top + height, left : left + width].all() and int(changed.sum()) == 3 * height * width
        box = images[b, :, top : top + height, left : left + width]
        assert torch.equal(box.flatten(), noise(seeds[b], torch.arange(3 * height * width)))


def test_noise_does_not_depend_on_the_batch_or_on_what_was_there():
    seeds, boxes = seeds_of(24)
    together = erase(torch.zeros(24, 3, SIZE, SIZE), boxes, seeds)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(erase(torch.zeros(24, 3, SIZE, SIZE), boxes[order], seeds[order]), together[order])
    assert torch.equal(erase(torch.zeros(1, 3, SIZE, SIZE), boxes[7:8], seeds[7:8]), together[7:8])
    top, left, height, width = boxes[7].tolist()
    other = erase(torch.rand(1, 3, SIZE, SIZE), boxes[7:8], seeds[7:8])
    assert torch.equal(*(images[0, :, top : top + height, left : left + width] for images in (other, together[7:8])))
    assert not torch.equal(erase(torch.zeros(24, 3, SIZE, SIZE), boxes, seeds.roll(1)), together)


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on another device than the CPU, so that `erase` goes the way it goes there."""

    @property
    def device(self):
        return types.SimpleNamespace(type="elsewhere")


class TorchElsewhere:
    """torch, but what is made on that device is made on the CPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def arange(self, *arguments, device):
        assert device.type == "elsewhere"
        return torch.arange(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_devices_fill_in_what_the_cpu_does(monkeypatch, dtype, memory_format):
    seeds, boxes = seeds_of(32)
    boxes[::4] = torch.tensor([0, 0, 0, 0])
    boxes[1] = torch.tensor([SIZE - 3, 0, 3, SIZE])
    images = torch.randn(32, 3, SIZE, SIZE).to(dtype).to(memory_format=memory_format)
    expected = erase(images.clone(), boxes, seeds)
    monkeypatch.setattr(module, "torch", TorchElsewhere())
    result = erase(images.as_subclass(Elsewhere), boxes, seeds).as_subclass(torch.Tensor)
    assert result.dtype == dtype and torch.equal(result, expected)
    assert not torch.equal(result, images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_fills_in_what_the_cpu_does():
    seeds, boxes = seeds_of(32)
    images = torch.randn(32, 3, SIZE, SIZE)
    result = erase(images.cuda(), boxes.cuda(), seeds.cuda()).cpu()
    torch.testing.assert_close(result, erase(images, boxes, seeds), rtol=0, atol=1e-4)


@pytest.mark.parametrize("boxes, seeds", [((3, 4), (4,)), ((4, 3), (4,)), ((4, 4), (3,)), ((4, 4), (4, 1))])
def test_shapes_that_do_not_fit_are_refused(boxes, seeds):
    with pytest.raises(ValueError, match="boxes must be"):
        erase(torch.zeros(4, 3, 8, 8), torch.zeros(boxes, dtype=torch.int32), torch.zeros(seeds, dtype=torch.int64))
