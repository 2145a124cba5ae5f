"""The log of a run: JSON lines, TensorBoard, and a progress bar on a terminal or plain lines elsewhere; silent on ranks
other than 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError


class RunLog:
    """Writes `metrics.jsonl` and `tensorboard/` in a folder and shows the progress of `total_steps` steps.

    Args:
        folder: the run's folder; must exist on the rank that writes.
        total_steps, start_step: the progress bar's end and start. Rows of steps after `start_step`, left by a run that
            got further than its last checkpoint, are dropped, so that each step has one row. 0 starts new files.
        enabled: False (all ranks but the first) makes every method do nothing.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int = 0, enabled: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        self.enabled = enabled
        if not enabled:
            return
        rows = read_rows(self.path) if start_step and self.path.exists() else []
        kept = [row for row in rows if row["step"] <= start_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomic(self.path, lambda file: file.write(text.encode()))
        self._file = self.path.open("a", buffering=1)  # a row reaches the file when its line ends
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._console = Console()
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, epoch=0, note="")

    def __enter__(self) -> RunLog:
        if self.enabled:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._progress.stop()
            self._board.close()
            self._file.close()

    def advance(self, step: int, epoch: int) -> None:
        """Move the bar to `step` steps done."""
        if self.enabled:
            self._progress.update(self._task, completed=step, epoch=epoch)

    def row(self, kind: str, step: int, epoch: int, values: dict[str, Any], note: str) -> None:
        """One row: a line of JSON, a TensorBoard point per number (tag `kind/name`), and `note` on the bar or as a line
        of text."""
        if not self.enabled:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._progress.disable:
            self._console.print(f"epoch {epoch} step {step}: {note}", highlight=False)
        else:
            self._progress.update(self._task, note=note)

    def message(self, text: str) -> None:
        """A line above the bar."""
        if self.enabled:
            self._progress.console.print(text, highlight=False, soft_wrap=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line cut short by a kill is left out; another malformed line raises
    ValueError."""
    rows = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: torn
                break
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    return rows
