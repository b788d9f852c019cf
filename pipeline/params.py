"""A typed, strict view of `params.yaml`: unknown keys, wrong types and values out of range are errors.

The file holds the defaults; the classes here hold names, types, ranges and meaning.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from pipeline.decoding import SamplingParams
from pipeline.errors import UserError

PARAMS_FILE = Path("params.yaml")


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _one_sample_a_prompt(decoding: SamplingParams) -> SamplingParams:
    if decoding.seed is not None:
        raise ValueError("seed: set evaluate.seed; a registered model draws a fresh seed for each call")
    if decoding.n != 1:
        raise ValueError(f"n: {decoding.n} is out of range, must be 1: evaluate takes one sample a prompt")
    if decoding.logprobs is not None:
        raise ValueError("logprobs: set it where you call the engine; evaluate reports none")
    return decoding


Pattern = Annotated[str, AfterValidator(_regular_expression)]
Decoding = Annotated[SamplingParams, BeforeValidator(SamplingParams.from_mapping), AfterValidator(_one_sample_a_prompt)]


class Section(BaseModel):
    """A section of the file: fixed once read, nothing unknown, no type coerced but a whole number to a float."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
    )


class ScratchParams(Section):
    """The small GPT-2 that `base.source: scratch` makes."""

    vocabulary_size: Annotated[int, Field(ge=257)]
    """Tokens of the byte-level BPE: 256 bytes, end-of-text, and merges learned from the training split."""
    context_length: Annotated[int, Field(ge=2)]
    """Positions."""
    layers: Count
    heads: Count
    width: Count
    """Size of the residual stream; a multiple of `heads`."""
    seed: Seed
    """Of the random weights."""

    @model_validator(mode="after")
    def _width_divides(self) -> "ScratchParams":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class BaseParams(Section):
    """Where the model to be fine-tuned comes from."""

    source: Annotated[str, Field(min_length=1)]
    """A folder, the id of a model on the hub, or `scratch`."""
    revision: str | None
    """For a hub id: the commit hash to fetch, 40 hexadecimal digits."""
    scratch: ScratchParams


class NearDuplicateParams(Section):
    """Documents as alike as this are one: the first in file order stays."""

    ngram_words: Count
    """Words of a shingle."""
    jaccard: Share
    """Similarity of the two sets of shingles from which on documents count as the same."""
    permutations: Annotated[int, Field(ge=16)]
    """Hash functions of the MinHash that finds the candidates."""


class PrepareParams(Section):
    """How files become documents."""

    separator: Pattern
    """A line that matches this whole parts two documents of a text file."""
    piece_words: Count
    """A text without separators is cut at blank lines into pieces of about this many words."""
    minimum_words: Annotated[int, Field(ge=0)]
    """A separated document of fewer words is a fragment and dropped."""
    text_column: Annotated[str, Field(min_length=1)]
    """Column (CSV, Parquet) or key (JSON lines) that holds the text."""
    title_column: Annotated[str, Field(min_length=1)]
    """Column or key that holds the title, where there is one."""
    straighten_quotes: bool
    """Make curly quotes plain."""
    near_duplicate: NearDuplicateParams
    validation_share: Share
    """Of the documents, by hash of their content."""
    test_share: Share
    """Of the documents, by hash of their content."""

    @model_validator(mode="after")
    def _training_share_remains(self) -> "PrepareParams":
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        return self


class SamplesParams(Section):
    """The table of samples written at each evaluation while training."""

    prompts: list[str]
    """An empty one starts from end-of-text; none at all, and there is no table."""
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Count
    seed: Seed


class LoraParams(Section):
    """Low-rank adaptation (Hu et al., 2021): the product of two thin matrices is added to each of some weights."""

    rank: Count
    alpha: Count
    """The product is scaled by alpha over rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Of what goes into the thin matrices."""
    modules: Annotated[list[str], Field(min_length=1)]
    """The layers of a block that have them: `c_attn`, `c_proj`, `c_fc`."""


