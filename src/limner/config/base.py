"""What all sections of a recipe share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, and strict about names: a misspelt key is an error, never a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
