"""Score base and fine-tuned model on the test split, and compare samples of several decodings with people's texts."""

import argparse
import sys
from pathlib import Path

from pipeline.curves import read_curve
from pipeline.engine.text import TextGenerator
from pipeline.errors import report_errors
from pipeline.evaluation.documents import loss_by_position, score_documents, summarize_losses
from pipeline.evaluation.report import Report, describe_choice, render_report
from pipeline.evaluation.samples import SLOTS, describe_missing_form, human_samples, make_meter
from pipeline.evaluation.summary import metrics_of, protocol_of
from pipeline.evaluation.systems import (
    HUMAN,
    System,
    choose_decoding,
    copies_table,
    decodings_of,
    replace_searched,
    run_systems,
    sample_rows,
    summarize_model,
    summarize_people,
)
from pipeline.files import read_json, whole_folder, write_csv, write_json, write_jsonl
from pipeline.params.evaluate import EvaluateParams
from pipeline.params.file import load_section
from pipeline.params.samples import SamplesParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.quality.comparison import measure_people
from pipeline.stage_process import stage_process
from pipeline.tokens import load_tokens, tokenizer_sha256
from pipeline.tracking.lineage import base_md5, data_md5, read_lock
from pipeline.tracking.records import parent_run, record_evaluation
from pipeline.tracking.runs import start_run
from pipeline.tracking.store import connect, store_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of the export stage")
    parser.add_argument("documents", type=Path, help="folder of the prepare stage")
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage")
    parser.add_argument("finetune", type=Path, help="folder of the finetune stage, whose run is the parent")
    parser.add_argument("tune", type=Path, help="folder of the tune stage")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with report_errors(), store_errors(), stage_process(arguments.out):
        params, sampling = load_section("evaluate", EvaluateParams), load_section("samples", SamplesParams)
        parameters = read_yaml(PARAMS_FILE)
        parent = parent_run(connect(), arguments.finetune, parameters)
        with start_run("evaluate", parameters, parent_run_id=parent) as run:
            evaluate(
                arguments.export,
                arguments.documents,
                arguments.tokens,
                arguments.finetune,
                arguments.tune,
                arguments.out,
                params,
                sampling,
            )
            parity, test = arguments.export / "parity.json", arguments.documents / "test.jsonl"
            record_evaluation(run, arguments.out, parity, test, parameters)


def evaluate(
    export: Path,
    documents: Path,
    tokens: Path,
    finetune: Path,
    tune: Path,
    out: Path,
    params: EvaluateParams,
    sampling: SamplesParams,
) -> None:
    """Write scores, samples, tables for plots, the report, and the decoding of a registered model to `out`."""
    folders = {"base": export / "base" / "engine", "finetuned": export / "engine"}
    generators = {name: TextGenerator.load(folder, slots=SLOTS) for name, folder in folders.items()}
    engine, tokenizer = generators["finetuned"].engine, generators["finetuned"].tokenizer
    digest = tokenizer_sha256(export / "engine")
    test, train = load_tokens(tokens / "test", digest), load_tokens(tokens / "train", digest)
    losses = {name: score_documents(own.engine, test, params.stride_tokens) for name, own in generators.items()}
    written = human_samples(
        documents / "test.jsonl",
        generators["finetuned"],
        params.decoding,
        samples=params.samples,
        prompt_words=sampling.prompt_words,
    )
    found = read_json(tune / "found.json")
    decodings = decodings_of(params, found["balanced"], holds_index=engine.manifest.holds_index)
    meter = make_meter(generators["base"].engine, export / "engine", tokenizer, train, sampling)
    people = System(written, meter.measure(written))
    human = measure_people(people.figures)
    if not human.has_form:
        print(describe_missing_form(len(written)), file=sys.stderr)
    models = run_systems(generators, people, decodings, meter, params.seed)
    systems = {HUMAN: people, **models}
    choice = choose_decoding(models["tuned"].comparison, models["hand_set"].comparison)
    print(describe_choice(choice))
    details = {
        "protocol": protocol_of(engine, test, params, len(written), export),
        "documents": {name: summarize_losses(own, test) for name, own in losses.items()},
        "systems": {HUMAN: summarize_people(people)} | {name: summarize_model(own) for name, own in models.items()},
        "scales": human.scales,
        "choice": choice,
    }
    lock = read_lock()
    rows = list(sample_rows(systems, tokenizer, train.tokens, params.seed))
    report = Report(
        details=details,
        samples=rows,
        trials=read_json(tune / "trials.json"),
        train_losses=read_curve(finetune / "loss_train.csv"),
        validation_losses=read_curve(finetune / "loss_validation.csv"),
        data_md5=data_md5(lock),
        base_md5=base_md5(lock),
    )
    presets = {name: replace_searched(params.decoding, values) for name, values in found.items()}
    with whole_folder(out) as partial:
        write_json(partial / "details.json", details)
        write_json(partial / "metrics.json", metrics_of(details, export))
        write_jsonl(partial / "samples.jsonl", rows)
        write_csv(partial / "loss_by_position.csv", loss_by_position(losses))
        write_csv(partial / "copies.csv", copies_table(systems))
        write_json(partial / "decoding.json", decodings[choice["kept"]].to_mapping())
        write_json(partial / "presets.json", {name: decoding.to_mapping() for name, decoding in presets.items()})
        (partial / "report.html").write_text(render_report(report), encoding="utf-8")


if __name__ == "__main__":
    main()
