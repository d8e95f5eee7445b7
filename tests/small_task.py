"""The small task of the tests of meta-training: an MLP on digits, a few seconds in all."""

from dataclasses import replace

from learnsched.meta.tasks import task_of

SMALL = task_of(
    ("digits", "mlp", 6, 3, 3, 4),
    batch=16,
    bits="ternary/2-bit",
    learning_rates=(0.01, 0.02),
    fine_tuning=False,
    seed=3,
)
THREE_MEMBERS = replace(SMALL, learning_rates=(0.01, 0.02, 0.03))
