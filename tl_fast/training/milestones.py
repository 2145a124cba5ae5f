"""When a run validates, saves and ends."""

from __future__ import annotations

from dataclasses import dataclass

from tl_fast.training.progress import Progress


@dataclass(frozen=True)
class Milestones:
    """The steps of a run at which something is due besides training. A run validates and saves a checkpoint at its end;
    before, every so many epochs, steps, or both; None: not by these."""

    end: int
    """Steps of the whole run."""
    steps_per_epoch: int
    eval_epochs: int | None = None
    eval_steps: int | None = None
    checkpoint_epochs: int | None = None
    checkpoint_steps: int | None = None

    def pause(self, progress: Progress) -> int:
        """The next step after which the run leaves its steps: where an epoch or the run ends, or validation is due."""
        pauses = [self.end, self.end_of_epoch(progress)]
        if self.eval_steps is not None:
            pauses.append(progress.global_step - progress.global_step % self.eval_steps + self.eval_steps)
        return min(pauses)

    def end_of_epoch(self, progress: Progress) -> int:
        """The step after which the epoch under way ends."""
        return progress.global_step - progress.step_in_epoch + self.steps_per_epoch

    def validation_is_due(self, progress: Progress) -> bool:
        """Asked at a pause, and where a run starts."""
        return not progress.validated and self._is_due(progress, self.eval_epochs, self.eval_steps)

    def checkpoint_is_due(self, progress: Progress, improved: bool = False) -> bool:
        """Asked at a pause, and where a run starts. improved: these weights are the best so far."""
        return improved or self._is_due(progress, self.checkpoint_epochs, self.checkpoint_steps)

    def checkpoint_is_due_between(self, progress: Progress) -> bool:
        """Asked between two pauses."""
        return self._is_due(progress, None, self.checkpoint_steps)

    def _is_due(self, progress: Progress, epochs: int | None, steps: int | None) -> bool:
        by_epoch = epochs is not None and progress.step_in_epoch == 0 and progress.epoch % epochs == 0
        by_step = steps is not None and progress.global_step % steps == 0
        return progress.global_step == self.end or by_epoch or by_step
