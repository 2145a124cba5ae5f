"""LV-ViT, the vision transformer of token labeling (arXiv 2104.10858), under the published parameter names.

Sizes, names, initialisation and the eval-time sum follow github.com/zihangJiang/TokenLabeling (tlt/models/lvvit.py and
models/layers.py at 9e0d143), so published checkpoints load as they are. Deliberate differences: MixToken's box is an
input of `forward`, never drawn inside it, so that a restart mixes as the run before it did; and `reset_classifier`
resets both heads, where theirs forgets the token head.

Shapes: B images, D channels, h x w the token grid, N = h * w tokens, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices

from tl_fast.models.mix_token import MixBox, box_mask
from tl_fast.system.sides import Sides, both_sides

PATCH = 16
"""Pixels a side of one token (arXiv 2104.10858); the strides of the stem, 2 and then 8, fix it."""
# The drop path rate from which a branch computes only the samples it keeps, where branches are drawn one by one. On a
# GPU a gather and a scatter must first be earned back: an estimate from memory traffic, not yet measured there.
SKIP_FROM = {"cpu": 0.0, "cuda": 0.1}

__all__ = ["LVViT", "resize_pos_embed"]


class ConvStem(nn.Module):
    """Published 4-layer patch embedding: three convolutions at half resolution, then an 8x8 projection.
    [B,3,H,W] -> [B,D,H/16,W/16].

    `space_to_depth` computes the first convolution, 7x7 with stride 2 over 3 channels, as the same sums with 4x4 and
    stride 1 over the 12 channels of 2x2 pixels. Its weights keep their shape.
    """

    def __init__(self, in_chans: int, width: int, embed_dim: int, space_to_depth: bool = False) -> None:
        super().__init__()
        self.space_to_depth = space_to_depth
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, PATCH // 2, stride=PATCH // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv1_space_to_depth(x) if self.space_to_depth else self.conv1(x)
        x = F.relu(self.bn1(x), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return self._project(x)

    def _conv1_space_to_depth(self, x: Tensor) -> Tensor:
        """`conv1` over 2x2 pixels at a time: [B,3,H,W] -> [B,W,H/2,W/2], in the memory layout of x."""
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        x = F.pixel_unshuffle(x, 2)  # [B,12,H/2,W/2]
        # A first row and column of zeros makes the 7x7 kernel 8x8, that is 4x4 cells of 2x2 pixels.
        weight = F.pixel_unshuffle(F.pad(self.conv1.weight, (1, 0, 1, 0)), 2)  # [W,12,4,4]
        if channels_last:  # pixel_unshuffle leaves this layout
            x = x.contiguous(memory_format=torch.channels_last)
            weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(F.pad(x, (2, 1, 2, 1)), weight)

    def _project(self, x: Tensor) -> Tensor:
        """`proj` as one matrix product, as its patches do not overlap: [B,W,8h,8w] -> [B,D,h,w], channels-last in
        memory. W: the stem's width."""
        batch, width, rows, columns = x.shape
        side, weight = PATCH // 2, self.proj.weight
        h, w = rows // side, columns // side
        if x.is_contiguous(memory_format=torch.channels_last):  # pixels of a patch row lie together: few, long copies
            patches = x.permute(0, 2, 3, 1).reshape(batch, h, side, w, side, width).transpose(2, 3)  # [B,h,w,8,8,W]
            weight = weight.permute(0, 2, 3, 1)  # [D,8,8,W]
        else:
            patches = x.reshape(batch, width, h, side, w, side).permute(0, 2, 4, 1, 3, 5)  # [B,h,w,W,8,8]
        patches = patches.reshape(batch, h, w, -1)  # [B,h,w,64*W]
        tokens = F.linear(patches, weight.reshape(weight.shape[0], -1), self.proj.bias)  # [B,h,w,D]
        return tokens.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`; no bias on qkv, as published.
    [B,1+N,D] -> [B,1+N,D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)  # [B,1+N,3,heads,D/heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B,heads,1+N,D/heads]
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B,1+N,heads,D/heads]
        return self.proj(x.reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two linear layers around a GELU, exact or approximated by a tanh. [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden: int, gelu: str = "exact") -> None:
        super().__init__()
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Kept(NamedTuple):
    """What drop path keeps in one residual branch: K of the B samples."""

    index: Tensor | None
    """int64 [K], the samples; None for all."""
    scales: Tensor
    """float32 [K,1,1], their factors."""
    position: Tensor | None
    """int64 [B], where in `index` each sample is; K or more for a dropped one. None where `index` is."""


class DropPath(nn.Module):
    """Which samples of a batch a residual branch keeps. Dropped samples are not computed; the rate is that of the
    published stochastic depth.

    Every sample is dropped with probability `drop_prob`, and kept ones are scaled by 1 / (1 - drop_prob), as published.
    Shapes are static: a branch computes K = ceil(B * (1 - drop_prob)) samples, a random subset of the batch, and scales
    a few of those by 0 so that the probability is exact. Samples of one batch are therefore not quite independent,
    which the published ones are.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"

    def draw(self, batch: int, device: torch.device) -> Kept:
        """One branch's draw, from torch's generator of `device`."""
        kept = self._kept(batch) if self.drop_prob >= SKIP_FROM.get(device.type, 0.0) else batch
        scales = self._scales(torch.rand((kept, 1, 1), device=device), batch)
        if kept == batch:
            return Kept(None, scales, None)
        index = torch.rand(batch, device=device).argsort()[:kept]
        position = torch.full((batch,), kept, device=device)
        return Kept(index, scales, position.index_copy(0, index, torch.arange(kept, device=device)))

    def draw_from(self, order: Tensor, position: Tensor, uniform: Tensor) -> Kept:
        """One branch's draw from random numbers made for many branches: `order`, a permutation of the B samples, its
        inverse `position`, and B numbers `uniform` in [0, 1)."""
        batch = len(order)
        kept = self._kept(batch)
        scales = self._scales(uniform[:kept].view(-1, 1, 1), batch)
        return Kept(None, scales, None) if kept == batch else Kept(order[:kept], scales, position)

    def _kept(self, batch: int) -> int:
        """K: the fewest samples among which the survivors can be."""
        return math.ceil(batch * (1 - self.drop_prob))

    def _scales(self, uniform: Tensor, batch: int) -> Tensor:
        """The factors of K kept samples from as many numbers in [0, 1): some 0, so that the rate is exact."""
        survive = 1 - self.drop_prob
        return (uniform < survive * batch / len(uniform)) / survive


class _Rows(torch.autograd.Function):
    """x[rows], and grad[inverse] * mask as its gradient, where autograd would add up the gradients of a row that was
    taken several times. Without such additions, which are atomic, both directions are gathers that a compiler fuses
    with what is around them. `rows` must not take a row twice whose gradient counts.

    x [n,...]; rows int64 [m]; inverse int64 [n], where in `rows` each row of x is; mask [n,1,1], 0 for rows that were
    not taken, or None.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, inverse: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, mask)
        return x[rows]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, mask = ctx.saved_tensors
        grad = grad[inverse]
        return grad if mask is None else grad * mask, None, None, None


class Block(nn.Module):
    """Pre-norm transformer block whose two residual branches are divided by `skip_lam`. [B,1+N,D] -> [B,1+N,D]."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, skip_lam: float, gelu: str = "exact"
    ) -> None:
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def _residual(self, x: Tensor, norm: nn.Module, layer: nn.Module, drawn: Kept | None) -> Tensor:
        if not self.training or isinstance(self.drop_path, nn.Identity):
            return x + layer(norm(x)) / self.skip_lam
        index, scales, position = drawn or self.drop_path.draw(x.shape[0], x.device)
        scales = scales / self.skip_lam  # float32: rounded to bfloat16 they would all be wrong by the same share
        if index is None:
            return (x + layer(norm(x)) * scales).to(x.dtype)
        kept = len(index)
        # A dropped sample reads any row of the branch, masked.
        mask, row = (position < kept).view(-1, 1, 1).to(x.dtype), position.clamp(max=kept - 1)  # [B,1,1], [B]
        branch = (layer(norm(_Rows.apply(x, index, row, mask))) * scales).to(x.dtype)  # [K,1+N,D]
        return torch.addcmul(x, _Rows.apply(branch, row, index, None), mask)

    def forward(self, x: Tensor, drawn: tuple[Kept | None, Kept | None] = (None, None)) -> Tensor:
        """`drawn`: what drop path keeps in the two branches; None: drawn here."""
        x = self._residual(x, self.norm1, self.attn, drawn[0])
        return self._residual(x, self.norm2, self.mlp, drawn[1])


class LVViT(nn.Module):
    """LV-ViT with a class head and a head for every patch token, trained with MixToken (arXiv 2104.10858, sections
    3.2-3.4).

    Args:
        img_size: side, or (height, width), of the input in pixels; multiples of 16.
        embed_dim, depth, num_heads, mlp_ratio: transformer size; `embed_dim` is a multiple of `num_heads`.
        stem_width: channels of the convolutional stem (64; 128 in LV-ViT-L).
        skip_lam: divisor of both residual branches (1 in T, 2 in S and M, 3 in L).
        num_classes: C; 0 makes both heads the identity, and eval mode then returns the class token [B,D].
        drop_path_rate: drop path of the last block; it grows linearly from 0 in the first.
        in_chans: channels of the input.
        stem_space_to_depth: the stem's first convolution as in `ConvStem`; the same function of the same weights.
        residual_dtype: of the stream from block to block under bfloat16 autocast. "float32": class token and position
            embeddings, which are float32, promote it; "bfloat16": their sum is rounded to what the stem returns.
            Without autocast either is the weights' dtype.
        drop_path_batched: draw drop path for all branches in one operation, and skip the dropped samples at any rate;
            else every branch draws for itself, and skips from a rate that depends on the device.
        gelu: "exact", as published, or "tanh", an approximation that is off by at most 4.8e-4.
        eval_token_weight: what the maximum of the token logits counts in evaluation, beside the class logits.

    Raises ValueError naming the argument that does not fit.
    """

    num_prefix_tokens = 1  # timm's word for the class token in front of `forward_features`' patch tokens
    can_mix_tokens = True  # every image size that the constructor takes is whole patches

    def __init__(
        self,
        img_size: Sides = 224,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        stem_width: int = 64,
        skip_lam: float = 2.0,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        stem_space_to_depth: bool = False,
        residual_dtype: str = "float32",
        drop_path_batched: bool = False,
        gelu: str = "exact",
        eval_token_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.img_size = height, width = both_sides(img_size)
        if height < PATCH or width < PATCH or height % PATCH or width % PATCH:
            raise ValueError(f"img_size {img_size}: height and width must be positive multiples of {PATCH}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate} is outside [0, 1)")
        if skip_lam <= 0:
            raise ValueError(f"skip_lam {skip_lam} must be positive")
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes} must be 0 (no heads) or positive")
        if residual_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"residual_dtype {residual_dtype!r} must be 'float32' or 'bfloat16'")
        if gelu not in ("exact", "tanh"):
            raise ValueError(f"gelu {gelu!r} must be 'exact' or 'tanh'")
        self.residual_dtype = residual_dtype
        self.drop_path_batched = drop_path_batched
        self.eval_token_weight = eval_token_weight
        self.grid_size = height // PATCH, width // PATCH
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        # timm's description of what `forward_intermediates` gives
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=PATCH, module=f"blocks.{number}") for number in range(depth)
        ]

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid_size), embed_dim))
        self.patch_embed = ConvStem(in_chans, stem_width, embed_dim, stem_space_to_depth)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, skip_lam, gelu)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = self._new_head()
        self.aux_head = self._new_head()

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(self._init_linear)  # convolutions and norms keep torch's defaults, as published

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _new_head(self) -> nn.Module:
        return nn.Linear(self.embed_dim, self.num_classes) if self.num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Parameters besides norms and biases that the optimiser must not decay."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layer groups from the input to the heads, by patterns of parameter names, as timm's models give them: stem
        and embeddings, every block, the final norm and the heads (named by no pattern) last. timm's signature."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """The class token's head."""
        return self.head

    def get_token_head(self) -> nn.Module:
        """The head of every patch token."""
        return self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones for `num_classes` (0: identities), on the old ones' device and dtype. timm's
        signature."""
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes} must be 0 (no heads) or positive")
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool {global_pool!r}: LV-ViT classifies from its class token; leave it None")
        self.num_classes = num_classes
        for name in ("head", "aux_head"):
            head = self._new_head().to(device=self.pos_embed.device, dtype=self.pos_embed.dtype)
            self._init_linear(head)
            setattr(self, name, head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _patches(self, x: Tensor) -> Tensor:
        """Stem: images [B,3,H,W] -> patch embeddings [B,D,h,w]."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"images are {x.shape[-2]}x{x.shape[-1]} pixels, the model was built for {self.img_size[0]}x"
                f"{self.img_size[1]}; build it with img_size=(height, width) and resize the checkpoint's pos_embed"
            )
        return self.patch_embed(x)

    def _encode(self, x: Tensor) -> Tensor:
        """Transformer: patch embeddings [B,D,h,w] -> class and patch tokens after the final norm [B,1+N,D]."""
        return self.norm(self._run_blocks(x)[0])

    def _run_blocks(self, x: Tensor, kept_blocks: Collection[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """All blocks: patch embeddings [B,D,h,w] -> class and patch tokens [B,1+N,D] after the last block, and the same
        after every block whose number is in `kept_blocks`, in the blocks' order."""
        x = x.flatten(2).transpose(1, 2)  # [B,N,D], a view when the stem ran channels-last
        dtype = x.dtype
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        if self.residual_dtype == "bfloat16":
            x = x.to(dtype)
        draws = self._draw_all(x.shape[0], x.device) if self.drop_path_batched and self.training else {}
        kept = []
        for number, block in enumerate(self.blocks):
            arguments = x, draws.get(number, (None, None))  # drawn outside: a checkpointed block runs twice
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
            if number in kept_blocks:
                kept.append(x)
        return x, kept

    def _draw_all(self, batch: int, device: torch.device) -> dict[int, tuple[Kept, Kept]]:
        """What drop path keeps in both branches of every block that has a rate, by the block's number."""
        rates = {n: block.drop_path for n, block in enumerate(self.blocks) if isinstance(block.drop_path, DropPath)}
        if not rates:
            return {}
        shuffle, uniform = torch.rand((2, 2 * len(rates), batch), device=device).unbind()  # each [branches,B]
        order = shuffle.argsort(1)
        branches = list(zip(order, order.argsort(1), uniform, strict=True))
        return {
            number: (drop_path.draw_from(*branches[2 * i]), drop_path.draw_from(*branches[2 * i + 1]))
            for i, (number, drop_path) in enumerate(rates.items())
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images [B,3,H,W] -> class token and patch tokens after the final norm [B,1+N,D], without
        MixToken."""
        return self._encode(self._patches(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]] | tuple[Tensor, list]:
        """Normalised images [B,3,H,W] -> the patch tokens after the blocks `indices`, in the blocks' order. timm's
        signature, without what stops early: `prune_intermediate_layers` removes the blocks that nobody reads.

        Args:
            indices: blocks' numbers from 0, negative ones from the end; a number n: the last n; None: all.
            return_prefix_tokens: give (patch tokens, class token [B,1,D]) for each block.
            norm: apply the final norm to all of them.
            output_fmt: "NCHW" for [B,D,h,w], "NLC" for [B,N,D].
            intermediates_only: else the result is (`forward_features`' result, this list).

        Raises ValueError for another `output_fmt`, and AssertionError for a block that there is not.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be 'NCHW' or 'NLC'")
        blocks, _ = feature_take_indices(len(self.blocks), indices)
        last, sequences = self._run_blocks(self._patches(x), blocks)
        if norm:
            sequences = [self.norm(sequence) for sequence in sequences]
        features = [sequence[:, 1:] for sequence in sequences]  # each [B,N,D]
        if output_fmt == "NCHW":
            features = [tokens.transpose(1, 2).unflatten(2, self.grid_size) for tokens in features]
        if return_prefix_tokens:
            features = [(tokens, sequence[:, :1]) for tokens, sequence in zip(features, sequences, strict=True)]
        return features if intermediates_only else (self.norm(last), features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` of these blocks does not need: the blocks behind the last of them, the
        final norm with `prune_norm`, the heads with `prune_head`. timm's signature; the blocks' numbers."""
        blocks, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return blocks

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B,1+N,D] -> logits [B,C]: class logits + `eval_token_weight` * max over token logits; the class
        token [B,D] when `pre_logits`."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        logits = self.head(x[:, 0])
        if not self.eval_token_weight:
            return logits
        return logits + self.eval_token_weight * self.token_logits(x).amax(1)

    def token_logits(self, x: Tensor) -> Tensor:
        """Features [B,1+N,D] -> logits of the patch tokens [B,N,C]."""
        return self.aux_head(x[:, 1:])

    def forward(self, x: Tensor, mix_box: MixBox | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images [B,3,H,W] (float, normalised).

        Eval mode returns logits [B,C]. Train mode returns (class logits [B,C], token logits [B,N,C]), tokens row by
        row. `mix_box` (train mode only) switches MixToken on: inside the box the patch embeddings of the batch-flipped
        batch replace the image's own, and the token logits are put back to the image they came from. It is (top, left,
        bottom, right) in tokens, ends exclusive; give it as an integer tensor [4] on the model's device so that a new
        box neither recompiles nor synchronises.

        Raises ValueError for images of another size than `img_size`, a malformed box, or a box in eval mode.
        """
        if mix_box is not None and not self.training:
            raise ValueError(
                "mix_box is given in eval mode, where nothing is mixed; call model.train() or leave it out"
            )
        x = self._patches(x)
        inside = None if mix_box is None else box_mask(mix_box, self.grid_size, x.device)
        if inside is not None:
            x = torch.where(inside, x.flip(0), x)
        x = self._encode(x)
        if not self.training:
            return self.forward_head(x)
        tokens = x[:, 1:]
        if inside is not None:
            # The token head acts on each token alone: un-mixing its D inputs equals un-mixing its C outputs.
            tokens = torch.where(inside.view(1, -1, 1), tokens.flip(0), tokens)
        return self.head(x[:, 0]), self.aux_head(tokens)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], old_grid: tuple[int, int] | None = None) -> Tensor:
    """Resample position embeddings [1,1+N,D] to a token grid (h, w): [1,1+h*w,D], the class token's unchanged (bicubic,
    antialiased).

    `old_grid` is the source's (h, w), a square if not given. Raises ValueError when N does not fit it.
    """
    tokens = pos_embed.shape[1] - 1
    if old_grid is None:
        old_grid = math.isqrt(tokens), math.isqrt(tokens)
    if math.prod(old_grid) != tokens:
        raise ValueError(
            f"pos_embed {tuple(pos_embed.shape)} holds {tokens} patch positions, not a {old_grid[0]}x{old_grid[1]}"
            " grid; give old_grid=(height, width) in tokens"
        )
    return resample_abs_pos_embed(pos_embed, list(grid), list(old_grid), num_prefix_tokens=1)


