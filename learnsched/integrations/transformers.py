"""A callback of Transformers' Trainer; ``pip install 'learnsched[transformers]'``."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from learnsched.files import write
from learnsched.layers import quantized_layers
from learnsched.schedule import Policy
from learnsched.scheduler import QuantizationScheduler, UnwrappedModelWarning

_FILE = "quantization_scheduler.pt"


class QuantizationCallback(TrainerCallback):
    """Steps a scheduler after every epoch; its state lies in the Trainer's checkpoint folders.

    Args:
        policy: what makes the settings. It is shown the mean of the epoch's logged losses.
        **options: further arguments of :class:`~learnsched.scheduler.QuantizationScheduler`;
            ``epochs`` is ``num_train_epochs`` if omitted.

    Raises:
        ValueError: when the Trainer is made, its length is given as ``max_steps``.
        RuntimeError: when training begins, the callback was given to the Trainer too late, or the model
            has been trained by it before.
        FileNotFoundError: when training is resumed, the schedule's state is not in the checkpoint.

    Example:
        >>> from learnsched.policies import StraightThrough
        >>> callback = QuantizationCallback(StraightThrough())  # for Trainer(callbacks=[callback])
    """

    def __init__(self, policy: Policy, **options: Any) -> None:
        self.policy, self.options = policy, options
        self.scheduler: Any = None
        self._model: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the scheduler, before a checkpoint is loaded."""
        if args.max_steps > 0:
            raise ValueError("give the Trainer num_train_epochs, not max_steps")
        self._schedule(args, kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the optimizer; go on where the checkpoint was taken."""
        model = kwargs["model"]
        if self.scheduler is None:
            raise RuntimeError("give the callback to the Trainer's constructor, not later")
        if model is not self._model:
            self._schedule_anew(args, model, resumed=state.global_step > 0)
        elif self.scheduler.epoch > 0 and state.global_step == 0:
            raise RuntimeError(
                f"this schedule has run {self.scheduler.epoch} epochs: to train again, quantize the "
                "float model anew for another Trainer and callback, or give the Trainer model_init"
            )
        self.scheduler.watch(kwargs["optimizer"])
        if state.global_step > 0:
            path = _checkpoint(args, state) / _FILE
            if not path.exists():
                raise FileNotFoundError(
                    f"the schedule's state is not at {path}; to resume from another folder than "
                    "output_dir, name it in TrainingArguments(resume_from_checkpoint=...) as well"
                )
            self.scheduler.load_state_dict(torch.load(path, weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the loss logged before saving and at an epoch's end, where on_log steps."""
        control.should_log |= control.should_save or state.epoch >= self.scheduler.epoch + 1

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step if the epoch has ended, with the mean of what was logged in it."""
        if "loss" in kwargs["logs"] and state.epoch >= self.scheduler.epoch + 1:
            began = state.global_step * self.scheduler.epoch // (self.scheduler.epoch + 1)
            logs = [e for e in state.log_history if "loss" in e and e["step"] > began]
            steps = np.diff([began, *(e["step"] for e in logs)])
            loss = np.average([e["loss"] for e in logs], weights=steps)
            self.scheduler.step({"train_loss": loss})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the scheduler's state to the checkpoint."""
        if state.is_world_process_zero:
            usual = _folder(args, state)
            # A hyperparameter search has a folder for each run.
            found = [usual, *usual.parent.glob(f"run-*/{usual.name}")]
            written = (folder for folder in found if folder.exists())
            folder = max(written, key=lambda folder: folder.stat().st_mtime, default=usual)
            write(folder / _FILE, partial(torch.save, self.scheduler.state_dict()))

    def _schedule(self, args: Any, model: Any) -> None:
        options = {"epochs": math.ceil(args.num_train_epochs), **self.options}
        with warnings.catch_warnings():  # the loss that the Trainer logs is averaged over ranks
            warnings.simplefilter("ignore", UnwrappedModelWarning)
            self.scheduler = QuantizationScheduler(model, self.policy, **options)
        self._model = model

    def _schedule_anew(self, args: Any, model: Any, *, resumed: bool) -> None:
        """For what ``model_init`` has made; a checkpoint is in it already if the run is resumed."""
        loaded = copy.deepcopy(model.state_dict()) if resumed else {}
        for layer in quantized_layers(model):
            if layer.weight is not None:
                layer.weight.weight_quantizer.release_()
        self._schedule(args, model)
        if resumed:
            model.load_state_dict(loaded)


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder that the Trainer resumes from, as far as a callback can know."""
    named = args.resume_from_checkpoint
    if isinstance(named, str) and Path(named, _FILE).exists():
        return Path(named)
    return _folder(args, state)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
