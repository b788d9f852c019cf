"""Search for the decoding parameters whose texts read most like people's, on the validation split."""

import argparse
from dataclasses import asdict
from pathlib import Path

import onnxruntime
import optuna

from pipeline import resume
from pipeline.errors import report_errors
from pipeline.evaluation.presets import choose_presets, edges_of, rows_of
from pipeline.evaluation.search import Search, open_search
from pipeline.evaluation.trials import run_finals, run_trials, set_up
from pipeline.files import whole_folder, write_json
from pipeline.params.file import load_section
from pipeline.params.samples import SamplesParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.params.tune import TuneParams
from pipeline.stage_process import stage_process
from pipeline.tracking.records import parent_run, record_search, record_trial
from pipeline.tracking.runs import RunLog, start_run
from pipeline.tracking.store import connect, store_errors

STAGE = "tune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of the export stage")
    parser.add_argument("documents", type=Path, help="the validation split's documents")
    parser.add_argument("tokens", type=Path, help="token arrays of the training split")
    parser.add_argument("finetune", type=Path, help="folder of the finetune stage, whose run is the parent")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with report_errors(), store_errors(), stage_process(arguments.out), resume.only_resumer(STAGE):
        params, samples = load_section("tune", TuneParams), load_section("samples", SamplesParams)
        parameters = read_yaml(PARAMS_FILE)
        parent = parent_run(connect(), arguments.finetune, parameters)
        read = (arguments.export, arguments.documents, arguments.tokens)
        name = fingerprint(read, params, samples)
        if resume.holds_outputs(STAGE, name, arguments.out):
            return
        folder = resume.open_folder(STAGE, name)
        run_id = resume.interrupted_run(STAGE, folder)
        with start_run(STAGE, parameters, parent_run_id=parent, run_id=run_id, fingerprint=name) as run:
            resume.note_run(folder, run.run_id)
            search = open_search(folder, params.space, params.seed)
            tune(*read, arguments.out, params, samples, search, run)
            record_search(run, arguments.out)
        resume.remove(folder)


def fingerprint(read: tuple[Path, ...], params: TuneParams, samples: SamplesParams) -> str:
    """Return the name of a search: a digest of files, parameters, code and libraries."""
    versions = (optuna.__version__, onnxruntime.__version__)
    return resume.fingerprint(STAGE, read, params.model_dump_json(), samples.model_dump_json(), *versions)


def tune(
    export: Path,
    documents: Path,
    tokens: Path,
    out: Path,
    params: TuneParams,
    samples: SamplesParams,
    search: Search,
    run: RunLog,
) -> None:
    """Write to `out`: `found.json` (the decoding parameters of each preset), `trials.json` and `metrics.json`."""
    bench = set_up(export, documents, tokens, params, samples)
    run.forget_trials(len(search.finished))
    trials = run_trials(bench, search, lambda trial, start_s: record_trial(run, asdict(trial), start_s))
    finals = run_finals(bench, trials, search)
    presets = choose_presets(trials, finals)
    found = trials[presets["balanced"]].values
    for name in edges_of(found, params.space):
        print(f"tune.space.{name}: the winner has {found[name]:g}, an end of the range; the best may be outside")
    with whole_folder(out) as partial:
        # Neutral values too: they replace whatever is set by hand.
        write_json(partial / "found.json", {name: trials[number].values for name, number in presets.items()})
        write_json(partial / "trials.json", rows_of(trials, finals, presets, params.space))
        best = finals[presets["balanced"]]
        write_json(partial / "metrics.json", {"validation_excess": best.excess, "validation_distance": best.distance})


if __name__ == "__main__":
    main()
