"""The section `register`: how the model is registered."""

from typing import Annotated

from pydantic import Field

from pipeline.params.section import Section


class RegisterParams(Section):
    """How the model is registered."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")]
    """The name of the model in the registry."""
