"""Score base and fine-tuned model on the test split, and their samples, decoded in several ways, beside people's."""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.errors import report_errors
from pipeline.evaluation.report import SYSTEMS, Report, decoding_told, render_report
from pipeline.evaluation.samples import SLOTS, Measures, Sample, character_spans, draw_samples, human_samples
from pipeline.files import read_json, read_jsonl, whole_file, whole_folder, write_json, write_jsonl
from pipeline.params.evaluate import EvaluateParams
from pipeline.params.file import PARAMS_FILE, load_section, read_yaml
from pipeline.params.samples import SamplesParams
from pipeline.quality.comparison import Comparison, SampleFigures, compare, measure_people
from pipeline.quality.distance import SetFigures
from pipeline.quality.memorization import copied_tokens
from pipeline.quality.perplexity import bits_per_byte, perplexity, plan_windows
from pipeline.quality.repetition import repeated_tokens
from pipeline.stage_process import stage_process
from pipeline.tokens import TokenArrays, load_tokens, tokenizer_sha256
from pipeline.tracking import lineage, runs, store
from pipeline.tracking.restore import parent_run, read_curve

POSITION_BIN_TOKENS = 32
COPY_TOKENS = 10
"""A run of so many tokens that stands in the training text is marked as a copy."""
REPEAT_TOKENS = 4
"""A run of so many tokens that stood in the sample before is marked as repeated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of the export stage")
    parser.add_argument("documents", type=Path, help="folder of the prepare stage")
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage")
    parser.add_argument("finetune", type=Path, help="folder of the finetune stage, whose run is the parent")
    parser.add_argument("tune", type=Path, help="folder of the tune stage")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with report_errors(), store.store_errors(), stage_process(arguments.out):
        params, samples = load_section("evaluate", EvaluateParams), load_section("samples", SamplesParams)
        parameters = read_yaml(PARAMS_FILE)
        parent = parent_run(store.connect(), arguments.finetune, parameters)
        with runs.start_run("evaluate", parameters, parent_run_id=parent) as run:
            evaluate(
                arguments.export,
                arguments.documents,
                arguments.tokens,
                arguments.finetune,
                arguments.tune,
                arguments.out,
                params,
                samples,
                {**lineage.lineage(), "run": parent},
            )
            log_evaluation(run, arguments.out, arguments.export / "parity.json")


def evaluate(
    export: Path,
    documents: Path,
    tokens: Path,
    finetune: Path,
    tune: Path,
    out: Path,
    params: EvaluateParams,
    sampling: SamplesParams,
    lineage: Mapping[str, str],
) -> None:
    """Write scores, samples, the tables of the plots, the report, and what a registered model decodes with to `out`."""
    generators = {
        name: TextGenerator.load(folder, slots=SLOTS)
        for name, folder in (("base", export / "base" / "engine"), ("finetuned", export / "engine"))
    }
    engines = {name: generator.engine for name, generator in generators.items()}
    tokenizer, digest = generators["finetuned"].tokenizer, tokenizer_sha256(export / "engine")
    test, train = load_tokens(tokens / "test", digest), load_tokens(tokens / "train", digest)
    measures = Measures(
        engines["base"],
        tokenizer,
        train.tokens,
        sampling.loop_ngram_tokens,
        sampling.loop_repeats,
        sampling.form_pattern,
    )
    found = read_json(tune / "decoding.json")
    decodings = decodings_of(params, found, holds_index=engines["finetuned"].manifest.holds_index)

    losses = {name: score_documents(engine, test, params.stride_tokens) for name, engine in engines.items()}
    people = human_samples(
        documents / "test.jsonl",
        tokenizer,
        samples=params.samples,
        prompt_words=sampling.prompt_words,
        max_new_tokens=params.decoding.max_new_tokens or engines["finetuned"].context_length,
    )
    samples = {"human": people}
    for name, decoding in decodings.items():
        generator = generators["base" if name == "untuned_base" else "finetuned"]
        prompts = [sample.prompt for sample in people]
        samples[name] = draw_samples(generator, prompts, decoding, seed=params.seed, description=f"samples: {name}")
    measured = {name: measures.take(own) for name, own in samples.items()}
    human = measure_people(measured["human"])
    compared = {name: compare(measured[name], human, intervals=True) for name in decodings}

    metrics = {
        "protocol": protocol(engines["finetuned"], test, params, len(people)),
        **{name: score_losses(own, test) for name, own in losses.items()},
        **{name: score_samples(own, measured[name]) for name, own in samples.items()},
        "human_scales": human.scales,
    }
    metrics["human"] |= named(human.figures)
    for name, own in compared.items():
        metrics[name] |= named(own.figures) | distance_of(own)
    metrics["choice"] = choice = choose(compared["tuned"], compared["hand_set"])
    print(decoding_told(choice))
    with whole_folder(out) as partial:
        write_json(partial / "metrics.json", metrics)
        rows = list(sample_rows(samples, measured, decodings, tokenizer, train.tokens, params.seed))
        write_jsonl(partial / "samples.jsonl", rows)
        write_loss_by_position(partial / "loss_by_position.csv", losses)
        write_copies(partial / "copies.csv", measured)
        write_json(partial / "decoding.json", decodings[choice["kept"]].to_mapping())
        presets = {name: tuned(params.decoding, values) for name, values in read_json(tune / "presets.json").items()}
        write_json(partial / "presets.json", {name: decoding.to_mapping() for name, decoding in presets.items()})
        page = render_report(
            Report(
                metrics=metrics,
                samples=rows,
                trials=read_json(tune / "trials.json"),
                train_losses=read_curve(finetune / "loss_train.csv"),
                validation_losses=read_curve(finetune / "loss_validation.csv"),
                lineage=lineage,
            )
        )
        (partial / "report.html").write_text(page, encoding="utf-8")


def decodings_of(params: EvaluateParams, found: Mapping[str, Any], *, holds_index: bool) -> dict[str, SamplingParams]:
    """The decodings that are compared, of the fine-tuned model but for `untuned_base`, which has the hand-set one.

    `found` is what `tune` came to. `guarded` is left out where the engine holds no index, and says so.
    """
    hand_set = params.decoding
    decodings = {"hand_set": hand_set, "tuned": tuned(hand_set, found)}
    if params.guard_tokens is not None and holds_index:
        decodings["guarded"] = replace(decodings["tuned"], max_verbatim_tokens=params.guard_tokens)
    elif params.guard_tokens is not None:
        print("evaluate.guard_tokens: left out, as the engine holds no index (export.verbatim_index)", file=sys.stderr)
    pure = SamplingParams(max_new_tokens=hand_set.max_new_tokens, context_overflow=hand_set.context_overflow)
    decodings["greedy"] = replace(pure, temperature=0.0)
    decodings["sampling"] = pure
    decodings["untuned_base"] = hand_set
    return decodings


def tuned(hand_set: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """The hand-set decoding with all that `tune` searches for as it was found; neutral values are values too."""
    return SamplingParams.from_mapping({**hand_set.to_mapping(), **values})


def protocol(engine: Engine, test: TokenArrays, params: EvaluateParams, samples: int) -> dict[str, Any]:
    """How the figures were taken: without it no two perplexities can be compared."""
    return {
        "split": "test",
        "documents": len(test),
        "scored_tokens": len(test.tokens) - 1,
        "text_bytes": test.text_bytes,
        "window_tokens": engine.context_length,
        "stride_tokens": params.stride_tokens,
        "tokenizer_sha256": test.tokenizer_sha256,
        "provider": engine.session.provider,
        "precision": engine.session.precision,
        "samples": samples,
        "guard_tokens": params.guard_tokens,
        "copy_tokens": COPY_TOKENS,
        "repeat_tokens": REPEAT_TOKENS,
    }


def score_documents(engine: Engine, tokens: TokenArrays, stride_tokens: int) -> list[NDArray[np.float64]]:
    """Negative log-likelihood in nats of each token of each document, its closing end-of-text included."""
    documents = [tokens.document(index) for index in range(len(tokens))]
    windows = [
        (index, window)
        for index, document in enumerate(documents)
        for window in plan_windows(len(document), engine.context_length, stride_tokens)
    ]
    scored = engine.score([documents[index][window.start : window.end].tolist() for index, window in windows])
    losses: list[list[NDArray[np.float64]]] = [[] for _ in documents]
    for (index, window), logprobs in zip(windows, scored, strict=True):
        losses[index].append(-window.select_scored(logprobs))
    return [np.concatenate(parts) for parts in losses]


def score_losses(losses: Sequence[NDArray[np.float64]], test: TokenArrays) -> dict[str, float]:
    logprobs = -np.concatenate(losses)
    return {"perplexity": perplexity(logprobs), "bits_per_byte": bits_per_byte(logprobs, test.text_bytes)}


def score_samples(samples: Sequence[Sample], measured: Sequence[SampleFigures]) -> dict[str, float | None]:
    """What no distance is made of."""
    return {
        "longest_copy_tokens": max(sample.copy_tokens for sample in measured),
        "finished_share": float(np.mean([sample.finish_reason == "stop" for sample in samples])),
    }


def named(scores: SetFigures) -> dict[str, float | None]:
    """The figures that a distance is made of, with a word more for the perplexity: it is not that of the model."""
    return {("base_perplexity" if name == "perplexity" else name): value for name, value in asdict(scores).items()}


def distance_of(compared: Comparison) -> dict[str, float | None]:
    distance, low, high = compared.interval()
    faults = {"too_tame": compared.distance.too_tame, "too_wild": compared.distance.too_wild}
    return {"distance": distance, "distance_low": low, "distance_high": high, **faults}


def choose(tuned: Comparison, hand_set: Comparison) -> dict[str, Any]:
    """Which decoding goes with the model: the tuned one where it is nearer to people beyond what chance would do."""
    difference, low, high = tuned.difference(hand_set)
    kept = "tuned" if high < 0 else "hand_set"
    return {"kept": kept, "difference": difference, "difference_low": low, "difference_high": high}


def sample_rows(
    samples: Mapping[str, Sequence[Sample]],
    measured: Mapping[str, Sequence[SampleFigures]],
    decodings: Mapping[str, SamplingParams],
    tokenizer: Tokenizer,
    training_ids: NDArray[np.unsignedinteger],
    seed: int,
) -> Iterator[dict[str, Any]]:
    for name, own in samples.items():
        copied = copied_tokens([sample.token_ids for sample in own], training_ids, COPY_TOKENS)
        decoding = decodings[name].to_mapping() if name in decodings else None
        for index, sample in enumerate(own):
            repeated = repeated_tokens(sample.token_ids, REPEAT_TOKENS)
            yield {
                "system": name,
                "prompt": sample.prompt,
                "text": sample.text,
                "tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
                "longest_copy_tokens": measured[name][index].copy_tokens,
                "looping": measured[name][index].looping,
                "copied_spans": character_spans(tokenizer, sample, copied[index]),
                "repeated_spans": character_spans(tokenizer, sample, repeated),
                "seed": None if decoding is None else seed + index,
                "decoding": decoding,
            }


def write_loss_by_position(path: Path, losses: dict[str, list[NDArray[np.float64]]]) -> None:
    """Mean loss of the tokens at each position of their document, in bins: shows what context is worth."""
    longest = max(len(document) for documents in losses.values() for document in documents)
    table = [
        [
            str(start + POSITION_BIN_TOKENS // 2),
            *(
                repr(float(np.concatenate([own[start : start + POSITION_BIN_TOKENS] for own in documents]).mean()))
                for documents in losses.values()
            ),
        ]
        for start in range(0, longest, POSITION_BIN_TOKENS)
    ]
    write_table(path, ["position", *losses], table)


def write_copies(path: Path, measured: Mapping[str, Sequence[SampleFigures]]) -> None:
    """The longest verbatim copy of each sample, sorted: a rank a row."""
    ordered = [sorted((sample.copy_tokens for sample in own), reverse=True) for own in measured.values()]
    ranks = enumerate(zip(*ordered, strict=True), start=1)
    write_table(path, ["rank", *measured], [[str(rank), *map(str, lengths)] for rank, lengths in ranks])


def write_table(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def decoding_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of every decoding as a table; of people's texts too, which are at no distance from themselves."""
    systems = [name for name in SYSTEMS if name in metrics]
    columns = list(metrics["hand_set"])
    return [{"system": name, **{column: metrics[name].get(column) for column in columns}} for name in systems]


def log_evaluation(run: runs.RunLog, out: Path, parity: Path) -> None:
    """Scores, samples and plots of an evaluation, and the parity of what was evaluated, into its run."""
    for precision, found in read_json(parity).items():
        run.log_scores(f"parity.{precision}", found)
    run.log_file(parity)
    metrics = read_json(out / "metrics.json")
    for group, values in metrics.items():
        run.log_scores(group, values)
    engine = {f"engine.{name}": metrics["protocol"][name] for name in ("provider", "precision")}
    run.set_tags({**engine, "decoding.kept": metrics["choice"]["kept"]})
    run.log_table("decodings.json", decoding_rows(metrics))
    rows = read_jsonl(out / "samples.jsonl")
    spans = ("copied_spans", "repeated_spans")
    shown = [{key: value for key, value in row.items() if key not in spans} for row in rows]
    run.log_table("samples.json", [{**row, "decoding": str(row["decoding"])} for row in shown])
    for file in sorted(out.iterdir()):
        run.log_file(file)


if __name__ == "__main__":
    main()
