"""From logits to a token: the readable reference of sampling, one row at a time, in NumPy.

The order is fixed. Each filter sees the distribution that the earlier ones left. A neutral value turns a filter off:

1. bias, bans and allowed tokens
2. repetition penalty, over prompt and output
3. presence and frequency penalties, over the output
4. no-repeat n-gram, over prompt and output
5. runs of the training text, over the output
6. minimum length
7. temperature
8. top-k
9. top-p
10. min-p
11. typical-p
12. top-n-sigma
13. eta
14. draw

Filters and order are those of `transformers` where it has them, with one exception: if several tokens at the edge of a
filter are equally likely, all are kept, so that the result does not depend on a sorting order.

`pipeline.engine.sampler` gives the same tokens in less time, and is what runs; what it does not support is drawn here.
Both compute logits in float32, so that ties and thresholds agree, and sum probabilities in float64.

A row of logits is float32 `[vocabulary]`. A removed token has the logit -inf. No function changes its input; one that
has nothing to do returns it. Token ids must be in the vocabulary: `check_token_ids` checks those of a request.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.decoding import SamplingParams
from pipeline.errors import UserError

Logits = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
TokenIds = Sequence[int] | npt.NDArray[np.integer]
Followers = Callable[[list[int]], Iterable[int]]
"""A lookup of the tokens that follow a run of tokens anywhere in the training text."""

_FLOAT32 = np.finfo(np.float32)
REMOVED = np.float32(-np.inf)
LOWEST, SMALLEST = float(_FLOAT32.min), float(_FLOAT32.tiny)
LARGEST_PENALTY = 1e30
HIGHEST_TEMPERATURE = 1e6
"""Here every token that is left is equally likely, to one part in ten thousand. Higher ones are taken for this one:
they would make weights equal that are not, and overflow float32."""


def sample(
    logits: Logits,
    params: SamplingParams,
    prompt_ids: TokenIds,
    output_ids: TokenIds,
    end_of_text_id: int,
    seed: int,
    choice: int,
    followers: Followers | None = None,
) -> int:
    """Draw the next token of a continuation that so far holds `output_ids`.

    `seed` replaces `params.seed`, which may be null. `choice` is the index among the request's `n` continuations.
    `max_verbatim_tokens` needs the `followers`. Raises what `filter_logits` raises.
    """
    filtered = filter_logits(logits, params, prompt_ids, output_ids, end_of_text_id, followers)
    return draw(filtered, uniform(seed, choice, len(output_ids)))


def filter_logits(
    logits: Logits,
    params: SamplingParams,
    prompt_ids: TokenIds,
    output_ids: TokenIds,
    end_of_text_id: int,
    followers: Followers | None = None,
) -> Logits:
    """Apply every filter in the module's order.

    Raises `UserError` if no token is left, and `ArithmeticError` if the model gave NaN or infinity.
    """
    history_ids = np.concatenate([_array(prompt_ids), _array(output_ids)])
    ending_ids = (end_of_text_id, *params.stop_token_ids)

    logits = apply_bias(logits, params.logit_bias)
    logits = apply_bans(logits, params.banned_token_ids, params.allowed_token_ids, ending_ids)
    logits = apply_repetition_penalty(logits, history_ids, params.repetition_penalty)
    logits = apply_output_penalties(logits, output_ids, params.presence_penalty, params.frequency_penalty)
    logits = apply_no_repeat_ngram(logits, history_ids, params.no_repeat_ngram_size)
    logits = apply_verbatim_limit(logits, output_ids, params.max_verbatim_tokens, followers, ending_ids)
    logits = apply_minimum_length(logits, len(output_ids), params.min_new_tokens, ending_ids)
    _check_some_token_left(logits)
    # Each filter from here on keeps at least one token. The largest logit becomes 0, which changes no probability.
    with np.errstate(over="ignore"):  # to -inf, where the probability is 0 as well
        logits = logits - logits.max()
    logits = apply_temperature(logits, params.temperature)
    logits = apply_top_k(logits, params.top_k)
    logits = apply_top_p(logits, params.top_p)
    logits = apply_min_p(logits, params.min_p)
    logits = apply_typical_p(logits, params.typical_p)
    logits = apply_top_n_sigma(logits, params.top_n_sigma)
    return apply_eta_cutoff(logits, params.eta_cutoff)


def apply_bias(logits: Logits, logit_bias: Mapping[int, float]) -> Logits:
    """Add each token's bias to its logit."""
    if not logit_bias:
        return logits
    biased = logits.copy()
    biased[list(logit_bias)] += np.array(list(logit_bias.values()), dtype=np.float32)
    return biased


