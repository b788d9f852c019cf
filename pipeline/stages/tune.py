"""Search the decoding parameters with which the model's texts are nearest to people's, on the validation split."""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import optuna
from optuna.trial import TrialState
from tqdm import tqdm

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.errors import report_errors
from pipeline.evaluation.samples import SLOTS, Measures, draw_samples, human_samples
from pipeline.evaluation.search import FOLDER, Search, Values, open_search
from pipeline.files import digest_of, whole_folder, write_json
from pipeline.imports import PACKAGE, needed_files
from pipeline.params.file import PARAMS_FILE, load_section, read_yaml
from pipeline.params.samples import SamplesParams
from pipeline.params.tune import TuneParams
from pipeline.quality.comparison import Comparison, Human, SampleFigures, compare, measure_people
from pipeline.quality.pareto import pareto_front
from pipeline.stage_process import only_writer, stage_process
from pipeline.tokens import load_tokens, tokenizer_sha256
from pipeline.tracking import runs, store
from pipeline.tracking.restore import parent_run

FINAL_ROUNDS = 2
"""Sets of samples that each finalist is drawn anew."""
PRUNABLE_PROMPTS = 8
"""With fewer prompts, half of them say nothing."""
PRESET_DISTANCE = 3.0
"""An end of the front may be this many times as far from people as the winner to be of use."""
LOCK_WAIT_S = 10
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of the export stage")
    parser.add_argument("documents", type=Path, help="the validation split's documents")
    parser.add_argument("tokens", type=Path, help="token arrays of the training split")
    parser.add_argument("finetune", type=Path, help="folder of the finetune stage, whose run is the parent")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with report_errors(), store.store_errors(), stage_process(arguments.out), only_writer(FOLDER, LOCK_WAIT_S):
        params, samples = load_section("tune", TuneParams), load_section("samples", SamplesParams)
        parameters = read_yaml(PARAMS_FILE)
        parent = parent_run(store.connect(), arguments.finetune, parameters)
        read = (arguments.export, arguments.documents, arguments.tokens)
        name = fingerprint(read, params, samples, parent)
        search = go_on(open_search(name, params.space, params.seed), params)
        run_id = search.notes.get("run_id")
        with runs.start_run("tune", parameters, parent_run_id=parent, run_id=run_id) as run:
            search.note("run_id", run.run_id)
            tune(*read, arguments.out, params, samples, search, run)
            for file in sorted(arguments.out.iterdir()):
                run.log_file(file)
        search.remove()


