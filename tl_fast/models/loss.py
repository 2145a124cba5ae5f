"""The token-labeling loss: soft cross-entropy of the class token plus soft cross-entropy of every patch token.

Follows `TokenLabelCrossEntropy` and its ground-truth variant of github.com/zihangJiang/TokenLabeling
(tlt/loss/cross_entropy.py); paper: arXiv 2104.10858, equations 2-4. Nothing here looks at a value on the host, so it
compiles and never synchronises the device.

Shapes: B images, N patch tokens, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tl_fast.models.mix_token import MixBox

CHUNK = 1 << 19  # logits that the eager path looks at at a time: 2 MB of float32, which stay in the cache


class _SoftCrossEntropy(torch.autograd.Function):
    """-sum(target * log_softmax(logits)) over all elements. No tensor of the logits' size is made but their gradient.

    The backward pass keeps the arguments and one number a row, its logsumexp. Compiled, value and gradient are
    one kernel each; eager, they run over chunks of rows that stay in the cache (one chunk on a GPU, where launches cost
    more).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        total, lse = logits.new_zeros((), dtype=torch.float32), []
        for x, t in _chunks(logits, target):
            x, t = x.float(), t.float()
            log_p = x.log_softmax(-1)
            lse.append(x.amax(-1, keepdim=True) - log_p.amax(-1, keepdim=True))
            total = total - (t * log_p).sum(-1).sum()
        ctx.save_for_backward(logits, target, torch.cat(lse))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits, target, lse = ctx.saved_tensors
        chunks = list(_chunks(logits, target, lse))
        if len(chunks) == 1:
            return _gradient(logits, target, lse, grad), None
        result = torch.empty_like(logits)
        for out, (x, t, row_lse) in zip(_chunks(result), chunks, strict=True):
            out[0].copy_(_gradient(x, t, row_lse, grad))
        return result, None


def _gradient(logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """grad * (softmax(logits) * sum(target) - target), in the logits' dtype, computed in float32, as lse is."""
    target = target.float()
    return (logits - lse).exp_().mul_(target.sum(-1, keepdim=True)).sub_(target).mul_(grad).to(logits.dtype)


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors cut alike along their first dimension, CHUNK elements of the first at a time; whole under
    torch.compile and on GPUs."""
    rows, size = tensors[0].shape[0], tensors[0].numel()
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu" or size <= CHUNK:
        return [tensors]
    return list(zip(*(tensor.split(max(1, CHUNK * rows // size)) for tensor in tensors), strict=True))


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all leading dimensions of -sum(target * log_softmax(logits)): logits and target [..., C] -> float32
    scalar.

    float32 whatever the inputs' dtype, inside autocast too; the gradient has the logits' dtype, and the target none.
    Raises ValueError when the shapes differ or the target requires a gradient.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits are {tuple(logits.shape)} but their targets {tuple(target.shape)}")
    if target.requires_grad:
        raise ValueError("the target requires a gradient, which is not computed: detach it")
    return _SoftCrossEntropy.apply(logits, target) / math.prod(logits.shape[:-1])


def strongest_class(targets: Tensor, smoothing: float) -> Tensor:
    """Hard labels of soft ones [..., C]: the most probable class alone, the first of equals, smoothed to 1 - s + s / C
    beside s / C. Same shape and type."""
    rest = smoothing / targets.shape[-1]
    top = targets.argmax(-1, keepdim=True)
    return torch.full_like(targets, rest).scatter(-1, top, 1 - smoothing + rest)


def _term(weight: float, logits: Tensor, target: Tensor) -> Tensor:
    if weight == 0:
        return 0 * logits.float().sum()  # a gradient of zero: DDP waits for one from every parameter
    return soft_cross_entropy(logits, target)


def _with_ground_truth(annotated: Tensor, ground_truth: Tensor) -> Tensor:
    """Class targets [B,C] mixed with the truth [B,C], as in the published code: the annotator's share is 0.5 where both
    have the same top-1 class, else 0.9."""
    agree = annotated.argmax(-1, keepdim=True) == ground_truth.argmax(-1, keepdim=True)
    return torch.lerp(ground_truth, annotated, torch.where(agree, 0.5, 0.9).to(annotated.dtype))


def _mix_flipped(target: Tensor, mix_box: MixBox, tokens: int) -> Tensor:
    """Class targets [B,C] mixed with those of the batch-flipped batch by the share of the tokens that the box
    covers."""
    top, left, bottom, right = mix_box.to(target.device).unbind() if isinstance(mix_box, Tensor) else mix_box
    share = (bottom - top) * (right - left) / tokens
    return (1 - share) * target + share * target.flip(0)


class TokenLabelLoss(nn.Module):
    """cls_weight * CE(class logits, class target) + dense_weight * CE(token logits, token targets).

    Args:
        cls_weight, dense_weight: non-negative, not both 0. The published recipes use 1 and 1 (0.5 for the ground-truth
            variant).

    Raises ValueError for weights outside that range.
    """

    def __init__(self, cls_weight: float = 1.0, dense_weight: float = 1.0) -> None:
        super().__init__()
        if not (cls_weight >= 0 and dense_weight >= 0 and 0 < cls_weight + dense_weight < math.inf):
            raise ValueError(
                f"cls_weight {cls_weight} and dense_weight {dense_weight} must be finite, >= 0 and not both 0"
            )
        self.cls_weight = cls_weight
        self.dense_weight = dense_weight

    def forward(
        self,
        cls_logits: Tensor,
        token_logits: Tensor,
        targets: Tensor,
        mix_box: MixBox | None = None,
        ground_truth: Tensor | None = None,
        with_terms: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss as a float32 scalar; with_terms: also its class and token terms [2], unweighted and detached (0
        where the weight is 0).

        Args:
            cls_logits: [B,C], of MixToken's mixed images when `mix_box` is given.
            token_logits: [B,N,C], already un-mixed (as `LVViT` returns them).
            targets: probabilities [B,1+N,C], class target first, float32 or bfloat16 (sums are float32); or [B,C],
                which then is the target of the class token and of every patch token, as published for data without
                label maps.
            mix_box: (top, left, bottom, right) in tokens, a tensor [4] or four ints; its share of the tokens is the
                share of the batch-flipped class target in the mixed one.
            ground_truth: [B,C] smoothed one-hot; mixes the truth into the class target before MixToken does.

        Raises ValueError when the shapes do not fit one another.
        """
        batch, tokens, classes = token_logits.shape
        if targets.dim() == 2:
            targets = targets.unsqueeze(1).expand(-1, 1 + tokens, -1)
        if targets.shape != (batch, 1 + tokens, classes):
            raise ValueError(
                f"targets are {tuple(targets.shape)}; token logits {tuple(token_logits.shape)} need "
                f"{(batch, 1 + tokens, classes)}: the class target first, then one for each token"
            )
        cls_target = targets[:, 0].float()
        if ground_truth is not None:
            if ground_truth.shape != cls_target.shape:
                raise ValueError(f"ground_truth is {tuple(ground_truth.shape)}, expected {tuple(cls_target.shape)}")
            cls_target = _with_ground_truth(cls_target, ground_truth.float())
        if mix_box is not None:
            cls_target = _mix_flipped(cls_target, mix_box, tokens)
        of_class = _term(self.cls_weight, cls_logits, cls_target)
        of_tokens = _term(self.dense_weight, token_logits, targets[:, 1:])
        loss = self.cls_weight * of_class + self.dense_weight * of_tokens
        return (loss, torch.stack((of_class, of_tokens)).detach()) if with_terms else loss