def apply_bans(logits: Logits, banned_token_ids: TokenIds, allowed_token_ids: TokenIds, ending_ids: TokenIds) -> Logits:
    """Remove the banned tokens and, if any are allowed, all that are neither allowed nor end the continuation."""
    if len(allowed_token_ids) > 0:
        logits = _only(logits, np.concatenate([_array(allowed_token_ids), _array(ending_ids)]))
    return _remove(logits, banned_token_ids)


def apply_repetition_penalty(logits: Logits, token_ids: TokenIds, penalty: float) -> Logits:
    """Divide positive logits of the tokens by `penalty` and multiply the others (CTRL, Keskar et al. 2019).

    How often a token occurs makes no difference. The paper divides all logits. Here the sign matters, as in
    `transformers`, so that a penalty above 1 always makes a token less likely.
    """
    if penalty == 1 or len(token_ids) == 0:
        return logits
    ids = _array(token_ids)
    penalized = logits.copy()
    before, factor = logits[ids], penalty_factor(penalty)
    penalized[ids] = np.where(before > 0, before / factor, before * factor)
    return penalized


def penalty_factor(penalty: float) -> np.float32:
    """Return the repetition penalty in float32, at most 1e30 and at least its inverse, or products would overflow."""
    return np.float32(min(max(penalty, 1 / LARGEST_PENALTY), LARGEST_PENALTY))


def apply_output_penalties(
    logits: Logits, output_ids: TokenIds, presence_penalty: float, frequency_penalty: float
) -> Logits:
    """Subtract the first penalty once, and the second per occurrence, from the logit of each token in the output.

    OpenAI's API defines them so.
    """
    if (presence_penalty == 0 and frequency_penalty == 0) or len(output_ids) == 0:
        return logits
    ids, counts = np.unique(_array(output_ids), return_counts=True)
    penalized = logits.copy()
    penalized[ids] -= (presence_penalty + frequency_penalty * counts).astype(np.float32)
    return penalized


def apply_no_repeat_ngram(logits: Logits, token_ids: TokenIds, ngram_size: int) -> Logits:
    """Remove each token that would complete an n-gram that `token_ids` already holds (Paulus et al. 2017)."""
    if ngram_size == 0 or len(token_ids) < ngram_size:
        return logits
    ids = _array(token_ids)
    ngrams = np.lib.stride_tricks.sliding_window_view(ids, ngram_size)  # [positions, n]
    begun = ids[len(ids) - ngram_size + 1 :]
    repeats = (ngrams[:, :-1] == begun).all(axis=1)
    return _remove(logits, ngrams[repeats, -1])


def apply_verbatim_limit(
    logits: Logits,
    output_ids: TokenIds,
    max_verbatim_tokens: int,
    followers: Followers | None,
    ending_ids: TokenIds,
) -> Logits:
    """Remove each token with which the output would end in more than `max_verbatim_tokens` training tokens in a row.

    Ending ids copy nothing and stay. The prompt does not count: its author already has what it quotes.
    """
    return _remove(logits, verbatim_ids(output_ids, max_verbatim_tokens, followers, ending_ids))


