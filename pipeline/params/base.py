"""The section `base`: where the model to fine-tune comes from."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.params.section import Count, Section, Seed


class ScratchParams(Section):
    """The small GPT-2 that `base.source: scratch` makes."""

    vocabulary_size: Annotated[int, Field(ge=257)]
    """The size of the byte-level BPE, in tokens: 256 bytes, end-of-text, and merges learned from the training split."""
    context_length: Annotated[int, Field(ge=2)]
    """The number of positions, in tokens."""
    layers: Count
    heads: Count
    width: Count
    """The size of the residual stream; a multiple of `heads`."""
    seed: Seed
    """The seed of the random weights."""

    @model_validator(mode="after")
    def _check_width(self) -> "ScratchParams":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class BaseParams(Section):
    """Where the model to be fine-tuned comes from."""

    source: Annotated[str, Field(min_length=1)]
    """A folder, the id of a model on the hub, or `scratch`."""
    revision: str | None
    """The hash of the commit to fetch from the hub, 40 hexadecimal digits; null for a folder or `scratch`."""
    split_special_tokens: bool
    """Whether the name of a special token of the source, such as `<|user|>`, is ordinary characters in a text and not
    that token. The name of end-of-text always is."""
    scratch: ScratchParams
