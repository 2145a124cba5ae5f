"""Windows, scales and flips in segmentation, against a slow oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tl_fast.system.mistakes import InputError
from tl_fast.training.windows import Inference, probabilities, segment

FILL = 200, 10, 90


def positional(images: torch.Tensor) -> torch.Tensor:
    """Logits [B, 4, h/4, w/4] of uint8 windows: they depend on the pixels and on the position in the window."""
    pooled = F.avg_pool2d(images.float() / 64, 4)
    rows = torch.linspace(-1, 2, pooled.shape[2]).view(1, 1, -1, 1)
    columns = torch.linspace(3, -1, pooled.shape[3])
    return torch.cat([pooled * (1 + rows), (columns * rows).expand(len(images), 1, *pooled.shape[2:])], dim=1)


def pointwise(images: torch.Tensor) -> torch.Tensor:
    """Logits [B, 3, h, w] of every pixel by itself."""
    return images.float() / 50


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A smooth image uint8 [3, H, W]."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), np.uint8)
    return torch.from_numpy(np.array(Image.fromarray(noise).resize((width, height)))).permute(2, 0, 1).contiguous()


def slow_bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[C, h, w] in another size: between the centres of the four nearest cells, beyond the border as at it."""
    corners = []
    for old, new in zip(values.shape[1:], size, strict=True):
        centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(centre).astype(int)
        corners.append((low, np.minimum(low + 1, old - 1), centre - low))
    (top, bottom, down), (left, right, along) = corners
    rows = values[:, top] * (1 - down)[:, None] + values[:, bottom] * down[:, None]
    return rows[:, :, left] * (1 - along) + rows[:, :, right] * along


def oracle(call, image: torch.Tensor, size: tuple[int, int], inference: Inference) -> np.ndarray:
    """Probabilities [C, *size], one window at a time, in float64; crop and stride are pairs."""
    total = []
    for scale in inference.scales:
        height, width = image.shape[1:]
        if inference.base_size:
            long, short = inference.base_size
            scale = min(long * scale / max(height, width), short * scale / min(height, width))
        height, width = (math.floor(side * scale + 0.5) for side in (height, width))
        planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in image]
        resized = np.stack([plane.resize((width, height), Image.Resampling.BILINEAR) for plane in planes])
        for mirrored in [False, True] if inference.flip else [False]:
            pixels = resized[:, :, ::-1] if mirrored else resized
            high, wide = (max(a, b) for a, b in zip((height, width), inference.crop, strict=True))
            canvas = np.tile(np.array(FILL, np.float32)[:, None, None], (1, high, wide))
            canvas[:, :height, :width] = pixels
            sums, counts = 0.0, np.zeros((high, wide))
            for top in range(0, high + inference.stride[0], inference.stride[0]):
                for left in range(0, wide + inference.stride[1], inference.stride[1]):
                    y, x = min(top, high - inference.crop[0]), min(left, wide - inference.crop[1])
                    if (y, x) != (top, left) and not (
                        (y == top or top - inference.stride[0] < y) and (x == left or left - inference.stride[1] < x)
                    ):
                        continue  # the window before this one reached the border
                    box = slice(y, y + inference.crop[0]), slice(x, x + inference.crop[1])
                    window = torch.from_numpy(canvas[:, *box].round().astype(np.uint8))
                    logits = np.zeros((4, high, wide))
                    logits[:, *box] = slow_bilinear(call(window[None])[0].double().numpy(), inference.crop)
                    sums, counts[box] = sums + logits, counts[box] + 1
            mean = (sums / counts)[:, :height, :width]
            mean = slow_bilinear(mean[:, :, ::-1] if mirrored else mean, size)
            powers = np.exp(mean - mean.max(axis=0))
            total.append(powers / powers.sum(axis=0))
    return np.mean(total, axis=0)


CASES = {
    "rows and columns of windows": ((70, 100), {}),
    "the last window ends at the border": ((32 + 2 * 20, 40 + 3 * 28), {}),
    "lower than a window": ((20, 100), {}),
    "narrower than a window": ((70, 30), {}),
    "smaller than a window": ((20, 30), {}),
    "scales and flips": ((50, 70), {"scales": (0.5, 1.75), "flip": True}),
    "fitted into a size": ((50, 70), {"base_size": (200, 60), "scales": (0.75, 1.25)}),
    "fitted by its longer side": ((30, 100), {"base_size": (80, 60)}),
}