def verbatim_ids(
    output_ids: TokenIds, max_verbatim_tokens: int, followers: Followers | None, ending_ids: TokenIds
) -> list[int]:
    """Return the tokens that `apply_verbatim_limit` removes."""
    if max_verbatim_tokens == 0 or len(output_ids) < max_verbatim_tokens:
        return []
    run = [int(token_id) for token_id in output_ids[len(output_ids) - max_verbatim_tokens :]]
    return [token_id for token_id in require_followers(followers)(run) if token_id not in ending_ids]


def require_followers(followers: Followers | None) -> Followers:
    """Return `followers`. Raises `ValueError` if there are none."""
    if followers is None:
        raise ValueError("max_verbatim_tokens needs to know what follows a run in the training text")
    return followers


def apply_minimum_length(logits: Logits, output_tokens: int, min_new_tokens: int, ending_ids: TokenIds) -> Logits:
    """Remove the tokens that end the continuation while it holds fewer than `min_new_tokens`."""
    return _remove(logits, ending_ids) if output_tokens < min_new_tokens else logits


def apply_temperature(logits: Logits, temperature: float) -> Logits:
    """Divide by the temperature; 0 keeps only the likeliest token, the lowest id of several.

    The largest logit is subtracted first: it changes no probability, and then no temperature is too small to divide by.
    """
    if temperature == 1:
        return logits
    if temperature == 0:
        return _only(logits, [int(np.argmax(logits))])
    with np.errstate(over="ignore"):  # to -inf, where the probability is 0 as well
        cooled: Logits = (logits - logits.max()) / temperature_divisor(temperature)
    return cooled


def temperature_divisor(temperature: float) -> np.float32:
    """Return a temperature above 0 in float32, in which the smallest must not become 0."""
    return np.float32(min(max(temperature, SMALLEST), HIGHEST_TEMPERATURE))


def apply_top_k(logits: Logits, top_k: int) -> Logits:
    """Keep the `top_k` likeliest tokens and those as likely as the last of them (Fan et al. 2018)."""
    if top_k == 0 or top_k >= logits.size:
        return logits
    return _at_least(logits, _kth_largest(logits, top_k))


def apply_top_p(logits: Logits, top_p: float) -> Logits:
    """Keep the fewest likeliest tokens that together reach the probability `top_p` (nucleus, Holtzman et al. 2020).

    Tokens as likely as the last of the set are kept too.
    """
    if top_p == 1:
        return logits
    left = logits[logits > REMOVED]
    probabilities = softmax(left)
    likeliest = np.sort(probabilities[_sufficient(probabilities, top_p)])[::-1]
    edge = likeliest[_reach(likeliest, top_p)]
    return _at_least(logits, float(left[probabilities >= edge].min()))


def apply_min_p(logits: Logits, min_p: float) -> Logits:
    """Keep the tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024)."""
    if min_p == 0:
        return logits
    return _at_least(logits, float(logits.max()) + math.log(min_p))


def apply_typical_p(logits: Logits, typical_p: float) -> Logits:
    """Keep the tokens with surprise -ln p nearest the entropy, until their probability reaches `typical_p`.

    Tokens as near as the last of them are kept too (locally typical sampling, Meister et al. 2023).
    """
    if typical_p == 1:
        return logits
    candidates = np.flatnonzero(logits > REMOVED)
    logprobs = log_softmax(logits[candidates])
    probabilities = np.exp(logprobs)
    entropy = -(probabilities @ logprobs)
    distances = np.abs(-logprobs - entropy)
    near = np.flatnonzero(distances <= distances[_sufficient(probabilities, typical_p)].max())
    nearest = near[np.argsort(distances[near])]
    edge = distances[nearest[_reach(probabilities[nearest], typical_p)]]
    return _only(logits, candidates[distances <= edge])


