"""Optimizer and learning-rate schedule: AdamW, or Muon for the blocks' matrices and AdamW for the rest; a cosine."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import GPT2Config

from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams

BLOCK = re.compile(r"\.h\.(\d+)\.")
"""The part of a weight's name that says that it belongs to a block of a GPT-2, with the block's number."""
EMBEDDINGS = re.compile(r"\.w[tp]e\.")


def build_optimizer(model: nn.Module, params: FinetuneParams) -> Optimizer:
    """Return the optimizer that `params` names, over every weight of `model` that is trained.

    Matrices decay; biases and layer norms do not. Muon (Jordan et al., 2024) moves a matrix by its orthogonalized
    momentum, scaled to the size of an AdamW step (Liu et al., 2025, "Muon is Scalable for LLM Training"), so one
    learning rate serves both. AdamW takes the embeddings, for which Muon is not meant.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = defaultdict(list)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            rate = params.learning_rate * params.layer_decay ** _depth(name, model.config)
            decay = params.weight_decay if weight.ndim >= 2 else 0.0
            takes_muon = params.optimizer == "muon" and weight.ndim >= 2 and BLOCK.search(name) is not None
            groups[takes_muon, rate, decay].append(weight)
    muon, adamw = (
        [
            {"params": weights, "lr": rate, "weight_decay": decay}
            for (takes_muon, rate, decay), weights in groups.items()
            if takes_muon == wanted
        ]
        for wanted in (True, False)
    )
    optimizers: list[Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, adjust_lr_fn="match_rms_adamw"))
    if adamw:
        optimizers.append(AdamW(adamw, fused=True))
    return optimizers[0] if len(optimizers) == 1 else JointOptimizer(optimizers)


def learning_rate_schedule(params: FinetuneParams) -> dict[str, Any]:
    """Return the Trainer's arguments for the learning-rate schedule.

    The rate rises linearly over the first `warmup_share` of the steps, then falls to zero along half a cosine.
    """
    return {"lr_scheduler_type": "cosine", "warmup_ratio": params.warmup_share}


def freeze(model: nn.Module, layers: int) -> None:
    """Exclude the lowest blocks, and with any of them the embeddings, from training.

    Raises `UserError` if no block is left to train.
    """
    config: GPT2Config = model.config
    if layers >= config.n_layer:
        raise UserError(
            f"finetune.frozen_layers: {layers} of the base's {config.n_layer} blocks leave none to train; lower it"
        )
    for name, weight in model.named_parameters():
        block = BLOCK.search(name)
        if (block and int(block[1]) < layers) or (layers and EMBEDDINGS.search(name)):
            weight.requires_grad = False


def _depth(name: str, config: GPT2Config) -> int:
    """Count the blocks above a weight: 0 for the last block and what follows it, all of them for the embeddings."""
    if block := BLOCK.search(name):
        return int(config.n_layer) - 1 - int(block[1])
    return int(config.n_layer) if EMBEDDINGS.search(name) else 0


class JointOptimizer(Optimizer):
    """Several optimizers, each over its own weights, as one optimizer to a schedule and to a checkpoint."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        # Loading replaces an optimizer's groups, and a schedule changes the groups listed here.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
