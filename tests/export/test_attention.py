"""Attention on an 8-bit cache: prompts and single tokens take different ways, and write and say the same."""

from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2LMHeadModel

from pipeline.engine import Engine
from pipeline.engine.session import Session
from pipeline.export.build import build_engine

TEXT = [(17 * index) % 300 for index in range(48)]


def session_of(folder: Path, precision: str) -> Session:
    return Engine.load(folder, precision=precision, provider="cpu", threads=1, slots=2).session


def cache_of(session: Session, tokens: int) -> np.ndarray:
    """Return keys and values of slot 0, int8 `[buffers, heads, tokens, head width]`."""
    buffers = [buffer.array for buffer in session._cache.values()]
    return np.stack([array[0, :, :tokens] for array in buffers if array is not None])


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("parts", [[48], [20, 28], [1, 47], [16, 16, 15, 1]])
def test_a_prompt_in_any_parts_is_what_its_tokens_are_one_by_one(
    parts: list[int], precision: str, tiny_engine_folder: Path
) -> None:
    whole, single = (session_of(tiny_engine_folder, precision) for _ in range(2))
    begin = 0
    for part in parts:
        whole.prefill(0, TEXT[begin : begin + part], begin)
        begin += part
    for position, token_id in enumerate(TEXT):
        single.decode([token_id], [position])
    found, expected = (cache_of(session, len(TEXT)).astype(int) for session in (whole, single))
    # Steps of a cache are whole numbers: where rounding falls the other way, one more or less, and few of them.
    assert np.abs(found - expected).max() <= 2
    assert (found != expected).mean() < 0.02
    assert np.abs(whole.logits[0] - single.logits[0]).max() < 0.1 * single.logits[0].std()


def test_what_lies_behind_a_prompt_stays(tiny_engine_folder: Path) -> None:
    session = session_of(tiny_engine_folder, "int8")
    for buffer in session._cache.values():
        assert buffer.array is not None
        buffer.array[...] = 77
    session.prefill(0, TEXT[:9], 0)
    for buffer in session._cache.values():
        assert buffer.array is not None
        assert (buffer.array[0, :, 9:] == 77).all()
        assert (buffer.array[1:] == 77).all()
        assert not (buffer.array[0, :, :9] == 77).all()


def test_a_channel_that_is_always_zero_stays_zero(
    tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    width = tiny_model.config.n_embd
    attention = tiny_model.transformer.h[0].attn.c_attn
    attention.weight.data[:, width + 3] = 0
    attention.bias.data[width + 3] = 0
    build_engine(tiny_model, tiny_checkpoint, tmp_path / "engine", ["int8"])
    session = session_of(tmp_path / "engine", "int8")
    session.prefill(0, TEXT, 0)
    assert np.isfinite(session.logits[0]).all()
    assert (cache_of(session, len(TEXT))[0, 0, :, 3] == 0).all()
