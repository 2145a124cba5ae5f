"""How far a run has got."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a run has got. The fields are keys of a checkpoint's meta.json."""

    global_step: int = 0
    """Steps done over the run."""
    epoch: int = 0
    """Epochs done."""
    step_in_epoch: int = 0
    """Steps done of the epoch under way."""
    last_validation: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation (`Task.validate`)."""
    validated: bool = False
    """Whether they are of the weights of this step."""
    skipped: int = 0
    """Steps skipped as not finite, up to this start of the run."""

    def end_step(self) -> None:
        """One step more, whose weights have not been validated."""
        self.global_step += 1
        self.step_in_epoch += 1
        self.validated = False

    def end_epoch(self) -> None:
        """The epoch under way is done."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
