"""Confusion matrices of segmentations, and the scores that they give.

The scores are mmsegmentation's: mIoU is the mean over the classes that occur in the truth or among the predictions,
mean accuracy the mean over those that occur in the truth. torchmetrics' MulticlassJaccardIndex averages over the same
classes; its MulticlassAccuracy also counts a class that is predicted but nowhere true, at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_fast.system.mistakes import InputError


@dataclass(frozen=True)
class SegmentationScores:
    """What a confusion matrix says.

    miou, mean_accuracy, pixel_accuracy: in percent.
    iou: float64 [C], percent; NaN for a class that is neither true nor predicted anywhere.
    accuracy: float64 [C], percent of a class's pixels that were predicted as it; NaN for a class that is nowhere true.
    pixels: int64 [C], the labelled pixels of each class.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: Tensor
    accuracy: Tensor
    pixels: Tensor


def new_matrix(num_classes: int, device: torch.device) -> Tensor:
    """An empty confusion matrix int64 [C, C]: a row a true class, a column a predicted class."""
    return torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)


def update(matrix: Tensor, predictions: Tensor, masks: Tensor, ignore_index: int) -> None:
    """Count pixels into `matrix` int64 [C, C], in place and exactly.

    predictions, masks: integer classes of any one shape, on the matrix's device. Pixels whose mask is `ignore_index`
    do not count. The host waits for the device. Raises InputError where a mask holds another value outside 0..C-1.
    """
    num_classes = len(matrix)
    ignored, unknown = num_classes**2, num_classes**2 + 1
    truth = masks.flatten().long()
    cell = truth * num_classes + predictions.flatten().long()
    cell = torch.where(truth < num_classes, cell, unknown)
    cell = torch.where(truth == ignore_index, ignored, cell)
    counts = torch.bincount(cell, minlength=ignored + 1)
    if len(counts) > ignored + 1:
        outside = truth[(truth >= num_classes) & (truth != ignore_index)]
        raise InputError(
            f"a mask has class {int(outside.max())}, the model classes 0..{num_classes - 1} and {ignore_index} for"
            " pixels that do not count: convert the masks for these classes, or use another model"
        )
    matrix += counts[:ignored].view_as(matrix)


def scores(matrix: Tensor) -> SegmentationScores:
    """Scores of a confusion matrix int64 [C, C], a row a true class. Raises InputError where no pixel was counted."""
    matrix = matrix.cpu()
    if not matrix.any():
        raise InputError("no labelled pixels to evaluate")
    hits, pixels, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    # 0 / 0 is NaN, which nanmean leaves out.
    iou = 100 * hits.double() / (pixels + predicted - hits)
    accuracy = 100 * hits.double() / pixels
    return SegmentationScores(
        miou=iou.nanmean().item(),
        mean_accuracy=accuracy.nanmean().item(),
        pixel_accuracy=100 * hits.sum().item() / pixels.sum().item(),
        iou=iou,
        accuracy=accuracy,
        pixels=pixels,
    )
