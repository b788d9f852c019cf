"""The detector of loops in a growing text, against the definition over the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.loops import LoopDetector
from pipeline.quality.repetition import is_looping

few_tokens = st.lists(st.integers(0, 2), max_size=40)
repeated = st.builds(
    lambda beginning, run, times, end: beginning + run * times + end,
    few_tokens,
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.integers(1, 6),
    few_tokens,
)


@settings(max_examples=500, deadline=None)
@given(few_tokens | repeated, st.integers(1, 15), st.integers(2, 5), st.integers(1, 15))
def test_at_each_token_as_the_definition_says(token_ids: list[int], longest: int, repeats: int, shortest: int) -> None:
    loops = LoopDetector(longest, repeats, min(shortest, longest))
    found = [loops.append(token_id) for token_id in token_ids]
    heads = (token_ids[: end + 1] for end in range(len(token_ids)))
    assert found == [is_looping(head, longest, repeats, min(shortest, longest)) for head in heads]


def test_what_is_kept_is_no_longer_than_the_longest_run_that_counts() -> None:
    loops = LoopDetector(5, 3)
    for step in range(1000):
        loops.append(step % 2)
    assert len(loops._lengths) <= 5
    assert sum(map(len, loops._places.values())) <= 12
