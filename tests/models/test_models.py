"""LV-ViT against the published maths (golden files), its MixToken contract, its timm face and its behaviour under
torch.compile."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm
from timm.models import group_parameters

from tl_fast.models.lvvit import Block, DropPath, LVViT, Mlp, resize_pos_embed

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = json.loads((GOLDEN / "lvvit_state_dict_shapes.json").read_text())
PARAMETERS = {
    "lvvit_t": 8.53,
    "lvvit_s": 26.15,
    "lvvit_m": 55.83,
    "lvvit_l": 150.02,
}  # millions, from the golden README


@pytest.fixture(scope="module")
def tiny():
    with np.load(GOLDEN / "lvvit_tiny.npz") as file:
        return {
            name: json.loads(str(file[name])) if name == "config" else torch.from_numpy(file[name])
            for name in file.files
        }


@pytest.fixture
def tiny_model(tiny) -> LVViT:
    return golden_model(tiny)


def golden_model(tiny, **changes) -> LVViT:
    """The golden file's model with its published weights; `changes` are further arguments."""
    config = dict(tiny["config"])
    # What LVViT always is: patch 16, the 4-layer stem
    assert config.pop("patch_size") == 16 and config.pop("p_emb") == "4_2"
    model = LVViT(**config, **changes)
    model.load_state_dict(
        {name.removeprefix("weights."): value for name, value in tiny.items() if name.startswith("weights.")}
    )
    return model.eval()


def small(**changes) -> LVViT:
    torch.manual_seed(0)
    return LVViT(
        **{**dict(img_size=(64, 96), embed_dim=32, depth=2, num_heads=2, stem_width=8, num_classes=5), **changes}
    )


def freeze_norms(model: LVViT) -> LVViT:
    """Train mode with the stem's batch norms in eval mode, so that an image's embedding doesn't depend on the rest of
    the batch."""
    model.train()
    for module in model.patch_embed.modules():
        module.training = False
    return model


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_eval_and_features_equal_the_golden_file(tiny, tiny_model):
    with torch.no_grad():
        close(tiny_model(tiny["image"]), tiny["eval_logits"])
        close(tiny_model.forward_features(tiny["image"]), tiny["features"])
        close(tiny_model(tiny["image"].contiguous(memory_format=torch.channels_last)), tiny["eval_logits"])


@pytest.mark.parametrize("as_tensor", [True, False])
def test_train_mode_equals_the_golden_file(tiny, tiny_model, as_tensor):
    box = tiny["mix_box"] if as_tensor else tuple(tiny["mix_box"].tolist())
    cls_logits, token_logits = freeze_norms(tiny_model)(tiny["image"], box)
    close(cls_logits, tiny["train_cls_logits"])
    close(token_logits, tiny["train_token_logits"])


def compare_with_golden(tiny, tolerance=1e-4, **switches):
    """Evaluation and training's outputs of the golden model, built with `switches`."""
    model = golden_model(tiny, **switches)
    with torch.no_grad():
        close(model(tiny["image"]), tiny["eval_logits"], tolerance)
        close(model.forward_features(tiny["image"]), tiny["features"], tolerance)
    cls_logits, token_logits = freeze_norms(model)(tiny["image"], tiny["mix_box"])
    close(cls_logits, tiny["train_cls_logits"], tolerance)
    close(token_logits, tiny["train_token_logits"], tolerance)


def test_a_stem_of_space_to_depth_equals_the_golden_file(tiny):
    compare_with_golden(tiny, stem_space_to_depth=True)


