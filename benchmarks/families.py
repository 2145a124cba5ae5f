"""Which of timm's models take token labels: the table of docs/models.md.

    python benchmarks/families.py [--inductor] [NAME:SIZE ...]

For each model, at random weights and with 1,000 classes: its tokens and those in front of them (prefix), what its class
logits come from, all parameters and those that the token head adds, the loss of one training step with MixToken, and
how much of torch.compile that step, forward and backward, went through: "captured" as one graph, which then runs
operation by operation; with --inductor "inductor", which also generates its code and comes to the eager step's loss (a
minute or more a model on a CPU). Then the models that are refused, with the reason. It measures no speed.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from tl_fast.models.build import build_model
from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.normalise import Normalise
from tl_fast.models.step import TrainStep, compiled
from tl_fast.models.token_label import TokenLabelModel, backbone_of
from tl_fast.system.mistakes import InputError

CLASSES = 1000
MODELS = (
    "lvvit_t:224",
    "vit_tiny_patch16_224:224",
    "vit_wee_patch16_reg1_gap_256:256",
    "vit_pe_core_tiny_patch16_384:384",
    "vit_tiny_r_s16_p8_224:224",
    "deit_tiny_distilled_patch16_224:224",
    "deit3_small_patch16_224:224",
    "beit_base_patch16_224:224",
    "eva02_tiny_patch14_224:224",
    "swin_tiny_patch4_window7_224:224",
    "swinv2_tiny_window8_256:256",
    "convnext_atto:224",
    "coatnet_nano_rw_224:224",
    "maxvit_rmlp_pico_rw_256:256",
    "volo_d1_224:224",
    "resnet18:224",
    "mobilenetv3_small_050:224",
    "efficientnet_b0:224",
    "xcit_nano_12_p16_224:224",
    "cait_xxs24_224:224",
    "hiera_tiny_224:224",
    "pvt_v2_b0:224",
    "twins_pcpvt_small:224",
    "naflexvit_base_patch16_gap:384",
    "mixer_s16_224:224",
    "levit_128s:224",
)
COLUMNS = (
    "model",
    "px",
    "tokens",
    "prefix",
    "class logits from",
    "parameters",
    "token head",
    "MixToken",
    "loss",
    "torch.compile",
)
REFUSED = ("pit_ti_224:224", "coat_tiny:224", "crossvit_tiny_240:240")


def class_logits_of(model: nn.Module) -> str:
    """What the class logits are made of, in few words."""
    pool = getattr(backbone_of(model), "global_pool", "token")
    if not isinstance(pool, str):
        pool = "avg"  # timm's CNNs have a pooling layer in its place
    return {"token": "class token", "avg": "average", "map": "attention pooling"}.get(pool, pool)


def one_step(model: nn.Module, inductor: bool) -> tuple[float, str]:
    """The loss of a step on 2 images of noise with uniform labels; "captured", or "inductor" where that is asked for,
    if torch.compile got so far, else "no"."""
    torch.manual_seed(0)
    step = TrainStep(model.train(), TokenLabelLoss(1.0, 0.5), Normalise((0.5,) * 3, (0.25,) * 3))
    images = torch.randint(0, 256, (2, 3, *model.img_size), dtype=torch.uint8)
    targets = torch.full((2, 1 + math.prod(model.grid_size), CLASSES), 1 / CLASSES)
    box = torch.tensor([0, 0, 2, 1]) if model.can_mix_tokens else None
    loss = step(images, targets, box)[0].item()
    torch._dynamo.reset()
    if inductor:
        fast = compiled(step, images.device)
    else:
        fast = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    try:
        fast_loss = fast(images, targets, box)[0]
        fast_loss.backward()
    except TorchDynamoException:
        return loss, "no"
    if not inductor:
        return loss, "captured"
    return loss, "inductor" if math.isclose(fast_loss.item(), loss, rel_tol=1e-4) else "no"


def describe(model: nn.Module) -> tuple[str, ...]:
    """What can be said of a model without running it: the table's cells from "px" to "MixToken"."""
    added, prefix = 0, 1
    if isinstance(model, TokenLabelModel):
        prefix = model.layout.prefix or 0
        if not model.has_own_token_head:
            added = sum(parameter.numel() for parameter in model.get_token_head().parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        str(model.img_size[0]),
        "×".join(map(str, model.grid_size)),
        str(prefix),
        class_logits_of(model),
        f"{total / 1e6:.2f} M",
        f"{added / 1e6:.2f} M" if added else "its own",
        "yes" if model.can_mix_tokens else "no",
    )


def row(name: str, size: int, inductor: bool) -> str:
    """A model's line of the table."""
    torch.manual_seed(0)
    model = build_model(name, img_size=size, num_classes=CLASSES)
    loss, ran_by = one_step(model, inductor)
    cells = (f"`{name}`", *describe(model), f"{loss:.2f}", ran_by)
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inductor", action="store_true", help="compile to the end, instead of capturing the graph")
    parser.add_argument("models", nargs="*", default=[*MODELS, *REFUSED], metavar="NAME:SIZE")
    warnings.simplefilter("ignore")
    refused = []
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    options = parser.parse_args(arguments)
    for model in options.models:
        name, _, size = model.partition(":")
        try:
            print(row(name, int(size), options.inductor), flush=True)
        except InputError as error:
            refused.append(f"- `{name}`: {error}")
    print("\nRefused:\n")
    print("\n".join(refused))


if __name__ == "__main__":
    main()
