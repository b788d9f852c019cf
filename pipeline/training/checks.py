"""Checks before training: do tokens, base, parameters and processes fit each other?"""

from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams
from pipeline.tokens import TokenArrays
from pipeline.training.processes import Processes


def check_vocabulary(tokens: TokenArrays, vocabulary: int) -> None:
    """Raise `UserError` if the tokens are of a larger vocabulary than the model's."""
    if tokens.vocabulary_size > vocabulary:
        raise UserError(
            f"the tokens are of a vocabulary of {tokens.vocabulary_size}, but the base's holds {vocabulary}; "
            "make both again with dvc repro"
        )


def check_fsdp(params: FinetuneParams, processes: Processes) -> None:
    """Raise `UserError` if `finetune.fsdp` is set but these processes cannot share weights."""
    if not params.fsdp:
        return
    if processes.device.type != "cuda" or processes.count == 1:
        raise UserError(
            "finetune.fsdp: shares weights among GPUs, one per process; "
            "start the stage with torchrun, or set it to false"
        )
    if params.optimizer == "muon":
        raise UserError("finetune.optimizer: muon needs whole matrices, but finetune.fsdp shares them; set adamw")


def window_length(params: FinetuneParams, positions: int) -> int:
    """Return the tokens per window. Raises `UserError` if the base has fewer positions."""
    if params.context_length is None:
        return positions
    if params.context_length > positions:
        raise UserError(
            f"finetune.context_length: {params.context_length} is more than the base's {positions} positions; "
            "lower it, or set it to null for all of them"
        )
    return params.context_length