def test_the_tanh_gelu_is_near_the_golden_file(tiny):
    """The golden file's activations are small, where the two hardly differ: 1.1e-5 in the features. A layer with larger
    ones shows which of them is computed, and the stated bound."""
    compare_with_golden(tiny, gelu="tanh")
    exact, tanh = Mlp(1, 1), Mlp(1, 1, gelu="tanh")
    x = torch.linspace(-8, 8, 10_001).view(-1, 1)
    for mlp in (exact, tanh):
        mlp.fc1 = mlp.fc2 = torch.nn.Identity()
    close(exact(x), x * torch.special.ndtr(x), 1e-5)
    assert 4.7e-4 < (exact(x) - tanh(x)).abs().max() < 4.8e-4


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_backends_equal_the_golden_file(tiny, backend):
    with sdpa_kernel(backend):
        compare_with_golden(tiny)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_space_to_depth_is_the_convolution_with_equal_gradients(layout):
    stem = small(stem_space_to_depth=True).patch_embed.double()
    x = torch.randn(3, 3, 32, 48, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    pairs = []
    for out in (stem._conv1_space_to_depth(x), stem.conv1(x)):
        assert out.is_contiguous(memory_format=layout)
        pairs.append([out, *torch.autograd.grad(out.square().sum(), [x, stem.conv1.weight])])
    for actual, expected in zip(*pairs, strict=True):
        close(actual, expected, 1e-10)


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_names_shapes_and_parameter_counts_are_published(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SIZES[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PARAMETERS[name]
    assert model.blocks[0].skip_lam == {"lvvit_t": 1, "lvvit_s": 2, "lvvit_m": 2, "lvvit_l": 3}[name]


def test_timm_registration():
    assert set(timm.list_models("lvvit_*")) == set(SIZES) and not timm.list_pretrained("lvvit_*")
    model = timm.create_model("lvvit_t", img_size=(32, 64), num_classes=7, drop_path_rate=0.1)
    assert (
        model.img_size == (32, 64) and model.head.out_features == model.aux_head.out_features == model.num_classes == 7
    )
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)
    assert model.default_cfg["mean"] == (0.485, 0.456, 0.406) and model.default_cfg["crop_pct"] == 0.9
    with pytest.raises(ValueError, match="--checkpoint"):
        timm.create_model("lvvit_t", pretrained=True)


def test_the_last_blocks_features_are_those_before_the_golden_files_norm(tiny, tiny_model):
    image, depth = tiny["image"], len(tiny_model.blocks)
    with torch.no_grad():
        final, features = tiny_model.forward_intermediates(image, indices=[0, -1])
        normed = tiny_model.forward_intermediates(image, [-1], norm=True, output_fmt="NLC", intermediates_only=True)
        tokens = tiny_model.forward_intermediates(image, depth, True, output_fmt="NLC", intermediates_only=True)
    close(final, tiny["features"])
    close(normed[0], tiny["features"][:, 1:])
    assert len(features) == 2 and len(tokens) == depth
    assert features[1].shape == (len(image), tiny_model.embed_dim, *tiny_model.grid_size)
    for of_block, map_of_block in ((tokens[0], features[0]), (tokens[-1], features[1])):
        patches, class_token = of_block
        assert torch.equal(map_of_block.flatten(2).transpose(1, 2), patches)
        assert class_token.shape == (len(image), 1, tiny_model.embed_dim)
    close(tiny_model.norm(torch.cat(tokens[-1][::-1], 1)), tiny["features"])
    with pytest.raises(ValueError, match="output_fmt 'NHWC'"):
        tiny_model.forward_intermediates(image, output_fmt="NHWC")


def test_pruning_keeps_the_features_and_removes_what_they_do_not_need():
    model, images = small(depth=4).eval(), torch.randn(2, 3, 64, 96)
    expected = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 2]
    assert {name.split(".")[0] for name in model.state_dict()} == {"cls_token", "pos_embed", "patch_embed", "blocks"}
    assert len(model.blocks) == 3
    pruned = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, expected, strict=True))


def test_timm_gives_features_only():
    model = timm.create_model("lvvit_t", img_size=(32, 64), features_only=True, out_indices=(1, 5)).eval()
    assert model.feature_info.channels() == [240, 240] and model.feature_info.reduction() == [16, 16]
    features = model(torch.randn(1, 3, 32, 64))
    assert [tuple(feature.shape) for feature in features] == 2 * [(1, 240, 2, 4)]


