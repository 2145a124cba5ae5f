"""UPerNet on LV-ViT and on timm's models: shapes, which features it reads, what trains, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES
from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay

from tl_fast.models.segmentation import Segmenter, WholeImage, build_segmenter, default_indices
from tl_fast.models.step import compiled
from tl_fast.models.token_label import backbone_of
from tl_fast.system.mistakes import InputError

CROP, CLASSES = (64, 96), 5
TINY = {
    "lvvit_t": dict(embed_dim=32, depth=4, num_heads=2, stem_width=8),
    "vit_tiny_patch16_224": dict(embed_dim=32, depth=4, num_heads=2),
    "resnet18": dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 32)),
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
}


def tiny(name: str = "lvvit_t", crop_size=CROP, options: dict | None = None, **changes) -> Segmenter:
    torch.manual_seed(0)
    arguments = dict(num_classes=CLASSES, decoder_channels=16, aux_channels=8) | changes
    return build_segmenter(name, crop_size=crop_size, options={**TINY.get(name, {}), **(options or {})}, **arguments)


def check_shapes_and_gradients(model: Segmenter, height: int, width: int) -> None:
    images = torch.randn(2, 3, height, width)
    logits, aux_logits = model.train()(images)
    assert logits.shape == (2, CLASSES, height // 4, width // 4)
    assert aux_logits.shape == (2, CLASSES, height // 16, width // 16)
    (logits.square().sum() + aux_logits.square().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        assert model.eval()(images[:1]).shape == (1, CLASSES, height // 4, width // 4)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_of_stride_4_and_every_parameter_learns(name):
    model = tiny(name)
    check_shapes_and_gradients(model, *CROP)
    fixed = name in ("lvvit_t", "vit_tiny_patch16_224")
    assert (model.input_size, model.multiple) == ((CROP, 16) if fixed else (None, 32))
    maps = model.forward_features(torch.randn(1, 3, *CROP))
    assert [tuple(features.shape[2:]) for features in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swin_tiny_patch4_window7_224", "cait_xxs24_224"])
def test_models_of_other_families(name):
    options = FAMILIES[name].options
    check_shapes_and_gradients(tiny(name, options=options | ({"depth": 4} if "depth" in options else {})), *CROP)


def test_a_network_of_any_size_takes_others_and_the_rest_refuse_them():
    images = torch.randn(1, 3, 32, 160)
    assert tiny("resnet18").eval()(images).shape == (1, CLASSES, 8, 40)
    with pytest.raises(ValueError, match=r"32x160 pixels, the model was built for \(64, 96\)"):
        tiny().eval()(images)
    with pytest.raises(ValueError, match="32x40 pixels: both sides must be multiples of 32"):
        tiny("resnet18").eval()(torch.randn(1, 3, 32, 40))


def test_features_are_those_behind_the_chosen_blocks():
    model = tiny(options={"depth": 6}, out_indices=(0, 1, 3, -2)).eval()
    assert model.out_indices == [0, 1, 3, 4] and len(model.backbone.blocks) == 5
    outputs = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    images = torch.randn(2, 3, *CROP)
    maps = model.forward_features(images)
    for number, scaled, layer in zip(model.out_indices, maps, model.neck, strict=True):
        features = outputs[number][:, 1:].transpose(1, 2).reshape(2, 32, 4, 6)
        torch.testing.assert_close(layer(features), scaled)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_the_backbones_features_are_stock_timms(name):
    model = tiny(name).eval()
    size = {} if name == "resnet18" else {"img_size": CROP}
    stock = timm.create_model(name, num_classes=7, **TINY[name], **size).eval()
    wrong = stock.load_state_dict(model.backbone.state_dict(), strict=False)
    assert not wrong.unexpected_keys and all(key.split(".")[0] in ("head", "norm", "fc") for key in wrong.missing_keys)
    images, features = torch.randn(1, 3, *CROP), []
    stages = stock.blocks if name.startswith("vit") else [getattr(stock, f"layer{number}") for number in (1, 2, 3, 4)]
    for stage in stages:
        stage.register_forward_hook(lambda module, arguments, output: features.append(output))
    with torch.no_grad():
        stock(images)
        maps = model._backbone_maps(images)
    for ours, theirs in zip(maps, features, strict=True):
        if theirs.ndim == 3:
            theirs = theirs[:, 1:].transpose(1, 2).reshape(ours.shape)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "strides, expected",
    [
        ([16] * 16, [6, 9, 12, 15]),  # LV-ViT-S, M and L in the published configs
        ([16] * 20, [10, 13, 16, 19]),
        ([16] * 24, [14, 17, 20, 23]),
        ([16] * 12, [2, 5, 8, 11]),
        ([16] * 4, [0, 1, 2, 3]),
        ([4, 8, 16, 32], [0, 1, 2, 3]),
        ([2, 4, 8, 16, 16, 32], [1, 2, 4, 5]),
    ],
)
def test_which_features_are_read(strides, expected):
    assert default_indices(strides) == expected


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("volo_d1_224", {}, r"strides \[8, 16\]: there must be 4, 8, 16 and 32"),
        ("lvvit_t", {"options": {"depth": 3}}, "3 blocks"),
        ("lvvit_t", {"crop_size": 100}, "100"),
        ("resnet18", {"crop_size": 48}, "48x48 pixels: both sides must be multiples of 32"),
        ("lvvit_t", {"out_indices": (0, 2, 1, 3)}, r"out_indices \[0, 2, 1, 3\] must be four of 0..3, ascending"),
        ("lvvit_t", {"out_indices": (1, 2, 3, 4)}, r"out_indices \[1, 2, 3, 4\]"),
        ("resnet18", {"out_indices": (0, 1, 2, 3)}, r"features \[0, 1, 2, 3\] have strides \[2, 4, 8, 16\]"),
        ("lvvit_t", {"num_classes": 0}, "num_classes 0"),
        ("lvvit_t", {"options": {"wings": 2}}, "wings"),
        ("lvvit_x", {}, "not known to timm.*lvvit_"),
    ],
)
def test_what_does_not_fit_is_named(name, changes, message):
    with pytest.raises(InputError, match=message):
        tiny(name, **changes)


def test_one_image_trains_only_where_batch_norm_has_other_statistics():
    model, image = tiny().train(), torch.randn(1, 3, *CROP)
    with pytest.raises(ValueError, match="a batch of one image in training"):
        model(image)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert len(model(image)) == 2
    assert not nn.SyncBatchNorm.convert_sync_batchnorm(tiny()).train()._needs_two_images()


def test_layer_groups_end_behind_the_backbones_and_positions_do_not_decay():
    model = tiny()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["backbone.pos_embed"] == 0 and groups["backbone.blocks.3.mlp.fc1.weight"] == 4
    own = {group for name, group in groups.items() if not name.startswith("backbone.")}
    assert own == {5}
    decay_groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    (undecayed,) = [group for group in decay_groups if group["weight_decay"] == 0]
    ids = {id(parameter) for parameter in undecayed["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in ids}
    assert {"backbone.pos_embed", "backbone.cls_token", "neck.0.1.weight", "decoder.feature_norms.0.weight"} <= names
    assert "classifier.bias" in names and not names & {"classifier.weight", "neck.0.0.weight", "aux_head.0.weight"}
    assert backbone_of(model) is model.backbone


def test_spreading_one_pixel_is_the_decoders_interpolation():
    psp, features = tiny().eval().decoder.psp, torch.randn(2, 32, 4, 6)
    assert isinstance(psp.blocks[0], WholeImage)
    spread = psp(features)
    psp.blocks[0] = nn.Sequential(*psp.blocks[0])
    torch.testing.assert_close(psp(features), spread)


class Spread(nn.Module):
    """What UPerNet's pyramid does to a block's pixel."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.block(features), size=features.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.slow
def test_inductors_gradient_of_spreading_one_pixel_is_the_eager_one():
    torch.manual_seed(0)
    layers, features = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1)], torch.randn(2, 16, 4, 6)
    gradients = []
    for block, compile_it in ((nn.Sequential(*layers), False), (WholeImage(*layers), True)):
        spread = Spread(block)
        block.zero_grad()
        (compiled(spread, features.device) if compile_it else spread)(features).square().mean().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        model = tiny(drop_path=0.3).train()
        model.set_grad_checkpointing(enable)
        assert model.backbone.grad_checkpointing == enable
        torch.manual_seed(1)
        sum(logits.sum() for logits in model(torch.randn(2, 3, *CROP))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_copy_and_a_loaded_state_compute_the_same():
    model, other = tiny(), tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, *CROP)
    with torch.no_grad():
        expected = model.eval()(images)
        assert torch.equal(other.eval()(images), expected) and torch.equal(copy.deepcopy(model)(images), expected)
