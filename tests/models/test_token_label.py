"""A token head on timm's models, beside the stock models and beside LV-ViT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES
from torch import Tensor, nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm

from tl_fast.models import weights
from tl_fast.models.build import build_model, create, token_grid
from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.lvvit import LVViT
from tl_fast.models.mix_token import box_mask
from tl_fast.models.normalise import Normalise
from tl_fast.models.step import TrainStep
from tl_fast.models.token_label import TokenLabelModel, backbone_state_dict
from tl_fast.system.mistakes import InputError

CLASSES = 7


def small(name: str, **changes) -> LVViT | TokenLabelModel:
    family = FAMILIES[name]
    torch.manual_seed(0)
    given = dict(img_size=family.img_size, num_classes=CLASSES, options=family.options)
    return build_model(name, **{**given, **changes})


def pictures(model: nn.Module, number: int = 4) -> Tensor:
    return torch.randn(number, 3, *model.img_size, generator=torch.Generator().manual_seed(1))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_a_head_for_each_token_and_keeps_its_own_logits(name):
    family, model = FAMILIES[name], small(name)
    grid = token_grid(name, img_size=family.img_size, options=family.options)
    assert model.grid_size == grid == (family.grid, family.grid)
    images = pictures(model)
    class_logits, token_logits = model.train()(images, torch.tensor([1, 0, 2, 2]))
    assert class_logits.shape == (4, CLASSES) and token_logits.shape == (4, family.grid**2, CLASSES)
    (class_logits.square().sum() + token_logits.square().sum()).backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []

    torch.manual_seed(3)
    stock = create(name, family.img_size, num_classes=CLASSES, **family.options)
    stock.load_state_dict(backbone_state_dict(model), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), stock.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_come_row_by_row(name):
    """Pixels change the tokens of their own place most, on average over the places."""
    model = small(name).eval()
    (rows, columns), (height, width) = model.grid_size, model.img_size
    images = pictures(model, 1)
    changed = images.repeat(rows * columns, 1, 1, 1)
    noise = torch.randn(changed.shape, generator=torch.Generator().manual_seed(2))
    for place in range(rows * columns):
        top, left = place // columns, place % columns
        inside = box_mask(
            (top, left, top + 1, left + 1), (rows, columns), images.device, (height // rows, width // columns)
        )
        changed[place] += noise[place] * inside
    with torch.inference_mode():
        logits = model.token_logits(model.forward_features(torch.cat((images, changed))))
    change = (logits[1:] - logits[:1]).square().sum(-1)  # [place of the pixels, token]
    change /= change.sum(0)  # a token's own share of sensitivity
    own = change.diagonal().mean()
    assert own > 1.05 / (rows * columns), change
    transposed = change[torch.arange(rows * columns).view(rows, columns).T.flatten()].diagonal()
    assert own > transposed.mean()


def test_mixing_pixels_equals_lvvits_mixing_of_patch_embeddings():
    """Patches of a plain ViT do not overlap. An LV-ViT is given its patch embedding and weights."""
    torch.manual_seed(0)
    options = {"depth": 3, "qkv_bias": False}
    model = build_model("vit_tiny_patch16_224", img_size=96, num_classes=CLASSES, options=options)
    lvvit = LVViT(96, 192, depth=3, num_heads=3, mlp_ratio=4.0, skip_lam=1.0, num_classes=CLASSES)
    lvvit.patch_embed = model.backbone.patch_embed.proj
    for block in lvvit.blocks:  # timm's epsilon
        block.norm1.eps = block.norm2.eps = lvvit.norm.eps = 1e-6
    token_head = {f"aux_head.{key}": value for key, value in model.token_head.state_dict().items()}
    state = {key.replace("patch_embed.proj", "patch_embed"): value for key, value in backbone_state_dict(model).items()}
    lvvit.load_state_dict({**state, **token_head}, strict=True)
    images = pictures(model)
    for box in (None, (1, 2, 4, 6), torch.tensor([0, 3, 5, 5])):
        ours, theirs = model.train()(images, box), lvvit.train()(images, box)
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_an_empty_box_mixes_nothing_and_a_whole_one_swaps_the_batch():
    model = small("swin_tiny_patch4_window7_224").train()
    images = pictures(model)
    alone, tokens = model(images)
    empty, whole = model(images, (1, 1, 1, 3)), model(images, (0, 0, 4, 4))
    torch.testing.assert_close(empty, (alone, tokens), rtol=0, atol=0)
    torch.testing.assert_close(whole, (alone.flip(0), tokens), rtol=0, atol=1e-6)


def test_a_grid_that_does_not_divide_the_image_cannot_mix():
    model = build_model("resnet18", img_size=80, num_classes=CLASSES)  # 2.5 strides of 32 make 3 tokens
    assert model.grid_size == (3, 3) and not model.can_mix_tokens
    model.train()(pictures(model))
    with pytest.raises(ValueError, match=r"\(3, 3\) tokens do not divide \(80, 80\) pixels"):
        model(pictures(model), (0, 0, 1, 1))
    with pytest.raises(ValueError, match="eval mode"):
        small("resnet18").eval()(torch.zeros(2, 3, 96, 96), (0, 0, 1, 1))


def test_volo_keeps_its_own_token_head():
    """Its evaluation adds half the maximum of the token logits, as timm's does; training does not."""
    model = small("volo_d1_224")
    assert model.get_token_head() is model.backbone.aux_head and not any(
        "token_head" in key for key in model.state_dict()
    )
    images = pictures(model)
    with torch.inference_mode():
        features = model.eval().forward_features(images)
        tokens = model.token_logits(features)
        class_alone = small("volo_d1_224", eval_token_weight=0.0).eval()(images)
        torch.testing.assert_close(model(images), class_alone + 0.5 * tokens.amax(1))
        model.train().backbone.patch_embed.eval()  # whose batch norms
        torch.testing.assert_close(model(images)[0], class_alone, rtol=1e-4, atol=1e-4)