def test_layer_groups_go_from_the_stem_to_the_heads():
    model = small()
    groups = group_parameters(model, model.group_matcher())
    depth = len(model.blocks)
    assert list(groups) == list(range(depth + 2))
    parts = [{name.split(".")[0] for name in groups[0]}, {name.split(".")[0] for name in groups[depth + 1]}]
    assert parts == [{"cls_token", "pos_embed", "patch_embed"}, {"norm", "head", "aux_head"}]
    for block in range(depth):
        assert groups[1 + block] == [f"blocks.{block}.{name}" for name, _ in model.blocks[block].named_parameters()]


def test_no_weight_decay_names_exist():
    model = small()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"} <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("size", [16, 80, (48, 112)])
def test_any_size_divisible_by_16(size):
    height, width = (size, size) if isinstance(size, int) else size
    model, tokens = small(img_size=size), height * width // 256
    images = torch.randn(2, 3, height, width)
    assert model.eval()(images).shape == (2, 5) and model.forward_features(images).shape == (2, 1 + tokens, 32)
    cls_logits, token_logits = model.train()(images)
    assert cls_logits.shape == (2, 5) and token_logits.shape == (2, tokens, 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(img_size=100), "100"),
        (dict(img_size=(64, 0)), r"\(64, 0\)"),
        (dict(num_heads=3), "num_heads 3"),
        (dict(drop_path_rate=1.0), "1.0"),
        (dict(num_classes=-1), "-1"),
        (dict(skip_lam=0.0), "skip_lam"),
        (dict(residual_dtype="float16"), "residual_dtype 'float16'"),
        (dict(gelu="erf"), "gelu 'erf'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "box, message",
    [
        ((0, 0, 5, 2), "4x6 token grid"),
        ((3, 0, 2, 2), "4x6"),
        ((0, 0, 2), "3 numbers"),
        (torch.zeros(3), r"\(3,\)"),
        ((-1, 0, 2, 2), "-1"),
    ],
)
def test_boxes_that_do_not_fit_are_named(box, message):
    with pytest.raises(ValueError, match=message):
        small().train()(torch.zeros(2, 3, 64, 96), box)


def test_wrong_image_size_and_box_in_eval_mode_are_refused():
    with pytest.raises(ValueError, match="80x96.*64x96"):
        small().eval()(torch.zeros(1, 3, 80, 96))
    with pytest.raises(ValueError, match="eval mode"):
        small().eval()(torch.zeros(1, 3, 64, 96), (0, 0, 1, 1))


@torch.no_grad()
def test_eval_adds_half_the_largest_token_logit():
    model, images = small().eval(), torch.randn(3, 3, 64, 96)
    features = model.forward_features(images)
    tokens = torch.stack([model.aux_head(features[:, 1 + n]) for n in range(24)])  # token by token
    close(model(images), model.head(features[:, 0]) + 0.5 * tokens.max(0).values, 1e-6)


BOXES = [(0, 0, 4, 6), (1, 2, 3, 3), (0, 5, 4, 6), (2, 2, 2, 4), (0, 0, 0, 0)]


