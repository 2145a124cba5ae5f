"""Confusion matrices and scores of segmentations, against torchmetrics and against mmsegmentation's formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tl_fast.system import torchvision_shim  # noqa: F401, before torchmetrics imports torchvision
from tl_fast.system.mistakes import InputError
from tl_fast.training.confusion import new_matrix, scores, update

CPU = torch.device("cpu")


def random_case(seed: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number of classes, predictions and masks [2, 17, 23]: a third of the pixels ignored; some classes in neither, in
    the truth alone, or among the predictions alone."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(2, 40))
    true, predicted = (rng.permutation(num_classes)[: rng.integers(1, num_classes + 1)] for _ in range(2))
    masks = rng.choice(true, (2, 17, 23))
    hit = (rng.random(masks.shape) < 0.5) & np.isin(masks, predicted)
    predictions = np.where(hit, masks, rng.choice(predicted, masks.shape))
    masks[rng.random(masks.shape) < 1 / 3] = 255
    return num_classes, torch.from_numpy(predictions), torch.from_numpy(masks).to(torch.uint8)


def matrix_of(num_classes: int, predictions: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Counted in two batches."""
    matrix = new_matrix(num_classes, CPU)
    for pair in zip(predictions, masks, strict=True):
        update(matrix, *pair, 255)
    return matrix


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_torchmetrics(seed):
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassConfusionMatrix,
        MulticlassJaccardIndex,
    )

    num_classes, predictions, masks = random_case(seed)
    matrix = matrix_of(num_classes, predictions, masks)
    values = scores(matrix)

    def theirs(metric, **options):
        return metric(num_classes, ignore_index=255, **options)(predictions, masks.long())

    assert torch.equal(matrix, theirs(MulticlassConfusionMatrix))
    percent = lambda value: pytest.approx(100 * value.numpy(), rel=1e-5)
    assert values.miou == percent(theirs(MulticlassJaccardIndex, average="macro"))
    assert values.pixel_accuracy == percent(theirs(MulticlassAccuracy, average="micro"))
    # Per class they say 0 where there is nothing to divide by.
    assert values.iou.nan_to_num(0).numpy() == percent(theirs(MulticlassJaccardIndex, average="none"))
    assert values.accuracy.nan_to_num(0).numpy() == percent(theirs(MulticlassAccuracy, average="none"))
    assert torch.equal(values.pixels, torch.bincount(masks[masks != 255].long(), minlength=num_classes))
    # Their mean accuracy counts a class that is predicted alone, at 0.
    predicted_alone = (values.pixels == 0) & ~values.iou.isnan()
    occurring, true = (~values.iou.isnan()).sum().item(), (values.pixels > 0).sum().item()
    assert occurring == true + predicted_alone.sum().item()
    mean_accuracy = theirs(MulticlassAccuracy, average="macro") * occurring / true
    assert values.mean_accuracy == percent(mean_accuracy)


def mmseg_scores(num_classes: int, predictions: np.ndarray, masks: np.ndarray) -> tuple[float, float, float]:
    """mIoU, mAcc and aAcc as mmsegmentation's `intersect_and_union` and `total_area_to_metrics` define them."""
    kept = masks != 255
    predictions, masks = predictions[kept], masks[kept]
    classes = np.arange(num_classes)[:, None]
    true, predicted = masks == classes, predictions == classes
    both = (true & predicted).sum(axis=1)
    with np.errstate(invalid="ignore"):
        iou = both / (true | predicted).sum(axis=1)
        accuracy = both / true.sum(axis=1)
    return 100 * np.nanmean(iou), 100 * np.nanmean(accuracy), 100 * both.sum() / true.sum()


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_mmsegmentation(seed):
    num_classes, predictions, masks = random_case(seed)
    values = scores(matrix_of(num_classes, predictions, masks))
    figures = values.miou, values.mean_accuracy, values.pixel_accuracy
    assert figures == pytest.approx(mmseg_scores(num_classes, predictions.numpy(), masks.numpy()), rel=1e-12)


def test_the_cases_have_what_the_scores_differ_in():
    """Classes that are nowhere, that are true alone, and that are predicted alone."""
    kinds = set()
    for seed in range(20):
        matrix = matrix_of(*random_case(seed))
        kinds |= set(zip((matrix.sum(dim=1) > 0).tolist(), (matrix.sum(dim=0) > 0).tolist(), strict=True))
    assert len(kinds) == 4


def test_sums_are_exact_beyond_what_floats_hold():
    matrix = new_matrix(2, CPU)
    matrix[0, 0] = 2**53
    update(matrix, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.uint8), 255)
    assert matrix.tolist() == [[2**53 + 3, 0], [0, 0]]


def test_another_ignore_index_may_be_a_class():
    matrix = new_matrix(3, CPU)
    update(matrix, torch.tensor([1, 2, 1]), torch.tensor([0, 2, 1], dtype=torch.uint8), ignore_index=0)
    assert matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_unknown_classes_and_empty_sets_are_refused():
    matrix = new_matrix(3, CPU)
    with pytest.raises(InputError, match=r"a mask has class 9, the model classes 0\.\.2 and 255"):
        update(matrix, torch.tensor([0, 1, 2, 1]), torch.tensor([3, 9, 0, 255], dtype=torch.uint8), 255)
    assert not matrix.any()
    with pytest.raises(InputError, match="no labelled pixels"):
        scores(matrix)