def apply_top_n_sigma(logits: Logits, top_n_sigma: float) -> Logits:
    """Keep the logits at most `top_n_sigma` standard deviations below the largest (Tang et al. 2024).

    The deviation is that of the logits that are left, divided by their number. The temperature changes nothing here, as
    it divides both.
    """
    if top_n_sigma == 0:
        return logits
    deviation = float(logits[logits > REMOVED].std(dtype=np.float64))
    return _at_least(logits, max(float(logits.max()) - top_n_sigma * deviation, LOWEST))


def apply_eta_cutoff(logits: Logits, eta_cutoff: float) -> Logits:
    """Keep the tokens with a probability of at least min(e, sqrt(e) * exp(-entropy)), where e is `eta_cutoff`.

    The entropy is in nats (eta sampling, Hewitt et al. 2022). The likeliest token is always kept: its probability is at
    least exp(-entropy).
    """
    if eta_cutoff == 0:
        return logits
    logprobs = log_softmax(logits[logits > REMOVED])
    entropy = -float(np.exp(logprobs) @ logprobs)
    log_eta = min(math.log(eta_cutoff), math.log(eta_cutoff) / 2 - entropy)
    # Rounding must not put the edge above the likeliest token.
    return _at_least(logits, float(logits.max()) + min(log_eta - float(logprobs.max()), 0))


def draw(logits: Logits, u: float) -> int:
    """Return the token at which the CDF in vocabulary order first exceeds `u`, a float64 in [0, 1).

    The CDF is summed in float64 over the tokens that are left. A token of probability 0 is never drawn.
    """
    candidates = np.flatnonzero(logits > REMOVED)
    return int(candidates[place_in(np.cumsum(np.exp(_shifted(logits[candidates]))), u)])


def place_in(cdf: Float64s, u: float) -> int:
    """Return the index at which a CDF `[tokens]`, which may end in any sum above 0, first exceeds `u` of its sum.

    Raises `ArithmeticError` if the sum is none, as where a weight is NaN: the index would be that of no token.
    """
    total = cdf[-1]
    if not 0 < total < math.inf:
        raise ArithmeticError(f"the weights of the tokens sum to {total}")
    # u * sum < sum even after rounding, as u is at most 1 - 2**-53: the index is always in range.
    return int(cdf.searchsorted(u * total, side="right"))


def uniform(seed: int, choice: int, step: int) -> float:
    """Return a float64 in [0, 1) that depends only on the arguments, not on earlier draws.

    Philox4x64-10 (Salmon et al. 2011) with the key (seed, choice) is applied to the counter (step + 1, 0, 0, 0), all
    words of 64 bits, the first the least significant; the upper 53 bits of the first word of its output, divided by
    2**53, are the number. NumPy's generator counts up before each block: hence the 1.
    """
    return float(uniforms(seed, choice, step, 1)[0])


