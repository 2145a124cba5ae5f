"""Validation: several models on one pass over the data."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import TINY
from torch._dynamo.utils import counters

from tl_fast.models.lvvit import LVViT
from tl_fast.pipeline.loader import Loader
from tl_fast.system.ranks import Ranks
from tl_fast.training import accuracy as evaluation
from tl_fast.training.accuracy import Classifier, accuracy

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def models() -> list[LVViT]:
    """Two of other weights and, in their batch norms, other statistics; in training mode."""
    torch.manual_seed(1)
    models = [LVViT(img_size=64, num_classes=4, **TINY) for _ in range(2)]
    for model in models:
        model(torch.randn(8, 3, 64, 64))
    return models


class Counted:
    """A loader that counts how often it is gone through."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.passes = loader, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.loader)


def test_two_models_on_one_pass_have_the_figures_of_two_passes(tiny, betons, models):
    config = tiny(num_classes=4)
    with Loader(betons / "val.beton", 8, image_size=64, grid=4, train=False, threads=1) as loader:
        batches = Counted(loader)
        classifiers = [Classifier(model, config, ALONE.device) for model in models]
        together = accuracy(classifiers, batches, ALONE)
        assert batches.passes == 1
        apart = [accuracy([classifier], loader, ALONE)[0] for classifier in classifiers]
        assert together == apart and together[0]["loss"] != together[1]["loss"]
        assert [values["samples"] for values in together] == [29, 29]  # three batches of 8 and one of 5
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        for model, values in zip(models, together, strict=True):
            with torch.no_grad():
                hits = torch.cat(
                    [
                        model.eval()((batch.images / 255 - mean) / deviation).argmax(dim=1) == batch.labels
                        for batch in loader
                    ]
                )
            assert values["top1"] == pytest.approx(100 * hits.double().mean().item())


def test_models_are_in_their_mode_again_after_an_error(tiny, models):
    models[1].eval()

    def damaged():
        assert not models[0].training
        raise RuntimeError("damaged")
        yield

    with pytest.raises(RuntimeError, match="damaged"):
        accuracy([Classifier(model, tiny(), ALONE.device) for model in models], damaged(), ALONE)
    assert [model.training for model in models] == [True, False]


def test_whole_batches_alone_are_compiled(tiny, betons, models, monkeypatch):
    """Once a model; the figures stay."""
    built, shapes = [], []

    def compiled(module, device):
        built.append(device)

        def run(images):
            shapes.append(tuple(images.shape))
            return module(images)

        return run

    monkeypatch.setattr(evaluation, "compiled", compiled)
    config = tiny(num_classes=4)
    with Loader(betons / "val.beton", 8, image_size=64, grid=4, train=False, threads=1) as loader:
        eager = accuracy([Classifier(model, config, ALONE.device) for model in models], loader, ALONE)
        assert not built
        classifiers = [Classifier(model, config, ALONE.device, loader.batch_size) for model in models]
        assert [accuracy(classifiers, loader, ALONE) for _ in range(2)] == [eager, eager]
    assert built == [ALONE.device] * 2 and shapes == [(8, 3, 64, 64)] * (2 * 3 * 2)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_figures_are_the_eager_ones(tiny, betons, models, tmp_path, monkeypatch):
    """Through inductor, in one compilation for both models."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    config, before = tiny(num_classes=4), counters["stats"]["unique_graphs"]
    with Loader(betons / "val.beton", 8, image_size=64, grid=4, train=False, threads=1) as loader:
        eager, compiled, again = (
            accuracy(classifiers, loader, ALONE)
            for classifiers in (
                [Classifier(model, config, ALONE.device) for model in models],
                *[[Classifier(model, config, ALONE.device, loader.batch_size) for model in models]] * 2,
            )
        )
    assert counters["stats"]["unique_graphs"] == before + 1 and again == compiled
    for expected, values in zip(eager, compiled, strict=True):
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-5) and values["top1"] == expected["top1"]