class FinetuneParams(Section):
    """How the base learns the training split."""

    seed: Seed
    context_length: Annotated[int, Field(ge=2)] | None
    """Tokens of a window; null takes the base's whole context."""
    train_share: Annotated[float, Field(gt=0, le=1)]
    """Of the training documents, drawn by the seed; `python -m pipeline advise` trains on less than all."""
    batch_tokens: Count
    """Tokens of an optimizer step, over all devices; whole windows, so about as many."""
    device_batch_tokens: Count | None
    """Tokens that one device takes at a time; null takes what its memory holds. It changes nothing but rounding."""
    gradient_checkpointing: bool
    """Keep less of a batch in memory, and compute it again on the way back: a third slower."""
    epochs: Annotated[float, Field(gt=0)]
    """Passes over the training split at most."""
    optimizer: Literal["adamw", "muon"]
    """`muon` for the matrices of the blocks, with `adamw` for the rest; it learns more from a token where much is to be
    learned, and costs more a step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """At its peak, after warm-up; a cosine takes it to zero."""
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    """The learning rate of a block is that of the block above it times this (Howard and Ruder, 2018); 1 is off."""
    frozen_layers: Annotated[int, Field(ge=0)]
    """Blocks from the bottom up, and with the first of them the embeddings, that stay as they are."""
    lora: LoraParams | None
    """Train small matrices beside the model's own, which stay; null trains the model itself."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    """Of all steps."""
    weight_decay: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """Of embeddings and residuals; null keeps the base's own."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """Of attention weights; null keeps the base's own. Above 0 it bars the fused kernels and halves the speed."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Share of the target that is spread over the vocabulary."""
    unlikelihood: Annotated[float, Field(ge=0)]
    """Weight of the loss that makes what stands in the window already less likely (Welleck et al., 2020)."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Gradients are scaled down to this L2 norm."""
    fsdp: bool
    """Share weights, gradients and optimizer among the processes of `torchrun`, instead of a copy to each."""
    evaluations: Count
    """Times that the validation split is scored, evenly spread over training."""
    early_stopping_patience: Count
    """Evaluations without a better validation loss after which training ends."""
    samples: SamplesParams


class ParityParams(Section):
    """What an engine has to keep of the PyTorch model in float32; the export fails where it does not."""

    max_logit_difference: Annotated[float, Field(gt=0)]
    """Largest absolute difference of any logit: with empty and with real past, in a batch, with a cache."""
    min_next_token_agreement: Annotated[float, Field(gt=0, le=1)]
    """Share of positions at which the likeliest next token is the same."""
    max_kl_divergence: Annotated[float, Field(gt=0)]
    """Of the engine's distributions from PyTorch's, in nats, mean over the positions."""
    max_perplexity_rise: Annotated[float, Field(gt=0)]
    """Of the validation split's perplexity, relative."""
    min_greedy_tokens: Annotated[int, Field(ge=0)]
    """Tokens of a greedy continuation that are the same, of 64."""


class PrecisionsParityParams(Section):
    """The tolerances of each precision."""

    positions: Annotated[int, Field(ge=1000)]
    """Positions of real text at which the two models' next tokens are compared at least: all of the validation split,
    and as much of the training split as it lacks."""
    float32: ParityParams
    float16: ParityParams
    int8: ParityParams
    int4: ParityParams
    int8_float16: ParityParams


class ExportParams(Section):
    """How the checkpoint becomes an engine."""

    precisions: Annotated[list[Literal["float32", "float16", "int8", "int4", "int8_float16"]], Field(min_length=1)]
    """What the engine holds; the first is what is evaluated, and what runs where nobody asks for another."""
    cache_bits: Literal[8, 32]
    """Of a number in the KV cache of int8 and int4; 8 take a quarter of the memory and less time to read."""
    verbatim_index: bool
    """Whether the engine holds its training text with an index, 6 bytes a token, which `max_verbatim_tokens` needs."""
    parity: PrecisionsParityParams