@torch.no_grad()
@pytest.mark.parametrize("box", BOXES)
def test_mixing_takes_the_box_from_the_flipped_batch(box):
    model, images = freeze_norms(small()), torch.randn(3, 3, 64, 96)
    expected = model.patch_embed(images)  # [B,D,4,6], then token by token
    plain = expected.clone()
    for b in range(3):
        for row in range(box[0], box[2]):
            for column in range(box[1], box[3]):
                expected[b, :, row, column] = plain[2 - b, :, row, column]
    expected = expected.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    from_tuple, from_tensor = model(images, box), model(images, torch.tensor(box))
    handle.remove()
    close(seen[0][:, 1:], expected, 1e-6)
    close(seen[0][:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(3, 1, 32), 1e-6)
    assert all(torch.equal(*pair) for pair in zip(from_tuple, from_tensor, strict=False))


@torch.no_grad()
@pytest.mark.parametrize("box", BOXES)
def test_un_mixing_returns_each_token_to_its_image(box):
    """With blocks that pass tokens through, every token's logits come from its own image whatever the box."""
    model, images = freeze_norms(small()), torch.randn(4, 3, 64, 96)
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_(), layer.bias.zero_()
    close(model(images, box)[1], model(images)[1], 1e-6)


@torch.no_grad()
def test_attention_sees_the_mixed_batch():
    model, images = freeze_norms(small()), torch.randn(4, 3, 64, 96)
    plain, empty, mixed = model(images), model(images, (2, 2, 2, 2)), model(images, (0, 0, 2, 3))
    assert torch.equal(plain[0], empty[0]) and torch.equal(plain[1], empty[1])
    assert (plain[0] - mixed[0]).abs().max() > 1e-4 and (plain[1] - mixed[1]).abs().max() > 1e-4


def test_reset_classifier_resets_both_heads():
    model = small().eval()
    trunk = {name: value.clone() for name, value in model.state_dict().items() if "head" not in name}
    model.reset_classifier(9)
    assert model.num_classes == 9 and model.get_classifier() is model.head
    for head in (model.head, model.aux_head):
        assert head.weight.shape == (9, 32) and 0.005 < head.weight.std() < 0.04 and not head.bias.any()
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 9)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trunk.items())
    model.reset_classifier(0)
    images = torch.randn(2, 3, 64, 96)
    assert torch.equal(model(images), model.forward_features(images)[:, 0])


def test_initialisation_is_the_published_one():
    model = small(embed_dim=96)
    for weight in (
        model.pos_embed,
        model.cls_token,
        model.blocks[0].attn.qkv.weight,
        model.blocks[1].mlp.fc2.weight,
        model.head.weight,
    ):
        assert 0.016 < weight.std() < 0.024  # trunc_normal_(std=0.02)
    assert not model.aux_head.bias.any() and not model.blocks[0].attn.proj.bias.any()


def test_drop_path_grows_with_depth_and_is_off_in_eval():
    model = small(depth=3, drop_path_rate=0.6)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks] == pytest.approx([0.0, 0.3, 0.6])
    images = torch.randn(8, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images))
        close(model(images), small(depth=3).eval()(images), 1e-6)  # the same seed without drop path
        assert not torch.equal(freeze_norms(model)(images)[0], model(images)[0])


@pytest.mark.parametrize("batch", [2, 7, 64])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_drop_path_drops_each_sample_with_its_rate_and_keeps_the_mean(batch, rate):
    torch.manual_seed(0)
    drop, kept_most, draws = DropPath(rate), math.ceil(batch * (1 - rate)), 4000
    scale_of = torch.zeros(draws, batch)
    for row in scale_of:
        index, scales, _ = drop.draw(batch, row.device)
        assert scales.shape == (kept_most, 1, 1) and (index is None) == (kept_most == batch)
        row[torch.arange(batch) if index is None else index] = scales.view(-1)
    close(scale_of.unique(), torch.tensor([0, 1 / (1 - rate)]))
    noise = (rate / (1 - rate) / draws) ** 0.5  # the mean scale's standard deviation, of one sample
    assert (scale_of.mean(0) - 1).abs().max() < 4.5 * noise
    assert ((scale_of == 0).float().mean(0) - rate).abs().max() < 4.5 * (rate * (1 - rate) / draws) ** 0.5


