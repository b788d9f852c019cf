"""The section `finetune`: how the base learns the training split."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Count, Section, Seed


class TrainingSamplesParams(Section):
    """The table of samples written at each evaluation while training."""

    prompts: list[str]
    """An empty one starts from end-of-text; none at all, and there is no table."""
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Count
    seed: Seed


class LoraParams(Section):
    """Low-rank adaptation (Hu et al., 2021): the product of two thin matrices is added to each of some weights."""

    rank: Count
    alpha: Count
    """The product is scaled by alpha over rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Of what goes into the thin matrices."""
    modules: Annotated[list[str], Field(min_length=1)]
    """The layers of a block that have them: `c_attn`, `c_proj`, `c_fc`."""


class FinetuneParams(Section):
    """How the base learns the training split."""

    seed: Seed
    context_length: Annotated[int, Field(ge=2)] | None
    """Tokens of a window; null takes the base's whole context."""
    train_share: Annotated[float, Field(gt=0, le=1)]
    """Of the training documents, drawn by the seed; `python -m pipeline advise` trains on less than all."""
    batch_tokens: Count
    """Tokens of an optimizer step, over all devices; whole windows, so about as many."""
    device_batch_tokens: Count | None
    """Tokens that one device takes at a time; null takes what its memory holds. It changes nothing but rounding."""
    gradient_checkpointing: bool
    """Keep less of a batch in memory, and compute it again on the way back: a third slower."""
    epochs: Annotated[float, Field(gt=0)]
    """Passes over the training split at most."""
    optimizer: Literal["adamw", "muon"]
    """`muon` for the matrices of the blocks, with `adamw` for the rest; it learns more from a token where much is to be
    learned, and costs more a step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """At its peak, after warm-up; a cosine takes it to zero."""
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    """The learning rate of a block is that of the block above it times this (Howard and Ruder, 2018); 1 is off."""
    frozen_layers: Annotated[int, Field(ge=0)]
    """Blocks from the bottom up, and with the first of them the embeddings, that stay as they are."""
    lora: LoraParams | None
    """Train small matrices beside the model's own, which stay; null trains the model itself."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    """Of all steps."""
    weight_decay: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """Of embeddings and residuals; null keeps the base's own."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """Of attention weights; null keeps the base's own. Above 0 it bars the fused kernels and halves the speed."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Share of the target that is spread over the vocabulary."""
    unlikelihood: Annotated[float, Field(ge=0)]
    """Weight of the loss that makes what stands in the window already less likely (Welleck et al., 2020)."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Gradients are scaled down to this L2 norm."""
    fsdp: bool
    """Share weights, gradients and optimizer among the processes of `torchrun`, instead of a copy to each."""
    evaluations: Count
    """Times that the validation split is scored, evenly spread over training."""
    early_stopping_patience: Count
    """Evaluations without a better validation loss after which training ends."""
    samples: TrainingSamplesParams
