"""What every section of a config is, and the error of a user's mistake."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class UserError(ValueError):
    """A mistake that the user can mend: the CLI prints it as one line and exits with code 2."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())
