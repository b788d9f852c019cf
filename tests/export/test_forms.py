"""The usual forms of a precision, and the more exact ones after them."""

from itertools import pairwise

import pytest
from transformers import GPT2LMHeadModel

from pipeline.export.forms import CACHE, CHANNELS, HEAD, LADDERS, Form, cache_bits_of, finer_forms, usual_forms

FINE, COARSE = Form(8, 32), Form(8, 256)


def test_every_product_with_weights_has_a_form(tiny_model: GPT2LMHeadModel) -> None:
    # The Conv1D of transformers, and the head.
    products = {
        name.removeprefix("transformer.")
        for name, module in tiny_model.named_modules()
        if type(module).__name__ in ("Conv1D", "Linear")
    }
    for precision in LADDERS:
        forms = usual_forms(precision, tiny_model.config.n_layer, 32)
        assert set(forms) == products
        assert None not in forms.values()
    assert usual_forms("float32", 2, 8) == {}


def test_only_the_processor_has_a_cache_of_8_bits() -> None:
    names = ("float32", "float16", "int8", "int4", "int8_float16")
    assert [cache_bits_of(name, usual_forms(name, 1, 8)) for name in names] == [32, 16, 8, 8, 16]
    assert [cache_bits_of(name, usual_forms(name, 1, 32)) for name in names] == [32, 16, 32, 32, 16]


def test_what_does_most_harm_is_stored_more_exactly_first() -> None:
    by_harm = ["a", "b", CACHE, HEAD]
    assert list(finer_forms("int8", by_harm)) == [
        {"a": FINE, "b": COARSE, CACHE: CHANNELS, HEAD: COARSE},
        {"a": FINE, "b": FINE, CACHE: CHANNELS, HEAD: COARSE},
        {"a": FINE, "b": FINE, CACHE: None, HEAD: FINE},
        {"a": None, "b": FINE, CACHE: None, HEAD: FINE},
        {"a": None, "b": None, CACHE: None, HEAD: FINE},
    ]


def test_no_attempt_is_made_twice() -> None:
    # The head of int4 and the cache have no form after the next.
    attempts = list(finer_forms("int4", [HEAD, CACHE, "a", "b", "c", "d", "e", "f", "g"]))
    assert len(attempts) == 6
    assert all(one != other for one, other in pairwise(attempts))


@pytest.mark.parametrize("precision", LADDERS)
def test_no_rung_is_another_precision(precision: str) -> None:
    by_harm = list(usual_forms(precision, 3, 8))
    for forms in finer_forms(precision, by_harm):
        assert list(forms) == by_harm
        # int8 is never all floats, and int4 never all 8 bits.
        smallest = {LADDERS[precision].layers[0], LADDERS[precision].layers[1]}
        assert smallest & set(forms.values())
