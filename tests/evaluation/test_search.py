"""A search that goes on where it was."""

from pathlib import Path

import pytest
from optuna.trial import TrialState
from ruamel.yaml import YAML

from pipeline.evaluation.search import STARTUP_TRIALS, STUDY_FILE, Search, Values, open_search
from pipeline.params.tune import SpaceParams

ROOT = Path(__file__).parents[2]
SPACE = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")["tune"]["space"]
TRIALS = STARTUP_TRIALS + 6


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def space() -> SpaceParams:
    return SpaceParams.model_validate(SPACE)


def cost(values: Values) -> float:
    return abs(values["temperature"] - 0.9) + abs(values["top_p"] - 0.9) + values["min_p"]


def run(search: Search, trials: int) -> list[Values]:
    """Take the search to so many trials; half of what each costs is known first."""
    tried = []
    while len(search.over) < trials:
        trial, values = search.ask()
        trial.report(cost(values), 1)
        if trial.should_prune():
            search.study.tell(trial, state=TrialState.PRUNED)
        else:
            search.study.tell(trial, cost(values))
        tried.append(values)
    return tried


def test_the_same_seed_tries_the_same_in_the_same_order(space: SpaceParams) -> None:
    first = run(open_search("a", space, 1), TRIALS)
    assert run(open_search("b", space, 1), TRIALS) == first
    assert run(open_search("c", space, 2), TRIALS) != first


def test_an_interrupted_search_comes_to_the_same(space: SpaceParams, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(open_search("a", space, 1), TRIALS)
    for over in (0, 1, STARTUP_TRIALS + 2):
        (name,) = {f"b{over}"}
        search = open_search(name, space, 1)
        tried = run(search, over)
        # Asked for, and cut off.
        search.ask()
        capsys.readouterr()
        again = open_search(name, space, 1)
        told = f"tune: going on after {over} trials of the interrupted search\n" if over else ""
        assert capsys.readouterr().err == told
        assert tried + run(again, TRIALS) == whole
        assert len(again.over) == TRIALS


def test_values_are_those_of_the_space(space: SpaceParams) -> None:
    tried = run(open_search("a", space, 3), TRIALS)
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
                assert len(repr(value)) <= 5


def test_the_first_trial_filters_nothing(space: SpaceParams) -> None:
    _, values = open_search("a", space, 1).ask()
    assert values == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "no_repeat_ngram_size": 0,
    }


def test_where_the_space_does_not_hold_it_the_first_trial_is_drawn(space: SpaceParams) -> None:
    narrow = space.model_copy(update={"top_k": [20, 50]})
    _, values = open_search("a", narrow, 1).ask()
    assert values["top_k"] in (20, 50)


def test_a_trial_worse_than_the_best_ends_early(space: SpaceParams) -> None:
    search = open_search("a", space, 1)
    run(search, TRIALS)
    states = [trial.state for trial in search.over]
    assert set(states[:STARTUP_TRIALS]) == {TrialState.COMPLETE}
    assert TrialState.PRUNED in states


def test_another_fingerprint_starts_afresh(
    space: SpaceParams, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(open_search("a", space, 1), 2)
    assert capsys.readouterr().err == ""
    search = open_search("b", space, 1)
    assert "code have changed since the interrupted search: it starts afresh" in capsys.readouterr().err
    assert search.over == []
    assert [file.parent.name for file in folder.rglob(STUDY_FILE)] == ["b"]


def test_notes_outlive_an_interruption_and_nothing_outlives_the_end(space: SpaceParams, folder: Path) -> None:
    open_search("a", space, 1).note("run_id", "r1")
    search = open_search("a", space, 1)
    assert search.notes["run_id"] == "r1"
    search.remove()
    assert list(folder.rglob(STUDY_FILE)) == []
    assert open_search("a", space, 1).notes == {}
