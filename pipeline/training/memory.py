"""How many tokens a device's memory holds at a time, measured on the model at hand, not guessed from its size."""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakSet

import psutil
import torch
from transformers import GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams
from pipeline.training.objective import LOGITS_BYTES
from pipeline.training.precision import autocast

USED_SHARE = 0.8
"""The share of the free memory to fill; the rest is for what a step needs briefly and does not keep."""
STATE_BYTES = {"adamw": 12, "muon": 12}
"""The bytes per trained weight: its gradient and the optimizer's two moments, in float32. Muon keeps one moment, but
not for all weights."""
MAPPED_BYTES = 4
"""The bytes per trained weight of the weight itself, on a processor: until training changes it, it is a part of the
mapped file, and counts as free memory."""
HEAD_COPIES = 2
"""The most copies of the head's gradient at once, besides those that the graph keeps and that `STATE_BYTES` counts."""
LOGITS_COPIES = 3
"""The most copies of the logits at once: the logits, what they are scored by, and their gradient."""
PROCESSOR_BATCH_TOKENS = 1024
"""The tokens of a batch on a processor, unless a window is longer: a larger batch takes more memory, and no less time
(`benchmarks/batches.py`)."""
RESIDUE_BYTES = 4
"""The bytes per number that a checkpointed block keeps: its input."""

GLIBC_OPTIONS = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26), "M_MMAP_MAX": (-4, 0)}
"""The options and values for `mallopt`: return nothing, request much at a time, and never map a tensor by itself."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that a step frees, for the next step; glibc only.

    Otherwise glibc returns large tensors to the system, and every step pays for gigabytes of fresh pages: a sixth of
    its time in GPT-2 Medium's shape on two cores. The peak is up to a tenth higher.
    """
    if (mallopt := _glibc("mallopt")) is not None:
        for option, value in GLIBC_OPTIONS.values():
            mallopt(option, value)


def _return_freed_memory() -> None:
    """Return to the system what this process has freed; glibc only, because others do so by themselves."""
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, or `None` where the C library has no such function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Footprint:
    """The memory of training besides the weights, in bytes."""

    fixed: float
    per_token: float
    logits_per_token: float
    """All copies of the logits of a token; those of a batch take at most `LOGITS_COPIES` times `LOGITS_BYTES`."""

    def bytes_of(self, tokens: int) -> float:
        logits = min(self.logits_per_token * tokens, LOGITS_COPIES * LOGITS_BYTES)
        return self.fixed + self.per_token * tokens + logits

    def tokens_in(self, free: float) -> int:
        """Return the most tokens of a batch for which `bytes_of` is at most `free`."""
        room = free - self.fixed
        few, many = room / (self.per_token + self.logits_per_token), room - LOGITS_COPIES * LOGITS_BYTES
        return max(0, int(max(few, many / self.per_token)))


def parts_of_step(model: GPT2LMHeadModel, params: FinetuneParams, *, context_length: int, processes: int) -> int:
    """Return into how many batches to cut an optimizer step, a multiple of `processes`.

    Raises `UserError` if the device's memory does not hold one batch, as far as that can be known before training.
    """
    footprint, free = measure_footprint(model, params, context_length), free_bytes(model.device) * USED_SHARE
    room = footprint.tokens_in(free)
    enough = params.batch_tokens if model.device.type == "cuda" else PROCESSOR_BATCH_TOKENS
    wanted = params.device_batch_tokens or min(room, params.batch_tokens, max(enough, context_length))
    # A batch holds whole windows, and at least one.
    if max(wanted, context_length) > room:
        name = "finetune.context_length" if params.device_batch_tokens is None else "finetune.device_batch_tokens"
        tokens = max(wanted, context_length)
        needed = footprint.bytes_of(tokens)
        raise UserError(
            f"{name}: a batch of {tokens} tokens takes about {needed / 2**30:.1f} GiB besides the weights, but "
            f"{free / 2**30:.1f} GiB are available; lower it{_advice(params)}"
        )
    return math.ceil(params.batch_tokens / max(wanted, 1) / processes) * processes


def free_bytes(device: torch.device) -> float:
    """Return the memory that is still available on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the tensors on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_footprint(model: GPT2LMHeadModel, params: FinetuneParams, context_length: int) -> Footprint:
    """Return the footprint of training, from what forward passes keep for backward.

    One is over the shortest window that has a label, the other over this window and a full one: no more than training
    takes. Leaves the random state as it was.
    """
    short, both = (kept_bytes(model, windows) for windows in ([2], [2, context_length]))
    per_token = (both - short) / context_length
    # Any batch keeps this much, however small: the head's gradient, and under autocast copies of weights.
    kept = max(0.0, short - 2 * per_token)
    if params.gradient_checkpointing:
        layers, width = model.config.n_layer, model.config.n_embd
        per_token = per_token / layers + layers * width * RESIDUE_BYTES
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    output = model.get_output_embeddings().weight
    head = 4 * output.numel() if output.requires_grad else 0
    per_weight = STATE_BYTES[params.optimizer] + (0 if model.device.type == "cuda" else MAPPED_BYTES)
    _return_freed_memory()
    return Footprint(
        fixed=trained * per_weight + kept + HEAD_COPIES * head,
        per_token=per_token,
        logits_per_token=LOGITS_COPIES * 4 * model.config.vocab_size,
    )


class _Kept:
    """A tensor, for as long as a graph keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Detached: an operation that keeps its own result would otherwise keep itself, for ever.
        self.tensor = tensor.detach()


def kept_bytes(model: GPT2LMHeadModel, windows: Sequence[int]) -> int:
    """Count the bytes that a forward pass over windows of these token counts keeps for the backward pass.

    Weights do not count.
    """
    # Weak, because the loss frees its own tensors with its gradients, and their addresses are reused.
    kept: WeakSet[_Kept] = WeakSet()

    def keep(tensor: torch.Tensor) -> _Kept:
        held = _Kept(tensor)
        kept.add(held)
        return held

    ids = torch.zeros((1, sum(windows)), dtype=torch.int64, device=model.device)
    bounds = torch.tensor([0, *accumulate(windows)], dtype=torch.int32, device=model.device)
    positions = torch.cat([torch.arange(tokens, device=model.device) for tokens in windows])[None]
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor)
    with torch.random.fork_rng(devices=devices), autocast(model.device), hooks:
        # Keeps the graph alive until its tensors are counted.
        output = model(
            input_ids=ids,
            position_ids=positions,
            labels=ids,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=max(windows),
            max_length_k=max(windows),
        )
    storages = {storage.data_ptr(): storage for storage in (held.tensor.untyped_storage() for held in kept)}
    for weight in model.parameters():
        storages.pop(weight.untyped_storage().data_ptr(), None)
    total = sum(storage.nbytes() for storage in storages.values())
    del output
    model.train(was_training)
    return total


def _advice(params: FinetuneParams) -> str:
    return "" if params.gradient_checkpointing else ", or set finetune.gradient_checkpointing"
