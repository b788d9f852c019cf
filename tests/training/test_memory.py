"""How many batches a step is cut into, from what a model keeps for the backward pass."""

import gc
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams
from pipeline.params.whole import load_params
from pipeline.training import memory
from pipeline.training.memory import Footprint, kept_bytes, measure_footprint, parts_of_step
from pipeline.training.model import load_trainable
from pipeline.training.objective import ScoredGPT2

CONTEXT_LENGTH = 64


def params(**changes: object) -> FinetuneParams:
    return load_params().finetune.model_copy(update=changes)


@pytest.fixture
def model(tiny_checkpoint: Path) -> ScoredGPT2:
    loaded = load_trainable(tiny_checkpoint, params())
    assert isinstance(loaded, ScoredGPT2)
    return loaded


def test_what_is_kept_grows_with_the_tokens(model: ScoredGPT2) -> None:
    short, middle, long = (kept_bytes(model, [16] * windows) for windows in (1, 2, 3))
    assert long - middle == pytest.approx(middle - short, rel=0.05)
    # For each of two blocks, at least the inputs of its four products and its activation.
    assert (middle - short) / 16 > 2 * (2 * 3 + 2 * 4) * model.config.n_embd


def test_measuring_gives_the_same_again_wherever_tensors_lie(model: ScoredGPT2) -> None:
    def scattered(count: int) -> int:
        others = [torch.empty(257 * (1 + index)) for index in range(count)]
        kept = kept_bytes(model, [CONTEXT_LENGTH] * 2)
        del others
        return kept

    assert len({scattered(count) for count in range(40)}) == 1


def test_measuring_changes_neither_model_nor_random_numbers(model: ScoredGPT2) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.eval()
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    measure_footprint(model, params(), CONTEXT_LENGTH)
    assert torch.equal(torch.get_rng_state(), expected)
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("tokens_held", "processes", "parts"), [(10_000, 1, 1), (500, 1, 2), (300, 1, 4), (500, 4, 4)])
def test_a_step_is_cut_into_as_few_batches_as_memory_and_processes_ask(
    tokens_held: int, processes: int, parts: int, model: ScoredGPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = params(batch_tokens=1000, device_batch_tokens=None)
    footprint = measure_footprint(model, own, CONTEXT_LENGTH)
    free = (footprint.bytes_of(tokens_held) + 0.5 * footprint.per_token) / memory.USED_SHARE
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert parts_of_step(model, own, context_length=CONTEXT_LENGTH, processes=processes) == parts


@pytest.mark.parametrize(("batch_tokens", "context_length", "parts"), [(700, 64, 1), (8192, 64, 8), (8192, 3000, 3)])
def test_a_batch_on_a_processor_is_no_larger_than_helps(
    batch_tokens: int, context_length: int, parts: int, model: ScoredGPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "measure_footprint", lambda *_: Footprint(0, 1, 0))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e12)
    own = params(batch_tokens=batch_tokens, device_batch_tokens=None)
    assert parts_of_step(model, own, context_length=context_length, processes=1) == parts


@given(
    fixed=st.floats(0, 1e10), per_token=st.floats(1, 1e7), logits_per_token=st.floats(1, 1e7), free=st.floats(0, 1e12)
)
def test_as_many_tokens_as_fit_are_taken(fixed: float, per_token: float, logits_per_token: float, free: float) -> None:
    footprint = Footprint(fixed, per_token, logits_per_token)
    tokens = footprint.tokens_in(free)
    assert tokens == 0 or footprint.bytes_of(tokens) <= free * (1 + 1e-9)
    assert footprint.bytes_of(tokens + 1) > free * (1 - 1e-9)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_any_batch_keeps_is_the_gradient_of_the_head(
    bfloat16: bool, model: ScoredGPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.precision.supports_bfloat16", lambda: bfloat16)
    footprint = measure_footprint(model, params(), CONTEXT_LENGTH)
    head = 4 * model.lm_head.weight.numel()
    trained = model.num_parameters() * (memory.STATE_BYTES["adamw"] + memory.MAPPED_BYTES)
    # In bfloat16 it keeps a copy of the layers' weights, too.
    products = sum(weight.numel() for name, weight in model.transformer.h.named_parameters() if weight.ndim == 2)
    copies = 2 * products if bfloat16 else 0
    assert footprint.fixed == pytest.approx(trained + (1 + memory.HEAD_COPIES) * head + copies, rel=0.01)
    frozen = load_trainable(Path(model.name_or_path), params(frozen_layers=1))
    assert measure_footprint(frozen, params(), CONTEXT_LENGTH).fixed < footprint.fixed - (1 + memory.HEAD_COPIES) * head


def test_measuring_leaves_nothing_behind(model: ScoredGPT2) -> None:
    def live_bytes() -> int:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    before = live_bytes()
    kept = kept_bytes(model, [CONTEXT_LENGTH])
    assert live_bytes() - before < kept / 100


def test_the_number_of_tokens_that_is_asked_for_is_taken(model: ScoredGPT2) -> None:
    own = params(batch_tokens=1000, device_batch_tokens=250)
    assert parts_of_step(model, own, context_length=CONTEXT_LENGTH, processes=1) == 4


@pytest.mark.parametrize(
    ("device_batch_tokens", "checkpointing", "message"),
    [
        (
            None,
            False,
            r"^finetune\.context_length: a batch of 64 tokens takes about .* lower it, or set finetune\.grad",
        ),
        (None, True, r"^finetune\.context_length: a batch of 64 tokens .* are available; lower it$"),
        (10**9, False, r"^finetune\.device_batch_tokens: a batch of 1000000000 tokens takes about .* lower it, or"),
    ],
)
def test_a_batch_that_cannot_fit_is_refused_with_numbers(
    device_batch_tokens: int | None,
    checkpointing: bool,
    message: str,
    model: ScoredGPT2,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = params(device_batch_tokens=device_batch_tokens, gradient_checkpointing=checkpointing)
    if device_batch_tokens is None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=message):
        parts_of_step(model, own, context_length=CONTEXT_LENGTH, processes=1)


def test_checkpointing_needs_less(model: ScoredGPT2) -> None:
    plain, checkpointed = (
        measure_footprint(model, params(gradient_checkpointing=on), CONTEXT_LENGTH) for on in (False, True)
    )
    assert checkpointed.per_token < plain.per_token
    assert math.isclose(checkpointed.fixed, plain.fixed, rel_tol=1e-6)
