"""The section `finetune`: how the base learns the training split."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Count, Section, Seed


class TrainingSamplesParams(Section):
    """The table of samples that is written at each evaluation during training."""

    prompts: list[str]
    """The prompts; an empty prompt starts from end-of-text, an empty list writes no table."""
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Count
    seed: Seed


class LoraParams(Section):
    """Low-rank adaptation (Hu et al., 2021): add the product of two thin matrices to each of some weights."""

    rank: Count
    """The inner dimension of the two matrices."""
    alpha: Count
    """The scale of the product, which is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """The dropout rate of the input to the thin matrices."""
    modules: Annotated[list[str], Field(min_length=1)]
    """The layers of a block that get the matrices: `c_attn`, `c_proj`, `c_fc`."""


class FinetuneParams(Section):
    """How the base learns the training split."""

    seed: Seed
    context_length: Annotated[int, Field(ge=2)] | None
    """The length of a window, in tokens; null takes the base's whole context."""
    train_share: Annotated[float, Field(gt=0, le=1)]
    """The share of training documents to train on, drawn by the seed; `python -m pipeline advise` uses less."""
    batch_tokens: Count
    """The approximate size of an optimizer step over all devices, in tokens: whole windows, at least one."""
    device_batch_tokens: Count | None
    """The tokens that one device takes at a time; null takes what its memory holds, on a processor no more than helps.
    It changes only rounding, and which units dropout drops."""
    gradient_checkpointing: bool
    """Whether the backward pass computes activations again instead of keeping them: less memory, a third slower."""
    epochs: Annotated[float, Field(gt=0)]
    """The most passes over the training split."""
    optimizer: Literal["adamw", "muon"]
    """The optimizer. `muon` trains the matrices of the blocks, and leaves the rest to `adamw`: it learns more per token
    if much is to be learned, and costs more per step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The learning rate at its peak, after warm-up; it then falls to zero along a cosine."""
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    """The ratio of a block's learning rate to that of the block above (Howard and Ruder, 2018); 1 is off."""
    frozen_layers: Annotated[int, Field(ge=0)]
    """The number of blocks, counted from the bottom, that are not trained; from 1 on the embeddings are not either."""
    lora: LoraParams | None
    """The small matrices to train instead of the model's own weights; null trains the model itself."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    """The share of all steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """The dropout rate of embeddings and residuals; null keeps the base's own."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """The dropout rate of attention weights; null keeps the base's own. Above 0, fused kernels cannot be used, which
    halves the speed."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """The share of the target that is spread over the vocabulary."""
    unlikelihood: Annotated[float, Field(ge=0)]
    """The weight of the loss that makes tokens that are already in the window less likely (Welleck et al., 2020)."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """The L2 norm to which larger gradients are scaled down."""
    fsdp: bool
    """Whether the processes of `torchrun` share weights, gradients and optimizer, instead of each holding a copy."""
    evaluations: Count
    """The number of times that the validation split is scored, evenly spread over training."""
    early_stopping_patience: Count
    """The number of evaluations without a better validation loss after which training ends."""
    samples: TrainingSamplesParams
