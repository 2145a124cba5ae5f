"""Classes of every pixel of images of any size, from a network that takes windows of one size.

As in mmsegmentation: logits of overlapping windows are averaged, resized to the size that is asked for, and made
probabilities; these are averaged over scales and flips. Two things differ. Images are resized with antialiasing, as in
training. Images smaller than a window are padded on the right and below, as training's crops are, and the padding's
logits are cut off.

Windows of several images, also of images of different sizes, go through the network together.

Shapes: C classes, h x w pixels of a window, H x W of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides, both_sides

MODES = ("slide", "whole")

# uint8 images [B, 3, h, w] to float32 logits [B, C, h / s, w / s] for any stride s.
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inference:
    """How images become what a network takes.

    mode: "slide", windows of `crop` pixels every `stride` pixels, the last one of a row or column moved back into the
        image; or "whole", one window as large as the image.
    crop, stride: pixels, one number or (height, width).
    scales: factors of the image's size; the probabilities of all scales are averaged.
    flip: average with the mirrored image's probabilities too.
    base_size: pixels (of the longer side, of the shorter side) that the image is made to fit, its aspect kept, before
        `scales` applies, as mmsegmentation's img_scale; None: the image as it is.
    multiple: mode "whole" pads the image's sides to multiples of it.
    fill: RGB 0..255 of the padding.
    batch: windows that go through the network at once.

    Raises InputError for values that cannot work.
    """

    mode: str = "slide"
    crop: Sides = 512
    stride: Sides = 341
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    base_size: tuple[int, int] | None = None
    multiple: int = 1
    fill: tuple[int, int, int] = (124, 116, 104)
    batch: int = 8

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        sides = zip(both_sides(self.crop), both_sides(self.stride), strict=True)
        if not all(1 <= stride <= crop for crop, stride in sides):
            raise InputError(
                f"crop and stride must be at least 1 pixel, and stride at most crop, got crop {self.crop} and stride"
                f" {self.stride}"
            )
        if not self.scales or min(self.scales) <= 0:
            raise InputError(f"scales must be one or more factors above 0, got {list(self.scales)}")
        if self.base_size is not None and min(self.base_size) < 1:
            raise InputError(f"base_size must be two sides of at least 1 pixel, got {self.base_size}")
        if min(self.multiple, self.batch) < 1:
            raise InputError(f"multiple and batch must be at least 1, got {self.multiple} and {self.batch}")

    def scaled(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """(height, width) in pixels of an image at one of the scales, rounded as mmcv rounds."""
        if self.base_size is not None:
            long, short = (int(side * scale) for side in self.base_size)
            scale = min(long / max(height, width), short / min(height, width))
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


@dataclass(frozen=True)
class _View:
    """An image at one scale, mirrored or not, and the windows on it.

    size: (height, width) of the scaled image. padded: the same with padding. window: (height, width).
    starts: top and left of every window.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    mirrored: bool
    window: tuple[int, int]
    starts: tuple[tuple[int, int], ...]

    def windows(self, image: Tensor, fill: Tensor) -> Iterator[Tensor]:
        """The windows uint8 [3, h, w] on an image uint8 [3, H, W]; fill: uint8 [3, 1, 1], the padding's colour."""
        drawn = _resized(image, self.size)
        if self.mirrored:
            drawn = drawn.flip(-1)
        if self.padded != self.size:
            canvas = fill.repeat(1, *self.padded)
            canvas[:, : self.size[0], : self.size[1]] = drawn
            drawn = canvas
        for top, left in self.starts:
            yield drawn[:, top : top + self.window[0], left : left + self.window[1]]

    def average(self, sums: Tensor) -> Tensor:
        """Mean logits [C, height, width] of the image from their sums over windows [C, *padded], which are
        overwritten."""
        if len(self.starts) > 1:
            counts = sums.new_zeros(self.padded)
            for top, left in self.starts:
                counts[top : top + self.window[0], left : left + self.window[1]] += 1
            sums /= counts
        mean = sums[:, : self.size[0], : self.size[1]]
        return mean.flip(-1) if self.mirrored else mean