@pytest.mark.parametrize("case", CASES)
def test_windows_are_those_of_the_oracle(case):
    shape, options = CASES[case]
    inference = Inference(crop=(32, 40), stride=(20, 28), fill=FILL, batch=3, **options)
    images = torch.stack([photo(*shape, seed) for seed in range(2)])
    size = 61, 83
    values = probabilities(positional, images, size, inference)
    assert values.shape == (2, 4, *size) and values.dtype == torch.float32
    for image, ours in zip(images, values, strict=True):
        # Where images are resized, a pixel may be rounded the other way.
        tolerance = 2e-3 if options else 1e-5
        np.testing.assert_allclose(ours.numpy(), oracle(positional, image, size, inference), atol=tolerance)


def test_a_whole_image_is_one_window_of_a_multiple():
    shapes = []

    def call(images):
        shapes.append(tuple(images.shape))
        return pointwise(images)

    images = torch.stack([photo(50, 70, seed) for seed in range(2)])
    values = probabilities(call, images, (50, 70), Inference(mode="whole", multiple=32, fill=FILL))
    assert shapes == [(2, 3, 64, 96)]
    torch.testing.assert_close(values, pointwise(images).softmax(dim=1))


def test_mirrored_and_moved_windows_give_back_the_same():
    """A network that looks at every pixel by itself."""
    image = photo(90, 130)[None]
    expected = pointwise(image).softmax(dim=1)
    for options in ({}, {"flip": True}, {"mode": "whole", "flip": True}):
        inference = Inference(crop=(64, 48), stride=(30, 48), **options)
        torch.testing.assert_close(probabilities(pointwise, image, (90, 130), inference), expected)


def test_scales_give_back_about_the_same():
    image = photo(80, 100)[None]
    inference = Inference(crop=64, stride=40, scales=(1.0, 1.5), flip=True)
    values = probabilities(pointwise, image, (80, 100), inference)
    torch.testing.assert_close(values, pointwise(image).softmax(dim=1), atol=0.03, rtol=0)


def test_one_scale_of_a_base_size_equals_another_base_size():
    image = photo(50, 70)[None]
    smaller, larger = (
        probabilities(positional, image, (50, 70), Inference(crop=32, stride=20, **options))
        for options in ({"base_size": (400, 100), "scales": (0.5,)}, {"base_size": (200, 50)})
    )
    assert torch.equal(smaller, larger)


def test_windows_of_different_images_go_together_and_several_networks_see_them():
    batches = []

    def counted(images):
        batches.append(tuple(images.shape))
        return positional(images)

    shapes = [(40, 60), (32, 32), (70, 32), (20, 30)]  # 4, 1, 3 and 1 windows
    images = [photo(*shape) for shape in shapes]
    inference = Inference(crop=32, stride=28, batch=4, scales=(1.0,))
    tasks = [(image, shape, number) for number, (image, shape) in enumerate(zip(images, shapes, strict=True))]
    results = list(segment([counted, lambda windows: -positional(windows)], tasks, inference))
    windows = sum(size for size, *_ in batches)
    assert [key for key, _ in results] == [0, 1, 2, 3]
    assert batches[:-1] == [(4, 3, 32, 32)] * (len(batches) - 1) and windows == 4 + 1 + 3 + 1
    for (_, (values, opposite)), image, shape in zip(results, images, shapes, strict=True):
        torch.testing.assert_close(values.softmax(dim=0), probabilities(positional, image[None], shape, inference)[0])
        torch.testing.assert_close(opposite.argmax(dim=0), values.argmin(dim=0))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"mode": "crop"}, "mode must be one of slide, whole, got 'crop'"),
        ({"crop": 32, "stride": 33}, "stride at most crop, got crop 32 and stride 33"),
        ({"crop": (32, 0)}, "at least 1 pixel"),
        ({"scales": ()}, "scales must be"),
        ({"scales": (1.0, -0.5)}, "scales must be .*-0.5"),
        ({"base_size": (512, 0)}, "base_size"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        Inference(**options)
