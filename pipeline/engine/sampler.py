"""Draws the next token of a continuation as `pipeline.engine.filters` says, without sorting the vocabulary.

The reference in `filters` is written to be read; this is written to be small beside a step, whose weights have pushed
all else out of the caches: to read few numbers and to call few operations is what counts. Penalties and bans change the
logits of few tokens, which a continuation keeps as it goes on: a token more a step. The graph lists the likeliest
tokens. Every other has at most the logit of the last of them, so a token above that which the changes leave alone is in
the list, and top-k is decided by the list and the changes, if what it keeps is above it.

Where it is not, and for a nucleus of the whole vocabulary, the row is read. The k-th largest of the largest logits of
parts of the vocabulary is a bound that at least k tokens reach, so all tokens that top-k keeps are at or above it, and
in parts whose largest logit is. A nucleus is looked for among few such tokens first; where it is wider, among all but
those that together weigh too little to be in it. Where none of this decides, the reference draws from the same logits
with the same uniform.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.decoding import SamplingParams
from pipeline.engine import filters
from pipeline.engine.loops import Loops
from pipeline.engine.verbatim import Copies

UNIFORMS_AHEAD = 64
"""Random numbers are made for so many steps at a time."""
PART = 64
"""Tokens of the vocabulary whose largest logit is taken together: every n-th, as those are compared side by side."""
NUCLEUS_CANDIDATES = 256
"""Where top-k does not say how many tokens may be kept, a nucleus is looked for among at least so many first."""
OUTSIDE_THE_DRAW = frozenset(
    {
        *("max_new_tokens", "context_overflow", "repetition_detection", "stop", "ignore_eos"),
        *("seed", "n", "logprobs"),
    }
)
"""The fields of `SamplingParams` that change no logit: what ends a continuation, keys its draws or reports them."""
FAST_FIELDS = OUTSIDE_THE_DRAW | {
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("no_repeat_ngram_size", "max_verbatim_tokens", "min_new_tokens", "stop_token_ids"),
    *("logit_bias", "banned_token_ids"),
}
"""The fields that the fast path supports. If any other is set, as a new one would be, the reference draws."""
ROUNDING = np.float32(1e-6)
"""Relative; the temperature's division may round two logits to one, which then are both kept."""

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]
AnyLogits = TypeVar("AnyLogits", NDArray[np.float32], np.float32)


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
        followers: filters.Followers | None = None,
    ) -> None:
        """`seed` stands in for `params.seed`, which may be null; `choice` is the index among the `n`.

        `max_verbatim_tokens` needs the `followers` of a run in the training text.
        """
        self.params = params
        self.active_fields = frozenset(params.active_fields())
        """The names of the parameters that are not neutral."""
        self._is_fast = self.active_fields <= FAST_FIELDS
        self.prompt_ids = prompt_ids
        self.end_of_text_id = end_of_text_id
        self.output_ids: list[int] = []
        self._seed, self._choice = seed, choice
        self._uniforms, self._first_uniform = np.zeros(0), 0
        self._training_followers = followers
        limit = params.max_verbatim_tokens
        self._copies = Copies(limit, filters.known(followers)) if limit else None
        self._followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._latest: tuple[int, ...] = ()
        self._counts: Counter[int] = Counter()
        self._removed: set[int] = set()
        self._loops = Loops(*params.repetition_detection) if any(params.repetition_detection[:1]) else None
        self._ends_in_loop = False
        # The tokens whose logits are changed, and by what: logit + bias, then the penalty, then less the offset.
        self._changes: dict[int, int] = {}
        self._is_changed = np.zeros(vocabulary_size, np.bool_)
        self._has_offsets = False
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

    @property
    def is_looping(self) -> bool:
        """Whether `repetition_detection` ends it here; before `min_new_tokens` nothing does."""
        return self._ends_in_loop and len(self.output_ids) >= self.params.min_new_tokens

    @np.errstate(over="ignore")  # of cooled logits to -inf, where the probability is 0 as well
    def draw(self, logits: Logits, top_logits: Logits, top_ids: TokenIds) -> int:
        """The next token after these logits, float32 `[vocabulary]`, which are left as they are.

        `top_logits` and `top_ids` are the largest of them in descending order, any number, and whose they are.
        Raises what `filters.sample` raises.
        """
        params = self.params
        if self._is_fast:
            ids = self._ids[: len(self._changes)]
            own = logits.take(ids)
            changed = self._changed(own)
            if len(top_ids) > 0:
                others = ~self._is_changed.take(top_ids)
                token_id = draw_listed(
                    np.concatenate([ids, top_ids[others]]),
                    np.concatenate([changed, top_logits[others]]),
                    top_logits[-1] if len(top_ids) < len(logits) else np.float32(-np.inf),
                    params,
                    self._uniform(),
                )
                if token_id is not None:
                    return token_id
            logits[ids] = changed
            token_id = draw_fast(logits, params, self._uniform())
            logits[ids] = own
            if token_id is not None:
                return token_id
        return filters.sample(
            logits,
            params,
            self.prompt_ids,
            self.output_ids,
            self.end_of_text_id,
            self._seed,
            self._choice,
            self._training_followers,
        )

    def append(self, token_id: int) -> None:
        """Go on with this token."""
        self.output_ids.append(token_id)
        self._counts[token_id] += 1
        if self._loops is not None:
            self._ends_in_loop = self._loops.append(token_id)
        self._see(token_id)
        self._set_offset(token_id)
        self._update_removed()

    def dense_changes(self) -> tuple[Logits, Logits, Logits, NDArray[np.float64]]:
        """What becomes of every logit, `[vocabulary]` each: bias, then penalty, then offset; and what was drawn.

        A bias of -inf removes a token. The penalty divides a logit above 0, and multiplies one below.
        """
        vocabulary_size = len(self._is_changed)
        ids = self._ids[: len(self._changes)]
        rows = []
        for kept, unchanged in ((self._bias, 0), (self._factor, 1), (self._offset, 0)):
            row = np.full(vocabulary_size, unchanged, np.float32)
            row[ids] = kept[: len(ids)]
            rows.append(row)
        bias, penalty, offset = rows
        if self.params.allowed_token_ids:
            kept_ids = (*self.params.allowed_token_ids, self.end_of_text_id, *self.params.stop_token_ids)
            is_allowed = np.isin(np.arange(vocabulary_size), kept_ids)
            bias[~is_allowed] = -np.inf
        counts = np.zeros(vocabulary_size)
        counts[list(self._counts.keys())] = list(self._counts.values())
        return bias, penalty, offset, counts

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """The uniforms of the next `count` draws."""
        return filters.uniforms(self._seed, self._choice, len(self.output_ids), count)

    def _changed(self, own: Logits) -> Logits:
        """What becomes of the logits of the tokens that are changed."""
        params, used = self.params, len(own)
        values = own + self._bias[:used] if params.logit_bias or params.banned_token_ids else own
        if params.repetition_penalty != 1:
            factor = self._factor[:used]
            values = np.where(values > 0, values / factor, values * factor)
        return values - self._offset[:used] if self._has_offsets else values

    def _see(self, token_id: int) -> None:
        """Note a token of prompt or output."""
        params = self.params
        if params.repetition_penalty != 1:
            place = self._change(token_id)
            self._factor[place] = filters.penalty_factor(params.repetition_penalty)
        if size := params.no_repeat_ngram_size:
            if len(self._latest) == size - 1:
                self._followers[self._latest].add(token_id)
            self._latest = (*self._latest, token_id)[1 - size :] if size > 1 else ()

    def _update_removed(self) -> None:
        """What may not come next: the last of a repeated n-gram or of too long a copy, and an early end."""
        params = self.params
        if not params.no_repeat_ngram_size and not params.max_verbatim_tokens and not params.min_new_tokens:
            return
        removed: set[int] = set()
        ending_ids = {self.end_of_text_id, *params.stop_token_ids}
        if self._copies is not None:
            removed |= set(self._copies.ids(self.output_ids)) - ending_ids
        if params.no_repeat_ngram_size:
            removed |= self._followers.get(self._latest, set())
        if len(self.output_ids) < params.min_new_tokens:
            removed |= ending_ids
        changed, self._removed = removed ^ self._removed, removed
        for token_id in changed:
            self._set_offset(token_id)

    def _set_offset(self, token_id: int) -> None:
        params, count = self.params, self._counts[token_id]
        offset = np.inf if token_id in self._removed else 0.0
        if count and (params.presence_penalty or params.frequency_penalty):
            offset += params.presence_penalty + params.frequency_penalty * count
        if offset or token_id in self._changes:
            self._has_offsets = self._has_offsets or offset != 0
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
        self._is_changed[token_id] = True
        self._ids[place], self._factor[place] = token_id, 1
        return place

    def _uniform(self) -> float:
        step = len(self.output_ids) - self._first_uniform
        if not 0 <= step < len(self._uniforms):
            self._first_uniform, step = len(self.output_ids), 0
            self._uniforms = self.uniforms(UNIFORMS_AHEAD)
        return float(self._uniforms[step])


