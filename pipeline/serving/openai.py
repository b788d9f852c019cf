"""Requests and errors of OpenAI's completions API, with vLLM's additions."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.decoding import ModelDecoding, SamplingParams, merge_decoding
from pipeline.errors import UserError
from pipeline.serving.shapes import (
    MOST_BIASES,
    MOST_PROMPTS,
    MOST_STOP_CHARACTERS,
    MOST_STOP_IDS,
    MOST_STOPS,
    Biases,
    Prompt,
    StopIds,
    StopTexts,
    Text,
    TokenIds,
    TokenIdSet,
    shorten,
)

MOST_LOGPROBS = 20
OWN_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
"""The fields of the API that have another name in `SamplingParams`."""
GZIP_MAGIC = b"\x1f\x8b"
UNKNOWN_FIELD = "unknown_field"
"""The type of the error of a field that a body does not have; it carries the field's `name`."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    # vLLM
    "add_special_tokens": (True,),
    "bad_words": ([],),
    "detokenize": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    # SGLang, llama.cpp and text-generation-webui
    "add_bos_token": (True,),
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "no_stop_trim": (False,),
    "smoothing_factor": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "xtc_probability": (0,),
}
"""The fields of other servers that are accepted at these values, with which they do nothing; null does nothing in any
field."""
IGNORED = (
    *("cache_salt", "include_obfuscation", "metadata", "prompt_cache_key", "request_id", "safety_identifier"),
    *("store", "user"),
)
"""The fields that name a request or its sender, or say what a service keeps of it, and change nothing in its answer."""

Outcome = Literal["completed", "cancelled", "refused", "rejected", "timed_out", "failed"]


Name = Annotated[str, Field(max_length=1000)]


class ApiError(Exception):
    """An API error: status code and OpenAI-style body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        outcome: Outcome = "refused",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.outcome = outcome
        self.headers = headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """A body, or an object in one: fields that it does not have are refused by name unless they do nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _own_fields(cls, values: Any) -> Any:
        """Leave out what does nothing. Raises for the first field that is left and unknown: pydantic lists them all."""
        if not isinstance(values, dict):
            return values
        own = {}
        for name, value in values.items():
            if name in cls.model_fields:
                own[name] = value
            elif not (value is None or name in IGNORED or value in NEUTRAL.get(name, ())):
                raise PydanticCustomError(UNKNOWN_FIELD, "no such field", {"name": name})
        return own


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="End with an event that has the usage and no choices")
    continuous_usage_stats: bool | None = Field(None, description="Report the usage so far in each event, as vLLM does")


class RepetitionDetection(Body):
    """A loop as vLLM describes it, with the ranges of `SamplingParams.repetition_detection`."""

    max_pattern_size: int = Field(0, description="The longest run that counts, in tokens; 0 is off")
    min_pattern_size: int = Field(0, description="The shortest run that counts, in tokens; 0 means 1")
    min_count: int = Field(0, description="The number of times in a row that the run must occur")

    def values(self) -> list[int]:
        return [self.max_pattern_size, self.min_count, self.min_pattern_size or 1]


