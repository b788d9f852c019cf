"""The section `register`: how the model is registered."""

from typing import Annotated

from pydantic import Field

from pipeline.params.section import Section


class RegisterParams(Section):
    """How the model is registered."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")]
    """The name of the model in the registry."""

    about: Annotated[str, Field(max_length=1000)] | None
    """A sentence or two on the model card: what the texts are and what the model is for. None for nothing."""
    licence: str | None
    """The licence of the model on the card, such as CC0-1.0. None if there is no statement."""
