"""Draw the next token of a continuation as `pipeline.engine.filters` defines it, without sorting the vocabulary.

The reference in `filters` is written to be read. This is written to take little time next to a model step, which has
just pushed everything else out of the caches: read few numbers and call few operations.

Penalties and bans change the logits of few tokens. A continuation keeps these changes and adds one token per step. The
graph lists the likeliest tokens. Every unlisted token's logit is at most the last listed one. So if everything that
top-k keeps lies above that, the list and the changed tokens decide.

Otherwise, and for top-p without top-k, the row is read. Split the vocabulary into parts: the k-th largest maximum of a
part is a lower bound of the k-th largest logit, so only parts whose maximum reaches it are read. A nucleus is first
looked for among a few such tokens, and if it is wider, among all tokens but those that together weigh too little to be
in it. If none of this decides, the reference draws from the same logits with the same uniform.

Top-n-sigma and eta need all the logits that the earlier filters left, and get them: what is found above is exactly
that, or the whole row if no earlier filter is on.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.decoding import SamplingParams
from pipeline.engine import filters
from pipeline.engine.loops import LoopDetector
from pipeline.engine.verbatim import CopyLimiter

OUTSIDE_THE_DRAW = frozenset(
    {
        *("max_new_tokens", "context_overflow", "repetition_detection", "stop", "ignore_eos"),
        *("seed", "n", "best_of", "logprobs"),
    }
)
"""The fields of `SamplingParams` that change no logit: they end a continuation, key its random numbers or report on
it."""
FAST_FIELDS = OUTSIDE_THE_DRAW | {
    *("temperature", "top_k", "top_p", "min_p", "top_n_sigma", "eta_cutoff"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("no_repeat_ngram_size", "max_verbatim_tokens", "min_new_tokens", "stop_token_ids"),
    *("logit_bias", "banned_token_ids"),
}
"""The fields that the fast path supports. If any other is set, as a new one would be, the reference draws."""
UNIFORMS_AHEAD = 64
"""The number of steps for which random numbers are made at a time."""
PART = 64
"""The number of tokens per part of the vocabulary. A part is every n-th token, so that NumPy compares contiguous
rows."""
NUCLEUS_CANDIDATES = 256
"""The least number of candidates among which a nucleus is first looked for if top-k does not limit it."""
ROUNDING = np.float32(1e-6)
"""The relative margin for the temperature's division, which may round two logits to one; then both are kept."""
LEAST_CHANGES = 256
"""The number of changed tokens for which there is room at first."""

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]
AnyLogits = TypeVar("AnyLogits", NDArray[np.float32], np.float32)