def test_eval_token_weight_adds_the_strongest_token():
    images = torch.randn(2, 3, 64, 64)
    for name in ("vit_tiny_patch16_224", "lvvit_t"):
        options = {"depth": 2}
        torch.manual_seed(0)
        model = build_model(name, img_size=64, num_classes=CLASSES, options=options, eval_token_weight=0.25).eval()
        with torch.inference_mode():
            tokens = model.token_logits(model.forward_features(images))
            with_tokens, model.eval_token_weight = model(images), 0.0
            torch.testing.assert_close(with_tokens, model(images) + 0.25 * tokens.amax(1))
    assert build_model("lvvit_t", img_size=64, num_classes=3, options=options).eval_token_weight == 0.5


def test_construction_leaves_no_trace():
    """Modes, batch norm's statistics and torch's generator are as before."""
    backbone = timm.create_model("resnet18", num_classes=CLASSES).train()
    backbone.bn1.eval()
    before, generator = parameters(backbone), torch.get_rng_state()
    nn.Linear(512, CLASSES), torch.nn.init.trunc_normal_(torch.empty(CLASSES, 512), std=0.02)
    expected = torch.get_rng_state()
    torch.set_rng_state(generator)
    TokenLabelModel(backbone, 96)
    assert torch.equal(torch.get_rng_state(), expected)  # the token head's draws alone
    assert backbone.training and not backbone.bn1.training
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    "name, options, img_size, named",
    [
        ("pit_ti_224", {}, 64, "pit_ti_224 at 64 px takes no token labels: its features .* a single token"),
        ("coat_tiny", {}, 64, "coat_tiny .*no single map or sequence"),
        ("crossvit_tiny_240", {}, 240, "crossvit_tiny_240 .*no single map or sequence"),
        ("resnet18", {}, 32, r"resnet18 .*\[2, 512, 1, 1\] are a single token"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, 64, "in training and .* in evaluation: it drops tokens"),
        ("vit_tiny_patch16_224", {"embed_width": 3}, 64, "embed_width"),
        ("vit_tinny_patch16_224", {}, 64, "vit_tinny_patch16_224' is not known to timm; near it: vit_tiny_patch16_224"),
        ("local-dir:/nowhere", {}, 64, "local-dir:/nowhere"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(name, options, img_size, named):
    with pytest.raises(InputError, match=named):
        build_model(name, img_size=img_size, num_classes=CLASSES, options=options)
    with pytest.raises(ValueError, match="0 classes"):
        TokenLabelModel(timm.create_model("resnet18", num_classes=0), 64)


def test_features_of_another_size_are_refused():
    model = small("convnext_atto").eval()
    with pytest.raises(InputError, match=r"features \[2, 320, 2, 2\] hold 4 tokens, not the 3x3"):
        model.token_logits(model.forward_features(torch.zeros(2, 3, 64, 64)))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_step_compiles_without_a_break(name):
    """And a new box does not recompile it."""
    torch._dynamo.reset()
    model = small(name).train()
    step = TrainStep(model, TokenLabelLoss(1.0, 0.5), Normalise((0.5,) * 3, (0.5,) * 3))
    images = torch.randint(0, 256, (4, 3, *model.img_size), dtype=torch.uint8)
    targets = torch.rand(4, 1 + model.grid_size[0] ** 2, CLASSES).softmax(-1)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    for box in ([0, 0, 2, 1], [1, 1, 3, 3]):
        box = torch.tensor(box)
        torch.testing.assert_close(compiled(images, targets, box), step(images, targets, box))
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(images, targets, box + 0)


def test_layer_groups_and_decay_are_the_backbones():
    model = small("vit_tiny_patch16_224")
    assert model.no_weight_decay() == {f"backbone.{name}" for name in model.backbone.no_weight_decay()}
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    theirs = timm.models.group_parameters(model.backbone, model.backbone.group_matcher(), reverse=True)
    assert groups.pop("token_head.weight") == groups.pop("token_head.bias") == max(theirs.values())
    assert groups == {f"backbone.{name}": group for name, group in theirs.items()}


# Weights from files


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_a_checkpoint_of_the_stock_model_loads_at_another_image_size(name):
    family = FAMILIES[name]
    stock = create(name, family.img_size, num_classes=CLASSES, **family.options)
    expected = create(  # timm's own way
        name,
        2 * family.img_size,
        num_classes=CLASSES,
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=stock.state_dict(), num_classes=CLASSES, source="", custom_load=False),
        **family.options,
    )
    model = small(name, img_size=2 * family.img_size)
    remarks = weights.fit(model, stock.state_dict(), Path("stock.pth"))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.backbone.state_dict()[key], value, rtol=0, atol=0)
    assert any("kept head" in remark for remark in remarks) and any("token head" in remark for remark in remarks)
    assert name.startswith("swin") or any("resized" in remark for remark in remarks)


