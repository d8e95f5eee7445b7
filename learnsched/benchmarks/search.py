"""The search that every method gets: the same number of trials, its learning rate included."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from learnsched.data import DataSet, Split
from learnsched.meta.tasks import Task

# (task, data, learning rates, policies, seeds of each, split) to accuracies (rates, seeds).
Train = Callable[[Task, DataSet, Sequence[float], Sequence[Any], int, Split], Tensor]

LEARNING_RATES = (2e-3, 5e-2)


@dataclass(frozen=True)
class Budget:
    """How much every method gets.

    Attributes:
        rounds: rounds of the search; the sampler learns between them.
        trials: trials of a round.
        trial_runs: seeds of a trial.
        runs: fresh seeds of the final comparison.
    """

    rounds: int = 2
    trials: int = 8
    trial_runs: int = 2
    runs: int = 24


@dataclass(frozen=True)
class Found:
    """What a search chose.

    Attributes:
        learning_rate: of the best trial.
        policy: of the best trial; None where the method has nothing to search but the rate.
        validation: mean validation accuracy of the best trial, in [0, 1].
        parameters: of the best trial, by name, without the learning rate.
        trials: parameters of every trial with the learning rate, and its ``validation``.
        space: range of each parameter, as Optuna writes distributions in JSON.
    """

    learning_rate: float
    policy: Any
    validation: float
    parameters: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    space: dict[str, Any] = field(default_factory=dict)


def search(
    suggest: Callable[[Any], Any] | None,
    evaluate: Callable[[list[float], list[Any]], Sequence[float]],
    budget: Budget,
    seed: int,
    journal: Path | None = None,
) -> Found:
    """The learning rate and policy of best validation accuracy.

    The trials of a round are evaluated together. A round that was cut off is asked for again, with
    the same trials: the sampler's seed depends on the round, not on what ran before in the process.

    Args:
        suggest: from an Optuna trial to a policy; None if only the learning rate is searched.
        evaluate: from learning rates and policies (None without ``suggest``) to accuracies.
        budget: rounds and trials of a round.
        seed: of the sampler.
        journal: file of Optuna's journal storage, from which an interrupted search goes on; in
            memory if None.

    Raises:
        ImportError: Optuna is missing.

    Example:
        >>> found = search(None, lambda rates, _: [-abs(r - 0.01) for r in rates], Budget(), seed=0)
        >>> len(found.trials), 0.005 < found.learning_rate < 0.02
        (16, True)
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", storage=_storage(journal), study_name="search", load_if_exists=True
    )
    kept = study.get_trials(states=(TrialState.COMPLETE,))
    for turn in range(len(kept) // budget.trials, budget.rounds):
        # Of a round that was cut off while it was written down, the sampler must not know a part.
        sampler = optuna.samplers.TPESampler(
            seed=1000 * seed + turn, n_startup_trials=budget.trials
        )
        asked = optuna.create_study(direction="maximize", sampler=sampler)
        asked.add_trials(kept[: turn * budget.trials])
        trials = [asked.ask() for _ in range(budget.trials)]
        rates = [t.suggest_float("learning_rate", *LEARNING_RATES, log=True) for t in trials]
        policies = [suggest(t) if suggest else None for t in trials]
        accuracies = evaluate(rates, policies)
        for trial, accuracy in zip(trials, accuracies, strict=True):
            asked.tell(trial, float(accuracy))
        study.add_trials(asked.trials[len(kept) :])
        kept = study.get_trials(states=(TrialState.COMPLETE,))
    return _best(study, suggest)


def tune(
    train: Train,
    suggest: Callable[[Any], Any] | None,
    tasks: Sequence[tuple[Task, DataSet]],
    budget: Budget,
    seed: int,
    journal: Path | None = None,
) -> Found:
    """:func:`search` for the best mean validation accuracy over tasks."""

    def evaluate(rates: list[float], policies: list[Any]) -> list[float]:
        accuracies = [
            train(task, data, rates, policies, budget.trial_runs, data.validation).mean(1).tolist()
            for task, data in tasks
        ]
        return [fmean(values) for values in zip(*accuracies, strict=True)]

    return search(suggest, evaluate, budget, seed, journal)


def _best(study: Any, suggest: Callable[[Any], Any] | None) -> Found:
    from optuna.distributions import distribution_to_json
    from optuna.trial import FixedTrial, TrialState

    best = study.best_trial
    parameters = dict(best.params)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    ranges = {name: d for trial in complete for name, d in trial.distributions.items()}
    return Found(
        learning_rate=parameters.pop("learning_rate"),
        policy=suggest(FixedTrial(best.params)) if suggest else None,
        validation=best.value,
        parameters=parameters,
        trials=[{**t.params, "validation": t.value} for t in complete],
        space={name: json.loads(distribution_to_json(d)) for name, d in ranges.items()},
    )


def _storage(journal: Path | None) -> Any:
    if journal is None:
        return None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(journal)))
