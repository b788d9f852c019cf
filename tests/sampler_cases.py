"""What the sampler and its kernel are both compared on: parameters, histories and logits."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pipeline.decoding import SamplingParams
from pipeline.engine.filters import Logits, filter_logits, softmax
from pipeline.engine.sampler import Continuation
from pipeline.errors import UserError

VOCABULARY = 700
END_OF_TEXT = 3
EDGE = 1e-6
"""A uniform this near an edge of the CDF may fall to either side."""

STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 1e-300, 0.3, 0.8, 1.0, 1.7, 50.0, 1e39, 1e308]),
    "top_k": st.sampled_from([0, 0, 1, 5, 40, 300, 699, 700, 2000, 2**63]),
    "top_p": st.sampled_from([1.0, 1e-9, 0.3, 0.9, 0.95, 0.9999]),
    "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    "typical_p": st.sampled_from([1.0, 1.0, 1.0, 0.5]),
    "top_n_sigma": st.sampled_from([0.0, 0.0, 1e-9, 0.5, 2.0, 1e308]),
    "eta_cutoff": st.sampled_from([0.0, 0.0, 5e-324, 3e-4, 0.05, 1 - 2.0**-53]),
    "repetition_penalty": st.sampled_from([1.0, 1.2, 0.5, 5.0, 1e-300, 1e300]),
    "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.3, -0.2]),
    "no_repeat_ngram_size": st.sampled_from([0, 0, 1, 2, 3]),
    "max_verbatim_tokens": st.sampled_from([0, 0, 1, 2, 5]),
    "logit_bias": st.dictionaries(
        st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -3.0, 2.5, 100.0]), max_size=3
    ),
    "banned_token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=3).map(tuple),
    "allowed_token_ids": st.sampled_from([(), (), (), (5,), tuple(range(0, 600, 7))]),
    "min_new_tokens": st.sampled_from([0, 0, 3, 100]),
    "stop_token_ids": st.sampled_from([(), (8, 9)]),
    "seed": st.integers(0, 2**63 - 1),
}
parameters: st.SearchStrategy[SamplingParams] = st.builds(SamplingParams, **STRATEGIES)
histories = st.lists(st.integers(0, 12), max_size=30)


TRAINING_IDS = [0, 1, 2, 4, 5, 0, 1, 2, 8, 9, 0, 0, 0, 1, 12, 11, 10, 9, 8, 7, 6, 5, 4]


def followers(run: list[int]) -> list[int]:
    """What stands after a run in a training text."""
    places = range(len(TRAINING_IDS) - len(run))
    return [TRAINING_IDS[i + len(run)] for i in places if TRAINING_IDS[i : i + len(run)] == run]


def continued(params: SamplingParams, prompt: list[int], output: list[int], choice: int = 0) -> Continuation:
    assert params.seed is not None
    continuation = Continuation(params, params.seed, choice, prompt, END_OF_TEXT, VOCABULARY, followers)
    for token_id in output:
        continuation.append(token_id)
    return continuation


def outcome(draw: Callable[[], int]) -> Any:
    try:
        return draw()
    except (UserError, ArithmeticError) as error:
        return type(error)


def make_logits(seed: int, spread: float, steps: int) -> Logits:
    """Random logits; with few steps many are equal."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(VOCABULARY) * spread
    return (np.round(logits * steps) / steps).astype(np.float32)


def near_an_edge(logits: Logits, params: SamplingParams, prompt: list[int], output: list[int]) -> bool:
    """Whether the uniform lies within rounding of an edge, or a filter's own edge does."""
    filtered = filter_logits(logits, params, prompt, output, END_OF_TEXT, followers)
    cdf = np.cumsum(softmax(filtered))
    continuation = continued(params, prompt, output)
    return bool((np.abs(cdf - continuation._uniform()) < EDGE).any())
