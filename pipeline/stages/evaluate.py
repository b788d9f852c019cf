"""Score base and fine-tuned model on the test split, and their samples beside what people wrote."""

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from pipeline import tracking
from pipeline.engine import Engine
from pipeline.errors import reported
from pipeline.files import read_json, read_jsonl, whole_file, whole_folder, write_json, write_jsonl
from pipeline.params import PARAMS_FILE, EvaluateParams, load_params, read_yaml
from pipeline.process import stage_process
from pipeline.quality.diversity import distinct_n
from pipeline.quality.form import share_matching
from pipeline.quality.memorization import longest_copies
from pipeline.quality.perplexity import bits_per_byte, perplexity, plan_windows
from pipeline.quality.repetition import is_looping, mean_rep_n, share_looping
from pipeline.restore import parent_run
from pipeline.serving.text import TextGenerator
from pipeline.tokens import TokenArrays, load_tokenizer, load_tokens, tokenizer_sha256

BATCH_SAMPLES = 16
POSITION_BIN_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """A prompt with what a model, or the author, wrote after it."""

    prompt: str
    text: str
    token_ids: list[int]
    """Of the text alone."""
    finish_reason: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of the export stage")
    parser.add_argument("documents", type=Path, help="folder of the prepare stage")
    parser.add_argument("tokens", type=Path, help="folder of the tokenize stage")
    parser.add_argument("finetune", type=Path, help="folder of the finetune stage, whose run is the parent")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with reported(), tracking.store_errors(), stage_process(arguments.out):
        params, parameters = load_params().evaluate, read_yaml(PARAMS_FILE)
        parent = parent_run(tracking.connect(), arguments.finetune, parameters)
        with tracking.start_run("evaluate", parameters, parent_run_id=parent) as run:
            evaluate(arguments.export, arguments.documents, arguments.tokens, arguments.out, params)
            log_evaluation(run, arguments.out, arguments.export / "parity.json")


def evaluate(export: Path, documents: Path, tokens: Path, out: Path, params: EvaluateParams) -> None:
    """Write `metrics.json`, `samples.jsonl`, the tables of the plots and what the model is decoded with to `out`."""
    engines = {"base": Engine.load(export / "base" / "engine"), "finetuned": Engine.load(export / "engine")}
    tokenizer, digest = load_tokenizer(export / "engine"), tokenizer_sha256(export / "engine")
    test, train = load_tokens(tokens / "test", digest), load_tokens(tokens / "train", digest)
    human = list(islice(human_samples(documents / "test.jsonl", tokenizer, params), params.samples))
    metrics: dict[str, Any] = {"protocol": protocol(engines["finetuned"], test, params)}
    losses = {name: score_documents(engine, test, params.stride_tokens) for name, engine in engines.items()}
    samples = {"human": human}
    for name, engine in engines.items():
        samples[name] = generate(engine, tokenizer, [sample.prompt for sample in human], params, name)
    copies = {
        name: longest_copies([sample.token_ids for sample in own], train.tokens).lengths_tokens
        for name, own in samples.items()
    }
    for name, own in samples.items():
        metrics[name] = score_samples(own, copies[name], params)
        if name in losses:
            logprobs = -np.concatenate(losses[name])
            metrics[name] |= {
                "perplexity": perplexity(logprobs),
                "bits_per_byte": bits_per_byte(logprobs, test.text_bytes),
            }
    with whole_folder(out) as partial:
        write_json(partial / "metrics.json", metrics)
        write_jsonl(partial / "samples.jsonl", sample_rows(samples, copies, params))
        write_loss_by_position(partial / "loss_by_position.csv", losses)
        write_copies(partial / "copies.csv", copies)
        write_json(partial / "decoding.json", params.decoding.to_mapping())
        write_json(partial / "presets.json", {})


def protocol(engine: Engine, test: TokenArrays, params: EvaluateParams) -> dict[str, Any]:
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
        "samples": params.samples,
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
        losses[index].append(-logprobs[window.first_scored - window.start - 1 :])
    return [np.concatenate(parts) for parts in losses]


