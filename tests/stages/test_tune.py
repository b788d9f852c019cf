"""The search of decoding parameters: what is tried, what wins, what is recorded, and resuming after an interruption."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dag import ROOT
from mlflow import MlflowClient
from mlflow.entities import Run
from toy_project import Project

from pipeline.decoding import SamplingParams
from pipeline.errors import UserError
from pipeline.evaluation import trials as trials_module
from pipeline.evaluation.presets import choose_presets, edges_of, rows_of
from pipeline.evaluation.search import open_search
from pipeline.evaluation.trials import Bench, Final, Trial, run_finals, run_trials, set_up, try_out
from pipeline.files import read_json, sha256_file, write_jsonl
from pipeline.params.section import read_yaml
from pipeline.params.tune import TuneParams
from pipeline.quality.distance import EMPTY_EXCESS
from pipeline.resume import RESUME_FOLDER
from pipeline.stages import tune as stage
from pipeline.stages.tune import fingerprint
from pipeline.tracking import runs, store

FILES = {"found.json", "trials.json", "metrics.json"}
PRESETS = {"balanced", "faithful", "adventurous"}
VALUES = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_n_sigma": 0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
}
READ = ("out/export", "out/prepare/validation.jsonl", "out/tokenize/train")


@pytest.fixture
def rows(project: Project) -> list[dict[str, Any]]:
    return list(read_json(project.out / "tune" / "trials.json"))


@pytest.fixture
def recorded(project: Project) -> Iterator[tuple[MlflowClient, Run]]:
    """The store, and the run of the search in it."""
    with project.entered():
        client = store.connect()
        run = client.get_run(project.run_of("tune"))
        assert run.data.tags["mlflow.parentRunId"] == project.run_of("finetune")
        yield client, run


@pytest.fixture
def bench(project: Project) -> Bench:
    params = project.params
    return set_up(*(project.root / path for path in READ), params.tune, params.samples)


def trials_of(client: MlflowClient, run_id: str) -> list[Run]:
    """The child runs of a search, in the order of their numbers."""
    children = client.search_runs(
        [store.experiment_id(client)],
        filter_string=f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`{runs.STAGE_TAG}` = '{runs.TRIAL}'",
    )
    return sorted(children, key=lambda run: int(run.data.tags[runs.TRIAL_TAG]))


def complete(number: int, tame: float, wild: float, distance: float | None = None, excess: float = 0.0) -> Trial:
    total = tame + wild if distance is None else distance
    return Trial(number, "complete", 8, VALUES, excess, total, too_tame=tame, too_wild=wild, scores={})


def test_what_is_written(project: Project, rows: list[dict[str, Any]]) -> None:
    out = project.out / "tune"
    assert {file.name for file in out.iterdir()} == FILES
    found = read_json(out / "found.json")
    assert set(found) == PRESETS
    for name, values in found.items():
        # Neutral values too: they replace whatever is set by hand.
        assert set(values) == set(VALUES)
        (row,) = (row for row in rows if row["preset"] and name in row["preset"].split(", "))
        assert row["values"] == values
    assert [row["number"] for row in rows] == list(range(project.params.tune.trials))
    finals = [row["final"] for row in rows if row["final"] is not None]
    assert len(finals) == project.params.tune.finalists
    best = min(finals, key=lambda final: (final["excess"], final["distance"]))
    assert read_json(out / "metrics.json") == {f"validation_{name}": value for name, value in best.items()}
    # Fewer documents than samples were asked for: none comes twice.
    assert {row["prompts"] for row in rows if row["state"] == "complete"} == {8}


def test_the_first_trial_is_the_model_as_it_is(rows: list[dict[str, Any]]) -> None:
    assert rows[0]["values"] == VALUES


def test_the_front_is_of_complete_trials(rows: list[dict[str, Any]]) -> None:
    front = [row for row in rows if row["on_front"]]
    assert front
    for row in front:
        assert row["state"] == "complete"
        assert not any(
            other["state"] == "complete" and other["too_tame"] < row["too_tame"] and other["too_wild"] < row["too_wild"]
            for other in rows
        )


def test_every_trial_is_a_run_of_its_own(
    project: Project, rows: list[dict[str, Any]], recorded: tuple[MlflowClient, Run]
) -> None:
    client, run = recorded
    trials = trials_of(client, run.info.run_id)
    assert len(trials) == len(rows)
    for row, trial in zip(rows, trials, strict=True):
        assert trial.info.status == "FINISHED"
        assert trial.data.tags["tune.state"] == row["state"]
        assert trial.data.params == {name: str(value) for name, value in row["values"].items()}
        assert trial.data.metrics["distance"] == row["distance"]
        assert trial.data.metrics["zipf"] == row["scores"]["zipf"]
    written = read_json(project.out / "tune" / "metrics.json")["validation_distance"]
    assert run.data.metrics["tune/validation_distance"] == written
    assert run.data.metrics["tune/trials"] == len(rows)
    assert run.data.metrics["tune/pruned"] == sum(row["state"] == "pruned" for row in rows)
    curve = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "trial_distance")}
    assert curve == {row["number"]: row["distance"] for row in rows if row["state"] == "complete"}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == FILES


def search_again(project: Project, out: Path) -> None:
    project.run(stage, *READ, "out/finetune", str(out))


def test_the_same_search_gives_the_same_bytes(project: Project, tmp_path: Path) -> None:
    search_again(project, tmp_path / "tune")
    for name in FILES:
        assert sha256_file(tmp_path / "tune" / name) == sha256_file(project.out / "tune" / name), name
    assert not any((project.root / RESUME_FOLDER / "tune").iterdir())


@pytest.mark.parametrize("trials", [0, 3])
def test_an_interrupted_search_resumes_and_gives_the_same(
    trials: int,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > trials:
            raise KeyboardInterrupt
        return try_out(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trials_module, "try_out", interrupted)
        with pytest.raises(SystemExit, match="130"):
            search_again(project, tmp_path / "tune")
    assert not (tmp_path / "tune").exists()
    with project.entered():
        client = store.connect()
        (begun, *_) = client.search_runs(
            [store.experiment_id(client)], filter_string=f"tags.`{runs.STAGE_TAG}` = 'tune'"
        )
        assert begun.info.status == "FAILED"
        # As if it had been killed between recording a trial and keeping it.
        runs.RunLog(client, begun.info.run_id).log_trial(trials, VALUES, {"distance": 1.0}, {}, 0.0)
    capsys.readouterr()
    search_again(project, tmp_path / "tune")
    assert (f"resuming after {trials} trials" in capsys.readouterr().err) == (trials > 0)
    for name in FILES:
        assert sha256_file(tmp_path / "tune" / name) == sha256_file(project.out / "tune" / name), name
    with project.entered():
        assert client.get_run(begun.info.run_id).info.status == "FINISHED"
        recorded = trials_of(client, begun.info.run_id)
        numbers = [int(trial.data.tags[runs.TRIAL_TAG]) for trial in recorded]
        assert numbers == list(range(project.params.tune.trials))
        client.delete_run(begun.info.run_id)


def test_a_search_whose_run_is_gone_continues_in_another(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage, "run_finals", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            search_again(project, tmp_path / "tune")
    with project.entered():
        client = store.connect()
        (begun, *_) = client.search_runs(
            [store.experiment_id(client)], filter_string=f"tags.`{runs.STAGE_TAG}` = 'tune'"
        )
        client.delete_run(begun.info.run_id)
    capsys.readouterr()
    search_again(project, tmp_path / "tune")
    said = capsys.readouterr().err
    assert "does not hold the interrupted run: the work continues in a new run" in said
    assert f"resuming after {project.params.tune.trials} trials" in said
    with project.entered():
        run_id = runs.find_run(client, "tune", tmp_path / "tune")
        assert run_id is not None
        assert set(runs.RunLog(client, run_id).trials()) == set(range(project.params.tune.trials))
    assert sha256_file(tmp_path / "tune" / "trials.json") == sha256_file(project.out / "tune" / "trials.json")


def test_a_pruned_trial_has_drawn_half(bench: Bench) -> None:
    asked: list[tuple[int, float]] = []

    def stops(prompts: int, score: float) -> bool:
        asked.append((prompts, score))
        return True

    found, prompts = try_out(bench, VALUES, stops)
    assert prompts == 4
    assert asked == [(4, found.distance.score)]
    whole, prompts = try_out(bench, VALUES, lambda *_: False)
    assert prompts == 8
    assert whole.figures.mean_tokens == pytest.approx(
        np.mean([len(sample.token_ids) for sample in bench.draw(VALUES, 0, 8)])
    )


def test_with_few_documents_no_trial_is_pruned(project: Project, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    write_jsonl(few, [{"text": f"The baker lit oven {number} before the morning."} for number in range(5)])
    params = project.params
    bench = set_up(project.out / "export", few, project.out / "tokenize" / "train", params.tune, params.samples)

    def stops(*_: Any) -> bool:
        raise AssertionError

    assert try_out(bench, VALUES, stops)[1] == 5
    write_jsonl(few, [{"text": "The baker lit the only oven."}])
    with pytest.raises(UserError, match="1 text of people is too little"):
        set_up(project.out / "export", few, project.out / "tokenize" / "train", params.tune, params.samples)


def test_a_trial_that_says_nothing_is_the_worst_and_does_not_end_the_search(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Bench.draw
    silent: list[Any] = []

    def draw_or_be_silent(own: Bench, values: Any, *arguments: int) -> Any:
        if len(silent) < 2 and values not in silent:
            silent.append(values)
        ends = {"allowed_token_ids": (own.generator.engine.end_of_text_id,)} if values in silent else {}
        return draw(own, {**values, **ends}, *arguments)

    monkeypatch.setattr(Bench, "draw", draw_or_be_silent)
    search = open_search(tmp_path, bench.params.space, 1)
    trials = run_trials(bench, search, lambda *_: None)
    finals = run_finals(bench, trials, search)
    assert len(trials) == bench.params.trials
    assert [trial.values for trial in trials if trial.excess >= EMPTY_EXCESS] == silent
    assert [trial.values for trial in trials if trial.scores["mean_tokens"] == 0] == silent
    assert not {0, 1} & {*finals, *choose_presets(trials, finals).values()}
    assert search.study.best_trial.number > 1


def test_rounds_and_prompts_have_random_numbers_of_their_own(bench: Bench) -> None:
    whole, again = (bench.draw(VALUES, 0, 8, round_) for round_ in (0, 1))
    part = bench.draw(VALUES, 4, 8)
    assert [list(sample.token_ids) for sample in part] == [list(sample.token_ids) for sample in whole[4:]]
    assert [list(sample.token_ids) for sample in again] != [list(sample.token_ids) for sample in whole]


def test_what_a_search_depends_on(project: Project) -> None:
    read, params = [project.root / path for path in READ], project.params
    name = fingerprint(read, params.tune, params.samples)
    assert fingerprint(read, params.tune, params.samples) == name
    for changed in (
        params.tune.model_copy(update={"seed": 9}),
        params.tune.model_copy(update={"space": params.tune.space.model_copy(update={"top_k": [0]})}),
    ):
        assert fingerprint(read, changed, params.samples) != name
    other_prompts = params.samples.model_copy(update={"prompt_words": 1})
    assert fingerprint(read, params.tune, other_prompts) != name


def test_presets_by_hand() -> None:
    rows = [
        complete(0, 17.0, 1.0),
        complete(1, 5.0, 2.0),
        complete(2, 3.0, 3.0),
        complete(3, 1.0, 6.0),
        complete(4, 0.5, 20.0),
        complete(5, 4.0, 4.0),
        replace(complete(6, 0.0, 0.0), state="pruned"),
    ]
    # Another trial may beat the winner of the finals in both; three times as far as it, a preset is too far.
    assert choose_presets(rows, {2: Final(0, 6.5), 5: Final(0, 7.0)}) == {
        "balanced": 2,
        "faithful": 0,
        "adventurous": 3,
    }
    assert choose_presets(rows, {2: Final(0, 7.5), 5: Final(0, 7.0)}) == {
        "balanced": 5,
        "faithful": 0,
        "adventurous": 4,
    }
    rows[0] = replace(rows[0], distance=25.0)
    assert choose_presets(rows, {2: Final(0, 7.5), 5: Final(0, 7.0)}) == {
        "balanced": 5,
        "faithful": 1,
        "adventurous": 4,
    }


def test_a_trial_that_beats_all_others_in_both_is_not_all_presets() -> None:
    rows = [complete(0, 4.0, 0.3), complete(1, 3.0, 0.3), complete(2, 2.0, 0.1)]
    assert choose_presets(rows, {1: Final(0, 1.0)}) == {"balanced": 1, "faithful": 0, "adventurous": 2}


def test_faults_come_before_nearness() -> None:
    rows = [complete(0, 1.0, 9.0), complete(1, 5.0, 5.0), complete(2, 9.0, 4.0, excess=0.5), complete(3, 4.0, 6.0)]
    # The nearest finalist has faults above people's level; what has more faults than the winner is no preset.
    assert choose_presets(rows, {1: Final(0, 9.0), 2: Final(0.5, 1.0)}) == {
        "balanced": 1,
        "faithful": 1,
        "adventurous": 0,
    }
    # If the winner itself has some, a preset may have twice as many.
    assert choose_presets(rows, {2: Final(0.5, 1.0)}) == {"balanced": 2, "faithful": 2, "adventurous": 0}


def test_an_end_of_a_range_is_an_edge_unless_it_turns_the_filter_off() -> None:
    space = TuneParams.model_validate(read_yaml(ROOT / "params.yaml")["tune"]).space
    neutral = {name: getattr(SamplingParams(), name) for name, _ in space}
    assert edges_of(neutral, space) == []
    ends = {"temperature": space.temperature.low, "repetition_penalty": space.repetition_penalty.high, "top_k": 50}
    assert edges_of({**neutral, **ends}, space) == ["temperature", "repetition_penalty"]


def test_where_nothing_else_is_near_all_presets_are_the_winner() -> None:
    rows = [complete(0, 1.0, 1.0), complete(1, 0.5, 9.0), complete(2, 9.0, 0.5)]
    assert choose_presets(rows, {0: Final(0, 2.0)}) == {"balanced": 0, "faithful": 0, "adventurous": 0}
    rows = [complete(0, 1.0, 1.0), complete(1, 0.9, 0.9, distance=9.0)]
    assert choose_presets(rows, {0: Final(0, 2.0)}) == {"balanced": 0, "faithful": 0, "adventurous": 0}


def test_rows_tell_what_was_made_of_them() -> None:
    rows = [complete(0, 1.0, 1.0), complete(1, 3.0, 3.0), replace(complete(2, 0.0, 0.0), state="pruned")]
    space = TuneParams.model_validate(read_yaml(ROOT / "params.yaml")["tune"]).space
    found = rows_of(rows, {0: Final(0.0, 2.5)}, {"balanced": 0, "faithful": 0, "adventurous": 1}, space)
    assert [(row["on_front"], row["final"], row["preset"]) for row in found] == [
        (True, {"excess": 0.0, "distance": 2.5}, "balanced, faithful"),
        (False, None, "adventurous"),
        (False, None, None),
    ]


def test_a_search_of_which_only_comments_changed_is_kept(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "set_up", None)
    search_again(project, project.out / "tune")
    assert "tune: nothing but comments and docstrings has changed since run " in capsys.readouterr().err
