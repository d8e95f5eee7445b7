"""Meta-training: tasks, inner loop, gradient estimators, trainer; separate and swappable."""
