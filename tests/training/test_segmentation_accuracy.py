"""Scores of segmentation models on batches: exact, over ranks, with images of different sizes."""

from __future__ import annotations

import csv
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks
from tl_fast.training.accuracy import Classifier
from tl_fast.training.confusion import scores
from tl_fast.training.segmentation_accuracy import count_pixels, segmentation_accuracy, write_table
from tl_fast.training.windows import Inference

ALONE = Ranks(0, 1, torch.device("cpu"))
CONFIG = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), dtype="float32")
SHAPES = [(2, 40, 60), (1, 33, 32), (3, 20, 30)]  # samples, rows, columns of three batches
SLIDE = Inference(crop=32, stride=24, batch=4)
OPTIONS = dict(num_classes=5, ignore_index=255, samples=6, inference=SLIDE)


@pytest.fixture
def batches() -> list[SimpleNamespace]:
    """Three batches of images of different sizes with masks, a fifth of their pixels not labelled."""
    rng, made, first = np.random.default_rng(0), [], 0
    for count, rows, columns in SHAPES:
        masks = rng.integers(0, 5, (count, rows, columns)).astype(np.uint8)
        masks[rng.random(masks.shape) < 0.2] = 255
        images = torch.from_numpy(rng.integers(0, 256, (count, 3, rows, columns), np.uint8))
        ids = torch.arange(first, first + count)
        made.append(SimpleNamespace(images=images, masks=torch.from_numpy(masks), sample_ids=ids))
        first += count
    return made


@pytest.fixture
def segmenters() -> list[Classifier]:
    """Two of other weights, in training mode; each looks at every pixel by itself."""
    torch.manual_seed(1)
    return [Classifier(nn.Conv2d(3, 5, 1), CONFIG, ALONE.device) for _ in range(2)]


def expected(segmenter: Classifier, batches: list[SimpleNamespace]) -> np.ndarray:
    """The confusion matrix, pixel by pixel."""
    matrix = np.zeros((5, 5), np.int64)
    for batch in batches:
        with torch.no_grad():
            classes = segmenter(batch.images).argmax(dim=1)
        for truth, predicted in zip(batch.masks.flatten().tolist(), classes.flatten().tolist(), strict=True):
            if truth != 255:
                matrix[truth, predicted] += 1
    return matrix


def test_two_segmenters_on_one_pass_have_the_figures_of_two(batches, segmenters):
    matrices, visits = count_pixels(segmenters, iter(batches), ALONE, **OPTIONS)
    for segmenter, matrix in zip(segmenters, matrices, strict=True):
        assert matrix.numpy().tolist() == expected(segmenter, batches).tolist()
        assert segmenter.model.training
    assert not torch.equal(*matrices) and visits.tolist() == [1] * 6
    together = segmentation_accuracy(segmenters, batches, ALONE, **OPTIONS)
    for matrix, figures in zip(matrices, together, strict=True):
        assert figures["miou"] == scores(matrix).miou and set(figures) == {"miou", "mean_accuracy", "pixel_accuracy"}


class Threads(Ranks):
    """Ranks that are threads of this process."""

    meeting = threading.Barrier(2, timeout=60)
    given: dict[int, torch.Tensor] = {}

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.given[self.rank] = values.clone()
        self.meeting.wait()
        return values.copy_(self.given[0] + self.given[1])


def test_sums_over_ranks_are_those_of_one(batches, segmenters):
    """One rank has two batches, the other one."""
    results = {}

    def run(rank: int) -> None:
        model = nn.Conv2d(3, 5, 1)
        model.load_state_dict(segmenters[0].model.state_dict())
        ranks = Threads(rank, 2, ALONE.device)
        results[rank] = count_pixels([Classifier(model, CONFIG, ALONE.device)], batches[rank::2], ranks, **OPTIONS)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = count_pixels(segmenters[:1], batches, ALONE, **OPTIONS)
    for result in (results[0], results[1]):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, alone, strict=True))


def test_predictions_are_given_once_a_sample_at_the_masks_size(batches, segmenters):
    taken = {}

    def take(sample_id, image, classes):
        assert sample_id not in taken and classes.dtype == torch.uint8
        assert torch.equal(segmenters[0](image[None]).argmax(dim=1)[0], classes.long())
        taken[sample_id] = tuple(classes.shape)

    count_pixels(segmenters, batches, ALONE, take=take, **OPTIONS)
    assert taken == dict(enumerate(shape for count, *sides in SHAPES for shape in [tuple(sides)] * count))


def test_whole_groups_alone_have_the_compiled_number(batches, segmenters):
    """Windows of all batches fill the groups, so that one compiled shape serves all but the last of them."""
    numbers = []

    class Counted(Classifier):
        def __call__(self, images):
            numbers.append(len(images))
            return super().__call__(images)

    count_pixels([Counted(segmenters[0].model, CONFIG, ALONE.device)], batches, ALONE, **OPTIONS)
    assert numbers[:-1] == [4] * (len(numbers) - 1) and sum(numbers) == 2 * 6 + 2 + 3


def test_a_class_that_the_model_lacks_is_an_error(batches, segmenters):
    batches[1].masks[0, 3, 4] = 5
    with pytest.raises(InputError, match="a mask has class 5"):
        count_pixels(segmenters, batches, ALONE, **OPTIONS)
    assert all(segmenter.model.training for segmenter in segmenters)


def test_the_table_has_a_row_a_class(tmp_path):
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix[:2, :3] = torch.tensor([[6, 1, 1], [0, 4, 0]])
    path = tmp_path / "new" / "classes.csv"
    write_table(path, scores(matrix), ["road", "sky, clear", "car", "tree"])
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", "name", "iou", "accuracy", "pixels"]
    assert rows == [
        ["0", "road", "75.0000", "75.0000", "8"],
        ["1", "sky, clear", "80.0000", "100.0000", "4"],
        ["2", "car", "0.0000", "nan", "0"],
        ["3", "tree", "nan", "nan", "0"],
    ]
    write_table(path, scores(matrix), [])
    assert path.read_text().splitlines()[1] == "0,,75.0000,75.0000,8"