@pytest.mark.parametrize("batch", [2, 7, 64])
def test_one_draw_for_all_blocks_drops_with_each_ones_rate(batch):
    torch.manual_seed(0)
    model, draws = small(depth=4, drop_path_rate=0.6), 3000  # 0, 0.2, 0.4, 0.6
    scale_of = torch.zeros(draws, 3, 2, batch)
    for drawn in scale_of:
        kept = model._draw_all(batch, drawn.device)
        assert list(kept) == [1, 2, 3]
        for block, branches in kept.items():
            for branch, (index, scales, position) in enumerate(branches):
                assert len(scales) == math.ceil(batch * (1 - 0.2 * block)) and (index is None) == (len(scales) == batch)
                samples = torch.arange(batch) if index is None else index
                assert index is None or torch.equal(position[index], torch.arange(len(index)))
                drawn[block - 1, branch, samples] = scales.view(-1)
    for block, scales in enumerate(scale_of.unbind(1), 1):
        rate = 0.2 * block
        close(scales.unique(), torch.tensor([0, 1 / (1 - rate)]))
        assert (scales.mean(0) - 1).abs().max() < 4.5 * (rate / (1 - rate) / draws) ** 0.5
        assert ((scales == 0).float().mean(0) - rate).abs().max() < 4.5 * (rate * (1 - rate) / draws) ** 0.5
    # Branches are independent: a sample dropped in one is no more likely to be dropped in another.
    first_sample = (scale_of[..., 0] == 0).float().flatten(1)  # [draws, 6 branches]
    assert (first_sample.T.corrcoef() - torch.eye(6)).abs().max() < 4.5 / draws**0.5


def test_blocks_use_one_draw_for_all_as_they_use_their_own(monkeypatch):
    """The same draws given to both ways: equal outputs and gradients."""
    images, results = torch.randn(9, 3, 64, 96), []
    changes = dict(depth=4, drop_path_rate=0.6)
    given = small(**changes)._draw_all(9, images.device)
    queue = [kept for branches in given.values() for kept in branches]
    with monkeypatch.context() as patch:
        patch.setattr(DropPath, "draw", lambda self, batch, device: queue.pop(0))
        results.append(outputs_and_gradients(small(**changes), images))
        assert not queue
    for checkpointing in (False, True):
        model = small(**changes, drop_path_batched=True)
        model.set_grad_checkpointing(checkpointing)
        with monkeypatch.context() as patch:
            patch.setattr(model, "_draw_all", lambda batch, device: given)
            results.append(outputs_and_gradients(model, images))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            close(actual, expected, 1e-6)
    # Nothing replaced: `small` seeds, so the draw is the one given above; block by block it is another.
    batched, single = (outputs_and_gradients(small(**changes, drop_path_batched=b), images)[0] for b in (True, False))
    close(batched, results[0][0], 1e-6)
    assert (single - batched).abs().max() > 1e-3
    plain, batched = (outputs_and_gradients(small(drop_path_batched=b), images) for b in (False, True))
    assert all(torch.equal(*pair) for pair in zip(plain, batched, strict=True))  # no rate, nothing to draw