def draw_listed(ids: TokenIds, logits: Logits, floor: np.float32, params: SamplingParams, u: float) -> int | None:
    """The token that temperature, top-k, top-p and min-p leave to the uniform `u`; None where the list does not say.

    `logits` are those of the tokens `ids`, every other token has at most `floor`.
    """
    if params.top_k == 0 and (params.top_p < 1 or params.min_p == 0) and params.temperature != 0:
        return None
    peak = logits.max()
    if not floor < peak < np.inf:
        return None
    if params.temperature == 0:
        return int(ids[logits == peak].min())
    return _draw_among(
        ids,
        _cool(logits, peak, params.temperature),
        params,
        u,
        floor=_cool(floor, peak, params.temperature),
    )


def draw_fast(logits: Logits, params: SamplingParams, u: float) -> int | None:
    """The token that temperature, top-k, top-p and min-p leave to the uniform `u`; None where the reference is needed.

    That is where no token is left, the logits are not finite, or rounding hides the end of the nucleus.
    """
    peaks = logits[: logits.size // PART * PART].reshape(PART, -1).max(axis=0)
    peak = np.maximum(peaks.max(initial=-np.inf), logits[len(peaks) * PART :].max(initial=-np.inf))
    if not np.isfinite(peak):
        return None
    if params.temperature == 0:
        return int(logits.argmax())
    if params.top_k == 0 and params.top_p == 1:
        return _draw_from_all(_cool(logits, peak, params.temperature), params.min_p, u)
    if params.top_k > 0:
        ids = _candidates(logits, peaks, peak, params.top_k)
        return _draw_among(ids, _cool(logits.take(ids), peak, params.temperature), params, u)
    cooled = _cool(logits, peak, params.temperature)
    weights = np.exp(cooled)
    mass = weights.sum(dtype=np.float64)
    if len(peaks) > NUCLEUS_CANDIDATES:
        ids = _candidates(logits, peaks, peak, NUCLEUS_CANDIDATES)
        token_id = _draw_from_nucleus(ids, cooled.take(ids), mass, params, u)
        if token_id is not None:
            return token_id
    # What is left out holds less than half of what the nucleus may lack.
    ids = np.flatnonzero(weights >= mass * (1 - params.top_p) / (2 * logits.size))
    return _draw_from_nucleus(ids, cooled.take(ids), mass, params, u)


def _draw_among(
    ids: TokenIds, logits: Logits, params: SamplingParams, u: float, *, floor: np.float32 | None = None
) -> int | None:
    """The token that top-k, top-p and min-p leave of candidates with these cooled logits.

    None where a token at or below `floor` would be kept, as others than the candidates may be there.
    """
    order = logits.argsort()[::-1]
    ordered = logits[order]
    kept = _with_equals(ordered, params.top_k) if params.top_k else len(ordered)
    least = np.float32(math.log(params.min_p)) if params.min_p else np.float32(-np.inf)
    if floor is not None:
        edge = ordered[kept - 1] if 0 < params.top_k <= len(ordered) else np.float32(-np.inf)
        # A nucleus is one of what top-k keeps.
        if not floor < (edge if params.top_p < 1 else max(edge, least)):
            return None
    weights = np.exp(ordered[:kept], dtype=np.float64)
    if params.top_p < 1:
        reached = np.cumsum(weights / weights.sum())
        kept = _with_equals(ordered[:kept], int(reached.searchsorted(params.top_p)) + 1)
    if params.min_p:
        kept = int(np.count_nonzero(ordered[:kept] >= least))
    # The CDF goes through the vocabulary, not from the likeliest down.
    chosen = ids[order[:kept]]
    rising = chosen.argsort()
    cdf = weights[rising].cumsum()
    return int(chosen[rising[cdf.searchsorted(u * cdf[-1], side="right")]])


def _draw_from_nucleus(ids: TokenIds, logits: Logits, mass: np.float64, params: SamplingParams, u: float) -> int | None:
    """The token that top-p of the whole vocabulary, and min-p, leave of candidates, rising, with these cooled logits.

    None where the nucleus holds more than the candidates; `mass` is what the weights of the vocabulary sum to, relative
    to the likeliest's.
    """
    # There may be thousands: values alone sort many times faster than their places.
    ordered = np.sort(logits)[::-1]
    reached = np.cumsum(np.exp(ordered, dtype=np.float64) / mass)
    if reached[-1] < params.top_p:
        return None
    edge = ordered[reached.searchsorted(params.top_p)]
    if params.min_p:
        edge = max(edge, np.float32(math.log(params.min_p)))
    is_kept = logits >= edge
    cdf = np.exp(logits[is_kept], dtype=np.float64).cumsum()
    return int(ids[is_kept][cdf.searchsorted(u * cdf[-1], side="right")])


def _cool(logits: AnyLogits, peak: np.float32, temperature: float) -> AnyLogits:
    """The largest of all, `peak`, taken off, and divided by the temperature, as the reference does it."""
    return (logits - peak) / filters.cooling(temperature)


def _with_equals(ordered: Logits, count: int) -> int:
    """How many logits are among the first `count`, or equal to the last of those."""
    if count >= len(ordered):
        return len(ordered)
    while count < len(ordered) and ordered[count] == ordered[count - 1]:
        count += 1
    return count


def _draw_from_all(values: Logits, min_p: float, u: float) -> int:
    """The draw from a whole row: the CDF of its weights in float64."""
    weights = np.exp(values)
    if min_p:
        weights[values < np.float32(math.log(min_p))] = 0
    cdf = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(cdf, u * cdf[-1], side="right"))


def _candidates(logits: Logits, peaks: Logits, peak: np.float32, count: int) -> TokenIds:
    """The ids of the `count` largest logits and of what equals the least of them, and it may be of some more; rising.

    `peaks` are the largest logits of the parts, `peak` of all.
    """
    if len(peaks) <= count:
        return np.flatnonzero(logits > -np.inf)
    bound = np.partition(peaks, len(peaks) - count)[len(peaks) - count]
    if bound == -np.inf:
        return np.flatnonzero(logits > bound)
    bound -= ROUNDING * (peak - bound)
    ids = np.arange(0, len(peaks) * PART, len(peaks))[:, None] + np.flatnonzero(peaks >= bound)
    ids = np.concatenate([ids.ravel(), np.arange(len(peaks) * PART, logits.size)])
    return ids[logits.take(ids) >= bound]
