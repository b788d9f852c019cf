"""The registered model: MLflow runs this file when it loads one, with the packed engine, tokenizer and decoding."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pipeline.decoding import SamplingParams
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.serving.text import TextGenerator, bias_of, merge_decoding

logger = logging.getLogger(__name__)


class TextModel(PythonModel):
    """`predict(["The lamp"], params={"temperature": 0.7})` gives the continuations, without their prompts."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the engine; `model_config` names `provider` and `precision`, each `auto` by default."""
        # Servers call from any thread, several at once; the engine knows one.
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.generator = self._engine_thread.submit(
            TextGenerator.load,
            context.artifacts["engine"],
            precision=context.model_config["precision"],
            provider=context.model_config["provider"],
        ).result()
        self.decoding = SamplingParams.from_mapping(read_json(Path(context.artifacts["decoding"])))
        session = self.generator.engine.session
        logger.info("loaded on %s in %s", session.provider, session.precision)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Continue each prompt; with `n` of more than 1, choice j of prompt i stands at `i * n + j`.

        Raises `MlflowException` (HTTP 400 behind `mlflow models serve`) naming field, value and range.
        """
        try:
            prompts = model_input.iloc[:, 0].tolist()
            for row, prompt in enumerate(prompts):
                if not isinstance(prompt, str):
                    raise UserError(f"row {row}: holds no text to continue ({prompt!r}); '' starts from nothing")
            decoding = self._decoding(params or {})
            return self._engine_thread.submit(self.generator.generate, prompts, decoding).result()
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _decoding(self, params: dict[str, Any]) -> SamplingParams:
        # MLflow casts to NumPy's types, which are not those of the language.
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in params.items()}
        ids, biases = values.pop("logit_bias_ids", []), values.pop("logit_bias_values", [])
        if ids or biases:
            values["logit_bias"] = bias_of(ids, biases)
        return merge_decoding(self.decoding, values)


set_model(TextModel())
