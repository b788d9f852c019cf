"""A model saved as `register` logs it, with the tiny engine."""

from pathlib import Path

import mlflow

from pipeline.decoding import SamplingParams
from pipeline.files import write_json
from pipeline.stages.register import SIGNATURE, packed_code

DECODING = SamplingParams(temperature=0.7, top_k=40, max_new_tokens=12, logit_bias={7: -2.0})
PRESETS = {
    "balanced": SamplingParams(temperature=0.9, min_p=0.02, max_new_tokens=14),
    "faithful": SamplingParams(temperature=0.0, max_new_tokens=10),
    "adventurous": SamplingParams(temperature=1.3, typical_p=0.95, max_new_tokens=16, stop=("q",)),
}


def save(folder: Path, engine: Path) -> Path:
    """Save a version as `register` does, and return its folder."""
    write_json(folder / "decoding.json", DECODING.to_mapping())
    write_json(folder / "presets.json", {name: preset.to_mapping() for name, preset in PRESETS.items()})
    with packed_code() as code:
        mlflow.pyfunc.save_model(
            folder / "model",
            python_model=str(code / "serving" / "pyfunc.py"),
            artifacts={
                "engine": str(engine),
                "decoding": str(folder / "decoding.json"),
                "presets": str(folder / "presets.json"),
            },
            signature=SIGNATURE,
            model_config={"provider": "auto", "precision": "auto", "threads": None},
            pip_requirements=[],
            code_paths=[str(code)],
        )
    return folder / "model"