def outputs_and_gradients(model: LVViT, images: torch.Tensor) -> list[torch.Tensor]:
    cls_logits, token_logits = freeze_norms(model)(images)
    (cls_logits.square().sum() + token_logits.square().sum()).backward()
    return [cls_logits, token_logits, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_skipping_the_dropped_equals_multiplying_them_by_zero(monkeypatch, dtype):
    """The same draws applied to branches computed in full: values and gradients."""
    torch.manual_seed(0)
    block, drawn = Block(16, 2, 2.0, 0.5, 2.0).to(dtype), []
    draw = block.drop_path.draw
    monkeypatch.setattr(block.drop_path, "draw", lambda *size: drawn.append(draw(*size)) or drawn[-1])
    x = torch.randn(9, 5, 16, dtype=dtype, requires_grad=True)
    out = block(x)
    parameters = [x, *block.parameters()]
    gradients = torch.autograd.grad(out.square().sum(), parameters)
    expected, layers = x, [(block.norm1, block.attn), (block.norm2, block.mlp)]
    for (index, scales, _), (norm, layer) in zip(drawn, layers, strict=True):
        assert len(index) == 5
        scale_of = torch.zeros(9, 1, 1, dtype=dtype).index_copy(0, index, scales.to(dtype))
        expected = expected + layer(norm(expected)) * scale_of / 2
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    close(out, expected, tolerance)
    if dtype == torch.float64:
        for actual, full in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=False):
            close(actual, full, tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_projection_is_the_convolution_of_its_weights(layout):
    stem = small().patch_embed.double()
    x = torch.randn(3, 8, 16, 24, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    variables = [x, stem.proj.weight, stem.proj.bias]
    pairs = []
    for out in (stem._project(x), stem.proj(x)):
        pairs.append([out, *torch.autograd.grad(out.square().sum(), variables)])
    for actual, expected in zip(*pairs, strict=False):
        close(actual, expected, 1e-10)


def test_gradient_checkpointing_changes_no_gradient():
    images, gradients = torch.randn(2, 3, 64, 96), []
    for enable in (False, True):
        model = freeze_norms(small())
        model.set_grad_checkpointing(enable)
        cls_logits, token_logits = model(images, (0, 1, 3, 4))
        (cls_logits.square().sum() + token_logits.square().sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=False):
        close(checkpointed, plain, 1e-5)


@pytest.mark.parametrize("batched", [False, True])
def test_one_graph_serves_every_tensor_box(batched):
    torch._dynamo.reset()
    model, counter = small(drop_path_rate=0.1, drop_path_batched=batched).train(), CompileCounter()
    compiled, images = torch.compile(model, backend=counter, fullgraph=True), torch.randn(2, 3, 64, 96)
    for box in BOXES:
        compiled(images, torch.tensor(box))
    assert counter.frame_count == 1


@pytest.mark.parametrize("batched", [False, True])
def test_no_value_is_read_on_the_host(batched):
    """Meta tensors have no values, so a read of the box (or of anything else) raises."""
    with torch.device("meta"):
        cls_logits, token_logits = small(drop_path_rate=0.6, drop_path_batched=batched).train()(
            torch.empty(2, 3, 64, 96), torch.empty(4, dtype=torch.int32)
        )
    assert cls_logits.shape == (2, 5) and token_logits.shape == (2, 24, 5)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    model, images = freeze_norms(small()), torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for box in BOXES[:2]:
        for actual, expected in zip(compiled(images, torch.tensor(box)), model(images, box), strict=False):
            close(actual, expected, 1e-5)


def test_bfloat16_autocast_is_finite_and_near_float32():
    model, images = small().eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(images)
        cls_logits, token_logits = model.train()(images, torch.tensor([0, 0, 2, 2]))
    assert cls_logits.isfinite().all() and token_logits.isfinite().all()
    with torch.no_grad():
        close(half.float(), model.eval()(images), 0.05)


def streams(model: LVViT) -> list[torch.dtype]:
    """The dtypes in which every block and the last norm get the stream."""
    seen = []
    hook = lambda module, inputs: seen.append(inputs[0].dtype)
    handles = [module.register_forward_pre_hook(hook) for module in (*model.blocks, model.norm)]
    model(torch.randn(8, 3, 64, 96))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_the_residual_stream_has_its_dtype_in_every_block(training, drop_path):
    for residual_dtype in ("float32", "bfloat16"):
        model = small(depth=3, drop_path_rate=drop_path, residual_dtype=residual_dtype).train(training)
        with torch.autocast("cpu", torch.bfloat16):
            assert streams(model) == [getattr(torch, residual_dtype)] * 4
        assert streams(model) == [torch.float32] * 4  # no autocast, nothing to promote


def test_a_bfloat16_stream_stays_near_the_golden_file(tiny):
    """Largest error of the features, whose largest value is 3.26, under autocast: 0.011 with a float32 stream, 0.026 in
    bfloat16."""
    compare_with_golden(tiny, residual_dtype="bfloat16")  # without autocast both are one
    errors = {}
    for residual_dtype in ("float32", "bfloat16"):
        model = golden_model(tiny, residual_dtype=residual_dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            errors[residual_dtype] = (model.forward_features(tiny["image"]) - tiny["features"]).abs().max().item()
    assert errors["float32"] < errors["bfloat16"] < 0.05


@pytest.mark.parametrize("batch", [2, 64])  # in the first all samples are computed, in the second those kept alone
def test_a_bfloat16_stream_scales_what_it_keeps_without_a_bias(monkeypatch, batch):
    """The scale 1 / (1 - 0.3) / 3 rounded to bfloat16 would make every branch too large by 0.08 %."""
    torch.manual_seed(0)
    block = Block(16, 2, 2.0, 0.3, 3.0)
    monkeypatch.setattr(block.attn, "forward", lambda x: 1 + torch.rand(x.shape).to(torch.bfloat16))
    monkeypatch.setattr(block.mlp, "forward", torch.zeros_like)
    block.to(torch.bfloat16)
    out = torch.cat([block(torch.zeros(batch, 8192 // batch, 16, dtype=torch.bfloat16)) for _ in range(8)])
    kept = out[out != 0].double()
    assert kept.mean() == pytest.approx(1.5 / 0.7 / 3, rel=3e-4) and kept.numel() > 0.5 * out.numel()


def test_resize_pos_embed_keeps_linear_positions_and_the_class_token():
    row, column = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    pos_embed = torch.cat((torch.full((1, 1, 2), 7.0), torch.stack((row, column), -1).reshape(1, 196, 2)), 1)
    assert torch.equal(resize_pos_embed(pos_embed, (14, 14)), pos_embed)
    resized = resize_pos_embed(pos_embed, (28, 42))
    assert resized.shape == (1, 1 + 28 * 42, 2) and torch.equal(resized[:, 0], pos_embed[:, 0])
    rows, columns = resized[0, 1:].reshape(28, 42, 2).unbind(-1)
    # Bicubic interpolation reproduces a linear ramp away from the border: new centre (i + 0.5) / 2 - 0.5.
    close(rows[6:-6, 20], (torch.arange(6, 22) + 0.5) / 2 - 0.5)
    close(columns[14, 9:-9], (torch.arange(9, 33) + 0.5) / 3 - 0.5)
    assert resize_pos_embed(resized, (14, 14), old_grid=(28, 42)).shape == pos_embed.shape
    with pytest.raises(ValueError, match="1176.*old_grid"):
        resize_pos_embed(resized, (14, 14))


@pytest.mark.parametrize("size", [160, 288, 384, 448, 512])
def test_resize_pos_embed_is_pillows_bicubic(size):
    grid, pos_embed = size // 16, torch.randn(1, 197, 3, generator=torch.Generator().manual_seed(size))
    resized = resize_pos_embed(pos_embed, (grid, grid))[0, 1:].reshape(grid, grid, 3)
    for channel in range(3):
        plane = Image.fromarray(pos_embed[0, 1:, channel].reshape(14, 14).numpy())  # float32
        close(resized[..., channel], torch.from_numpy(np.array(plane.resize((grid, grid), Image.Resampling.BICUBIC))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports, align",
    [
        pytest.param("import tl_fast.system.torchvision_shim, torchvision, timm", False, id="timm"),
        # Where torchvision's own operators are missing, torch compiles roi_align for seconds.
        pytest.param(
            "import tl_fast.models.lvvit, torchvision.transforms.v2, tl_fast.system.torchvision_shim",
            True,
            id="lvvit",
        ),
    ],
)
@pytest.mark.usefixtures("compiler")  # with it torchvision compiles roi_align where its own does not load
def test_torchvision_and_timm_import_after_compat(imports, align):
    check = (
        imports
        + """
import torch, torchvision
boxes, scores = torch.tensor([[0., 0, 2, 2], [0, 0, 2, 2], [5, 5, 6, 6]]), torch.tensor([.9, .8, .7])
import tl_fast.system.torchvision_shim as shim
if torchvision.extension._has_ops():  # a torchvision that matches torch keeps its own nms
    assert shim._library is None and torchvision.ops.nms(boxes, scores, .5).tolist() == [0, 2]
else:
    assert torch.version.cuda is None and torch.ops.torchvision.nms
"""
        + """
aligned = torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0., 0, 2, 2]])], 2)
assert aligned.tolist() == [[[[1, 1], [1, 1]]]]
"""
        * align
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
