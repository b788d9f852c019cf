"""The section `samples`: how `tune` and `evaluate` take samples, and what counts as a fault in one."""

from typing import Annotated

from pydantic import Field

from pipeline.params.section import Count, Pattern, Section


class SamplesParams(Section):
    """How samples are taken and judged, in the same way by `tune` and `evaluate`."""

    prompt_words: Annotated[int, Field(ge=0)]
    """Words from the beginning of a document that make a prompt; 0 starts from end-of-text."""
    form_pattern: Pattern
    """A regular expression. A sample keeps the form of the data if it is found in the prompt plus the sample."""
    loop_ngram_tokens: Count
    """The longest run, in tokens, that counts as a loop if it is repeated at the end of a sample."""
    loop_repeats: Annotated[int, Field(ge=2)]
    """Times in a row that the run must occur to count as a loop."""
