"""A Lightning callback; ``pip install 'learnsched[lightning]'``."""

from __future__ import annotations

import math
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from learnsched.layers import is_quantized
from learnsched.schedule import Policy
from learnsched.scheduler import QuantizationScheduler, UnwrappedModelWarning


class QuantizationCallback(Callback):
    """Steps a scheduler at the end of every training epoch; its state is in Lightning's checkpoints.

    Args:
        policy: what makes the settings.
        metric: name under which the module logs its training loss, with ``on_epoch=True``.
        **options: further arguments of :class:`~learnsched.scheduler.QuantizationScheduler`;
            ``epochs`` is the trainer's ``max_epochs`` if omitted.

    Example:
        >>> from learnsched.policies import StraightThrough
        >>> callback = QuantizationCallback(StraightThrough())  # for Trainer(callbacks=[callback])
    """

    def __init__(self, policy: Policy, metric: str = "train_loss", **options: Any) -> None:
        self.policy, self.metric, self.options = policy, metric, options
        self.scheduler: Any = None
        self._module: LightningModule | None = None
        self._looked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the scheduler of a module, before a checkpoint is loaded.

        Raises:
            ValueError: the number of epochs is not known, the module is not quantized yet, or weights
                are averaged by ``StochasticWeightAveraging``.
        """
        if any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks):
            raise ValueError(
                "StochasticWeightAveraging averages weights that the schedule has frozen on their "
                "levels, and adds an epoch; take it out"
            )
        if stage == "fit" and self._module is not pl_module:
            options = {"epochs": trainer.max_epochs, **self.options}
            if options["epochs"] in (None, -1):
                raise ValueError("give the Trainer max_epochs, or the callback epochs")
            if not is_quantized(pl_module):
                raise ValueError(
                    "the module has no quantized layers yet: call learnsched.quantize_ in its __init__, "
                    "since Lightning sets up callbacks before it calls setup() and configure_model()"
                )
            with warnings.catch_warnings():  # what ranks step with is averaged here
                warnings.simplefilter("ignore", UnwrappedModelWarning)
                self.scheduler = QuantizationScheduler(pl_module, self.policy, **options)
            self._module = pl_module

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep frozen weights in their place after each step of the optimizers."""
        for optimizer in trainer.optimizers:
            self.scheduler.watch(optimizer)
        if trainer.ckpt_path and self.scheduler.epoch == trainer.current_epoch - 1:
            # Saved after the last batch of an epoch, whose end Lightning does not come back to.
            self.scheduler.step({"train_loss": math.nan})

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Warn, after the first batch, of a loss that is not a mean over the epoch."""
        known, self._looked = self._looked, True
        logged = trainer.callback_metrics
        # A mean over the epoch is there at its end only, or under a name of its own.
        if not known and self.metric in logged and f"{self.metric}_step" not in logged:
            warnings.warn(
                f"the module logs {self.metric!r} batch by batch, so that the schedule is shown the "
                "loss of the last one; log it with on_epoch=True",
                stacklevel=2,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step, with the mean of the loss over processes.

        Raises:
            KeyError: the module logs no loss, and the policy needs one.
        """
        loss = trainer.callback_metrics.get(self.metric)
        if loss is None and self.policy.metrics:
            raise KeyError(
                f"{type(self.policy).__name__} needs the training loss: log it in training_step by "
                f"self.log({self.metric!r}, loss, on_epoch=True)"
            )
        if loss is not None:
            loss = trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.scheduler.step({} if loss is None else {"train_loss": loss})

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state."""
        return self.scheduler.state_dict() if self.scheduler else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        if self.scheduler:
            self.scheduler.load_state_dict(state_dict)
