"""Rounding one product in PyTorch, against the engine; and the order that it gives."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from pipeline.engine import Engine
from pipeline.export import harm
from pipeline.export.build import build_engine
from pipeline.export.calibration import Calibration, calibrate
from pipeline.export.forms import CACHE, CHANNELS, HEAD, Form, usual_forms
from pipeline.export.harm import rank_by_harm
from pipeline.export.quantization import dequantize, quantize

TEXT = [299, *((19 * index) % 299 for index in range(40))]


@pytest.fixture
def model(tiny_model: GPT2LMHeadModel) -> Iterator[GPT2LMHeadModel]:
    """The tiny model, which must be left as it was."""
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    yield tiny_model
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(weight, before[name])


def logits(model: GPT2LMHeadModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0].numpy()


PRODUCTS = [
    ("h.0.attn.c_attn", Form(8, 32)),
    ("h.1.mlp.c_proj", Form(8, 32)),
    ("h.1.mlp.c_fc", Form(8, 16)),
    (HEAD, Form(8, 32)),
    (CACHE, CHANNELS),
]


def check_rounding(model: GPT2LMHeadModel, checkpoint: Path, engine: Path, name: str, form: Form) -> None:
    """Compare the rounding of one product, or of the cache, with an engine in which it alone is rounded."""
    build_engine(model, checkpoint, engine, ["int8"], forms={"int8": {name: form}})
    found = Engine.load(engine, provider="cpu", threads=1).session.read(TEXT, 0)[0]
    exact = logits(model)
    scales = calibrate(model, model.config.eos_token_id).cache_scales
    with harm._rounded_cache(model, scales) if name == CACHE else harm._rounded(model, name, form, on_cuda=False):
        expected = logits(model)
    # Sums in another order move some inputs to the next step.
    assert np.abs(found - expected).mean() < 0.1 * np.abs(found - exact).mean()


@pytest.mark.parametrize(("name", "form"), PRODUCTS, ids=str)
def test_the_engine_rounds_the_same(
    name: str, form: Form, model: GPT2LMHeadModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    check_rounding(model, tiny_checkpoint, tmp_path / "engine", name, form)


def untie(model: GPT2LMHeadModel) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())


def test_an_untied_head_is_rounded_with_the_embedding(
    tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    untie(tiny_model)
    check_rounding(tiny_model, tiny_checkpoint, tmp_path / "engine", HEAD, Form(8, 32))


@pytest.mark.parametrize("tied", [True, False])
def test_on_cuda_only_the_weights_of_the_product_are_rounded(tied: bool, tiny_model: GPT2LMHeadModel) -> None:
    if not tied:
        untie(tiny_model)
    hidden = torch.linspace(-1, 1, 32)
    table, weight = tiny_model.transformer.wte.weight.detach().clone(), tiny_model.lm_head.weight.detach().clone()
    with harm._rounded(tiny_model, HEAD, Form(8, 16), on_cuda=True), torch.no_grad():
        assert torch.equal(tiny_model.transformer.wte.weight, table)
        kept = dequantize(quantize(weight.T.numpy(), 8, 16))
        torch.testing.assert_close(tiny_model.lm_head(hidden), hidden @ torch.from_numpy(kept))
    assert torch.equal(tiny_model.lm_head.weight, weight)
    assert (tiny_model.lm_head.weight is tiny_model.transformer.wte.weight) is tied


def test_an_error_leaves_the_model_as_it_was(model: GPT2LMHeadModel) -> None:
    expected = logits(model)
    for name, form in PRODUCTS[:-1]:
        with pytest.raises(RuntimeError), harm._rounded(model, name, form, on_cuda=False):
            raise RuntimeError
    scales = calibrate(model, model.config.eos_token_id).cache_scales
    with pytest.raises(RuntimeError), harm._rounded_cache(model, scales):
        raise RuntimeError
    np.testing.assert_array_equal(logits(model), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_product_in_which_an_outlier_coarsens_the_rest_does_most_harm(
    layer: int, tiny_model: GPT2LMHeadModel
) -> None:
    mlp, forms = tiny_model.transformer.h[layer].mlp, usual_forms("int8", 2, 8)
    with torch.no_grad():
        # A neuron that is silent, so that its huge weights change nothing in the exact model.
        mlp.c_fc.weight[:, 5] = 0
        mlp.c_fc.bias[5] = -100
        mlp.c_proj.weight[5] = 10_000
    by_harm = rank_by_harm(tiny_model, "int8", forms, calibrate(tiny_model, tiny_model.config.eos_token_id))
    assert by_harm[0] == f"h.{layer}.mlp.c_proj"
    assert sorted(by_harm) == sorted(forms)


def test_what_gives_no_number_comes_first_and_floats_last(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {"h.0.mlp.c_fc": None, "h.0.mlp.c_proj": Form(8, 32), HEAD: Form(8, 32)}
    calibration = Calibration(torch.tensor([TEXT]), [])
    assert rank_by_harm(model, "int8", forms, calibration)[-1] == "h.0.mlp.c_fc"
    own, calls = harm._logprobs, iter([1.0, 1.0, np.nan])
    monkeypatch.setattr(harm, "_logprobs", lambda *given: own(*given) * next(calls))
    assert rank_by_harm(model, "int8", forms, calibration) == [HEAD, "h.0.mlp.c_proj", "h.0.mlp.c_fc"]