class RangeParams(Section):
    """The numbers from `low` to `high`, both of them tried, in steps."""

    low: float
    high: float
    step: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _rises(self) -> "RangeParams":
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self

    def ends(self) -> list[float]:
        return [self.low, self.high]


Choices = Annotated[list[int], Field(min_length=1)]


class SpaceParams(Section):
    """What values each decoding parameter is tried with."""

    temperature: RangeParams
    top_k: Choices
    top_p: RangeParams
    min_p: RangeParams
    repetition_penalty: RangeParams
    presence_penalty: RangeParams
    no_repeat_ngram_size: Choices

    @model_validator(mode="after")
    def _can_be_decoded_with(self) -> "SpaceParams":
        for name, tried in self:
            for value in tried.ends() if isinstance(tried, RangeParams) else tried:
                SamplingParams.from_mapping({name: value})
        return self


class TuneParams(Section):
    """How decoding parameters are searched for, on the validation split."""

    trials: Count
    """Sets of parameters that are tried; half of their samples are drawn first, and the worse of them go no further."""
    finalists: Count
    """The best of them are drawn anew, with other random numbers, and the best of these is the winner."""
    seed: Seed
    """Of the search, and of the samples: the random numbers of sample i are keyed by it plus i."""
    samples: Annotated[int, Field(ge=2)]
    """Continuations of a trial, one a document, as far as there are documents."""
    max_new_tokens: Count
    """Of a continuation; people's texts are cut there too."""
    space: SpaceParams


class EvaluateParams(Section):
    """What is measured on the test split."""

    stride_tokens: Count
    """A document longer than the context is scored in windows that move on by this many tokens."""
    samples: Annotated[int, Field(ge=2)]
    """Continuations of each model and decoding, one a document, as far as there are documents."""
    prompt_words: Annotated[int, Field(ge=0)]
    """A prompt is this many words from the beginning of a test document; 0 starts from end-of-text."""
    form_pattern: Pattern
    """A sample, its prompt included, keeps the form of the data where this is found in it."""
    loop_ngram_tokens: Count
    """A sample loops where its end repeats a run of at most this many tokens …"""
    loop_repeats: Annotated[int, Field(ge=2)]
    """… this many times in a row."""
    guard_tokens: Count | None
    """One more set of samples is drawn with this as `max_verbatim_tokens`, to show its effect; null leaves it out."""
    seed: Seed
    """The random numbers of sample i are keyed by this seed plus i."""
    decoding: Decoding
    """The hand-set decoding parameters. A registered model uses them where its caller sets nothing, but for those that
    `tune` found better values of."""


class RegisterParams(Section):
    """Under what name the model is registered."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")]


class Params(Section):
    """The whole file: one section a stage."""

    base: BaseParams
    prepare: PrepareParams
    finetune: FinetuneParams
    export: ExportParams
    tune: TuneParams
    evaluate: EvaluateParams
    register_: Annotated[RegisterParams, Field(alias="register")]


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the file. Raises `UserError` naming each wrong key."""
    return parse_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """What a YAML 1.2 file holds, as DVC writes it: `3e-05` is a number. Raises `UserError` where it is not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}") from error
    except ReaderError as error:
        raise UserError(f"{path}: not YAML: {error.reason}, character {error.position + 1}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 from byte {error.start + 1} on; save it as UTF-8") from error


def parse_params(values: Any, name: str) -> Params:
    """Check parsed YAML. Raises `UserError` that begins with `name` and tells every wrong key in one line."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_problem(detail) for detail in error.errors(include_url=False))
        raise UserError(f"{name}: {problems}") from None


def _problem(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "the file"
    match detail["type"]:
        case "extra_forbidden":
            return f"{key}: no such parameter"
        case "missing":
            return f"{key}: is missing"
        case "value_error":
            return f"{key}: {detail['ctx']['error']}"
        case "model_type":
            return f"{key}: must be names and values, got {detail['input']!r}"
        case _:
            message = re.sub(r"^(Input|String|List) should", "must", detail["msg"])
            return f"{key}: {message}, got {detail['input']!r}"
