"""Fine-tuning: from a run at one size and class count to another size, other classes and other data."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_families import FAMILIES
from small_betons import write
from tiny_runs import TINY

from tl_fast.models.build import build_model
from tl_fast.models.weights import fit
from tl_fast.training import loop as training

MODELS = {
    "lvvit_t": TINY,
    "vit_tiny_patch16_224": FAMILIES["vit_tiny_patch16_224"].options,
    "swin_tiny_patch4_window7_224": FAMILIES["swin_tiny_patch4_window7_224"].options,
}
FROZEN = dict(max_steps=1, lr=1e-12, min_lr=0.0, warmup_lr=0.0, warmup_epochs=0, ema_decay=0.0)  # as good as no step


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory, photos) -> Path:
    """A beton of the photos of three classes, without label maps."""
    path, names = tmp_path_factory.mktemp("three") / "three.beton", ["animal", "fish", "tool"]
    files = [file for name in names for file in sorted((photos / "train" / name).glob("*.jpg"))]
    labels = [names.index(file.parent.name) for file in files]
    write(path, [file.read_bytes() for file in files], class_names=names, labels=labels, max_resolution=96)
    return path


def read(summary: dict, name: str = "model") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(summary["checkpoint"]) / f"{name}.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_along_to_another_size_and_other_classes(tiny, three_classes, tmp_path, name, capsys):
    same = dict(model=name, model_kwargs=MODELS[name], batch_size=8, auto_augment=None)
    first = training.train(tiny("pretrained", img_size=64, max_steps=3, **same))
    capsys.readouterr()
    start = dict(init_weights=str(tmp_path / "pretrained"), img_size=128)
    plain = dict(train_data=str(three_classes), token_label=False, mix_token=False, mixup=0.8, cutmix=1.0)
    second = training.train(tiny("tuned", **same | start | plain | FROZEN))
    said = capsys.readouterr().out
    assert "left out" in said and "(4 classes)" in said and "the model has 3 classes" in said

    expected = build_model(name, img_size=128, num_classes=3, options=MODELS[name])
    fit(expected, read(first, "ema"), Path("x"))
    tuned, heads = read(second), 0
    for key, value in expected.state_dict().items():
        if "head" in key:
            heads += 1
            assert value.shape[0] == tuned[key].shape[0] == 3
        elif "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(tuned[key], value, rtol=0, atol=1e-6, msg=key)
    assert heads == 4


def test_label_maps_with_dense_weight_0_train_the_class_alone(tiny, betons, tmp_path):
    """As published for other data sets: the class token's target still comes from the label map."""
    training.train(tiny("pretrained", max_steps=2))
    tuned = training.train(
        tiny("tuned", init_weights=str(tmp_path / "pretrained"), dense_weight=0.0, max_steps=2, ema_decay=0.0)
    )
    before = safetensors.torch.load_file(
        next((tmp_path / "pretrained" / "checkpoints").glob("step-*")) / "ema.safetensors"
    )
    after = read(tuned)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    moved = (after["aux_head.weight"] - before["aux_head.weight"]).abs().max()
    assert moved <= 2 * 1e-3 * 0.05 * before["aux_head.weight"].abs().max()  # weight decay alone


def test_a_model_without_layer_groups_is_refused_by_name(tiny):
    same = dict(model="poolformer_s12", model_kwargs={}, img_size=64, max_steps=1)
    for name, value in (("layer_decay", 0.8), ("freeze", 1)):
        said = rf"{name} {value}: model 'poolformer_s12' \(MetaFormer\) has no layer groups .*set {name} null"
        with pytest.raises(ValueError, match=said):
            training.train(tiny(**same | {name: value}))
