"""How a continuation is decoded: the parameters of a request, `SamplingParams`, and a model's own, `ModelDecoding`.

Names, neutral values and ranges of the parameters are defined only here.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pipeline.errors import UserError
from pipeline.files import read_json

LONGEST_LOOP_TOKENS = 1024
"""The longest run, in tokens, that `repetition_detection` may look for. The worst cost of a step grows with it."""
LONGEST_NGRAM = 100
"""The longest n-gram, in tokens, that must not repeat. Every one of a text is kept."""
MOST_CHOICES = 1024
"""The most continuations of one prompt."""
CONTEXT_OVERFLOWS = ("end", "slide")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Decoding parameters of one request; every default is neutral (the filter is off).

    `pipeline.engine.filters` states the order in which they act. Raises `UserError`, naming field, value and range, if
    a value has the wrong type or is out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the argmax. At least 0; above a million it is a million."""
    top_k: int = 0
    """Keep the k likeliest tokens and ties with the last. At least 0; 0 is off."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that hold this probability, and ties with the last. In (0, 1]; 1 is off."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest. In [0, 1]; 0 is off."""
    typical_p: float = 1.0
    """Keep the tokens with surprise nearest the entropy that hold this probability. In (0, 1]; 1 is off."""
    top_n_sigma: float = 0.0
    """Keep tokens with a logit at most this many standard deviations of all logits below the largest. At least 0; 0 is
    off."""
    eta_cutoff: float = 0.0
    """Keep tokens with a probability of at least min(e, sqrt(e) * exp(-entropy)), where e is this value. In [0, 1); 0
    is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output. Above 0; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output. In [-2, 2]; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logit of each token in the output. In [-2, 2]; 0 is off."""
    no_repeat_ngram_size: int = 0
    """Never repeat an n-gram of this many tokens in prompt and output. In [0, 100]; 0 is off."""
    max_verbatim_tokens: int = 0
    """Never draw a longer run of tokens of the training text than this. At least 0; 0 is off. Needs an engine with an
    index of that text (`export.verbatim_index`). The prompt does not count. End-of-text and stop ids are never removed.
    """
    repetition_detection: tuple[int, ...] = ()
    """Two numbers, such as `[20, 3]`: stop once the text ends in a run of at most 20 tokens, 3 times in a row. A third
    number is the shortest run that counts. The first in [0, 1024], 0 is off; the second at least 2; the third in [1,
    the first]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids. In [-100, 100]."""
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that are never drawn."""
    allowed_token_ids: tuple[int, ...] = ()
    """If any are given, only these, end-of-text and the stop ids are drawn."""
    min_new_tokens: int = 0
    """End-of-text and stop ids are not drawn before this many tokens, and a stop text counts only if it is complete
    after them. At least 0."""
    max_new_tokens: int | None = None
    """The most tokens that are generated. At least 1; null continues to the end of the context."""
    context_overflow: str = "end"
    """What happens at the end of the context: `end`, or `slide`, which reads the newest half again and continues. With
    `slide`, `max_new_tokens` must be set."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; it ends before them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the continuation as end-of-text does."""
    ignore_eos: bool = False
    """Continue past end-of-text."""
    seed: int | None = None
    """The key of the random numbers, in [0, 2**63); null takes a fresh one."""
    n: int = 1
    """Independent continuations per prompt. In [1, 1024]."""
    best_of: int = 1
    """Draw this many continuations per prompt and return the `n` with the fewest faults (`pipeline.engine.best`). In
    [`n`, 1024]; 1 is off. Needs an engine with a lexicon. A stream gets each text whole."""
    logprobs: int | None = None
    """Report the log-probabilities of each drawn token and of this many likeliest ones. At least 0; null is off."""

    def __post_init__(self) -> None:
        for name in ("top_p", "min_p", "typical_p", "eta_cutoff", "repetition_penalty"):
            _check_number(name, getattr(self, name))
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name))
            _check_range(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "in [-2, 2]")
        for name in ("temperature", "top_n_sigma"):
            _check_number(name, getattr(self, name))
            _check_range(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("top_p", "typical_p"):
            _check_range(name, getattr(self, name), 0 < getattr(self, name) <= 1, "in (0, 1]")
        _check_range("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check_range("eta_cutoff", self.eta_cutoff, 0 <= self.eta_cutoff < 1, "in [0, 1)")
        _check_range("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0")
        for name in ("top_k", "no_repeat_ngram_size", "max_verbatim_tokens", "min_new_tokens"):
            _check_integer(name, getattr(self, name), minimum=0)
        _check_range("no_repeat_ngram_size", self.no_repeat_ngram_size,
                     self.no_repeat_ngram_size <= LONGEST_NGRAM, f"at most {LONGEST_NGRAM}")  # fmt: skip
        for name in ("n", "best_of"):
            _check_integer(name, getattr(self, name), minimum=1)
            _check_range(name, getattr(self, name), getattr(self, name) <= MOST_CHOICES, f"at most {MOST_CHOICES}")
        _check_range("best_of", self.best_of, self.best_of == 1 or self.best_of >= self.n,
                     f"at least n ({self.n}), or 1, which is off")  # fmt: skip
        for name, minimum in (("max_new_tokens", 1), ("seed", 0), ("logprobs", 0)):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), minimum=minimum)
        if self.seed is not None:
            _check_range("seed", self.seed, self.seed < 2**63, "below 2**63")
        if self.max_new_tokens is not None:
            _check_range("min_new_tokens", self.min_new_tokens, self.min_new_tokens <= self.max_new_tokens,
                         f"at most max_new_tokens ({self.max_new_tokens})")  # fmt: skip
        if self.context_overflow not in CONTEXT_OVERFLOWS:
            raise UserError(f"context_overflow: {self.context_overflow!r} is none of {', '.join(CONTEXT_OVERFLOWS)}")
        if self.context_overflow == "slide" and self.max_new_tokens is None:
            raise UserError("max_new_tokens: must be set if context_overflow is slide, or nothing may end the text")
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos: expected true or false, got {self.ignore_eos!r}")
        for name in ("banned_token_ids", "allowed_token_ids", "stop_token_ids"):
            values = _tuple_of(self, name)
            # There may be as many as the vocabulary has.
            if values and (set(map(type, values)) != {int} or min(values) < 0):
                for token_id in values:
                    _check_integer(name, token_id, minimum=0)
        _check_repetition_detection(_tuple_of(self, "repetition_detection"))
        for text in _tuple_of(self, "stop"):
            if not isinstance(text, str) or not text:
                raise UserError(f"stop: expected texts that are not empty, got {text!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias: expected token ids and their biases, got {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _check_integer("logit_bias", token_id, minimum=0)
            _check_number("logit_bias", bias)
            _check_range("logit_bias", bias, -100 <= bias <= 100, "in [-100, 100]")

    @classmethod
    def from_mapping(cls, values: Any, *, section: str = "") -> "SamplingParams":
        """Build from parsed YAML or JSON. Raises `UserError`, also for unknown names; `section` precedes each name."""
        prefix = f"{section}." if section else ""
        if not isinstance(values, Mapping):
            raise UserError(f"{section or 'decoding parameters'}: expected names and values, got {values!r}")
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(f"{prefix}{name}: no such decoding parameter; known are {', '.join(sorted(known))}")
        if isinstance(bias := values.get("logit_bias"), Mapping):
            # Keys of JSON are texts.
            ids = {int(key) if isinstance(key, str) and key.isdecimal() else key: bias[key] for key in bias}
            values = {**values, "logit_bias": ids}
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """Return the parameters that are not neutral, as JSON can hold them; `from_mapping` reads them back."""
        values = {name: getattr(self, name) for name in self.active_fields()}
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }

    @property
    def candidates(self) -> int:
        """The continuations that are drawn per prompt, of which `n` are returned."""
        return max(self.n, self.best_of)

    def active_fields(self) -> list[str]:
        """Return the names of the parameters that are not neutral."""
        neutral = SamplingParams()
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(neutral, f.name)]


