"""A callback of Transformers' Trainer; ``pip install 'learnsched[transformers]'``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from learnsched.files import write
from learnsched.schedule import Policy
from learnsched.scheduler import QuantizationScheduler

STATE_NAME = "quantization_scheduler.pt"


class QuantizationCallback(TrainerCallback):
    """Steps a scheduler after every epoch; its state lies in the Trainer's checkpoint folders.

    Args:
        policy: what makes the settings. It is shown the mean of the losses that the Trainer logs.
        **options: further arguments of :class:`~learnsched.scheduler.QuantizationScheduler`;
            ``epochs`` is ``num_train_epochs`` if omitted.

    Example:
        >>> from learnsched.policies import StraightThrough
        >>> callback = QuantizationCallback(StraightThrough())  # for Trainer(callbacks=[callback])
    """

    def __init__(self, policy: Policy, **options: Any) -> None:
        self.policy, self.options = policy, options
        self.scheduler: QuantizationScheduler | None = None
        self._loss = {"sum": 0.0, "steps": 0, "last": 0}
        self._ended = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the scheduler, before a checkpoint is loaded."""
        options = {"epochs": round(args.num_train_epochs), **self.options}
        self.scheduler = QuantizationScheduler(kwargs["model"], self.policy, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the optimizer; go on where the checkpoint was taken."""
        if self.scheduler is None:
            raise RuntimeError(
                "pass the callback to the Trainer's constructor, not to add_callback"
            )
        self.scheduler.watch(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))
        if state.global_step > 0:
            kept = torch.load(_path(args, state), weights_only=True)
            self.scheduler.load_state_dict(kept["scheduler"])
            self._loss = {**kept["loss"], "last": state.global_step}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the loss logged; on_log steps."""
        self._ended = control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the loss, and step if the epoch has ended."""
        if self.scheduler is None or "loss" not in kwargs["logs"]:
            return
        loss, steps = self._loss, state.global_step - self._loss["last"]
        loss["sum"] += kwargs["logs"]["loss"] * steps
        loss["steps"] += steps
        loss["last"] = state.global_step
        if self._ended:
            self.scheduler.step({"train_loss": loss["sum"] / max(1, loss["steps"])})
            self._loss, self._ended = {**loss, "sum": 0.0, "steps": 0}, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the scheduler's state to the checkpoint."""
        if state.is_world_process_zero and self.scheduler is not None:
            kept = {"scheduler": self.scheduler.state_dict(), "loss": self._loss}
            write(_path(args, state), lambda temporary: torch.save(kept, temporary))


def _path(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", STATE_NAME)
