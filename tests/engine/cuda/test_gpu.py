"""What only a GPU can show: `make gpu`. What both share is tested on the processor, in tests/engine."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import PROMPTS, SETTINGS
from transformers import GPT2LMHeadModel

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.cuda import driver
from pipeline.engine.manifest import CUDA_PRECISIONS
from pipeline.engine.memory import CudaMemory

OBSTACLES = driver.obstacles()
REASON = f"CUDA does not run here: {OBSTACLES[0] if OBSTACLES else ''}"
TOLERANCE = {"float16": 0.5, "int8_float16": 4}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(OBSTACLES), reason=REASON)]


@pytest.fixture(params=CUDA_PRECISIONS)
def engine(request: pytest.FixtureRequest, tiny_engine_folder: Path) -> Engine:
    return Engine.load(tiny_engine_folder, provider="cuda", precision=request.param)


def test_logits_are_those_of_pytorch(engine: Engine, tiny_model: GPT2LMHeadModel) -> None:
    """Every node runs on CUDA, or the engine would not load."""
    tolerance = TOLERANCE[engine.session.precision]
    text = [(17 * index) % 300 for index in range(40)]
    with torch.inference_mode():
        expected = tiny_model(torch.tensor([text])).logits[0].numpy()
    np.testing.assert_allclose(engine.session.read(text, 0)[0], expected, atol=tolerance, rtol=0)
    engine.session.prefill(1, text[:30], 0)
    engine.session.prefill(0, text[:20], 0)
    for step in range(3):
        engine.session.decode([text[20 + step], text[30 + step]], [20 + step, 30 + step])
        wanted = expected[[20 + step, 30 + step]]
        np.testing.assert_allclose(engine.session.logits[:2], wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("params", SETTINGS)
def test_the_captured_loop_draws_what_the_host_draws(engine: Engine, params: SamplingParams) -> None:
    """A captured step may round otherwise than one that is not: few rows may part ways."""
    found = engine.generate(PROMPTS, params)
    engine.scheduler._loop, loop = None, engine.scheduler._loop
    expected = engine.generate(PROMPTS, params)
    engine.scheduler._loop = loop
    same = sum(one.token_ids == other.token_ids for one, other in zip(found, expected, strict=True))
    assert same >= 0.8 * len(expected)


def test_requests_beside_each_other_draw_what_they_draw_alone(engine: Engine) -> None:
    each = [replace(SETTINGS[1], seed=seed) for seed in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, each)
    alone = [engine.generate([prompt], own)[0] for prompt, own in zip(PROMPTS, each, strict=True)]
    same = sum(one.token_ids == other.token_ids for one, other in zip(together, alone, strict=True))
    assert same >= 0.8 * len(PROMPTS)


def test_memory_is_copied_as_it_is_on_the_host(engine: Engine) -> None:
    memory = engine.session.memory
    assert isinstance(memory, CudaMemory)
    buffer = memory.zeros((3, 2, 5, 4), np.float16)
    values = np.arange(40).reshape(1, 2, 5, 4).astype(np.float16)
    memory.write(buffer, 0, values)
    memory.copy_tokens(buffer, 0, 2, 3)
    memory.copy_row(buffer, 0, 1)
    found = memory.read(buffer, 0, 3)
    np.testing.assert_array_equal(found[:2], np.concatenate([values, values]))
    np.testing.assert_array_equal(found[2, :, :3], values[0, :, :3])
    assert not found[2, :, 3:].any()