def human_samples(test: Path, tokenizer: Tokenizer, params: EvaluateParams) -> Iterator[Sample]:
    """The test documents, again and again, each cut in prompt and continuation as the models' samples are."""
    limit = params.decoding.max_new_tokens
    for row in cycle(read_jsonl(test)):
        prompt = leading_words(row["text"], params.prompt_words)
        ids = tokenizer.encode(row["text"][len(prompt) :]).ids[:limit]
        text = tokenizer.decode(ids)
        yield Sample(prompt, text, ids, "length" if len(ids) == limit else "stop")


def leading_words(text: str, count: int) -> str:
    """The first words of a text with what stands between them, but no space after the last."""
    found = re.match(rf"(?:\s*\S+){{0,{count}}}", text)
    return found.group() if found else ""


def generate(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], params: EvaluateParams, name: str
) -> list[Sample]:
    """A continuation of every prompt; sample i is keyed by `params.seed + i`."""
    samples: list[Sample] = []
    generator = TextGenerator(engine, tokenizer)
    batches = range(0, len(prompts), BATCH_SAMPLES)
    for start in tqdm(batches, desc=f"samples of {name}", disable=not sys.stderr.isatty()):
        batch = prompts[start : start + BATCH_SAMPLES]
        seeded = [replace(params.decoding, seed=params.seed + start + index) for index in range(len(batch))]
        samples += [
            Sample(prompt, done.text, done.token_ids, done.finish_reason)
            for prompt, done in zip(batch, generator.complete(batch, seeded), strict=True)
        ]
    return samples


def score_samples(samples: Sequence[Sample], copies: NDArray[np.int64], params: EvaluateParams) -> dict[str, float]:
    ids = [sample.token_ids for sample in samples]
    texts = [sample.prompt + sample.text for sample in samples]
    return {
        **{f"rep_{n}": mean_rep_n(ids, n) for n in (2, 3, 4)},
        **{f"distinct_{n}": distinct_n(ids, n) for n in (1, 2, 3)},
        "looping_share": share_looping(ids, params.loop_ngram_tokens, params.loop_repeats),
        "longest_copy_tokens": int(copies.max()),
        "mean_longest_copy_tokens": float(copies.mean()),
        "form_share": share_matching(texts, re.compile(params.form_pattern)),
        "mean_tokens": float(np.mean([len(own) for own in ids])),
        "finished_share": float(np.mean([sample.finish_reason == "stop" for sample in samples])),
    }


def sample_rows(
    samples: dict[str, list[Sample]], copies: dict[str, NDArray[np.int64]], params: EvaluateParams
) -> Iterator[dict[str, Any]]:
    for name, own in samples.items():
        for index, (sample, copy) in enumerate(zip(own, copies[name], strict=True)):
            yield {
                "model": name,
                "prompt": sample.prompt,
                "text": sample.text,
                "tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
                "longest_copy_tokens": int(copy),
                "looping": is_looping(sample.token_ids, params.loop_ngram_tokens, params.loop_repeats),
                "seed": params.seed + index if name != "human" else None,
                "decoding": params.decoding.to_mapping() if name != "human" else None,
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


def write_copies(path: Path, copies: dict[str, NDArray[np.int64]]) -> None:
    """The longest verbatim copy of each sample, sorted: a rank a row."""
    ordered = -np.sort(-np.stack(list(copies.values())), axis=1)
    write_table(path, ["rank", *copies], [[str(rank + 1), *map(str, row)] for rank, row in enumerate(ordered.T)])


def write_table(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def log_evaluation(run: tracking.RunLog, out: Path, parity: Path) -> None:
    """Scores, samples and plots of an evaluation, and the parity of what was evaluated, into its run."""
    for precision, found in read_json(parity).items():
        run.log_scores(f"parity.{precision}", found)
    run.log_file(parity)
    metrics = read_json(out / "metrics.json")
    for group, values in metrics.items():
        run.log_scores(group, values)
    run.set_tags({f"engine.{name}": metrics["protocol"][name] for name in ("provider", "precision")})
    rows = list(read_jsonl(out / "samples.jsonl"))
    run.log_table("samples.json", [{**row, "decoding": str(row["decoding"])} for row in rows])
    for file in sorted(out.iterdir()):
        run.log_file(file)


if __name__ == "__main__":
    main()
