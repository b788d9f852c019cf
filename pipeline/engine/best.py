"""The order of several candidates for one choice, the best first: `best_of`.

Candidates are judged as texts, by the faults that readers mind (`pipeline.quality.faults`). Of those with equally many
per word, the likeliest per token is the best, as in OpenAI's `best_of`. Faults come first, because likelihood by itself
prefers dull and repetitive text (Zhang et al. 2021, "Trading Off Diversity and Quality in Natural Language
Generation").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.quality.faults import find_faults
from pipeline.quality.lexicon import Lexicon
from pipeline.quality.repetition import is_looping

LOOP_NGRAM_TOKENS, LOOP_REPEATS = 20, 3
"""The longest run, in tokens, and the times in a row that make a loop, which spoils a candidate."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A continuation that may be returned."""

    text: str
    token_ids: Sequence[int]
    finished: bool
    """Whether it ended by itself, and not at the token limit."""
    mean_logprob: float
    """The mean natural log-probability of its tokens before any filter."""


def badness(prompt: str, candidate: Candidate, lexicon: Lexicon) -> tuple[float, float]:
    """Return how bad a candidate is, to compare with others: its faults per word, then how unlikely it is."""
    return _faults_per_word(prompt, candidate, lexicon), -candidate.mean_logprob


def _faults_per_word(prompt: str, candidate: Candidate, lexicon: Lexicon) -> float:
    """Return the faults per word; infinity for a candidate that is empty or ends in a loop."""
    faults = find_faults(candidate.text, prompt=prompt, lexicon=lexicon, finished=candidate.finished)
    if faults.empty or is_looping(candidate.token_ids, LOOP_NGRAM_TOKENS, LOOP_REPEATS):
        return math.inf
    # A single word that the token limit cut is not judged.
    return faults.total / max(1, faults.words)
