"""Which of what a precision rounds does most harm to a model's distributions."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from pipeline.engine.manifest import CUDA_PRECISIONS
from pipeline.export.attention import CacheScales
from pipeline.export.calibration import Calibration
from pipeline.export.forms import CACHE, HEAD, Form, Forms
from pipeline.export.quantization import dequantize, quantize
from pipeline.progress import progress

TEXTS, TEXT_TOKENS = 4, 64
"""The texts of the calibration, and the tokens of each, on which harm is measured."""


def rank_by_harm(model: GPT2LMHeadModel, precision: str, forms: Forms, calibration: Calibration) -> list[str]:
    """Return the names of `forms`, the one first that moves the distributions most if it alone has its form.

    What is measured is the KL divergence from the exact model's distributions. Weights of 4 bits are rounded without
    making up for what they lose: that is quicker, and orders them nearly the same.
    """
    texts = calibration.texts[:TEXTS, :TEXT_TOKENS]
    with torch.no_grad():
        exact = _logprobs(model, texts)
        harm = {}
        for name, form in progress(forms.items(), description="harm", unit="product"):
            if form is None:
                harm[name] = 0.0
                continue
            with ExitStack() as stack:
                if name == CACHE:
                    stack.enter_context(_rounded_cache(model, calibration.cache_scales))
                else:
                    stack.enter_context(_rounded(model, name, form, on_cuda=precision in CUDA_PRECISIONS))
                harm[name] = float((exact.exp() * (exact - _logprobs(model, texts))).sum())
    # NaN, where rounding overflows, is the worst.
    return sorted(harm, key=lambda name: -math.inf if math.isnan(harm[name]) else -harm[name])


def _logprobs(model: GPT2LMHeadModel, texts: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(texts, use_cache=False).logits, dim=-1)


@contextmanager
def _rounded(model: GPT2LMHeadModel, product: str, form: Form, *, on_cuda: bool) -> Iterator[None]:
    """Compute a product as the engine does: with rounded weights, and on the processor with inputs rounded per block.

    There, the embedding has the form of the head.
    """
    own = model.lm_head if product == HEAD else model.transformer.get_submodule(product)
    modules = [own, model.transformer.wte] if product == HEAD and not on_cuda else [own]
    exact = [module.weight for module in modules]
    block = 0
    with ExitStack() as stack:
        for module, weight in zip(modules, exact, strict=True):
            stack.callback(setattr, module, "weight", weight)
            # transformers stores the weights of its layers as [inputs, outputs], that of the head the other way round.
            kept = quantize((weight.T if product == HEAD else weight).detach().numpy(), form.bits, form.block)
            rounded = torch.from_numpy(dequantize(kept))
            module.weight = torch.nn.Parameter(rounded.T.contiguous() if product == HEAD else rounded)
            block = kept.block
        if not on_cuda:
            hook = own.register_forward_pre_hook(lambda _, inputs: (_round_inputs(inputs[0], block), *inputs[1:]))
            stack.callback(hook.remove)
        yield


@contextmanager
def _rounded_cache(model: GPT2LMHeadModel, scales: Sequence[CacheScales]) -> Iterator[None]:
    """Round all keys and values as an 8-bit cache does."""
    with ExitStack() as stack:
        for layer, own in zip(model.transformer.h, scales, strict=True):
            steps = torch.from_numpy(np.concatenate([own.key.reshape(-1), own.value.reshape(-1)]))
            hook = layer.attn.c_attn.register_forward_hook(
                lambda _module, _inputs, qkv, steps=steps: _round_channels(qkv, steps)
            )
            stack.callback(hook.remove)
        yield


def _round_channels(qkv: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Round keys and values, the last channels of `qkv` `[rows, tokens, 3 * width]`, to steps of 8 bits."""
    query, rest = qkv.tensor_split([qkv.shape[-1] - len(steps)], dim=-1)
    counted = torch.where(steps > 0, rest / steps, 0).round().clamp(-128, 127)
    return torch.cat([query, counted * steps], dim=-1)


def _round_inputs(inputs: torch.Tensor, block: int) -> torch.Tensor:
    blocks = inputs.reshape(*inputs.shape[:-1], -1, block)
    steps = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(steps > 0, (blocks / steps).round() * steps, 0).flatten(-2)
