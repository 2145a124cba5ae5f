"""The published training step, written for comparison: the model's forward, the loss, the optimiser and the moving
average.

As github.com/zihangJiang/TokenLabeling does them at 9e0d143, with timm 0.4 for what it takes from there: attention with
an explicit softmax, MixToken by clones and numpy's random box inside the forward, token targets [B, C, 2+N] transposed
in the step, `-sum(target * log_softmax)`, drop path by a mask, AdamW without foreach or fused kernels, a moving average
that loops over the state dict, and the loss read on the host after every step. Weights and parameter names are those of
tl_fast's LVViT, so that both compute the same function.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tl_fast.models.lvvit import LVViT


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    if rate == 0.0 or not training:
        return x
    keep = 1 - rate
    mask = keep + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
    return x.div(keep) * mask.floor_()


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, rate: float, skip_lam: float) -> None:
        super().__init__()
        self.rate, self.skip_lam = rate, skip_lam
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), self.rate, self.training) / self.skip_lam
        return x + drop_path(self.mlp(self.norm2(x)), self.rate, self.training) / self.skip_lam


class Stem(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(width, dim, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.relu(norm(conv(x)))
        return self.proj(x)


class PublishedLVViT(nn.Module):
    """The published module with the sizes and the weights of `model`. Train mode: images -> (class logits, token
    logits, box)."""

    def __init__(self, model: LVViT, drop_path_rate: float) -> None:
        super().__init__()
        dim, block = model.embed_dim, model.blocks[0]
        self.patch_embed = Stem(model.patch_embed.conv1.out_channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros_like(model.pos_embed))
        rates = [rate.item() for rate in torch.linspace(0, drop_path_rate, len(model.blocks), device="cpu")]
        self.blocks = nn.ModuleList(
            Block(dim, block.attn.num_heads, block.mlp.fc1.out_features, rate, block.skip_lam) for rate in rates
        )
        self.norm = nn.LayerNorm(dim)
        self.head, self.aux_head = nn.Linear(dim, model.num_classes), nn.Linear(dim, model.num_classes)
        self.load_state_dict(model.state_dict())

    def random_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The published `rand_bbox` with beta 1: numpy's global generator."""
        share = np.sqrt(1.0 - np.random.beta(1.0, 1.0))
        rows, columns = int(height * share), int(width * share)
        row, column = np.random.randint(height), np.random.randint(width)
        top, bottom = (int(np.clip(row + d, 0, height)) for d in (-(rows // 2), rows // 2))
        left, right = (int(np.clip(column + d, 0, width)) for d in (-(columns // 2), columns // 2))
        return top, left, bottom, right

    def forward(
        self, x: Tensor, box: tuple[int, int, int, int] | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
        x = self.patch_embed(x)
        height, width = x.shape[2:]
        top, left, bottom, right = box = self.random_box(height, width) if box is None else box
        mixed = x.clone()
        mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
        x = mixed.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        cls_logits, tokens = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        tokens = tokens.reshape(tokens.shape[0], height, width, tokens.shape[-1])
        unmixed = tokens.clone()
        unmixed[:, top:bottom, left:right, :] = tokens.flip(0)[:, top:bottom, left:right, :]
        return cls_logits, unmixed.reshape(unmixed.shape[0], height * width, -1), box


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()


def token_label_loss(
    outputs: tuple[Tensor, Tensor, tuple[int, int, int, int]], target: Tensor, dense_weight: float
) -> Tensor:
    """target float32 [B, C, 2+N]: the image label, the class token's target, the tokens' targets, as the published
    loader gives them."""
    cls_logits, token_logits, (top, left, bottom, right) = outputs
    _, tokens, classes = token_logits.shape
    cls_target, token_target = target[:, :, 1], target[:, :, 2:]
    share = 1 - (bottom - top) * (right - left) / tokens
    if share < 1:
        cls_target = share * cls_target + (1 - share) * cls_target.flip(0)
    token_target = token_target.transpose(1, 2).reshape(-1, classes)
    return soft_cross_entropy(cls_logits, cls_target) + dense_weight * soft_cross_entropy(
        token_logits.reshape(-1, classes), token_target
    )


class ModelEma:
    """timm's first: every tensor of the state dict in turn."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.ema, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        values = model.state_dict()
        for name, average in self.ema.state_dict().items():
            average.copy_(average * self.decay + (1.0 - self.decay) * values[name].detach())
