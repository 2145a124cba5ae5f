"""The training step: equal to the published one, one graph, no recompilation, no tensor of the token logits' size but
its gradient."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.utils import ModelEmaV3

from tl_fast.models.loss import TokenLabelLoss, soft_cross_entropy, strongest_class
from tl_fast.models.lvvit import LVViT
from tl_fast.models.normalise import Normalise
from tl_fast.models.step import TrainStep, compiled, usable_attention_backends
from tl_fast.plan.records import mix_box

BATCH, GRID, CLASSES = 4, 4, 50
SIZE = dict(img_size=64, embed_dim=32, depth=3, num_heads=2, stem_width=8, num_classes=CLASSES)


@pytest.fixture(scope="module")
def published():
    """benchmarks/published_step.py: the published model, loss and moving average, which share no code with ours."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "published_step.py"
    spec = importlib.util.spec_from_file_location("published_step", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["published_step"] = module
    spec.loader.exec_module(module)
    return module


def make_step(attention_backend: str = "default", **changes) -> TrainStep:
    torch.manual_seed(0)
    model = LVViT(**{**SIZE, "drop_path_rate": 0.5, **changes}).train()
    normalise = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return TrainStep(model, TokenLabelLoss(1.0, 0.5), normalise, attention_backend=attention_backend)


def inputs(seed: int = 0, classes: int = CLASSES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(256, (BATCH, 3, 64, 64), generator=generator).to(torch.uint8),
        "targets": torch.rand((BATCH, 1 + GRID**2, classes), generator=generator).softmax(-1),
        "mix_box": torch.from_numpy(mix_box(seed, 1, 2, GRID)),
        "erase_boxes": torch.tensor([[0, 0, 0, 0], [3, 5, 20, 30], [50, 60, 14, 4], [0, 0, 64, 64]], dtype=torch.int32),
        "noise": torch.randint(1 << 62, (BATCH,), generator=generator),
    }


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 0, 3, 4), (0, 0, 4, 4)])
def test_loss_and_every_gradient_equal_the_published_step(published, box):
    step, batch = make_step(drop_path_rate=0.0), inputs()
    theirs = published.PublishedLVViT(step.model, drop_path_rate=0.0).train()
    targets = batch["targets"]
    layout = torch.cat((torch.zeros(BATCH, 1, CLASSES), targets), 1).transpose(1, 2).contiguous()  # [B, C, 2+N]
    shift, scale = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    expected = published.token_label_loss(theirs((batch["images"] / 255 - shift) / scale, box), layout, 0.5)
    expected.backward()
    loss, terms = step(batch["images"], targets, torch.tensor(box))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms[0] + 0.5 * terms[1], expected)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in step.model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=2e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_moving_average_is_the_published_one(published):
    model = make_step().model
    ours, theirs = ModelEmaV3(model, decay=0.9), published.ModelEma(model, 0.9)
    torch.manual_seed(1)
    for step in range(3):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        ours.update(model, step=step + 2), theirs.update(model)
    for name, value in theirs.ema.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours.module.state_dict()[name], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_graph_breaks(dtype):
    torch._dynamo.reset()
    step = make_step()
    step.dtype = dtype
    explained = torch._dynamo.explain(step)(**inputs())
    assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons


def test_no_recompilation_over_boxes_rates_and_epochs():
    torch._dynamo.reset()
    step, counter = make_step(), CompileCounter()
    network = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    optimizer, ema = torch.optim.AdamW(step.parameters(), lr=1e-3, fused=True), ModelEmaV3(step.model, decay=0.9)
    for number in range(6):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + number)
        step.train(), torch.manual_seed(number)
        network(**inputs(seed=number))[0].backward()
        optimizer.step(), optimizer.zero_grad(), ema.update(step.model, step=number + 2)
        if number == 2:  # validation between epochs goes past the compiled network
            with torch.no_grad():
                step.model.eval()(torch.zeros(BATCH, 3, 64, 64))
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("sync", [False, True])
def test_synchronised_batch_norm_alone_may_break_the_graph(monkeypatch, device, sync):
    """Without a GPU: what torch.compile is told for either device, and that a break then is an error or none."""
    torch._dynamo.reset()
    counter, options, compile = CompileCounter(), [], torch.compile

    def spy(module, **given):
        options.append(given)
        return compile(module, backend=counter, fullgraph=given["fullgraph"], dynamic=given["dynamic"])

    def broken(self, images):
        torch._dynamo.graph_break()
        return torch.nn.functional.batch_norm(images, None, None, self.weight, self.bias, training=True)

    monkeypatch.setattr(torch, "compile", spy)
    monkeypatch.setattr(torch.nn.SyncBatchNorm if sync else torch.nn.BatchNorm2d, "forward", broken)
    step = make_step(depth=1)
    if sync:
        step = torch.nn.SyncBatchNorm.convert_sync_batchnorm(step)
    network = compiled(step, torch.device(device))
    assert options[0]["fullgraph"] is not sync and options[0]["dynamic"] is False
    if not sync:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            network(**inputs())
    else:
        assert network(**inputs())[0].isfinite() and counter.frame_count > 1


