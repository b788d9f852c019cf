"""Prepare the base for training (flat batches, dropout, frozen layers, LoRA), and extract the trained model."""

from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams
from pipeline.training.attention import PACKED
from pipeline.training.dropout import replace_dropout
from pipeline.training.objective import Objective, ScoredGPT2
from pipeline.training.optimizer import freeze

TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""The names of the tanh form of GELU (Hendrycks and Gimpel, 2016) in transformers; the first is GPT-2's."""


def load_trainable(base: Path, params: FinetuneParams) -> ScoredGPT2 | PeftModel:
    """Load the base in float32, prepared as `params` says. Raises `UserError` if it lacks the layers they name."""
    rates = {"embd_pdrop": params.dropout, "resid_pdrop": params.dropout, "attn_pdrop": params.attention_dropout}
    changes = {name: rate for name, rate in rates.items() if rate is not None}
    model: ScoredGPT2 = ScoredGPT2.from_pretrained(base, attn_implementation=PACKED, **changes)
    for block in model.transformer.h:
        if model.config.activation_function in TANH_GELU:
            # The same function in one kernel, which keeps one tensor for backward instead of five.
            block.mlp.act = nn.GELU(approximate="tanh")
    replace_dropout(model)
    model.objective = Objective(params.label_smoothing, params.unlikelihood)
    freeze(model, params.frozen_layers)
    return model if params.lora is None else add_lora(model, params)


def add_lora(model: ScoredGPT2, params: FinetuneParams) -> PeftModel:
    """Add LoRA to the layers that `params.lora` names, in the blocks that are not frozen."""
    lora = params.lora
    assert lora is not None  # noqa: S101
    block = model.transformer.h[0]
    names = sorted({name.rpartition(".")[2] for name, module in block.named_modules() if isinstance(module, Conv1D)})
    if unknown := sorted(set(lora.modules) - set(names)):
        raise UserError(
            f"finetune.lora.modules: the base has no {', '.join(unknown)}; its blocks have {', '.join(names)}"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.modules,
        layers_to_transform=list(range(params.frozen_layers, model.config.n_layer)),
        layers_pattern="h",
        # GPT-2's layers store their weights transposed.
        fan_in_fan_out=True,
    )
    return get_peft_model(model, config)


def merge_adapters(model: nn.Module) -> GPT2LMHeadModel:
    """Return the trained GPT-2, with LoRA merged into its weights."""
    return cast(GPT2LMHeadModel, model.merge_and_unload() if isinstance(model, PeftModel) else model)


def gather_weights(sharded: nn.Module, whole: ScoredGPT2 | PeftModel) -> ScoredGPT2 | PeftModel:
    """Return `whole` with the weights that are spread over the processes. Call it in each; the first gets them."""
    weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if weights:
        whole.load_state_dict(weights)
    return whole
