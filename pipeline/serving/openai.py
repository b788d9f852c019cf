"""Completions as OpenAI's API defines them, with vLLM's additions: what is asked for, what is answered, and errors."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError, ValidationError

from pipeline.decoding import ModelDecoding, SamplingParams, merge_decoding
from pipeline.errors import UserError

MOST_LOGPROBS = 20
OWN_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
"""What a field of the API is called here, where that is something else."""

Outcome = Literal["completed", "cancelled", "refused", "rejected", "timed_out", "failed"]


def encodable(text: str) -> str:
    """Raises `ValueError` for half of a surrogate pair, which JSON can spell and no text holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "holds half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class ApiError(Exception):
    """An answer that is none: its status, and OpenAI's body."""

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


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None


class RepetitionDetection(BaseModel):
    """A loop as vLLM describes it; ranges are those of `SamplingParams.repetition_detection`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_pattern_size: int = Field(0, description="Tokens of the longest run that counts; 0 is off")
    min_pattern_size: int = Field(0, description="Tokens of the shortest; 0 is 1")
    min_count: int = Field(0, description="How often the run stands in a row")

    def values(self) -> list[int]:
        return [self.max_pattern_size, self.min_count, self.min_pattern_size or 1]


class CompletionRequest(BaseModel):
    """What is null or not given is the model's own decoding, or its preset's; ranges are those of `SamplingParams`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="A name that /v1/models lists")
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]] = Field(
        "", description="A text, which is read as the beginning of a document, or token ids, which are read as they are"
    )
    preset: str | None = Field(
        None, description="One of the model's presets, which /v1/models lists; a field that is set beside it wins"
    )
    max_tokens: int | None = Field(None, description="Of a continuation; 0 with echo only scores the prompt")
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, description="Continuations of each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="Of so many likeliest tokens in each place")
    echo: bool | None = Field(None, description="Begin each choice with its prompt")
    stop: Text | list[Text] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="By token id")
    seed: int | None = None
    suffix: None = Field(None, description="Refused: the model continues a text, and fills no gap")
    user: str | None = Field(None, description="Heeded by nobody")
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_verbatim_tokens: int | None = Field(
        None, description="Drawn in a row as they stand in the training text, at most; 0 is no limit"
    )
    repetition_detection: RepetitionDetection | None = Field(
        None, description="Ends a choice that has fallen into a loop, with the finish_reason `repetition`"
    )
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_of_four(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            prompt = handler(value)
        except ValidationError as error:
            known = [one["msg"] for one in error.errors() if one["type"] == "text"]
            message = known[0] if known else "expected a text, token ids, or a list of either"
            raise PydanticCustomError("prompt", message) from None
        if prompt == []:
            raise PydanticCustomError("prompt", "the list is empty; give a prompt, '' to start from nothing")
        return prompt

    @field_validator("suffix", mode="before")
    @classmethod
    def _no_suffix(cls, value: Any) -> Any:
        if value is not None:
            raise PydanticCustomError("suffix", "the model continues a text and fills no gap; leave it out")
        return value

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one, as texts or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def sampling(self, decoding: ModelDecoding, most_tokens: int | None) -> SamplingParams:
        """The decoding of this request: that of the model or of its preset, and what is set here.

        At most `most_tokens` are drawn. A `max_tokens` of 0 draws nothing, and stands for what the model's own is.
        Raises `ApiError`.
        """
        try:
            own = decoding.named(self.preset)
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
                raise ApiError(400, f"max_tokens: {self.max_tokens} is more than {most_tokens}", param="max_tokens")
            most = min(most or most_tokens, most_tokens)
        values["max_new_tokens"] = most
        if self.min_tokens is None and most is not None:
            # The model's own minimum stands as far as the request leaves it room.
            values["min_new_tokens"] = max(0, min(own.min_new_tokens, most))
        try:
            return merge_decoding(own, values)
        except UserError as error:
            raise to_api_error(error) from error


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: Text


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[TokenId]


def to_api_error(error: UserError) -> ApiError:
    """Bad input as the API tells it: its fields by the names that they have there."""
    message = str(error)
    for name, own in OWN_NAMES.items():
        message = message.replace(own, name)
    field, colon, _ = message.partition(": ")
    known = field in CompletionRequest.model_fields or field == "tokens"
    return ApiError(400, message, param=field if colon and known else None)


def validation_to_api_error(errors: Sequence[Any]) -> ApiError:
    """What pydantic found first in a body, as one line that names the field."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if not place:
        return ApiError(400, "the body: expected a JSON object with the header Content-Type: application/json")
    field = place[0]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(place)}: no such field; /docs lists those that are", param=field)
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{field}: {message}", param=field)
