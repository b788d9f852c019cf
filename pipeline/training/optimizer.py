"""The optimizers of fine-tuning: AdamW for every weight, or Muon for the matrices of the blocks and AdamW beside it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from pipeline.params import FinetuneParams

BLOCKS = ".h."
"""In the name of every weight that belongs to a block of a GPT-2."""


def build_optimizer(model: nn.Module, params: FinetuneParams) -> Optimizer:
    """The optimizer that `params` names, over every weight of `model` that is trained.

    Matrices decay, biases and layer norms do not. Muon (Jordan et al., 2024) moves a matrix by its orthogonalized
    momentum, here of the size of an AdamW step (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that one
    learning rate serves both; embeddings are not its kind of matrix.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [(name, weight) for name, weight in trained if weight.ndim >= 2]
    vectors = {"params": [weight for _, weight in trained if weight.ndim < 2], "weight_decay": 0.0}
    rate, decay = params.learning_rate, params.weight_decay
    if params.optimizer == "adamw":
        groups = [{"params": [weight for _, weight in matrices]}, vectors]
        return AdamW(groups, lr=rate, weight_decay=decay, fused=True)
    hidden = [weight for name, weight in matrices if BLOCKS in name]
    outer = {"params": [weight for name, weight in matrices if BLOCKS not in name]}
    return JointOptimizer(
        [
            Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            AdamW([outer, vectors], lr=rate, weight_decay=decay, fused=True),
        ]
    )


class JointOptimizer(Optimizer):
    """Several optimizers, each over weights of its own, as one: to a schedule, and to a checkpoint."""

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
        # An optimizer that loads makes its groups anew; a schedule changes those that stand here.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