def uniforms(seed: int, choice: int, first_step: int, count: int) -> Float64s:
    """Return `uniform` of `count` consecutive steps, float64 `[count]`.

    The counter rises by one per step, which takes four words.
    """
    key = np.array([seed, choice], dtype=np.uint64)
    counter = np.array([first_step, 0, 0, 0], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(4 * count)[::4]
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def softmax(logits: Logits) -> Float64s:
    """Return probabilities over the last axis, float64 `[..., vocabulary]`; 0 for a removed token."""
    weights = np.exp(_shifted(logits))
    probabilities: Float64s = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def log_softmax(logits: Logits) -> Float64s:
    """Return natural log-probabilities over the last axis, float64 `[..., vocabulary]`."""
    shifted = _shifted(logits)
    logprobs: Float64s = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logprobs


def gather_logprobs(logits: Logits, token_ids: TokenIds) -> Float64s:
    """Return the natural log-probability of one token per row of `logits` `[rows, vocabulary]`, float64 `[rows]`."""
    logprobs: Float64s = logits[np.arange(len(token_ids)), _array(token_ids)] - log_normalizers(logits)
    return logprobs


def token_logprobs(logits: Logits, token_id: int, top_count: int) -> tuple[float, dict[int, float]]:
    """Return the natural log-probability of a token, and those of the `top_count` likeliest in order, ties by id.

    `logits` are the model's own, before any filter or temperature. Raises `ArithmeticError` if they are not finite.
    """
    normalizer = float(log_normalizers(logits))
    if not math.isfinite(normalizer):
        raise ArithmeticError("the model's logits are not finite")
    logprob = float(logits[token_id]) - normalizer
    if top_count == 0:
        return logprob, {}
    candidates = np.flatnonzero(logits >= _kth_largest(logits, min(top_count, logits.size)))
    likeliest = candidates[np.argsort(-logits[candidates], kind="stable")[:top_count]]
    return logprob, {int(i): float(logits[i]) - normalizer for i in likeliest}


def log_normalizers(logits: Logits) -> Float64s:
    """Return what the logits exceed the log-probabilities by, over the last axis: float64 `[...]`.

    NaN or infinity among the logits gives NaN. The exponentials are in float32, which takes a third of the time of
    float64 and moves a log-probability by 1e-7 at most; their sum is in float64.
    """
    peaks = logits.max(axis=-1)
    with np.errstate(invalid="ignore"):  # of infinity minus infinity
        sums = np.exp(logits - peaks[..., None]).sum(axis=-1, dtype=np.float64)
        normalizers: Float64s = peaks + np.log(sums)
    return normalizers


def check_token_ids(params: SamplingParams, vocabulary_size: int) -> None:
    """Raise `UserError`, naming the field, if a request names a token that the vocabulary lacks."""
    for name in ("logit_bias", "banned_token_ids", "allowed_token_ids", "stop_token_ids"):
        highest = max(getattr(params, name), default=0)
        if highest >= vocabulary_size:
            raise UserError(
                f"{name}: no token has the id {highest}, give ids below the vocabulary size ({vocabulary_size})"
            )


def _array(token_ids: TokenIds) -> npt.NDArray[np.int64]:
    return np.asarray(token_ids, dtype=np.int64)


def _at_least(logits: Logits, edge: float) -> Logits:
    """Keep the logits that are at least `edge`, which is rounded to float32 as they are."""
    return np.where(logits >= np.float32(edge), logits, REMOVED)


def _only(logits: Logits, token_ids: TokenIds) -> Logits:
    kept = np.full_like(logits, REMOVED)
    ids = _array(token_ids)
    kept[ids] = logits[ids]
    return kept


def _remove(logits: Logits, token_ids: TokenIds) -> Logits:
    if len(token_ids) == 0:
        return logits
    remaining = logits.copy()
    remaining[_array(token_ids)] = REMOVED
    return remaining


def _kth_largest(logits: Logits, k: int) -> float:
    return float(np.partition(logits, logits.size - k)[logits.size - k])


def _shifted(logits: Logits) -> Float64s:
    """Subtract the largest logit of each row, so that `exp` cannot overflow."""
    wide = logits.astype(np.float64)
    shifted: Float64s = wide - wide.max(axis=-1, keepdims=True)
    return shifted


def _sufficient(probabilities: Float64s, mass: float) -> npt.NDArray[np.bool_]:
    """Return which tokens can matter for `mass`: the others sum to less than half of 1 - `mass`."""
    return probabilities >= (1 - mass) / (2 * probabilities.size)


def _reach(probabilities: Float64s, mass: float) -> int:
    """Return the index at which the running sum reaches `mass`, or the last one if rounding keeps the sum below it."""
    return min(int(np.searchsorted(np.cumsum(probabilities), mass)), probabilities.size - 1)


def _check_some_token_left(logits: Logits) -> None:
    likeliest = float(logits.max())
    if likeliest == -math.inf:
        raise UserError(
            "the decoding parameters leave no token to draw; relax banned_token_ids, allowed_token_ids, "
            "no_repeat_ngram_size, max_verbatim_tokens or min_new_tokens"
        )
    if not math.isfinite(likeliest):
        raise ArithmeticError(f"the model's logits hold {likeliest}")
