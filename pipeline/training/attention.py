"""Causal attention over a flat batch of windows, each of which sees only itself, as a transformers implementation."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, GPT2LMHeadModel

from pipeline.checkpoint import attention_implementation, attention_scale

PACKED = "packed"
"""The name under which transformers finds it. transformers knows no mask for this name, so it makes none."""
CAUSAL = (-1, 0)
"""The attention window: everything before a position, nothing after it."""
VARLEN_CAPABILITY = (8, 0)
"""The least CUDA capability that has the kernel for sequences of many lengths: Ampere's."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each window.

    `query`, `key` and `value` are `[1, heads, tokens, head width]`; the result is `[1, tokens, heads, head width]`.
    `cu_seq_lens_q`, int32 `[windows + 1]`, holds the bounds of the windows. On a GPU one kernel takes all windows; on a
    processor, and with dropout, each window is a separate call.
    """
    attention: Any = module
    scale = attention_scale(attention.config, attention.layer_idx)
    if _can_use_varlen(query, dropout):
        attended = varlen_attn(
            *(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)),
            *(cu_seq_lens_q, cu_seq_lens_q),
            *(max_length_q, max_length_q),
            scale=scale,
            window_size=CAUSAL,
        )
        assert isinstance(attended, torch.Tensor)  # noqa: S101
        return attended[None], None
    parts = [
        _attend(query[0, :, start:end], key[0, :, start:end], value[0, :, start:end], scale, dropout)
        for start, end in pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)[None], None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float) -> torch.Tensor:
    """Attend causally within one window; all tensors are `[heads, tokens, head width]`.

    On a processor, forward and backward take a third of the time of PyTorch's fused kernel at a few hundred tokens.
    They keep the attention weights, which the fused kernel computes again.
    """
    tokens = query.shape[1]
    mask = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    scores = torch.baddbmm(mask.expand(len(query), tokens, tokens), query * scale, key.transpose(1, 2))
    return functional.dropout(scores.softmax(dim=-1), dropout) @ value


@contextmanager
def padded_attention(model: GPT2LMHeadModel) -> Iterator[None]:
    """Let a model that trains on flat batches take padded batches with a mask meanwhile, as `generate` makes them."""
    model.set_attn_implementation(attention_implementation(model.config))
    try:
        yield
    finally:
        model.set_attn_implementation(PACKED)


def _can_use_varlen(query: torch.Tensor, dropout: float) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and dropout == 0
        and torch.cuda.get_device_capability() >= VARLEN_CAPABILITY
    )


AttentionInterface.register(PACKED, packed_attention)
