"""Texts that a model writes itself, and what is measured on them, against the whole model."""

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from pipeline.export.calibration import CACHE_HEADROOM, TEXT_TOKENS, TEXTS, input_moments, scale_cache, write_texts
from pipeline.export.forms import PARTS


def test_texts_are_the_models_own_and_the_same_each_time(tiny_model: GPT2LMHeadModel) -> None:
    end_of_text = tiny_model.config.eos_token_id
    state = torch.get_rng_state()
    texts = write_texts(tiny_model, end_of_text)
    assert torch.equal(torch.get_rng_state(), state)
    assert texts.shape == (TEXTS, min(TEXT_TOKENS, tiny_model.config.n_positions))
    assert (texts[:, 0] == end_of_text).all()
    assert len({tuple(text) for text in texts.tolist()}) > TEXTS // 2
    assert torch.equal(write_texts(tiny_model, end_of_text), texts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_moments_are_those_of_the_inputs_in_the_whole_model(attention: str, tiny_model: GPT2LMHeadModel) -> None:
    tiny_model.set_attn_implementation(attention)
    texts = torch.tensor([[0, 5, 9, 22, 7], [0, 8, 8, 3, 100]])
    seen: dict[str, torch.Tensor] = {}
    for name, module in tiny_model.transformer.named_modules():
        if name.endswith(PARTS):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
    with torch.inference_mode():
        tiny_model(texts)
    expected = {name: torch.einsum("rti,rtj->ij", own, own).numpy() for name, own in seen.items()}
    layers = list(input_moments(tiny_model, texts))
    assert [list(layer) for layer in layers] == [[f"h.{number}.{part}" for part in PARTS] for number in range(2)]
    for layer in layers:
        for name, moments in layer.items():
            np.testing.assert_allclose(moments, expected[name], rtol=1e-4, atol=1e-4)


def test_measuring_leaves_the_mode_of_gradients_alone(tiny_model: GPT2LMHeadModel) -> None:
    moments = input_moments(tiny_model, torch.tensor([[0, 5, 9]]))
    next(moments)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_no_key_or_value_of_the_texts_is_clipped_and_the_largest_uses_most_of_the_range(
    tiny_model: GPT2LMHeadModel,
) -> None:
    texts = write_texts(tiny_model, tiny_model.config.eos_token_id)
    with torch.inference_mode():
        cache = tiny_model(texts, use_cache=True).past_key_values
    for layer, scales in zip(cache, scale_cache(tiny_model, texts), strict=True):
        for values, steps in zip(layer, (scales.key, scales.value), strict=True):
            largest = values.abs().amax(dim=(0, 2)).numpy()
            assert steps.shape == largest.shape
            # The texts joined into one hold larger ones here and there.
            assert (largest / steps <= 127 / CACHE_HEADROOM * 1.0001).all()
            assert (largest / steps).max() == pytest.approx(127 / CACHE_HEADROOM, rel=1e-4)
