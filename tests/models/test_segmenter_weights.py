"""Weights of classifiers and of segmenters in a segmenter: the same features, and what is adapted or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tl_fast.models.build import build_model
from tl_fast.models.lvvit import LVViT, resize_pos_embed
from tl_fast.models.segmentation import Segmenter, build_segmenter
from tl_fast.models.token_label import backbone_of, backbone_state_dict
from tl_fast.models.weights import WeightsError, fit, load_pretrained
from tl_fast.system.mistakes import InputError
from tl_fast.training import checkpoint

OPTIONS = {
    "lvvit_t": dict(embed_dim=32, depth=6, num_heads=2, stem_width=8),
    "vit_tiny_patch16_224": dict(embed_dim=32, depth=6, num_heads=2),
    "resnet18": dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 32)),
}
DEPTHS = {"lvvit_t": (0, 1, 2, 4), "vit_tiny_patch16_224": (0, 1, 2, 4), "resnet18": (1, 2, 3, 4)}
FILE = Path("weights.pth")  # named in messages alone


def segmenter(name: str = "lvvit_t", size=64, num_classes: int = 5, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return build_segmenter(
        name,
        crop_size=size,
        num_classes=num_classes,
        options=OPTIONS[name],
        out_indices=DEPTHS[name],
        decoder_channels=8,
        aux_channels=8,
    ).eval()


def classifier(name: str = "lvvit_t", size=64) -> nn.Module:
    torch.manual_seed(7)
    return build_model(name, img_size=size, num_classes=11, options=OPTIONS[name]).eval()


def features(network: nn.Module, name: str) -> list[torch.Tensor]:
    images = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        return network.forward_intermediates(images, indices=list(DEPTHS[name]), intermediates_only=True)


@pytest.mark.parametrize("stock", [True, False], ids=["timm's names", "a run's names"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_classifiers_weights_give_the_same_features(name, stock):
    trained, model = classifier(name), segmenter(name)
    own = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    remarks = fit(model, backbone_state_dict(trained) if stock else trained.state_dict(), FILE)
    assert remarks == [f"{FILE}: took the backbone's features without classifiers; the segmentation heads start anew"]
    expected = features(backbone_of(trained), name)
    assert all(torch.equal(a, b) for a, b in zip(features(model.backbone, name), expected, strict=True))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())


def test_files_of_any_origin_load(tmp_path):
    state = classifier().state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for file in ("a.pth", "model.safetensors"):
        model = segmenter()
        remarks = checkpoint.load_weights(model, tmp_path / file)
        assert remarks[-1].endswith("the segmentation heads start anew")
        assert torch.equal(model.backbone.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("name", ["lvvit_t", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("trained_size, size", [(64, (96, 128)), ((32, 64), 64)])
def test_positions_are_resized_to_the_crop(name, trained_size, size):
    trained, model = classifier(name, trained_size), segmenter(name, size)
    remarks = fit(model, trained.state_dict(), FILE, trained_size)
    assert any("pos_embed" in remark and "resized" in remark for remark in remarks) or name.startswith("vit")
    grid, old_grid = (
        [s // 16 for s in (side if isinstance(side, tuple) else (side, side))] for side in (size, trained_size)
    )
    expected = resize_pos_embed(backbone_of(trained).pos_embed, tuple(grid), tuple(old_grid))
    torch.testing.assert_close(model.backbone.pos_embed, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_segmenters_weights_load_whole(name):
    trained, model = segmenter(name, seed=1), segmenter(name)
    assert fit(model, trained.state_dict(), FILE, 64) == []
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.state_dict().items())


def test_a_segmenters_weights_fit_other_crops_and_classes():
    trained, model = segmenter(seed=1), segmenter(size=(64, 96), num_classes=3)
    before = model.classifier.weight.clone()
    resized, left_out = fit(model, trained.state_dict(), FILE, 64)
    assert resized == f"{FILE}: resized pos_embed from 16 to 24 tokens"
    assert "left out classifier and aux_classifier (5 classes), as the model has 3 classes" in left_out
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(model.decoder.fusion_block[0].weight, trained.decoder.fusion_block[0].weight)
    assert torch.equal(model.aux_head[0].weight, trained.aux_head[0].weight)
    assert torch.equal(model.neck[0][1].running_var, trained.neck[0][1].running_var)


def test_what_does_not_fit_is_named():
    model, other = segmenter(), LVViT(64, **{**OPTIONS["lvvit_t"], "depth": 7})
    with pytest.raises(WeightsError, match=r"weights.pth does not fit LVViT: .*unexpected \['blocks.6"):
        fit(model, other.state_dict(), FILE)
    with pytest.raises(WeightsError, match="weights.pth does not fit LVViT: missing"):
        fit(model, classifier("resnet18").state_dict(), FILE)
    with pytest.raises(WeightsError, match="weights.pth does not fit ResNet"):
        fit(segmenter("resnet18"), classifier().state_dict(), FILE)
    state = model.state_dict()
    with pytest.raises(WeightsError, match=r"does not fit Segmenter: missing \['decoder.psp.out_conv.0.weight'\]"):
        fit(model, {key: value for key, value in state.items() if key != "decoder.psp.out_conv.0.weight"}, FILE)
    state["aux_head.0.weight"] = torch.zeros(4, 32, 3, 3)
    with pytest.raises(WeightsError, match=r"does not fit Segmenter: \['aux_head.0.weight'\] are of other shape"):
        fit(model, state, FILE)


def test_pretrained_weights_are_the_backbones():
    model, trained = segmenter("resnet18"), classifier("resnet18").backbone
    model.create_backbone = lambda pretrained, num_classes: trained
    (remark,) = load_pretrained(model, "resnet18")
    assert remark.startswith("resnet18's pretrained weights: took the backbone's features")
    expected = features(trained, "resnet18")
    assert all(torch.equal(a, b) for a, b in zip(features(model.backbone, "resnet18"), expected, strict=True))
    with pytest.raises(InputError, match="lvvit_t: no hub holds weights"):
        load_pretrained(segmenter(), "lvvit_t")
