"""The registered model: MLflow runs this file to load the packed engine, tokenizer and decoding."""

import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.decoding import SamplingParams, merge_decoding, read_decoding
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.serving.worker import Worker, run_job, text_prompt

CONTINUATIONS_AT_ONCE = 1024
"""The continuations that `predict` submits at a time."""

logger = logging.getLogger(__name__)


class TextModel(PythonModel):
    """`predict(["The lamp"], params={"temperature": 0.7})` returns the continuations, without their prompts.

    `preset` names one of the model's presets; other parameters override it. Calls may come from several threads at
    once: their rows share the running batch. A forked process loads an engine of its own at its first call.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the engine; `model_config` names `provider` and `precision`, by default `auto`, and `threads`."""
        config = context.model_config
        self.decoding = read_decoding(Path(context.artifacts["decoding"]), Path(context.artifacts["presets"]))
        self._load = lambda: TextGenerator.load(
            context.artifacts["engine"],
            precision=config["precision"],
            provider=config["provider"],
            threads=config["threads"],
        )
        self._locks: dict[int, Lock] = {}
        self._workers: dict[int, Worker] = {}
        """The worker of each process. A forked one keeps those of its parents: to destroy them would wait for threads
        that it does not have."""
        session = self._worker.generator.engine.session
        logger.info("loaded on %s in %s", session.provider, session.precision)

    @property
    def _worker(self) -> Worker:
        """The worker of this process, started if it has none. Raises `UserError` in a fork of a process with CUDA."""
        process = os.getpid()
        # A lock of its own: another thread may have held the parent's when this process was forked.
        with self._locks.setdefault(process, Lock()):
            if process not in self._workers:
                if any(worker.generator.engine.session.provider == "cuda" for worker in self._workers.values()):
                    raise UserError(
                        "CUDA does not run in a forked process; start it by spawn, and load the model there"
                    )
                worker = Worker(self._load)
                worker.start()
                self._workers[process] = worker
                # Its thread would keep it, and the weights, for as long as the process lives.
                weakref.finalize(self, worker.abandon).atexit = False
            return self._workers[process]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Continue each prompt; with `n > 1`, choice j of prompt i is element `i * n + j`.

        Raises `MlflowException` (HTTP 400 behind `mlflow models serve`) naming field, value and range.
        """
        try:
            rows, decoding = model_input.iloc[:, 0].tolist(), self._decoding(params or {})
            _check_rows(rows)
            # As many at a time as keep every slot busy: a million rows must not wait in memory.
            rows_at_once = max(1, CONTINUATIONS_AT_ONCE // decoding.candidates)
            texts: list[str] = []
            for start in range(0, len(rows), rows_at_once):
                prompts = [text_prompt(self._worker.generator, row) for row in rows[start : start + rows_at_once]]
                first = len(texts)
                texts += [""] * (len(prompts) * decoding.n)
                for piece in run_job(self._worker, prompts, decoding):
                    texts[first + piece.index] += piece.text
            return texts
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def predict_stream(
        self, context: PythonModelContext, model_input: str, params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Continue one prompt, and yield pieces of whole characters as they are drawn. Raises as `predict` does."""
        try:
            decoding = self._decoding(params or {})
            if decoding.n != 1:
                raise UserError(f"n: a stream is one continuation, got {decoding.n}")
            _check_rows([model_input])
            for piece in run_job(self._worker, [text_prompt(self._worker.generator, model_input)], decoding):
                if piece.text:
                    yield piece.text
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _decoding(self, params: dict[str, Any]) -> SamplingParams:
        # MLflow casts to NumPy's types, not to Python's.
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in params.items()}
        own = self.decoding.preset(values.pop("preset", None))
        ids, biases = values.pop("logit_bias_ids", []), values.pop("logit_bias_values", [])
        if ids or biases:
            values["logit_bias"] = read_logit_bias(ids, biases)
        return merge_decoding(own, values)


def _check_rows(rows: list[Any]) -> None:
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise UserError(f"row {index}: expected a text to continue, got {row!r}; '' starts from nothing")


def read_logit_bias(ids: list[int], values: list[float]) -> dict[int, float]:
    """Return `logit_bias` from the two lists that a signature can declare. Raises `UserError`."""
    if len(ids) != len(values):
        raise UserError(f"logit_bias_values: {len(values)} values for {len(ids)} ids in logit_bias_ids")
    return dict(zip(ids, values, strict=True))


set_model(TextModel())
