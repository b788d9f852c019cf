"""Draws the next token of a continuation as `pipeline.engine.sampling` says, without sorting the vocabulary.

The reference in `sampling` is written to be read; this is written to be small beside a step. Two things make
it so. Penalties and bans change the logits of few tokens, which a continuation keeps as it goes on: a token more a
step. And thresholds are looked for among the tokens that may reach them: the k-th largest of the largest logits of
chunks of the vocabulary is a bound that at least k tokens reach, so all tokens that top-k keeps are at or above it. No
candidate is left out by number: where the bound does not suffice, as for a nucleus wider than it, the reference draws
from the same logits with the same uniform.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.decoding import SamplingParams
from pipeline.engine import sampling

UNIFORMS_AHEAD = 64
"""Random numbers are made for so many steps at a time."""
CHUNK = 64
"""Tokens of the vocabulary whose largest logit is taken together."""
NUCLEUS_CANDIDATES = 256
"""Where top-k does not say how many tokens may be kept, a nucleus is looked for among at least so many."""
ROUNDING = np.float32(1e-6)
"""Relative; the temperature's division may round two logits to one, which then are both kept."""

Logits = NDArray[np.float32]


class Continuation:
    """What one continuation has said so far, as the filters see it, and what comes next."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        choice: int,
        prompt_ids: Sequence[int],
        end_of_text_id: int,
        vocabulary_size: int,
    ) -> None:
        """`seed` stands in for `params.seed`, which may be null; `choice` is the index among the `n`."""
        self.params = params
        self.prompt_ids = prompt_ids
        self.end_of_text_id = end_of_text_id
        self.output_ids: list[int] = []
        self._seed, self._choice = seed, choice
        self._uniforms, self._first_uniform = np.zeros(0), 0
        self._followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._latest: tuple[int, ...] = ()
        self._counts: Counter[int] = Counter()
        self._removed: set[int] = set()
        # The tokens whose logits are changed, and by what: logit + bias, then the penalty, then less the offset.
        self._changes: dict[int, int] = {}
        self._ids = np.zeros(min(vocabulary_size, 256), np.int64)
        self._bias, self._factor, self._offset = (np.zeros(len(self._ids), np.float32) for _ in range(3))
        for token_id, bias in params.logit_bias.items():
            place = self._change(token_id)
            self._bias[place] = bias
        for token_id in params.banned_token_ids:
            place = self._change(token_id)
            self._bias[place] = -np.inf
        for token_id in prompt_ids:
            self._see(token_id)
        self._update_removed()

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """The tokens that end it."""
        params = self.params
        return params.stop_token_ids if params.ignore_eos else (self.end_of_text_id, *params.stop_token_ids)

    def draw(self, logits: Logits) -> int:
        """The next token after these logits, float32 `[vocabulary]`, which are left as they are.

        Raises what `sampling.sample` raises.
        """
        token_id = None
        if self.params.typical_p == 1 and not self.params.allowed_token_ids:
            used = len(self._changes)
            ids = self._ids[:used]
            own = logits[ids]
            biased, factor = own + self._bias[:used], self._factor[:used]
            penalized = np.where(biased > 0, biased / factor, biased * factor)
            logits[ids] = penalized - self._offset[:used]
            token_id = draw_fast(logits, self.params, self._uniform())
            logits[ids] = own
        if token_id is None:
            return sampling.sample(
                logits,
                self.params,
                self.prompt_ids,
                self.output_ids,
                self.end_of_text_id,
                self._seed,
                self._choice,
            )
        return token_id

    def append(self, token_id: int) -> None:
        """Go on with this token."""
        self.output_ids.append(token_id)
        self._counts[token_id] += 1
        self._see(token_id)
        self._set_offset(token_id)
        self._update_removed()

    def _see(self, token_id: int) -> None:
        """Note a token of prompt or output."""
        params = self.params
        if params.repetition_penalty != 1:
            place = self._change(token_id)
            self._factor[place] = sampling.penalty_factor(params.repetition_penalty)
        if size := params.no_repeat_ngram_size:
            if len(self._latest) == size - 1:
                self._followers[self._latest].add(token_id)
            self._latest = (*self._latest, token_id)[1 - size :] if size > 1 else ()

    def _update_removed(self) -> None:
        """What may not come next: what would complete an n-gram that stands in it already, and an early end."""
        params = self.params
        if not params.no_repeat_ngram_size and not params.min_new_tokens:
            return
        removed = self._followers.get(self._latest, set()) if params.no_repeat_ngram_size else set()
        if len(self.output_ids) < params.min_new_tokens:
            removed = removed | {self.end_of_text_id, *params.stop_token_ids}
        changed, self._removed = removed ^ self._removed, set(removed)
        for token_id in changed:
            self._set_offset(token_id)

    def _set_offset(self, token_id: int) -> None:
        params, count = self.params, self._counts[token_id]
        offset = np.inf if token_id in self._removed else 0.0
        if count and (params.presence_penalty or params.frequency_penalty):
            offset += params.presence_penalty + params.frequency_penalty * count
        if offset or token_id in self._changes:
            place = self._change(token_id)
            self._offset[place] = offset

    def _change(self, token_id: int) -> int:
        """The place of a token among the changes; a new one changes nothing yet."""
        if token_id in self._changes:
            return self._changes[token_id]
        place = len(self._changes)
        if place == len(self._ids):
            self._ids, self._bias, self._factor, self._offset = (
                np.concatenate([values, np.zeros_like(values)])
                for values in (self._ids, self._bias, self._factor, self._offset)
            )
        self._changes[token_id] = place
        self._ids[place], self._factor[place] = token_id, 1
        return place

    def _uniform(self) -> float:
        step = len(self.output_ids) - self._first_uniform
        if not 0 <= step < len(self._uniforms):
            self._first_uniform, step = len(self.output_ids), 0
            self._uniforms = sampling.uniforms(self._seed, self._choice, self._first_uniform, UNIFORMS_AHEAD)
        return float(self._uniforms[step])


@np.errstate(over="ignore")  # to -inf, where the probability is 0 as well
def draw_fast(logits: Logits, params: SamplingParams, u: float) -> int | None:
    """The token that temperature, top-k, top-p and min-p leave to the uniform `u`; None where the reference is needed.

    That is where no token is left, the logits are not finite, or the nucleus is wider than was looked.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        return None
    if params.temperature == 0:
        return int(logits.argmax())
    cooling = sampling.cooling(params.temperature)
    if params.top_k == 0 and params.top_p == 1:
        return _draw_from_all((logits - peak) / cooling, params.min_p, u)
    bound = _bound(logits, params.top_k or NUCLEUS_CANDIDATES)
    ids = np.flatnonzero(logits >= bound - ROUNDING * (peak - bound) if bound > -np.inf else logits > bound)
    values = (logits[ids] - peak) / cooling
    if 0 < params.top_k < len(values):
        kept = values >= np.partition(values, len(values) - params.top_k)[len(values) - params.top_k]
        ids, values = ids[kept], values[kept]
    if params.top_p < 1:
        ordered = np.sort(values)[::-1]
        weights = np.exp(ordered.astype(np.float64))
        mass = weights.sum() if params.top_k else np.exp((logits - peak) / cooling).sum(dtype=np.float64)
        reached = np.cumsum(weights / mass)
        if params.top_k == 0 and reached[-1] < params.top_p:
            return None
        edge = ordered[min(int(np.searchsorted(reached, params.top_p)), len(ordered) - 1)]
        kept = values >= edge
        ids, values = ids[kept], values[kept]
    if params.min_p:
        kept = values >= np.float32(math.log(params.min_p))
        ids, values = ids[kept], values[kept]
    cdf = np.cumsum(np.exp(values.astype(np.float64)))
    return int(ids[np.searchsorted(cdf, u * cdf[-1], side="right")])


def _draw_from_all(values: Logits, min_p: float, u: float) -> int:
    """The draw from a whole row: the CDF of its weights in float64."""
    weights = np.exp(values)
    if min_p:
        weights[values < np.float32(math.log(min_p))] = 0
    cdf = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(cdf, u * cdf[-1], side="right"))


def _bound(logits: Logits, count: int) -> np.float32:
    """A logit that at least `count` tokens reach; -inf where the chunks are too few to tell."""
    chunks = logits.size // CHUNK
    if chunks <= count:
        return np.float32(-np.inf)
    peaks = logits[: chunks * CHUNK].reshape(chunks, CHUNK).max(axis=1)
    bound: np.float32 = np.partition(peaks, chunks - count)[chunks - count]
    return bound