def _cfg(crop_pct: float) -> dict:
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        fixed_input_size=True,
        crop_pct=crop_pct,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.conv1",
        classifier=("head", "aux_head"),
        paper_ids="arXiv:2104.10858",
        origin_url="https://github.com/zihangJiang/TokenLabeling",
    )


default_cfgs = generate_default_cfgs(
    {"lvvit_t": _cfg(0.9), "lvvit_s": _cfg(0.9), "lvvit_m": _cfg(1.0), "lvvit_l": _cfg(1.0)}
)


def _create(name: str, pretrained: bool, size: dict, kwargs: dict) -> LVViT:
    if pretrained:
        raise ValueError(
            f"{name}: no hub holds weights for LV-ViT; build it with pretrained=False and load a file with --checkpoint"
        )
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", 4), feature_cls="getter")  # for features_only
    return build_model_with_cfg(LVViT, name, False, feature_cfg=feature_cfg, **{**size, **kwargs})


@register_model
def lvvit_t(pretrained: bool = False, **kwargs) -> LVViT:
    """LV-ViT-T: 8.53 M parameters at 224 px."""
    return _create("lvvit_t", pretrained, dict(embed_dim=240, depth=12, num_heads=4, skip_lam=1.0), kwargs)


@register_model
def lvvit_s(pretrained: bool = False, **kwargs) -> LVViT:
    """LV-ViT-S: 26.15 M parameters at 224 px."""
    return _create("lvvit_s", pretrained, dict(embed_dim=384, depth=16, num_heads=6, skip_lam=2.0), kwargs)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs) -> LVViT:
    """LV-ViT-M: 55.83 M parameters at 224 px."""
    return _create("lvvit_m", pretrained, dict(embed_dim=512, depth=20, num_heads=8, skip_lam=2.0), kwargs)


@register_model
def lvvit_l(pretrained: bool = False, **kwargs) -> LVViT:
    """LV-ViT-L: 150.02 M parameters at 224 px."""
    return _create(
        "lvvit_l", pretrained, dict(embed_dim=768, depth=24, num_heads=12, skip_lam=3.0, stem_width=128), kwargs
    )
