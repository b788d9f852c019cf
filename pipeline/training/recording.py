"""Log to the MLflow run what a fine-tuning records besides its curves: the splits it read, and samples."""

from collections.abc import Mapping

from pipeline.params.finetune import TrainingSamplesParams
from pipeline.tokens import TokenArrays
from pipeline.tracking import lineage
from pipeline.tracking.runs import RunLog
from pipeline.tracking.tags import DATA_TAG


def log_splits(run: RunLog, splits: Mapping[str, TokenArrays]) -> None:
    """Record splits as datasets of the run: their digests, their sizes, and the hash of the texts that DVC knows."""
    data_md5 = lineage.data_md5(lineage.read_lock())
    for name, arrays in splits.items():
        source = {"split": name, "documents": str(len(arrays)), "tokens": str(len(arrays.tokens))}
        run.log_dataset(name, arrays.sha256, source | ({DATA_TAG: data_md5} if data_md5 else {}))


def log_samples(
    run: RunLog,
    step: int,
    samples: list[dict[str, str]],
    scores: list[dict[str, float]],
    params: TrainingSamplesParams,
) -> None:
    """Log a table row per sample, and over all samples how much they repeat and the longest copy of training text."""
    if not samples:
        return
    metrics = {
        "samples_rep_4": sum(score["rep_4"] for score in scores) / len(scores),
        "samples_longest_copy_tokens": max(score["longest_copy_tokens"] for score in scores),
    }
    run.log_metrics(metrics, step)
    if not run.holds_row("samples.json", "step", step):
        decoding = params.model_dump(exclude={"prompts"})
        rows = [{"step": step, **sample, **score, **decoding} for sample, score in zip(samples, scores, strict=True)]
        run.log_table("samples.json", rows)
