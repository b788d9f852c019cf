"""The section `register`: under what name the model is registered."""

from typing import Annotated

from pydantic import Field

from pipeline.params.section import Section


class RegisterParams(Section):
    """Under what name the model is registered."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")]
