"""What every section of a config is, and the error of a user's mistake."""

from __future__ import annotations

import importlib.util

from pydantic import BaseModel, ConfigDict


class UserError(ValueError):
    """A mistake that the user can mend: the CLI prints it as one line and exits with code 2."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


def require(package: str, asked_by: str, otherwise: str = "") -> None:
    """Raises UserError where a package that a key asks for is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{asked_by}: {package} is not installed here; pip install {package}{otherwise}")
