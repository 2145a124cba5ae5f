"""Scores of segmentation models on a beton's samples, over all ranks."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tl_fast.pipeline.batch import Batch
from tl_fast.system.atomic import write_atomic
from tl_fast.system.ranks import Ranks
from tl_fast.training.accuracy import Classifier, in_eval_mode
from tl_fast.training.confusion import SegmentationScores, new_matrix, scores, update
from tl_fast.training.windows import Inference, segment

# A sample's id, its image uint8 [3, H, W] and its predicted classes uint8 [H, W].
Taker = Callable[[int, Tensor, Tensor], None]


@torch.inference_mode()
def count_pixels(
    segmenters: Sequence[Classifier],
    batches: Iterable[Batch],
    ranks: Ranks,
    *,
    num_classes: int,
    ignore_index: int,
    samples: int,
    inference: Inference,
    take: Taker | None = None,
) -> tuple[Tensor, Tensor]:
    """Confusion matrices int64 [S, C, C] of S segmenters over all ranks, and how often each sample was evaluated, int64
    [samples], both on the host.

    batches: this rank's share, with masks, whose size the predictions have; ranks may differ in the number of batches.
    samples: in the whole set. take: gets every prediction of the first segmenter. The models are put in eval mode and
    back. Raises InputError where a mask has a class outside 0..C-1 that is not `ignore_index`.
    """
    matrices = [new_matrix(num_classes, ranks.device) for _ in segmenters]
    visits = torch.zeros(samples, dtype=torch.int64)
    with in_eval_mode([segmenter.model for segmenter in segmenters]):
        for (sample_id, image, mask), answers in segment(segmenters, _images(batches, ranks.device), inference):
            predictions = [class_scores.argmax(dim=0).to(torch.uint8) for class_scores in answers]
            for matrix, predicted in zip(matrices, predictions, strict=True):
                update(matrix, predicted, mask, ignore_index)
            visits[sample_id] += 1
            if take is not None:
                take(sample_id, image, predictions[0])
    # One message for all of them.
    sums = ranks.sum(torch.cat([*(matrix.flatten() for matrix in matrices), visits.to(ranks.device)])).cpu()
    return sums[:-samples].view(len(segmenters), num_classes, num_classes), sums[-samples:]


def _images(
    batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, Tensor, Tensor]]]:
    """The samples of batches as `windows.segment` takes them; the key is (sample id, image, mask)."""
    for batch in batches:
        images, masks = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.masks))
        for sample_id, image, mask in zip(batch.sample_ids.tolist(), images, masks, strict=True):
            yield image, tuple(mask.shape), (sample_id, image, mask)


def segmentation_accuracy(
    segmenters: Sequence[Classifier], batches: Iterable[Batch], ranks: Ranks, **options
) -> list[dict[str, float]]:
    """Of each segmenter `miou`, `mean_accuracy`, `pixel_accuracy` in percent; arguments are those of `count_pixels`.
    Raises InputError where no pixel is labelled."""
    matrices, _ = count_pixels(segmenters, batches, ranks, **options)
    return [in_percent(scores(matrix)) for matrix in matrices]


def in_percent(result: SegmentationScores) -> dict[str, float]:
    """The scores that are one number each."""
    return {name: getattr(result, name) for name in ("miou", "mean_accuracy", "pixel_accuracy")}


def write_table(path: Path, result: SegmentationScores, class_names: Sequence[str]) -> None:
    """A CSV file with a row a class: its number, name, IoU and accuracy in percent (nan where they are not defined),
    labelled pixels. class_names: may be empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "name", "iou", "accuracy", "pixels"])
    columns = result.iou.tolist(), result.accuracy.tolist(), result.pixels.tolist()
    for c, (iou, accuracy, pixels) in enumerate(zip(*columns, strict=True)):
        table.writerow([c, class_names[c] if class_names else "", f"{iou:.4f}", f"{accuracy:.4f}", pixels])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
