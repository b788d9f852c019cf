"""A search of decoding parameters by Optuna that can be resumed and gives the same result after any interruption.

Trials are asked for one after the other. What is tried next depends on the seed, on the number of finished trials and
on their results, and on nothing that an interruption would lose.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import PercentilePruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pipeline.decoding import SamplingParams
from pipeline.params.tune import RangeParams, SpaceParams

STUDY_FILE = "study.db"
STUDY = "tune"
STARTUP_TRIALS = 6
"""The trials drawn evenly from the space before the search learns from any; they are never pruned."""
BEST_PERCENT = 35
"""A trial is pruned unless half of its samples are as good as this percentage of the complete trials were then."""
DECIMALS = 6
"""Decimals that a number on a grid is rounded to: its steps would add up to 0.7500000000000001."""

Values = dict[str, float | int]


class Search:
    """An Optuna study in a folder, new or resumed."""

    def __init__(self, study: optuna.Study, space: SpaceParams, seed: int) -> None:
        self.study = study
        self._space = space
        self._seed = seed

    @property
    def finished(self) -> list[FrozenTrial]:
        """The trials that are complete or pruned, in their order; an interrupted one is not among them."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def ask(self) -> tuple[optuna.Trial, Values]:
        """Return the next trial, and the values to try."""
        # A new sampler for each trial: its random numbers must not depend on how many trials this process asked for.
        key = np.random.SeedSequence([self._seed, len(self.finished)]).generate_state(1)[0]
        self.study.sampler = TPESampler(seed=int(key), n_startup_trials=STARTUP_TRIALS, multivariate=True)
        if not self.finished and (neutral := _neutral(self._space)):
            # A search of filters has to start from no filter at all.
            self.study.enqueue_trial(neutral)
        trial = self.study.ask()
        return trial, {name: _suggest(trial, name, tried) for name, tried in self._space}

    def note(self, name: str, value: Any) -> None:
        """Keep a value with the study."""
        self.study.set_user_attr(name, value)

    @property
    def notes(self) -> Mapping[str, Any]:
        return self.study.user_attrs


def open_search(folder: Path, space: SpaceParams, seed: int) -> Search:
    """Open the study in `folder`, or create it; say so if it is resumed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=RDBStorage(f"sqlite:///{folder / STUDY_FILE}"),
        study_name=STUDY,
        load_if_exists=True,
        direction="minimize",
        pruner=PercentilePruner(BEST_PERCENT, n_startup_trials=STARTUP_TRIALS),
    )
    for interrupted in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(interrupted.number, state=TrialState.FAIL)
    search = Search(study, space, seed)
    if search.finished:
        print(f"tune: resuming after {len(search.finished)} trials of the interrupted search", file=sys.stderr)
    return search


def _neutral(space: SpaceParams) -> Values:
    """Return the values that leave the model's distribution as it is; empty if the space lacks one of them."""
    neutral = SamplingParams()
    values = {name: getattr(neutral, name) for name, _ in space}
    return values if all(values[name] in tried for name, tried in space) else {}


def _suggest(trial: optuna.Trial, name: str, tried: RangeParams | list[int]) -> float | int:
    if isinstance(tried, RangeParams):
        return round(trial.suggest_float(name, tried.low, tried.high, step=tried.step), DECIMALS)
    return int(trial.suggest_categorical(name, tried))
