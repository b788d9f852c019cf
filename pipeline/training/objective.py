"""The loss that training minimizes, and a GPT-2 that computes it without holding the logits of a whole batch."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from pipeline.training.packing import IGNORED_LABEL

LOGITS_BYTES = 2**28
"""The bytes of float32 logits per chunk: large enough for few passes over the head's gradient, small enough to fit."""
LEAST_COMPLEMENT = 1e-5
"""The least value of 1 - p, so that `log(1 - p)` stays finite."""

Score = Callable[[torch.Tensor, int, int], torch.Tensor]
"""A function of logits `[positions, vocabulary]`, `start` and `end` (exclusive): the summed loss of these positions."""


@dataclass(frozen=True)
class Objective:
    """Negative log-likelihood, and the terms that training may add to it; scoring omits these."""

    label_smoothing: float = 0.0
    """The share of the target that is spread evenly over the vocabulary (Szegedy et al., 2016)."""
    unlikelihood: float = 0.0
    """The weight of the token unlikelihood loss (Welleck et al., 2020): -log(1 - p), summed over all tokens that occur
    earlier in the window, except the label and end-of-text."""

    def score(self, input_ids: torch.Tensor, labels: torch.Tensor, bounds: torch.Tensor) -> Score:
        """Return the loss over a flat batch; `input_ids` and `labels` are `[tokens]`, `bounds` those of the windows."""
        windows = list(pairwise(bounds.tolist()))

        def loss(logits: torch.Tensor, start: int, end: int) -> torch.Tensor:
            chunk = labels[start:end]
            total = functional.cross_entropy(
                logits, chunk, ignore_index=IGNORED_LABEL, label_smoothing=self.label_smoothing, reduction="sum"
            )
            if self.unlikelihood > 0:
                repeats = _repeats(input_ids, chunk, start, windows, vocabulary_size=logits.shape[1])
                complement = (1 - logits.softmax(dim=1)).clamp_min(LEAST_COMPLEMENT)
                total = total - self.unlikelihood * complement.log()[repeats].sum()
            return total

        return loss


def _repeats(
    input_ids: torch.Tensor, labels: torch.Tensor, start: int, windows: list[tuple[int, int]], *, vocabulary_size: int
) -> torch.Tensor:
    """Return which tokens would be repeats, bool `[positions, vocabulary]`; `labels` begin at position `start`.

    A window's first token is context, and does not count: it is end-of-text, or it belongs to the window before.
    """
    end = start + len(labels)
    repeats = torch.zeros((len(labels), vocabulary_size), dtype=torch.bool, device=labels.device)
    for first, last in windows:
        low, high = max(first, start), min(last, end)
        if low >= high:
            continue
        rows = repeats[low - start : high - start]
        rows[:, input_ids[first + 1 : low]] = True
        later, earlier = torch.tril_indices(high - low, high - low, device=labels.device)
        known = earlier + low > first
        rows[later[known], input_ids[low + earlier[known]]] = True
    is_label = labels != IGNORED_LABEL
    repeats[~is_label] = False
    repeats[is_label, labels[is_label]] = False
    return repeats


class ChunkedLoss(torch.autograd.Function):
    """The sum of a loss over positions, from logits that are made and freed one chunk of positions at a time.

    The forward pass also takes the gradients of hidden states and head, chunk by chunk, so nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, score: Score) -> torch.Tensor:
        """Return a float32 scalar; `hidden` is `[positions, width]`, `head` is `[vocabulary, width]`.

        Under autocast, products are in its type.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        wanted = [hidden.requires_grad, head.requires_grad]
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_head: torch.Tensor | None = None
        weight = head.detach().to(dtype).requires_grad_(wanted[1])
        positions = max(1, LOGITS_BYTES // (4 * len(head)))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), positions):
            end = min(start + positions, len(hidden))
            chunk = hidden[start:end].detach().to(dtype).requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                loss = score(functional.linear(chunk, weight).float(), start, end)
            total += loss.detach()
            inputs = [tensor for tensor, is_wanted in zip((chunk, weight), wanted, strict=True) if is_wanted]
            grads = list(torch.autograd.grad(loss, inputs)) if inputs else []
            if grad_hidden is not None:
                grad_hidden[start:end] = grads.pop(0)
            if wanted[1]:
                own = grads.pop(0)
                grad_head = own.to(head.dtype) if grad_head is None else grad_head.add_(own)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return _scale(grad_hidden, grad), _scale(grad_head, grad), None


def _scale(gradient: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor | None:
    return None if gradient is None else gradient * factor


class ScoredGPT2(GPT2LMHeadModel):
    """A GPT-2 that also takes flat batches (see `packing`), and in training returns the loss of `objective`."""

    objective = Objective()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Return the loss, or without labels the logits, of a flat batch; do what any GPT-2 does for other batches.

        A flat batch has its bounds among the `arguments`. `labels` are `[1, tokens]`; the loss is the mean over them,
        or their sum divided by `num_items_in_batch`.
        """
        if "cu_seq_lens_q" not in arguments:
            return super().forward(input_ids=input_ids, position_ids=position_ids, labels=labels, **arguments)
        arguments |= {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        hidden = self.transformer(**arguments).last_hidden_state[0]
        if labels is None:
            return CausalLMOutput(logits=self.lm_head(hidden)[None])
        objective = self.objective if self.training else Objective()
        # A position predicts the token after it.
        score = objective.score(arguments["input_ids"][0, :-1], labels[0, 1:], arguments["cu_seq_lens_q"])
        head = self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
        total = ChunkedLoss.apply(hidden[:-1], head, score)  # type: ignore[no-untyped-call]
        count = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)


# save_pretrained writes this name into config.json: to other programs, the model is a plain GPT-2.
ScoredGPT2.__name__ = GPT2LMHeadModel.__name__
