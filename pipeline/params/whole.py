"""All sections of `params.yaml` together: the check of the whole file, run by every stage and by `make repro`."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.errors import report_errors
from pipeline.params.base import BaseParams
from pipeline.params.evaluate import EvaluateParams
from pipeline.params.export import ExportParams
from pipeline.params.finetune import FinetuneParams
from pipeline.params.prepare import PrepareParams
from pipeline.params.register import RegisterParams
from pipeline.params.samples import SamplesParams
from pipeline.params.section import PARAMS_FILE, Section, read_yaml, validate
from pipeline.params.tune import TuneParams


class Params(Section):
    """The whole file: a section per stage, and `samples`, which `tune` and `evaluate` share."""

    base: BaseParams
    prepare: PrepareParams
    finetune: FinetuneParams
    export: ExportParams
    samples: SamplesParams
    tune: TuneParams
    evaluate: EvaluateParams
    register_: Annotated[RegisterParams, Field(alias="register")]


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the file. Raises `UserError` naming each wrong key."""
    return parse_params(read_yaml(path), str(path))


def parse_params(values: Any, name: str) -> Params:
    """Check parsed YAML. Raises a one-line `UserError` that begins with `name` and names each wrong key."""
    return validate(Params, values, name)


def main() -> None:
    """Check `params.yaml`; print nothing if it is valid."""
    with report_errors():
        load_params()


if __name__ == "__main__":
    main()
