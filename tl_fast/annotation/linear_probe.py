"""Fits a linear probe on an annotator's pooled features, for classes that the annotator does not know.

The probe is a multinomial logistic regression. Its penalty is chosen by cross-validated log-loss, not accuracy: the
probe's logits become soft labels, so their scale has to be right.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

# L2 penalties on standardised features, strongest first: each fit starts at the last one's solution.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
FOLDS = 5
MAX_ITERATIONS = 200


@dataclasses.dataclass(frozen=True)
class Probe:
    """logits = x · weightᵀ + bias on raw features `[N, D]`; weight `[C, D]`, bias `[C]`, float32 on the CPU.

    Accuracies in percent, `cv_loss` in nats.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    train_accuracy: float
    cv_accuracy: float
    cv_loss: float

    def report(self) -> dict[str, float]:
        return {
            "penalty": self.penalty,
            "train_top1": self.train_accuracy,
            "cv_top1": self.cv_accuracy,
            "cv_loss": self.cv_loss,
        }


def fit(features: Tensor, labels: Tensor, num_classes: int) -> Probe:
    """Fit on features float32 `[N, D]` and labels int64 `[N]`, on the features' device. Deterministic.

    Standardises the features, minimises mean cross-entropy + penalty/2 · ‖weight‖² (bias free) by L-BFGS, chooses the
    penalty by 5-fold cross-validation (stratified; the accuracy of the chosen one is so slightly optimistic), and folds
    the standardisation into weight and bias.
    Raises ValueError for fewer than 2 classes or samples, or non-finite features.
    """
    if num_classes < 2 or len(features) < 2 * FOLDS:
        raise ValueError(
            f"a probe needs at least 2 classes and {2 * FOLDS} images, got {num_classes} and {len(features)}"
        )
    if not torch.isfinite(features).all():
        raise ValueError("the annotator's pooled features are not finite; try --dtype float32")
    mean, std = features.mean(0), features.std(0)
    # A feature that hardly varies over the pooled training images may be large in single cells: limit how much
    # standardising enlarges it.
    std = std.maximum(0.1 * std.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    x = (features - mean) / std
    folds = _folds(labels)
    loss, hits = torch.zeros(len(PENALTIES), dtype=torch.float64), torch.zeros(len(PENALTIES), dtype=torch.float64)
    for fold in range(FOLDS):
        held = folds == fold
        weight, bias = _zeros(x, num_classes)
        for i, penalty in enumerate(PENALTIES):
            weight, bias = _minimise(x[~held], labels[~held], weight, bias, penalty)
            logits = F.linear(x[held], weight, bias)
            loss[i] += F.cross_entropy(logits, labels[held], reduction="sum").item()
            hits[i] += (logits.argmax(1) == labels[held]).sum().item()
    best = int(loss.argmin())
    weight, bias = _minimise(x, labels, *_zeros(x, num_classes), PENALTIES[best])
    train = (F.linear(x, weight, bias).argmax(1) == labels).double().mean().item()
    weight = weight / std
    cv_accuracy, cv_loss = 100 * hits[best].item() / len(x), loss[best].item() / len(x)
    return Probe(weight.cpu(), (bias - weight @ mean).cpu(), PENALTIES[best], 100 * train, cv_accuracy, cv_loss)


def _folds(labels: Tensor) -> Tensor:
    """Fold 0..4 of each sample: every class dealt out evenly in an order shuffled by a fixed seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels), device=labels.device) % FOLDS
    return folds


def _zeros(x: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)


def _minimise(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
