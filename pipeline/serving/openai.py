"""Requests and errors of OpenAI's completions API, with vLLM's additions."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, ValidationError

from pipeline.decoding import ModelDecoding, SamplingParams, merge_decoding
from pipeline.errors import UserError

MOST_LOGPROBS = 20
OWN_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
"""The fields of the API that have another name in `SamplingParams`."""
GZIP_MAGIC = b"\x1f\x8b"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "include_obfuscation": (False,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
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
IGNORED = ("cache_salt", "metadata", "prompt_cache_key", "request_id", "safety_identifier")
"""The fields that name a request or its sender, and change nothing in its answer."""

Outcome = Literal["completed", "cancelled", "refused", "rejected", "timed_out", "failed"]


def check_encodable(text: str) -> str:
    """Return the text. Raises a validation error for half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "contains half of a surrogate pair, which is not a character") from None
    return text


Text = Annotated[str, AfterValidator(check_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


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
    def _leave_out_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields or not (value is None or name in IGNORED or value in NEUTRAL.get(name, ()))
        }


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

    model: str | None = Field(None, description="A name that /v1/models lists")
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]] = Field(
        "",
        description="A text, read as the beginning of a document, or token ids, read as they are; or a list of either",
    )
    preset: str | None = Field(
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
    stop: Text | list[Text] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="By token id")
    seed: int | None = None
    suffix: None = Field(None, description="Not supported: the model continues a text and cannot fill a gap")
    user: str | None = Field(None, description="Accepted and ignored")
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
    stop_token_ids: list[TokenId] | None = None
    allowed_token_ids: list[TokenId] | None = None
    banned_token_ids: list[TokenId] | None = None
    context_overflow: str | None = Field(
        None,
        description="What happens at the end of the context: `end`, or `slide`, which reads the newest half again and "
        "continues; it also takes prompts that are longer than the context",
    )

    @field_validator("top_k", "seed", mode="after")
    @classmethod
    def _minus_one_is_off(cls, value: int | None, info: ValidationInfo) -> int | None:
        return {"top_k": 0, "seed": None}[str(info.field_name)] if value == -1 else value

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_of_four(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            prompt = handler(value)
        except ValidationError as error:
            texts = [one["msg"] for one in error.errors() if one["type"] == "text"]
            message = texts[0] if texts else "expected a text, token ids, or a list of either"
            raise PydanticCustomError("prompt", message) from None
        if prompt == []:
            raise PydanticCustomError("prompt", "the list is empty; give a prompt, '' to start from nothing")
        return prompt

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
        if isinstance(self.stop, str):
            values["stop"] = [self.stop] if self.stop else None
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
    model: str | None = None
    prompt: Text


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


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
            text = f"is JSON, but {json.dumps(json.loads(body))[:20]} is not an object with fields such as prompt"
        except UnicodeDecodeError as error:
            text = f"is not {error.encoding} (byte 0x{body[error.start]:02x} at {error.start}); send it in UTF-8"
        except RecursionError:
            text = "is not read: its lists or objects are nested too deeply"
        except ValueError as error:
            text = f"is not JSON: {str(error).partition(';')[0]}"
    return ApiError(400, f"the body {text}")


def validation_to_api_error(errors: Sequence[Any]) -> ApiError:
    """Return the first error that pydantic found in the fields of a body, as one line that names the field."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = place[0]
    if first["type"] == "extra_forbidden":
        path, accepted = ".".join(place), NEUTRAL.get(place[-1])
        if accepted:
            return ApiError(400, f"{path}: only {json.dumps(accepted[0])} is supported; leave it out", param=field)
        return ApiError(400, f"{path}: no such field; /docs lists the fields", param=field)
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{field}: {message}", param=field)
