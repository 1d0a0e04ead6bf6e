"""Configs in and out of TOML: files, `--set section.key=value`, errors that name the key, and what follows from it."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from dist_ssl.config.sections import MAY_DIFFER_ON_RESUME, Config, UserError


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys, sections included: `run`, `run.dir`, ..."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config in a TOML file with `section.key=value` overrides laid over it.

    Raises UserError naming the key, the file and, for a key that is not known, the nearest one that is.
    """
    try:
        values = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from None
    for override in overrides:
        _set(values, override)
    return validate(values, str(path), [override.partition("=")[0] for override in overrides])


def loads(text: str, source: str = "config") -> Config:
    """The config in a TOML text, for one that a checkpoint carries."""
    return validate(tomllib.loads(text), source)


def validate(values: dict[str, Any], source: str, overridden: Sequence[str] = ()) -> Config:
    """A Config from nested dictionaries; `source` is named in errors, "--set" in those of the `overridden` keys."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(one, source, overridden) for one in error.errors())) from None


def dumps(config: Config) -> str:
    """The complete config as TOML; keys whose value is None are left out, which reads back the same."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def with_overrides(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """A new config; `train.steps` and `train.epochs` replace each other."""
    values = config.model_dump(mode="python", exclude_none=True)
    for override in overrides:
        _set(values, override)
    return validate(values, "--set")


def resume_diff(saved: Config, new: Config) -> list[str]:
    """Lines `key: saved -> new` for what a resumed run may not change; empty when the resume is allowed."""
    before, after = _flatten(saved.model_dump()), _flatten(new.model_dump())
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in MAY_DIFFER_ON_RESUME)
    ]


def total_steps(config: Config, num_samples: int) -> int:
    """Optimizer steps of the run: `train.steps`, or as many as consume `train.epochs` whole epochs at least."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return -(-config.train.epochs * num_samples // config.train.global_batch_size)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or "." not in key:
        raise UserError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set model.encoder=resnet18
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {section!r} is a value, not a section")
    if sections == ["train"] and name in ("steps", "epochs"):
        values.pop("epochs" if name == "steps" else "steps", None)
    values[name] = value


def _explain(error: Any, source: str, overridden: Sequence[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    source = "--set" if key in overridden else source
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
        return f"{source}: unknown key {key!r}; did you mean {near[0]!r}?"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(error["input"], dict):
        return f"{source}: {key}: {message}"
    return f"{source}: {key}: {message}, got {error['input']!r}"