@dataclass(frozen=True, slots=True)
class ModelDecoding:
    """A model's own decoding parameters: its default, and its presets by name."""

    default: SamplingParams
    presets: Mapping[str, SamplingParams] = field(default_factory=dict)
    """Each preset is complete: it takes nothing from `default`."""

    def preset(self, name: str | None) -> SamplingParams:
        """Return the parameters of a preset, or `default` for None. Raises `UserError` for a name that is no preset."""
        if name is None:
            return self.default
        if not self.presets:
            raise UserError(f"preset: this model has no presets, got {name!r}; leave it out")
        if name not in self.presets:
            raise UserError(f"preset: {name!r} is none of {', '.join(self.presets)}")
        return self.presets[name]


def read_decoding(decoding: Path, presets: Path | None) -> ModelDecoding:
    """Read `decoding.json` and `presets.json`; a model from before there were presets has no second file.

    Raises `UserError` naming file, preset and parameter.
    """
    named = {} if presets is None else _read(presets)
    if not isinstance(named, Mapping):
        raise UserError(f"{presets}: expected names and their decoding parameters, got {named!r}")
    return ModelDecoding(
        SamplingParams.from_mapping(_read(decoding), section=f"{decoding}: decoding"),
        {name: SamplingParams.from_mapping(values, section=f"{presets}: {name}") for name, values in named.items()},
    )


