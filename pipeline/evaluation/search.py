"""A search of decoding parameters by Optuna that goes on where it was, and comes to the same end however often.

A study lies in a folder of its own, named by a fingerprint of all that it depends on. Its trials are asked for one
after the other; what is tried next depends on the seed, the number of trials that are over, and what they came to, and
on nothing that an interruption would lose.
"""

import shutil
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

FOLDER = Path(".resume") / "tune"
STUDY_FILE = "study.db"
STUDY = "tune"
STARTUP_TRIALS = 6
"""Drawn evenly from the space before anything is learned from them; none of them ends early."""
BEST_PERCENT = 35
"""Of the trials that were not given up: with half of its samples another one has to be as good as these."""
DECIMALS = 6
"""Of a number on a grid, whose steps would add up to 0.7500000000000001."""

Values = dict[str, float | int]


class Search:
    """An Optuna study, begun or gone on with."""

    def __init__(self, study: optuna.Study, folder: Path, space: SpaceParams, seed: int) -> None:
        self.study = study
        self.folder = folder
        self._space = space
        self._seed = seed

    @property
    def over(self) -> list[FrozenTrial]:
        """The trials that came to an end, in their order; an interrupted one is not among them."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def ask(self) -> tuple[optuna.Trial, Values]:
        """The next trial, and the values that it tries."""
        # Anew for each trial: its random numbers must not depend on how many were asked for by this process.
        key = np.random.SeedSequence([self._seed, len(self.over)]).generate_state(1)[0]
        self.study.sampler = TPESampler(seed=int(key), n_startup_trials=STARTUP_TRIALS, multivariate=True)
        if not self.over and (neutral := _neutral(self._space)):
            # No filter at all is where a search of filters has to start from.
            self.study.enqueue_trial(neutral)
        trial = self.study.ask()
        return trial, {name: _suggested(trial, name, tried) for name, tried in self._space}

    def note(self, name: str, value: Any) -> None:
        """Keep something beside the trials."""
        self.study.set_user_attr(name, value)

    @property
    def notes(self) -> Mapping[str, Any]:
        return self.study.user_attrs

    def remove(self) -> None:
        """The search is over, and what it found is in its place."""
        shutil.rmtree(self.folder)


def open_search(fingerprint: str, space: SpaceParams, seed: int) -> Search:
    """The study of this fingerprint; says what it goes on from, and what it cannot use, which it removes."""
    folder = FOLDER / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    for other in FOLDER.iterdir():
        if other != folder:
            _tell("models, data, parameters or code have changed since the interrupted search: it starts afresh")
            shutil.rmtree(other)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=RDBStorage(f"sqlite:///{folder / STUDY_FILE}"),
        study_name=STUDY,
        load_if_exists=True,
        direction="minimize",
        pruner=PercentilePruner(BEST_PERCENT, n_startup_trials=STARTUP_TRIALS),
    )
    for cut_off in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(cut_off.number, state=TrialState.FAIL)
    search = Search(study, folder, space, seed)
    if search.over:
        _tell(f"going on after {len(search.over)} trials of the interrupted search")
    return search


def _neutral(space: SpaceParams) -> Values:
    """The values that leave the model's distribution as it is, where the space holds them."""
    neutral = SamplingParams()
    values = {name: getattr(neutral, name) for name, _ in space}
    return values if all(_holds(tried, values[name]) for name, tried in space) else {}


def _holds(tried: RangeParams | list[int], value: float) -> bool:
    if isinstance(tried, RangeParams):
        return tried.low <= value <= tried.high
    return value in tried


def _suggested(trial: optuna.Trial, name: str, tried: RangeParams | list[int]) -> float | int:
    if isinstance(tried, RangeParams):
        return round(trial.suggest_float(name, tried.low, tried.high, step=tried.step), DECIMALS)
    return int(trial.suggest_categorical(name, tried))


def _tell(line: str) -> None:
    print(f"tune: {line}", file=sys.stderr)