class CompletionRequest(Body):
    """A field that is null or missing has the value of the preset, or else of the model's own decoding.

    Fields of other servers are accepted where they do nothing, such as `use_beam_search: false`.
    """

    model: Name | None = Field(None, description="A name that /v1/models lists")
    prompt: Prompt = Field(
        "",
        description="A text, read as the beginning of a document, or token ids, read as they are; or a list of either",
    )
    preset: Name | None = Field(
        None, description="One of the model's presets, which /v1/models lists; other fields override it"
    )
    max_tokens: int | None = Field(
        None, description="The longest continuation, in tokens; 0 with echo only scores the prompt"
    )
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, description="The number of continuations per prompt")
    best_of: int | None = Field(
        None, description="Draw this many per prompt and return the n with the fewest faults; 1 is off"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="The number of likeliest tokens to report at each position"
    )
    echo: bool | None = Field(None, description="Begin each choice with its prompt")
    stop: StopTexts = Field(
        None, description=f"At most {MOST_STOPS} texts, of {MOST_STOP_CHARACTERS:,} characters together"
    )
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases = Field(None, description=f"By token id, at most {MOST_BIASES:,} of them")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="-1 draws one")
    suffix: None = Field(None, description="Not supported: the model continues a text and cannot fill a gap")
    top_k: int | None = Field(None, description="0 and, as in vLLM, -1 are off")
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = Field(
        None, description="Keeps tokens with a logit at most this many standard deviations below the largest; 0 is off"
    )
    eta_cutoff: float | None = Field(
        None, description="Keeps tokens with a probability of at least min(e, sqrt(e) * exp(-entropy)); 0 is off"
    )
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_verbatim_tokens: int | None = Field(
        None, description="The longest run of tokens copied from the training text; 0 is no limit"
    )
    repetition_detection: RepetitionDetection | None = Field(
        None, description="Ends a choice that runs into a loop, with the finish_reason `repetition`"
    )
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopIds = Field(None, description=f"At most {MOST_STOP_IDS:,}")
    allowed_token_ids: TokenIdSet = None
    banned_token_ids: TokenIdSet = None
    context_overflow: Name | None = Field(
        None,
        description="What happens at the end of the context: `end`, or `slide`, which reads the newest half again and "
        "continues; it also takes prompts that are longer than the context",
    )

    @field_validator("top_k", mode="after")
    @classmethod
    def _minus_one_is_off(cls, value: int | None) -> int | None:
        return 0 if value == -1 else value

    @field_validator("seed", mode="after")
    @classmethod
    def _not_negative(cls, value: int | None) -> int | None:
        """As in vLLM, -1 is none; other negative seeds are those of OpenAI's 64 bits, of which ours has 63."""
        return None if value in (None, -1) else value % 2**63

    @field_validator("suffix", mode="before")
    @classmethod
    def _no_suffix(cls, value: Any) -> None:
        if value not in (None, ""):
            raise PydanticCustomError("suffix", "the model continues a text and cannot fill a gap; leave it out")

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def sampling(self, decoding: ModelDecoding, most_tokens: int | None) -> SamplingParams:
        """Return the decoding of this request: its fields over those of its preset or the model's own decoding.

        At most `most_tokens` are drawn. With a `max_tokens` of 0 nothing is drawn, and `max_new_tokens` is the model's.
        Raises `ApiError`.
        """
        try:
            own = decoding.preset(self.preset)
        except UserError as error:
            raise to_api_error(error) from error
        asked = {OWN_NAMES.get(name, name): getattr(self, name) for name in CompletionRequest.model_fields}
        values = {name: value for name, value in asked.items() if name in SamplingParams.__dataclass_fields__}
        if self.repetition_detection is not None:
            values["repetition_detection"] = self.repetition_detection.values()
        most = self.max_tokens or own.max_new_tokens
        if most_tokens is not None:
            if self.max_tokens and self.max_tokens > most_tokens:
                raise ApiError(
                    400,
                    f"max_tokens: {self.max_tokens} is more than {most_tokens}, this server's limit",
                    param="max_tokens",
                )
            most = min(most or most_tokens, most_tokens)
        values["max_new_tokens"] = most
        if self.min_tokens is None and most is not None:
            # The model's own minimum yields to a shorter request.
            values["min_new_tokens"] = max(0, min(own.min_new_tokens, most))
        try:
            return merge_decoding(own, values)
        except UserError as error:
            raise to_api_error(error) from error


class TokenizeRequest(Body):
    model: Name | None = None
    prompt: Text


class DetokenizeRequest(Body):
    model: Name | None = None
    tokens: TokenIds


class FeedbackRequest(Body):
    id: Name = Field(description="The id of the completion")
    index: int = Field(0, ge=0, lt=MOST_PROMPTS, description="The index of the choice")
    value: bool | None = Field(description="True for a good continuation, false for a bad one, null for neither")


def to_api_error(error: UserError) -> ApiError:
    """Return an error in the terms of the API: with the names that fields have there."""
    message = str(error)
    for name, own in OWN_NAMES.items():
        message = message.replace(own, name)
    field, colon, _ = message.partition(": ")
    is_field = field in CompletionRequest.model_fields or field == "tokens"
    return ApiError(400, message, param=field if colon and is_field else None)


def unreadable_body(body: bytes, headers: Mapping[str, str]) -> ApiError:
    """Return what keeps a body from being read as a JSON object, as one line."""
    coding = headers.get("content-encoding", "identity")
    if body.startswith(GZIP_MAGIC):
        coding = "gzip"
    content_type = headers.get("content-type", "")
    if coding != "identity":
        text = f"is compressed ({coding}), which this server does not read; send it as it is, without Content-Encoding"
    elif not body:
        text = "is empty; send a JSON object"
    elif content_type.partition(";")[0].strip().lower() != "application/json":
        text = f"has the Content-Type {content_type!r}; send JSON, with the header Content-Type: application/json"
    else:
        try:
            json.loads(body)
            text = f"is JSON, but {body[:20].decode(errors='replace')} is not an object with fields such as prompt"
        except UnicodeDecodeError as error:
            text = f"is not {error.encoding} (byte 0x{body[error.start]:02x} at {error.start}); send it in UTF-8"
        except RecursionError:
            text = "is not read: its lists or objects are nested too deeply"
        except ValueError as error:
            text = f"is not JSON: {str(error).partition(';')[0]}"
    return ApiError(400, f"the body {text}")


def validation_to_api_error(error: Mapping[str, Any]) -> ApiError:
    """Return an error that pydantic found in a field of a body, as one line that names the field."""
    place, given = [str(part) for part in error["loc"] if part != "body"], error.get("ctx", {})
    if error["type"] == UNKNOWN_FIELD:
        name = str(given["name"])
        field = place[0] if place else name
        path, accepted = shorten(".".join([*place, name])), NEUTRAL.get(name)
        if accepted:
            return ApiError(400, f"{path}: only {json.dumps(accepted[0])} is supported; leave it out", param=field)
        return ApiError(400, f"{path}: no such field; /docs lists the fields", param=field)
    message = error["msg"][:1].lower() + error["msg"][1:]
    return ApiError(400, f"{place[0]}{given.get('place', '')}: {message}", param=place[0])
