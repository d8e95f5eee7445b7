"""A skorch callback; ``pip install 'learnsched[skorch]'``."""

from __future__ import annotations

from typing import Any

from skorch import NeuralNet
from skorch.callbacks import Callback

from learnsched.schedule import Policy
from learnsched.scheduler import QuantizationScheduler


class QuantizationCallback(Callback):
    """Steps a scheduler, ``net.quantization_``, after every epoch; skorch's checkpoints may keep it.

    To resume, list ``[this, LoadInitState(checkpoint), checkpoint]`` as callbacks, with
    ``checkpoint = Checkpoint(monitor=None, f_quantization="quantization.pt")``, and give ``epochs``,
    since a net that goes on counts its ``max_epochs`` anew.

    Args:
        policy: what makes the settings. It is shown the net's ``train_loss``.
        epochs: the horizon; the net's ``max_epochs`` if None.
        fine_tuning: whether training starts from a trained float network.
        seed: of random INQ partitions.

    Example:
        >>> from learnsched.policies import StraightThrough
        >>> callback = QuantizationCallback(StraightThrough())  # for NeuralNet(callbacks=[callback])
    """

    def __init__(
        self, policy: Policy, epochs: int | None = None, fine_tuning: bool = False, seed: int = 0
    ) -> None:
        self.policy, self.epochs, self.fine_tuning, self.seed = policy, epochs, fine_tuning, seed

    def initialize(self) -> QuantizationCallback:
        """Forget the scheduler of a net that is made anew."""
        self.scheduler_: QuantizationScheduler | None = None
        self.module_: Any = None
        self.optimizer_: Any = None
        return self

    def on_train_begin(self, net: NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Make the scheduler, before a checkpoint is loaded; keep it when the module trains on."""
        if self.scheduler_ is None or self.module_ is not net.module_:
            self.scheduler_ = QuantizationScheduler(
                net.module_,
                self.policy,
                net.max_epochs if self.epochs is None else self.epochs,
                optimizer=net.optimizer_,
                fine_tuning=self.fine_tuning,
                seed=self.seed,
            )
        elif self.optimizer_ is not net.optimizer_:  # as after net.initialize_optimizer()
            self.scheduler_.watch(net.optimizer_)
        self.module_, self.optimizer_ = net.module_, net.optimizer_
        net.quantization_ = self.scheduler_

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Step, with the epoch's training loss."""
        if self.scheduler_ is not None:
            self.scheduler_.step({"train_loss": net.history[-1, "train_loss"]})
