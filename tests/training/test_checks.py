from pathlib import Path

import pytest

import pipeline
from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams
from pipeline.params.section import PARAMS_FILE
from pipeline.params.whole import load_params
from pipeline.training.checks import check_fsdp, window_length
from pipeline.training.processes import join_processes

ROOT = Path(pipeline.__file__).parents[1]


def test_a_shorter_window_is_taken() -> None:
    params = FinetuneParams.model_construct(context_length=16)
    assert window_length(params, positions=64) == 16
    assert window_length(FinetuneParams.model_construct(context_length=None), positions=64) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fsdp": True}, r"^finetune\.fsdp: shares weights among GPUs, one per process; start the stage with torchrun")],
)
def test_one_process_cannot_share_weights(changes: dict[str, object], message: str) -> None:
    params: FinetuneParams = load_params(ROOT / PARAMS_FILE).finetune.model_copy(update=changes)
    with pytest.raises(UserError, match=message):
        check_fsdp(params, join_processes())
