"""A search that can be interrupted and resumed gives the result of one that was not."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from ruamel.yaml import YAML

from pipeline.evaluation.search import STARTUP_TRIALS, Search, Values, open_search
from pipeline.params.tune import RangeParams, SpaceParams

ROOT = Path(__file__).parents[2]
SPACE = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")["tune"]["space"]
TRIALS = STARTUP_TRIALS + 6


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """Yield empty folders without end."""

    def make() -> Iterator[Path]:
        for number in count():
            (tmp_path / str(number)).mkdir()
            yield tmp_path / str(number)

    return make()


@pytest.fixture
def space() -> SpaceParams:
    return SpaceParams.model_validate(SPACE)


def cost(values: Values) -> float:
    return abs(values["temperature"] - 0.9) + abs(values["top_p"] - 0.9) + values["min_p"]


def run(search: Search, trials: int) -> list[Values]:
    """Take the search to so many trials; half of what each costs is known first."""
    tried = []
    while len(search.finished) < trials:
        trial, values = search.ask()
        trial.report(cost(values), 1)
        if trial.should_prune():
            search.study.tell(trial, state=TrialState.PRUNED)
        else:
            search.study.tell(trial, cost(values))
        tried.append(values)
    return tried


def test_the_same_seed_tries_the_same_in_the_same_order(space: SpaceParams, folders: Iterator[Path]) -> None:
    first = run(open_search(next(folders), space, 1), TRIALS)
    assert run(open_search(next(folders), space, 1), TRIALS) == first
    assert run(open_search(next(folders), space, 2), TRIALS) != first


def test_an_interrupted_search_gives_the_same(
    space: SpaceParams, folders: Iterator[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(open_search(next(folders), space, 1), TRIALS)
    for finished in (0, 1, STARTUP_TRIALS + 2):
        folder = next(folders)
        search = open_search(folder, space, 1)
        tried = run(search, finished)
        # Asked for, and interrupted.
        search.ask()
        capsys.readouterr()
        again = open_search(folder, space, 1)
        line = f"tune: resuming after {finished} trials of the interrupted search\n" if finished else ""
        assert capsys.readouterr().err == line
        assert tried + run(again, TRIALS) == whole
        assert len(again.finished) == TRIALS


def test_values_are_those_of_the_space(space: SpaceParams, folders: Iterator[Path]) -> None:
    tried = run(open_search(next(folders), space, 3), TRIALS)
    assert len({tuple(values.items()) for values in tried}) > TRIALS / 2
    for values in tried:
        for name, value in values.items():
            if isinstance(SPACE[name], list):
                assert value in SPACE[name]
            else:
                steps = (value - SPACE[name]["low"]) / SPACE[name]["step"]
                assert steps == pytest.approx(round(steps), abs=1e-6)
                assert SPACE[name]["low"] <= value <= SPACE[name]["high"]
                # As people would write it.
                assert len(repr(value)) <= 6


def test_the_first_trial_filters_nothing(space: SpaceParams, folders: Iterator[Path]) -> None:
    _, values = open_search(next(folders), space, 1).ask()
    assert values == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "top_n_sigma": 0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
    }


def test_where_the_space_does_not_hold_it_the_first_trial_is_drawn(space: SpaceParams, folders: Iterator[Path]) -> None:
    narrow = space.model_copy(update={"top_k": [20, 50]})
    _, values = open_search(next(folders), narrow, 1).ask()
    assert values["top_k"] in (20, 50)


@pytest.mark.parametrize(("low", "high"), [(0.65, 1.05), (0.6, 0.9)])
def test_where_no_step_reaches_it_the_first_trial_is_drawn(
    low: float, high: float, space: SpaceParams, folders: Iterator[Path]
) -> None:
    coarse = space.model_copy(update={"temperature": RangeParams(low=low, high=high, step=0.1)})
    _, values = open_search(next(folders), coarse, 1).ask()
    assert values["temperature"] in coarse.temperature


@given(st.integers(-100, 100), st.integers(1, 60), st.integers(0, 40), st.integers(0, 4))
def test_steps_that_divide_a_range_try_both_ends(low: int, step: int, steps: int, decimals: int) -> None:
    written = [f"{number}e-{decimals}" for number in (low, low + steps * step, step)]
    tried = RangeParams(**dict(zip(("low", "high", "step"), map(float, written), strict=True)))
    grid = FloatDistribution(tried.low, tried.high, step=tried.step)
    assert grid.high == tried.high
    assert all(end in tried for end in tried.ends())


def test_a_trial_worse_than_the_best_ends_early(space: SpaceParams, folders: Iterator[Path]) -> None:
    search = open_search(next(folders), space, 1)
    run(search, TRIALS)
    states = [trial.state for trial in search.finished]
    assert set(states[:STARTUP_TRIALS]) == {TrialState.COMPLETE}
    assert TrialState.PRUNED in states


def test_notes_survive_an_interruption(space: SpaceParams, folders: Iterator[Path]) -> None:
    folder = next(folders)
    open_search(folder, space, 1).note("final_3", 1.5)
    assert open_search(folder, space, 1).notes["final_3"] == 1.5