def _views(height: int, width: int, inference: Inference) -> list[_View]:
    """The views on an image of these sides in pixels."""
    views = []
    for scale, mirrored in itertools.product(inference.scales, (False, True)[: 1 + inference.flip]):
        size = inference.scaled(height, width, scale)
        if inference.mode == "slide":
            window, stride = both_sides(inference.crop), both_sides(inference.stride)
        else:
            window = stride = tuple(-(-side // inference.multiple) * inference.multiple for side in size)
        padded = tuple(max(side, least) for side, least in zip(size, window, strict=True))
        starts = itertools.product(*map(_starts, padded, window, stride))
        views.append(_View(size, padded, mirrored, window, tuple(starts)))
    return views


def _starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows over a side of `length` >= `window` pixels."""
    count = -(-(length - window) // stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] in another size, bilinear with antialiasing."""
    if images.shape[-2:] == size:
        return images
    resized = F.interpolate(images[None].float(), size, mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


class _Task:
    """An image on its way: collects its windows' logits, in their order, view after view.

    scores: of every call, float32 [C, *size], after the last window (see `segment`).
    """

    def __init__(self, sides: tuple[int, int], size: tuple[int, int], key: Any, inference: Inference) -> None:
        self.key, self._size = key, size
        self.views = _views(*sides, inference)
        self._windows = iter([(view, start) for view in self.views for start in view.starts])
        self.scores: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, logits: Sequence[Tensor]) -> bool:
        """Take every call's logits [C, h / s, w / s] of the next window; True after the last one."""
        view, start = next(self._windows)
        self._add_window([_bilinear(one, view.window) for one in logits], view, start)
        if start != view.starts[-1]:
            return False
        means = [_bilinear(view.average(sums), self._size) for sums in self._sums]
        if len(self.views) == 1:
            self.scores = means
        elif view is self.views[0]:
            self.scores = [mean.softmax(dim=0) for mean in means]
        else:
            for total, mean in zip(self.scores, means, strict=True):
                total += mean.softmax(dim=0)
        return view is self.views[-1]

    def _add_window(self, logits: list[Tensor], view: _View, start: tuple[int, int]) -> None:
        if len(view.starts) == 1:
            self._sums = logits
            return
        if start == view.starts[0]:
            self._sums = [one.new_zeros(len(one), *view.padded) for one in logits]
        top, left = start
        for sums, one in zip(self._sums, logits, strict=True):
            sums[:, top : top + view.window[0], left : left + view.window[1]] += one


def _bilinear(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 [C, h, w] in another size."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]


def segment(
    calls: Sequence[Call], images: Iterable[tuple[Tensor, tuple[int, int], Any]], inference: Inference
) -> Iterator[tuple[Any, list[Tensor]]]:
    """Scores of the classes of images' pixels, from several networks at once: the class of the highest score is the
    predicted one. With several scales or flips they are sums of probabilities, else the logits.

    images: of each one its pixels uint8 [3, H, W] on the networks' device, the (height, width) of the result, and
    anything to know it by, its key. Yields in the same order the key, and of every call the scores float32
    [C, height, width]. Takes images from the iterable until their windows fill a batch.
    """
    for group in _groups(images, inference):
        stacked = torch.stack([window for _, window in group])
        for (task, _), *logits in zip(group, *(call(stacked) for call in calls), strict=True):
            if task.add(logits):
                yield task.key, task.scores


def _groups(
    images: Iterable[tuple[Tensor, tuple[int, int], Any]], inference: Inference
) -> Iterator[list[tuple[_Task, Tensor]]]:
    """The windows uint8 [3, h, w] of all images, each with its image's task, in groups of one size and at most
    `inference.batch`."""
    group: list[tuple[_Task, Tensor]] = []
    fill = torch.tensor(inference.fill, dtype=torch.uint8).view(3, 1, 1)
    for image, size, key in images:
        task = _Task(image.shape[-2:], size, key, inference)
        fill = fill.to(image.device)
        for view in task.views:
            for window in view.windows(image, fill):
                if group and (len(group) == inference.batch or window.shape != group[0][1].shape):
                    yield group
                    group = []
                group.append((task, window))
    if group:
        yield group


def probabilities(call: Call, images: Tensor, size: tuple[int, int], inference: Inference) -> Tensor:
    """Probabilities float32 [B, C, *size] of the classes of every pixel; images: uint8 [B, 3, H, W] on the device of
    `call`; size: (height, width) of the result."""
    results = segment([call], ((image, size, None) for image in images), inference)
    scores = torch.stack([values for _, (values,) in results])
    views = len(inference.scales) * (1 + inference.flip)
    return scores.softmax(dim=1) if views == 1 else scores / views
