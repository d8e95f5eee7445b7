"""Callbacks for training frameworks, each in a module of its own that imports its framework.

``lightning.QuantizationCallback``, ``transformers.QuantizationCallback`` and
``skorch.QuantizationCallback`` step a :class:`~learnsched.scheduler.QuantizationScheduler` after
every epoch and keep its state in their framework's checkpoints. The model is quantized before and
finalized after, as in a loop of one's own.
"""