class LogitChanges:
    """What bias, penalties and bans do to single tokens: add the bias, apply the factor, subtract the offset.

    The factor divides a positive logit and multiplies others. A bias of -inf or an offset of inf removes the token.
    """

    def __init__(self, vocabulary_size: int, biases: Mapping[int, float]) -> None:
        self.is_changed = np.zeros(vocabulary_size, np.bool_)
        """Whether each token of the vocabulary is changed, `[vocabulary]`."""
        used = len(biases)
        self._places = dict(zip(biases, range(used), strict=True))
        self._ids = np.zeros(min(vocabulary_size, used + LEAST_CHANGES), np.int64)
        self._bias, self._factor, self._offset = (np.zeros(len(self._ids), np.float32) for _ in range(3))
        # A request may bias the whole vocabulary.
        self._ids[:used] = list(biases)
        self._bias[:used] = list(biases.values())
        self._factor[:used] = 1
        self.is_changed[self._ids[:used]] = True
        self._has_bias = used > 0
        self._has_factors = self._has_offsets = False

    @property
    def ids(self) -> TokenIds:
        """The changed tokens, in the order in which they were first changed."""
        return self._ids[: len(self._places)]

    def set_factor(self, token_id: int, factor: np.float32) -> None:
        place = self._place(token_id)
        self._has_factors = True
        self._factor[place] = factor

    def set_offset(self, token_id: int, offset: float) -> None:
        if offset or token_id in self._places:
            place = self._place(token_id)
            self._has_offsets = self._has_offsets or offset != 0
            self._offset[place] = offset

    def apply(self, own: Logits) -> Logits:
        """Return the changed logits of `ids`, of which the model's own logits are `own`."""
        used = len(own)
        values = own + self._bias[:used] if self._has_bias else own
        if self._has_factors:
            factor = self._factor[:used]
            values = np.where(values > 0, values / factor, values * factor)
        return values - self._offset[:used] if self._has_offsets else values

    def expand(self) -> tuple[Logits, Logits, Logits]:
        """Return bias, factor and offset of every token, `[vocabulary]` each."""
        bias, offset = (np.zeros(len(self.is_changed), np.float32) for _ in range(2))
        factor = np.ones(len(self.is_changed), np.float32)
        ids, used = self.ids, len(self._places)
        bias[ids], factor[ids], offset[ids] = self._bias[:used], self._factor[:used], self._offset[:used]
        return bias, factor, offset

    def _place(self, token_id: int) -> int:
        """Return the place of a token in the arrays, which may be new ones then; a new token is not changed yet."""
        place = self._places.get(token_id)
        if place is not None:
            return place
        place = self._places[token_id] = len(self._places)
        if place == len(self._ids):
            self._ids, self._bias, self._factor, self._offset = (
                np.concatenate([values, np.zeros_like(values)])
                for values in (self._ids, self._bias, self._factor, self._offset)
            )
        self.is_changed[token_id] = True
        self._ids[place], self._factor[place] = token_id, 1
        return place