class Sizes(TorchDispatchMode):
    """Collects the storages of at least `numel` elements that operators return."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.storages = numel, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel:
                self.storages[tensor.untyped_storage().data_ptr()] = (
                    tensor.untyped_storage()
                )  # held, so no address is used twice
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_loss_allocates_only_the_gradient(dtype):
    shape = (16, 49, 1000)
    logits, target = torch.randn(shape, dtype=dtype, requires_grad=True), torch.rand(16, 50, 1000).softmax(-1)[:, 1:]
    known = {logits.untyped_storage().data_ptr(), target.untyped_storage().data_ptr()}
    with Sizes(logits.numel()) as seen:
        soft_cross_entropy(logits, target).backward()
    new = set(seen.storages) - known
    assert new == {logits.grad.untyped_storage().data_ptr()} and logits.grad.dtype == dtype
    reference = logits.detach().float().requires_grad_()
    torch.nn.functional.cross_entropy(reference.flatten(0, 1), target.flatten(0, 1)).backward()
    torch.testing.assert_close(
        logits.grad.float(), reference.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-8
    )


@pytest.mark.usefixtures("compiler")
def test_compiled_loss_allocates_only_the_gradient():
    torch._dynamo.reset()
    logits, target = torch.randn(4, 16, 100, requires_grad=True), torch.rand(4, 17, 100).softmax(-1)[:, 1:]

    def both():
        torch.compile(soft_cross_entropy, fullgraph=True)(logits, target).backward()

    _, code = run_and_get_code(both)
    sizes = [
        np.prod([int(n) for n in re.findall(r"\d+", found)])
        for source in code
        for found in re.findall(r"empty_strided_cpu\w*\(\(([\d, ]*)\)", source)
    ]
    assert len(code) == 2 and sizes.count(logits.numel()) == 1, (
        sizes
    )  # forward and backward; the gradient alone is as large
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1)), logits
    )[0]
    torch.testing.assert_close(logits.grad, expected)


def test_targets_that_require_a_gradient_are_refused():
    with pytest.raises(ValueError, match="detach"):
        soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True))


def test_erasing_is_the_same_in_the_graph():
    torch._dynamo.reset()
    batch, step = inputs(), make_step(drop_path_rate=0.0)
    eager = step(**batch)[0]
    graph = torch.compile(step, backend="aot_eager", fullgraph=True)(**batch)[0]
    without = step(**{name: value for name, value in batch.items() if name not in ("erase_boxes", "noise")})[0]
    torch.testing.assert_close(graph, eager)
    assert (without - eager).abs() > 20 * (graph - eager).abs()


def attention_nodes(loss: Tensor) -> set[str]:
    """The names of attention's nodes in the graph of a loss."""
    names, nodes, seen = set(), [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            nodes += [parent for parent, _ in node.next_functions]
    return {name for name in names if "Attention" in name}


def test_the_attention_backend_computes_attention():
    """Equal but for the order of sums; "math" is made of products and a softmax, "flash" is one operation."""
    batch, results = inputs(), {}
    for name in ("default", "math", "flash"):
        step = make_step(name, drop_path_rate=0.0)
        loss, _ = step(**batch)
        assert bool(attention_nodes(loss)) is (name != "math")
        loss.backward()
        results[name] = [loss.detach(), *(p.grad for p in step.parameters())]
    for name in ("math", "flash"):
        for actual, expected in zip(results[name], results["default"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention_backend", ["math", "flash"])
def test_the_attention_backend_breaks_no_graph(attention_backend):
    torch._dynamo.reset()
    batch, step = inputs(), make_step(attention_backend, drop_path_rate=0.0)
    graph = torch.compile(step, backend="aot_eager", fullgraph=True)(**batch)[0]
    torch.testing.assert_close(graph, step(**batch)[0])


def test_hard_labels_are_made_of_the_targets():
    batch, step = inputs(), make_step(drop_path_rate=0.0)
    hard = TrainStep(step.model, step.criterion, step.normalise, hard_labels=0.2)
    expected = step(**{**batch, "targets": strongest_class(batch["targets"], 0.2)})
    torch.testing.assert_close(hard(**batch), expected, rtol=0, atol=0)
    assert not torch.allclose(hard(**batch)[0], step(**batch)[0])


def test_usable_attention_backends_of_the_cpu():
    model = LVViT(**SIZE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for dtype in ("auto", "bfloat16"):
        assert usable_attention_backends(model, SIZE["img_size"], torch.device("cpu"), dtype) == ["flash", "math"]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_steps_on_a_gpu_learn_without_recompiling_or_synchronising(mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    device = torch.device("cuda")
    step = make_step().to(device, memory_format=torch.channels_last)
    network = compiled(step, device, mode)
    optimizer, losses = torch.optim.AdamW(step.parameters(), lr=1e-3, fused=True), []
    batches = [{name: value.to(device) for name, value in inputs(seed).items()} for seed in range(3)]
    for number in range(60):
        if number == 12:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            torch.cuda.set_sync_debug_mode("error")
        loss, _ = network(**batches[number % 3])
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step(), optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1
    values = torch.stack(losses)
    assert values.isfinite().all() and values[-6:].mean() < values[:6].mean()