def fingerprint(read: Sequence[Path], params: TuneParams, samples: SamplesParams, parent: str) -> str:
    """A name for all that a search depends on: files, parameters, code, libraries, the run that it belongs to."""
    code = sorted(needed_files(f"{PACKAGE}.stages.tune", Path(__file__).parents[2]))
    parts = [
        digest_of([*read, *code]),
        params.model_dump_json(),
        samples.model_dump_json(),
        optuna.__version__,
        onnxruntime.__version__,
        parent,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def go_on(search: Search, params: TuneParams) -> Search:
    """The search, or where the store no longer holds what it recorded, one that begins."""
    run_id = search.notes.get("run_id")
    if run_id is None or runs.holds_run(run_id):
        return search
    print("tune: the tracking store no longer holds the interrupted search: it starts afresh", file=sys.stderr)
    search.remove()
    return open_search(search.folder.name, params.space, params.seed)


@dataclass(frozen=True)
class Bench:
    """What every set of parameters is tried on."""

    generator: TextGenerator
    measures: Measures
    prompts: list[str]
    human: Human
    human_half: Human | None
    """Of the first half of the prompts; none where that is too little to end a trial by."""
    params: TuneParams

    @property
    def half(self) -> int:
        return len(self.prompts) // 2

    def draw(self, values: Mapping[str, Any], start: int, end: int, round_: int = 0) -> list[SampleFigures]:
        """Samples of the prompts from `start` to `end`, measured; in another round with other random numbers."""
        decoding = SamplingParams.from_mapping({**values, "max_new_tokens": self.params.max_new_tokens})
        seed = self.params.seed + round_ * len(self.prompts) + start
        return self.measures.take(draw_samples(self.generator, self.prompts[start:end], decoding, seed=seed))


def set_up(export: Path, documents: Path, tokens: Path, params: TuneParams, samples: SamplesParams) -> Bench:
    """Load the models, and measure what people wrote."""
    generator = TextGenerator.load(export / "engine", slots=SLOTS)
    people = human_samples(
        documents,
        generator.tokenizer,
        samples=params.samples,
        prompt_words=samples.prompt_words,
        max_new_tokens=params.max_new_tokens,
    )
    measures = Measures(
        Engine.load(export / "base" / "engine"),
        generator.tokenizer,
        load_tokens(tokens, tokenizer_sha256(export / "engine")).tokens,
        samples.loop_ngram_tokens,
        samples.loop_repeats,
        samples.form_pattern,
    )
    human = measure_people(measures.take(people))
    half = human.first(len(people) // 2) if len(people) >= PRUNABLE_PROMPTS else None
    return Bench(generator, measures, [sample.prompt for sample in people], human, half, params)


def tune(
    export: Path,
    documents: Path,
    tokens: Path,
    out: Path,
    params: TuneParams,
    samples: SamplesParams,
    search: Search,
    run: runs.RunLog,
) -> None:
    """Write to `out`: the winner as `decoding.json`, `presets.json`, `trials.json` and `metrics.json`."""
    bench = set_up(export, documents, tokens, params, samples)
    rows = run_trials(bench, search, run)
    finals = run_finals(bench, rows, search)
    presets = choose_presets(rows, finals)
    with whole_folder(out) as partial:
        write_json(partial / "decoding.json", values_of(rows[presets["balanced"]], params))
        write_json(partial / "presets.json", {name: values_of(rows[at], params) for name, at in presets.items()})
        write_json(partial / "trials.json", labelled(rows, finals, presets))
        metrics = {
            "trials": len(rows),
            "pruned": sum(row["state"] == "pruned" for row in rows),
            "distance": finals[presets["balanced"]],
        }
        write_json(partial / "metrics.json", metrics)
    run.log_scores("tune", metrics)


def run_trials(bench: Bench, search: Search, run: runs.RunLog) -> list[Row]:
    """Try as many sets of parameters as are asked for, those of an interrupted search among them; a row each."""
    run.forget_trials(len(search.over))
    rows = [trial.user_attrs["row"] for trial in search.over]
    with tqdm(total=bench.params.trials, initial=len(rows), desc="trials", disable=not sys.stderr.isatty()) as progress:
        while len(rows) < bench.params.trials:
            start_s = time.time()
            trial, values = search.ask()
            found, prompts = try_out(bench, values, stops_early(trial))
            row = row_of(len(rows), values, found, prompts, pruned=prompts < len(bench.prompts))
            trial.set_user_attr("row", row)
            record(run, row, values, start_s)
            # Last: what was cut off before is not over, and is taken anew.
            if row["state"] == "pruned":
                search.study.tell(trial, state=TrialState.PRUNED)
            else:
                search.study.tell(trial, found.distance.total)
            rows.append(row)
            tqdm.write(told(row, values), file=sys.stderr)
            progress.update()
    return rows


def stops_early(trial: optuna.Trial) -> Callable[[int, float], bool]:
    """Whether a trial is given up, asked with how many prompts it has done and what distance it has come to."""

    def asked(prompts: int, distance: float) -> bool:
        trial.report(distance, prompts)
        return trial.should_prune()

    return asked


def try_out(bench: Bench, values: Values, stops: Callable[[int, float], bool]) -> tuple[Comparison, int]:
    """Samples beside people's texts, and of how many prompts: half of them, where it stops there."""
    first = bench.draw(values, 0, bench.half)
    if bench.human_half is not None:
        found = compare(first, bench.human_half)
        if stops(bench.half, found.distance.total):
            return found, bench.half
    samples = [*first, *bench.draw(values, bench.half, len(bench.prompts))]
    return compare(samples, bench.human), len(bench.prompts)


def row_of(number: int, values: Values, found: Comparison, prompts: int, *, pruned: bool) -> Row:
    return {
        "trial": number,
        "state": "pruned" if pruned else "complete",
        "prompts": prompts,
        **values,
        "distance": found.distance.total,
        "too_tame": found.distance.too_tame,
        "too_wild": found.distance.too_wild,
        "scores": asdict(found.figures),
    }


def record(run: runs.RunLog, row: Row, values: Values, start_s: float) -> None:
    """The trial as a run of its own, and as a point of the search's curve."""
    distances = {name: row[name] for name in ("distance", "too_tame", "too_wild")}
    run.log_trial(row["trial"], values, {**row["scores"], **distances}, {"tune.state": row["state"]}, start_s)
    if row["state"] == "complete":
        run.log_metrics({"trial_distance": row["distance"]}, row["trial"])


def told(row: Row, values: Values) -> str:
    """A trial in one line."""
    tried = ", ".join(f"{name} {value:g}" for name, value in values.items())
    if row["state"] == "pruned":
        return f"trial {row['trial']}: given up after {row['prompts']} samples, distance {row['distance']:.1f}; {tried}"
    faults = f"too tame {row['too_tame']:.1f}, too wild {row['too_wild']:.1f}"
    return f"trial {row['trial']}: distance {row['distance']:.1f} ({faults}); {tried}"


def run_finals(bench: Bench, rows: Sequence[Row], search: Search) -> dict[int, float]:
    """Draw the best trials anew, and tell by their number how far they are then, on average over the rounds.

    The best of many trials owes something to its random numbers; the best of these owes less.
    """
    best = sorted((row for row in rows if row["state"] == "complete"), key=lambda row: row["distance"])
    finals: dict[int, float] = {}
    for row in tqdm(best[: bench.params.finalists], desc="finalists", disable=not sys.stderr.isatty()):
        number, name = row["trial"], f"final_{row['trial']}"
        if name not in search.notes:
            rounds = range(1, FINAL_ROUNDS + 1)
            drawn = (bench.draw(values_of(row, bench.params), 0, len(bench.prompts), round_) for round_ in rounds)
            search.note(name, float(np.mean([compare(samples, bench.human).distance.total for samples in drawn])))
        finals[number] = search.notes[name]
        tqdm.write(f"trial {number}, drawn anew: distance {finals[number]:.1f}", file=sys.stderr)
    return finals


def choose_presets(rows: Sequence[Row], finals: Mapping[int, float]) -> dict[str, int]:
    """The trial of each preset: the winner, and the ends of the Pareto front that are still near people.

    `balanced` is the finalist that came nearest. Of what is on the front of both kinds of faults, `faithful` errs least
    to the wild side and `adventurous` least to the tame one. Where nothing else on it is near, either is the winner.
    """
    winner = min(finals, key=lambda number: finals[number])
    limit = PRESET_DISTANCE * rows[winner]["distance"]
    near = [row["trial"] for row in front_of(rows) if row["distance"] <= limit] or [winner]
    # The front rises from the least tame.
    return {"balanced": winner, "faithful": near[-1], "adventurous": near[0]}


def front_of(rows: Sequence[Row]) -> list[Row]:
    """The complete trials that no other beats in both kinds of faults, from the least tame on."""
    complete = [row for row in rows if row["state"] == "complete"]
    return [complete[index] for index in pareto_front([(row["too_tame"], row["too_wild"]) for row in complete])]


def values_of(row: Row, params: TuneParams) -> Values:
    """The decoding parameters of a trial; neutral ones too, so that they take the place of whatever was set."""
    return {name: row[name] for name, _ in params.space}


def labelled(rows: Sequence[Row], finals: Mapping[int, float], presets: Mapping[str, int]) -> list[Row]:
    """The rows with what was made of them: whether they are on the front, how they did anew, which preset they are."""
    front = {row["trial"] for row in front_of(rows)}
    return [
        {
            **row,
            "on_front": row["trial"] in front,
            "final_distance": finals.get(row["trial"]),
            "preset": ", ".join(name for name, number in presets.items() if number == row["trial"]) or None,
        }
        for row in rows
    ]


if __name__ == "__main__":
    main()
