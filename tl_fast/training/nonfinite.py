"""What a run does about a loss or gradient that is infinite or NaN: say which samples, keep them on record, and stop or
skip the step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tl_fast.system.mistakes import Mistake
from tl_fast.system.ranks import Ranks


class NonFiniteError(Mistake, RuntimeError):
    """Loss or gradient norm became infinite or NaN. The message names step, epoch, lr, loss and samples. No weights of
    that step were saved."""


class NonFinite:
    """The policy of one run, alike on all ranks.

    Args:
        policy: "stop" raises NonFiniteError at the first step that is not finite; "skip" leaves weights, moments,
            moving average and batch norm's statistics as they were before it and goes on.
        limit: skipped steps of the run after which the next one stops it.
        folder: the run's folder; each such step leaves `nonfinite/step-<step>.json` there, with loss and sample ids of
            every rank.
        name: a sample's name by its id, for that file.
        skipped: steps skipped before this start of the run.
    """

    def __init__(
        self, ranks: Ranks, policy: str, limit: int, folder: Path, name: Callable[[int], str] = str, skipped: int = 0
    ) -> None:
        self.ranks, self.limit, self.name = ranks, limit, name
        self.skips = policy == "skip"
        self.folder = folder / "nonfinite"
        self.skipped = skipped
        self._kept: list[Tensor] = []

    def keep(self, model: nn.Module) -> None:
        """Before a step's forward: remember the buffers, which it changes before anybody knows that it is not
        finite."""
        if self.skips:
            self._kept = [buffer.clone() for buffer in model.buffers()]

    def restore(self, model: nn.Module, bad: Tensor) -> None:
        """After its backward: bring the buffers back where `bad` (a scalar on the device, 0 or 1), without asking the
        device."""
        for buffer, kept in zip(model.buffers(), self._kept, strict=True):
            buffer.copy_(torch.where(bad > 0, kept, buffer))

    @staticmethod
    def update_unless(bad: Tensor | None, module: nn.Module, update: Callable[[], None]) -> None:
        """Call `update`, which changes `module`, and take that back where `bad` (as of `restore`, or None: never),
        without asking the device."""
        if bad is None:
            update()
            return
        tensors = list(module.state_dict().values())
        kept = [tensor.clone() for tensor in tensors]
        update()
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(torch.where(bad > 0, before, tensor))

    def report(self, step: int, epoch: int, lr: float, loss: float, norm: float, sample_ids: Sequence[int]) -> None:
        """Put a step that was not finite on record and count it, or stop; every rank calls this for the same step with
        its own loss and ids.

        Raises NonFiniteError under "stop", or when more than `limit` steps were skipped.
        """
        own = {"rank": self.ranks.rank, "loss": repr(loss), "sample_ids": list(map(int, sample_ids))}
        ranks = self.ranks.gather(own)
        # All of them where every loss is finite: only a gradient is not, and its rank is unknown.
        guilty = [part for part in ranks if part["loss"] in ("nan", "inf", "-inf")] or ranks
        path = self.folder / f"step-{step:010d}.json"
        if self.ranks.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {str(i): self.name(i) for part in guilty for i in part["sample_ids"]}
            facts = {"step": step, "epoch": epoch, "lr": lr, "grad_norm": repr(norm), "ranks": ranks, "names": names}
            path.write_text(json.dumps(facts, indent=1))
        self.skipped += 1
        event = (
            f"not finite: loss {', '.join(part['loss'] for part in guilty)}, gradient norm {norm} at step {step} (epoch"
            f" {epoch}, lr {lr:.3e}, rank {', '.join(str(part['rank']) for part in guilty)}); sample ids"
            f" {sum((part['sample_ids'] for part in guilty), [])}, on record in {path}"
        )
        if not self.skips:
            raise NonFiniteError(
                f"{event}. Weights of this step were not saved: lower lr, set clip_grad, look at these samples, or"
                " choose --non_finite skip; then --resume auto"
            )
        if self.skipped > self.limit:
            raise NonFiniteError(
                f"{event}. That is more than the {self.limit} steps that max_skipped allows a run to skip: lower lr,"
                " set clip_grad, or look at these samples; then --resume auto"
            )
        if self.ranks.main:
            print(f"skipped a step ({self.skipped} of at most {self.limit}), {event}", flush=True)