def _read(file: Path) -> Any:
    try:
        return read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error


_SCALARS = {hint: kind for kind in (bool, int, float, str) for hint in (kind, kind | None)}


def scalar_types() -> dict[str, type]:
    """Return the parameters that are one value, each with its type apart from null: bool, int, float or str."""
    hints = get_type_hints(SamplingParams)
    return {name: _SCALARS[hint] for name, hint in hints.items() if hint in _SCALARS}


def list_types() -> dict[str, type]:
    """Return the parameters that are lists, each with the type of its entries: int or str."""
    hints = get_type_hints(SamplingParams)
    return {name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is tuple}


def _tuple_of(params: SamplingParams, name: str) -> tuple[Any, ...]:
    """Turn a field into a tuple, as YAML and JSON give lists, and return it."""
    value = getattr(params, name)
    if not isinstance(value, list | tuple):
        raise UserError(f"{name}: expected a list, got {value!r}")
    object.__setattr__(params, name, tuple(value))
    return tuple(value)


def _check_repetition_detection(values: tuple[Any, ...]) -> None:
    name = "repetition_detection"
    for value in values:
        _check_integer(name, value, minimum=0)
    if not values or (longest := values[0]) == 0:
        return
    if len(values) not in (2, 3):
        raise UserError(f"{name}: expected the longest run and its repetitions, such as [20, 3], got {list(values)}")
    _check_range(name, longest, longest <= LONGEST_LOOP_TOKENS, f"at most {LONGEST_LOOP_TOKENS}")
    _check_range(name, values[1], values[1] >= 2, "at least 2 (repetitions of the run)")
    for shortest in values[2:]:
        _check_range(name, shortest, 1 <= shortest <= longest, f"in [1, {longest}] (the shortest run that counts)")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{name}: expected a finite number, got {value!r}")


def _check_integer(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name}: expected a whole number, got {value!r}")
    _check_range(name, value, value >= minimum, f"at least {minimum}")


def _check_range(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name}: {value!r} is out of range, must be {allowed}")


def merge_decoding(defaults: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """Return `defaults` with each value that is given; null and an empty list mean the default. Raises `UserError`."""
    given = {name: value for name, value in values.items() if value is not None and value != []}
    return SamplingParams.from_mapping({**defaults.to_mapping(), **given})