class Continuation:
    """One continuation: its parameters, its tokens so far as the filters see them, and the draw of its next token."""

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
        """Start a continuation of a prompt.

        `seed` replaces `params.seed`, which may be null. `choice` is the index among the `n`. `max_verbatim_tokens`
        needs the `followers` of a run in the training text.
        """
        self.params = params
        self.active_fields = frozenset(params.active_fields())
        """The names of the parameters that are not neutral."""
        self.prompt_ids = prompt_ids
        self.end_of_text_id = end_of_text_id
        self.output_ids: list[int] = []
        self._is_fast = self.active_fields <= FAST_FIELDS
        self._seed, self._choice = seed, choice
        self._uniforms, self._first_uniform = np.zeros(0), 0
        self._training_followers = followers
        limit, detection = params.max_verbatim_tokens, params.repetition_detection
        self._copies = CopyLimiter(limit, filters.require_followers(followers)) if limit else None
        self._loops = LoopDetector(*detection) if any(detection[:1]) else None
        self._ends_in_loop = False
        self._ngram_followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._latest: tuple[int, ...] = ()
        self._counts: Counter[int] = Counter()
        self._removed: set[int] = set()
        self._penalty = None if params.repetition_penalty == 1 else filters.penalty_factor(params.repetition_penalty)
        banned = dict.fromkeys(params.banned_token_ids, -np.inf)
        self._changes = LogitChanges(vocabulary_size, {**params.logit_bias, **banned})
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
        """Draw the next token from these logits, float32 `[vocabulary]`, which are left as they are.

        `top_logits` are any number of the largest of them in descending order, `top_ids` their tokens. Raises what
        `filters.sample` raises.
        """
        token_id = self._draw_fast(logits, top_logits, top_ids) if self._is_fast else None
        if token_id is not None:
            return token_id
        return filters.sample(
            logits,
            self.params,
            self.prompt_ids,
            self.output_ids,
            self.end_of_text_id,
            self._seed,
            self._choice,
            self._training_followers,
        )

    def append(self, token_id: int) -> None:
        """Add a drawn token to the output."""
        self.output_ids.append(token_id)
        self._counts[token_id] += 1
        if self._loops is not None:
            self._ends_in_loop = self._loops.append(token_id)
        self._see(token_id)
        self._set_offset(token_id)
        self._update_removed()

    def expand_changes(self) -> tuple[Logits, Logits, Logits, NDArray[np.float64]]:
        """Return what changes each logit, `[vocabulary]` each: bias, factor, offset, and how often it was drawn.

        They act as in `LogitChanges`.
        """
        bias, factor, offset = self._changes.expand()
        every_id = np.arange(len(bias))
        if self.params.allowed_token_ids:
            kept_ids = (*self.params.allowed_token_ids, self.end_of_text_id, *self.params.stop_token_ids)
            bias[~np.isin(every_id, kept_ids)] = -np.inf
        counts = np.zeros(len(bias))
        counts[list(self._counts.keys())] = list(self._counts.values())
        return bias, factor, offset, counts

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Return the uniforms of the next `count` draws."""
        return filters.uniforms(self._seed, self._choice, len(self.output_ids), count)

    def _draw_fast(self, logits: Logits, top_logits: Logits, top_ids: TokenIds) -> int | None:
        """Draw from the list, else from the row; None if neither decides."""
        ids = self._changes.ids
        own = logits.take(ids)
        changed = self._changes.apply(own)
        if len(top_ids) > 0:
            others = ~self._changes.is_changed.take(top_ids)
            token_id = draw_listed(
                np.concatenate([ids, top_ids[others]]),
                np.concatenate([changed, top_logits[others]]),
                top_logits[-1] if len(top_ids) < len(logits) else np.float32(-np.inf),
                self.params,
                self._uniform(),
            )
            if token_id is not None:
                return token_id
        logits[ids] = changed
        token_id = draw_fast(logits, self.params, self._uniform())
        logits[ids] = own
        return token_id

    def _see(self, token_id: int) -> None:
        """Take note of a token of prompt or output."""
        if self._penalty is not None:
            self._changes.set_factor(token_id, self._penalty)
        if size := self.params.no_repeat_ngram_size:
            if len(self._latest) == size - 1:
                self._ngram_followers[self._latest].add(token_id)
            self._latest = (*self._latest, token_id)[1 - size :] if size > 1 else ()

    def _update_removed(self) -> None:
        """Find the tokens that must not come next: those that repeat an n-gram, copy too much, or end too early."""
        params = self.params
        if not params.no_repeat_ngram_size and not params.max_verbatim_tokens and not params.min_new_tokens:
            return
        removed: set[int] = set()
        ending_ids = {self.end_of_text_id, *params.stop_token_ids}
        if self._copies is not None:
            removed |= set(self._copies.ids(self.output_ids)) - ending_ids
        if params.no_repeat_ngram_size:
            removed |= self._ngram_followers.get(self._latest, set())
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
        self._changes.set_offset(token_id, offset)

    def _uniform(self) -> float:
        step = len(self.output_ids) - self._first_uniform
        if not 0 <= step < len(self._uniforms):
            self._first_uniform, step = len(self.output_ids), 0
            self._uniforms = self.uniforms(UNIFORMS_AHEAD)
        return float(self._uniforms[step])


def draw_listed(ids: TokenIds, logits: Logits, floor: np.float32, params: SamplingParams, u: float) -> int | None:
    """Draw by the filters from temperature on with the uniform `u`; None if the list does not decide.

    `logits` are those of the tokens `ids`; every other token's logit is at most `floor`.
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
    """Draw by the filters from temperature on with the uniform `u`; None if the reference is needed.

    That is the case if no token is left, the logits are not finite, or rounding hides the end of the nucleus.
    """
    peaks = logits[: logits.size // PART * PART].reshape(PART, -1).max(axis=0)
    peak = np.maximum(peaks.max(initial=-np.inf), logits[len(peaks) * PART :].max(initial=-np.inf))
    if not np.isfinite(peak):
        return None
    if params.temperature == 0:
        return int(logits.argmax())
    if params.top_k == 0 and params.top_p == 1:
        return _draw_from_all(_cool(logits, peak, params.temperature), params, u)
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
    # What is left out weighs less than half of what the nucleus may lack.
    ids = np.flatnonzero(weights >= mass * (1 - params.top_p) / (2 * logits.size))
    return _draw_from_nucleus(ids, cooled.take(ids), mass, params, u)


def _draw_among(
    ids: TokenIds, logits: Logits, params: SamplingParams, u: float, *, floor: np.float32 | None = None
) -> int | None:
    """Draw by the filters from top-k on among candidates with these cooled logits.

    Return None if a token at or below `floor` would be kept, where there may be tokens that are not candidates.
    """
    order = logits.argsort()[::-1]
    ordered = logits[order]
    kept = _with_equals(ordered, params.top_k) if params.top_k else len(ordered)
    least = _least(params)
    if floor is not None:
        edge = ordered[kept - 1] if 0 < params.top_k <= len(ordered) else np.float32(-np.inf)
        # The nucleus is taken from what top-k keeps.
        if not floor < (edge if params.top_p < 1 else max(edge, least)):
            return None
    if params.top_p < 1:
        weights = np.exp(ordered[:kept], dtype=np.float64)
        reached = np.cumsum(weights / weights.sum())
        kept = _with_equals(ordered[:kept], int(reached.searchsorted(params.top_p)) + 1)
    if params.min_p:
        kept = int(np.count_nonzero(ordered[:kept] >= least))
    # The CDF is in vocabulary order, not from the likeliest down.
    chosen = ids[order[:kept]]
    rising = chosen.argsort()
    return _draw_rising(chosen[rising], ordered[rising], params, u)


def _draw_from_nucleus(ids: TokenIds, logits: Logits, mass: np.float64, params: SamplingParams, u: float) -> int | None:
    """Draw by the filters from top-p on among candidates, in rising order, with these cooled logits.

    Return None if the nucleus is wider than the candidates. `mass` is the sum of the vocabulary's weights, relative to
    the likeliest token's.
    """
    # There may be thousands: sorting the values alone is many times faster than sorting their places.
    ordered = np.sort(logits)[::-1]
    reached = np.cumsum(np.exp(ordered, dtype=np.float64) / mass)
    if reached[-1] < params.top_p:
        return None
    is_kept = logits >= max(ordered[reached.searchsorted(params.top_p)], _least(params))
    return _draw_rising(ids[is_kept], logits[is_kept], params, u)


def _draw_rising(ids: TokenIds, logits: Logits, params: SamplingParams, u: float) -> int:
    """Draw by the filters from top-n-sigma on among all tokens that the earlier ones left, in rising order."""
    logits = filters.apply_top_n_sigma(logits, params.top_n_sigma)
    logits = filters.apply_eta_cutoff(logits, params.eta_cutoff)
    return int(ids[filters.place_in(np.exp(logits, dtype=np.float64).cumsum(), u)])


def _least(params: SamplingParams) -> np.float32:
    """Return the least cooled logit that min-p keeps."""
    return np.float32(math.log(params.min_p)) if params.min_p else np.float32(-np.inf)


def _cool(logits: AnyLogits, peak: np.float32, temperature: float) -> AnyLogits:
    """Subtract the largest logit, `peak`, and divide by the temperature, as the reference does."""
    return (logits - peak) / filters.temperature_divisor(temperature)


def _with_equals(ordered: Logits, count: int) -> int:
    """Return how many logits are among the first `count` or equal to the last of them."""
    if count >= len(ordered):
        return len(ordered)
    while count < len(ordered) and ordered[count] == ordered[count - 1]:
        count += 1
    return count


def _draw_from_all(logits: Logits, params: SamplingParams, u: float) -> int:
    """Draw by the filters from min-p on from a whole row of cooled logits, by the CDF of its weights in float64."""
    if params.top_n_sigma or params.eta_cutoff:
        ids = np.flatnonzero((logits > -np.inf) & (logits >= _least(params)))
        return _draw_rising(ids, logits.take(ids), params, u)
    weights = np.exp(logits)
    if params.min_p:
        weights[logits < _least(params)] = 0
    return filters.place_in(np.cumsum(weights, dtype=np.float64), u)


def _candidates(logits: Logits, peaks: Logits, peak: np.float32, count: int) -> TokenIds:
    """Return the ids, in rising order, of the `count` largest logits, of any that equal the least, and maybe of more.

    `peaks` are the parts' largest logits, `peak` is the largest of all.
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
