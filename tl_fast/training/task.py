"""What the training loop asks of a task: what a run trains for, on which data, and how well it does."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tl_fast.models.weights import load_pretrained
from tl_fast.pipeline.batch import Batch
from tl_fast.pipeline.batch_loader import BatchLoader
from tl_fast.system.ranks import Ranks
from tl_fast.training import checkpoint
from tl_fast.training.optimiser import Schedule
from tl_fast.training.progress import Progress
from tl_fast.training.run_config import RunConfig
from tl_fast.training.stopping import Agreement


class Task(abc.ABC):
    """The part of one run that depends on what it trains for. Steps, checkpoints, resuming, logs and the guard against
    non-finite steps are the loop's, alike for all tasks.

    The loop calls `open` first and `close` last. Every rank calls every method at the same point, unless the method
    says otherwise.
    """

    name: ClassVar[str]
    """In a checkpoint's meta.json."""
    loss_terms: ClassVar[tuple[str, str]]
    """What a row of the log calls the two terms of the loss."""
    score_metrics: ClassVar[tuple[str, ...]]
    """The metrics that judge a checkpoint: that with the largest of them is the best."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.train_loader: BatchLoader | None = None
        self.val_loader: BatchLoader | None = None

    def open(self) -> None:
        """Open the loaders, fill the config's `num_classes`, and check that the data fit. Raises what `make_loaders`
        and `check_data` raise on any rank."""
        self.train_loader, self.val_loader = self.ranks.agree(self.make_loaders)
        num_classes = self.config.num_classes or self.train_loader.num_classes
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.ranks.agree(self.check_data)

    def close(self) -> None:
        """Close the loaders that are open."""
        for loader in filter(None, (self.train_loader, self.val_loader)):
            loader.close()

    @abc.abstractmethod
    def make_loaders(self) -> tuple[BatchLoader, BatchLoader | None]:
        """The training and validation loaders of this rank. Raises InputError when settings do not fit the number or
        kind of ranks, FileNotFoundError. Speaks to no other rank."""

    @abc.abstractmethod
    def check_data(self) -> None:
        """Raises InputError, naming the file and the remedy, for what would fail, or silently mislead, later. Speaks to
        no other rank."""

    @abc.abstractmethod
    def build_network(self) -> nn.Module:
        """The model on the CPU, randomly initialised from torch's generator. Raises InputError naming what does not
        fit. Speaks to no other rank."""

    def read_weights(self, model: nn.Module) -> list[str]:
        """Load the weights that the config starts from; remarks for the user. The main rank alone calls it."""
        if self.config.pretrained:
            return load_pretrained(model, self.config.model)
        return checkpoint.load_weights(model, checkpoint.find(Path(self.config.init_weights)), self.config.init_ema)

    @abc.abstractmethod
    def prepare(self, model: nn.Module) -> list[str]:
        """Freeze what does not learn, after the weights are loaded; remarks for the user. Raises InputError. Speaks to
        no other rank."""

    @abc.abstractmethod
    def build_schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Schedule:
        """The learning rate from step to step."""

    @abc.abstractmethod
    def build_step(self, model: nn.Module) -> nn.Module:
        """The module that goes from a batch's `arguments` to (loss: a scalar, terms: [2], detached), compiled and
        distributed as the config says; the model stays the caller's. Raises InputError."""

    @abc.abstractmethod
    def set_train(self, model: nn.Module) -> None:
        """Put the model in train mode."""

    @abc.abstractmethod
    def draw(self, progress: Progress, model: nn.Module) -> Any:
        """What is drawn once for the next step, for all its batches; a function of seed and progress."""

    @abc.abstractmethod
    def arguments(self, batch: Batch, drawn: Any) -> tuple[Tensor | None, ...]:
        """A batch on the device, as the module of `build_step` takes it."""

    @abc.abstractmethod
    def prepare_validation(self, model: nn.Module, ema: nn.Module) -> None:
        """Called once, after `build_step`: what `validate` will measure is these weights and their moving average."""

    @abc.abstractmethod
    def validate(self, agreement: Agreement) -> dict[str, float]:
        """Metrics of the weights and of their moving average over all ranks. Called where there is validation data.
        Ends early, with figures of no meaning, when a signal arrives."""

    @abc.abstractmethod
    def in_words(self, metrics: dict[str, float]) -> str:
        """Metrics of `validate` in a few words."""

    @abc.abstractmethod
    def summary(self, metrics: dict[str, float], best: float | None) -> dict[str, float | None]:
        """A run's summary of its last metrics (empty: it has not validated) and of its best checkpoint's score."""

    @property
    @abc.abstractmethod
    def class_names(self) -> list[str] | None:
        """Names of the classes in their order; None where the data do not say."""

    @property
    @abc.abstractmethod
    def network_in_words(self) -> str:
        """The model and the size of its images."""