def test_a_checkpoint_of_our_own_keeps_its_token_head():
    trained, model = small("vit_tiny_patch16_224"), small("vit_tiny_patch16_224", img_size=96)
    trained.token_head.weight.data.normal_()
    remarks = weights.fit(model, trained.state_dict(), Path("ours.safetensors"))
    assert torch.equal(model.token_head.weight, trained.token_head.weight)
    assert any("resized pos_embed from [1, 17, 192] to [1, 37, 192]" in remark for remark in remarks)
    torch.testing.assert_close(model.backbone.norm.weight, trained.backbone.norm.weight)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "volo_d1_224", "deit_tiny_distilled_patch16_224"])
def test_heads_for_other_classes_start_anew(name):
    trained, model = small(name), small(name, num_classes=3)
    before = parameters(model)
    remarks = weights.fit(model, trained.state_dict(), Path("ours.safetensors"))
    assert any("left out head" in r and "(7 classes)" in r and "the model has 3" in r for r in remarks), remarks
    heads = ("backbone.head", "backbone.aux_head", "token_head")
    for key, value in model.state_dict().items():
        expected = before[key] if key.startswith(heads) else trained.state_dict()[key]
        assert torch.equal(value, expected), key


def test_weights_of_another_model_are_refused():
    model = small("vit_tiny_patch16_224")
    for state in (small("resnet18").state_dict(), timm.create_model("resnet18", num_classes=CLASSES).state_dict()):
        with pytest.raises(weights.WeightsError, match="x.pth does not fit VisionTransformer"):
            weights.fit(model, state, Path("x.pth"))
    state = model.state_dict()
    del state["backbone.norm.weight"]
    with pytest.raises(weights.WeightsError, match=r"norm\.weight"):
        weights.fit(model, state, Path("x.pth"))
    headless = {key: value for key, value in model.backbone.state_dict().items() if not key.startswith("head.")}
    del headless["norm.weight"]
    with pytest.raises(weights.WeightsError, match=r"norm\.weight"):
        weights.fit(model, headless, Path("x.pth"))


def test_pretrained_weights_come_from_a_folder_of_timms(tmp_path):
    """`local-dir:` is timm's name for a folder with config.json and weights, which its hub downloads are, too."""
    stock = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": {"num_classes": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    name = f"local-dir:{tmp_path}"
    model = build_model(name, img_size=64, num_classes=5)
    remarks = weights.load_pretrained(model, name)
    assert any("kept head (5 classes)" in remark for remark in remarks), remarks
    for key, value in stock.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value), key
    other = build_model(name, img_size=64, num_classes=3)
    (remark,) = weights.load_pretrained(other, name)
    assert "left out head (5 classes)" in remark and torch.equal(other.backbone.norm.bias, stock.norm.bias)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="pretrained weights cannot be had"):
        weights.load_pretrained(model, name)
    with pytest.raises(InputError, match="lvvit_t: no hub holds weights for it; set init_weights"):
        weights.load_pretrained(build_model("lvvit_t", img_size=64, num_classes=3, options={"depth": 1}), "lvvit_t")
