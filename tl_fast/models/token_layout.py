"""Where the tokens of a grid are in the features of any timm network, and how the network's head takes one of them.

Shapes: B images, D channels, h x w the token grid, N = h * w tokens, P tokens in front of them, C classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tl_fast.system.mistakes import InputError

_MOST_PREFIX_TOKENS = 16  # class token, distillation token and registers together


class TokenLayoutError(InputError):
    """Features without a token for every cell of a grid; the message says what they are instead."""


@dataclass(frozen=True)
class TokenLayout:
    """The form of one network's features for images of one size.

    grid: (h, w). prefix: P, for features [B,P+N,D]; None for a map. channels_last: the map is [B,h,w,D], else
    [B,D,h,w].
    """

    grid: tuple[int, int]
    prefix: int | None = None
    channels_last: bool = False

    def tokens(self, features: Tensor) -> Tensor:
        """Features -> tokens [B,N,D], row by row. Raises TokenLayoutError for features of another grid."""
        if self.prefix is not None:
            tokens = features[:, self.prefix :]
        else:
            tokens = (features if self.channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
        if tokens.shape[1] != math.prod(self.grid):
            raise TokenLayoutError(
                f"features {list(features.shape)} hold {tokens.shape[1]} tokens, not the {self.grid[0]}x{self.grid[1]}"
                " that the network has for the image size that it was built for"
            )
        return tokens

    def cells(self, tokens: Tensor) -> Tensor:
        """Tokens [B,N,D] -> features of B*N images of one token each, as the network's head takes them.

        A head takes the class token, or pools over the tokens behind the prefix. With the same token at all 1 + P
        positions, either gives that token.
        """
        flat = tokens.flatten(0, 1)
        if self.prefix is not None:
            return flat.unsqueeze(1).expand(-1, 1 + self.prefix, -1)
        return flat[:, None, None, :] if self.channels_last else flat[:, :, None, None]


def token_layout(network: nn.Module, features: Tensor, img_size: tuple[int, int]) -> TokenLayout:
    """The layout of `network.forward_features`' result for images of `img_size` (height, width) pixels.

    Raises TokenLayoutError naming what the features are where they are no grid.
    """
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        shapes = [list(part.shape) if isinstance(part, Tensor) else part for part in features]
        form = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__} of {shapes}"
        raise TokenLayoutError(f"its features are no single map or sequence of tokens but {form}")
    if features.ndim == 4:
        channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        height, width = features.shape[1:3] if channels_last else features.shape[2:4]
        return TokenLayout((height, width), channels_last=channels_last)
    if features.shape[1] < 2:  # a class token: PiT keeps nothing else
        raise TokenLayoutError(f"its features {list(features.shape)} are a single token for the whole image")
    return _of_sequence(network, features.shape[1], img_size)


def _of_sequence(network: nn.Module, total: int, img_size: tuple[int, int]) -> TokenLayout:
    """The layout of a sequence of `total` tokens, prefix included."""
    prefix = getattr(network, "num_prefix_tokens", None)
    patches = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if patches is not None:
        in_front = total - math.prod(patches)
        if 0 <= in_front <= _MOST_PREFIX_TOKENS and prefix in (None, in_front):
            return TokenLayout((patches[0], patches[1]), in_front)
    # No patch grid, or one that later stages thin out: a grid of the image's aspect.
    for in_front in range(3) if prefix is None else (prefix,):
        grid = _grid_like(img_size, total - in_front)
        if grid is not None:
            return TokenLayout(grid, in_front)
    raise TokenLayoutError(
        f"its {total} tokens, {prefix or 0} of them in front of the patches', form no grid of the aspect of"
        f" {img_size[0]}x{img_size[1]} pixels"
    )


def _grid_like(img_size: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of so many tokens in the aspect of an image; None where there is no such grid."""
    divisor = math.gcd(*img_size)
    rows, columns = img_size[0] // divisor, img_size[1] // divisor
    scale = math.isqrt(max(tokens, 0) // (rows * columns))
    return (scale * rows, scale * columns) if 0 < scale**2 * rows * columns == tokens else None


def classify_cells(network: nn.Module, cells: Tensor, *, pre_logits: bool) -> Tensor:
    """The network's head, or all of it in front of the classifier, on every cell (`TokenLayout.cells`): [B*N, C or D].

    Raises TokenLayoutError for a head that gives no such rows.
    """
    rows = network.forward_head(cells, pre_logits=pre_logits)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(cells):
        raise TokenLayoutError(f"its head gives {getattr(rows, 'shape', type(rows))} for {len(cells)} single tokens")
    return rows


def output_stride(network: nn.Module) -> int | None:
    """Pixels a side that a token of the last features stands for, as timm states them; None where it does not."""
    info = getattr(network, "feature_info", None)
    info = getattr(info, "info", info)
    return info[-1].get("reduction") if info else None


@contextlib.contextmanager
def trial(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, the network is in train or eval mode and makes no gradients; afterwards its mode and buffers, and torch's
    generator, are as before."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    modes = [(module, module.training) for module in network.modules()]
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            network.train(training)
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])


def features_of_zeros(network: nn.Module, img_size: tuple[int, int]) -> Tensor:
    """`forward_features` of two black images of (height, width) pixels."""
    return network.forward_features(torch.zeros(2, 3, *img_size, device=next(network.parameters()).device))
