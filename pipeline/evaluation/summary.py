"""The summary of an evaluation: how the figures were taken, and the few of them that experiments are compared by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engine import Engine
from pipeline.engine.manifest import measure_megabytes
from pipeline.evaluation.systems import COPY_TOKENS, REPEAT_TOKENS
from pipeline.files import read_json
from pipeline.params.evaluate import EvaluateParams
from pipeline.tokens import TokenArrays


def protocol_of(
    engine: Engine, test: TokenArrays, params: EvaluateParams, samples: int, export: Path
) -> dict[str, Any]:
    """Return how the figures were taken: without it no two perplexities can be compared.

    Precisions that the export stage left out of the engine are named, with the reason.
    """
    parity = read_json(export / "parity.json")
    left_out = {precision: found["left_out"] for precision, found in parity.items() if "left_out" in found}
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
        **{f"{precision}_left_out": promises for precision, promises in left_out.items()},
    }


def metrics_of(details: Mapping[str, Any], export: Path) -> dict[str, float]:
    """Return the few numbers by which experiments are compared (`dvc metrics show`, `dvc exp show`).

    `engine_megabytes` is the size of the evaluated precision's files, `kl_divergence` its distance from PyTorch.
    """
    base, finetuned = details["documents"]["base"], details["documents"]["finetuned"]
    kept, precision = details["systems"][details["choice"]["kept"]], details["protocol"]["precision"]
    return {
        "base_test_bits_per_byte": base["bits_per_byte"],
        "test_bits_per_byte": finetuned["bits_per_byte"],
        "base_test_perplexity": base["perplexity"],
        "test_perplexity": finetuned["perplexity"],
        "test_excess": kept["excess"],
        "test_distance": kept["distance"],
        "invented_words": kept["invented_words"],
        "longest_copy_tokens": kept["longest_copy_tokens"],
        "kl_divergence": read_json(export / "parity.json")[precision]["kl_divergence"],
        "engine_megabytes": measure_megabytes(export / "engine", precision),
    }
