"""Configs in and out of TOML: files, `--set section.key=value`, errors that name the key, and what follows from it."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_ssl.config.methods import METHODS, WITH_PREDICTOR
from dist_ssl.config.section import UserError
from dist_ssl.config.sections import MAY_DIFFER_ON_RESUME, Config
from dist_ssl.config.writing import known_keys

# What other libraries and papers call a key of ours.
SYNONYMS = {
    "optimizer.base_learning_rate": ("lr", "base_lr", "learning_rate", "eta"),
    "optimizer.weight_decay": ("wd", "decay"),
    "optimizer.trust_coefficient": ("eta_lars", "trust"),
    "optimizer.warmup_epochs": ("warmup", "warmup_steps"),
    "train.global_batch_size": ("batch_size", "batch", "bs", "bsz"),
    "train.epochs": ("num_epochs", "max_epochs", "epoch"),
    "train.steps": ("num_steps", "max_steps", "iterations"),
    "objective.name": ("method", "loss"),
    "objective.temperature": ("tau", "temp", "t"),
    "objective.teacher_decay": ("ema", "ema_decay", "moco_m", "m"),
    "objective.off_diagonal": ("lambd", "lambda_param"),
    "model.predictor.hidden_dim": ("pred_dim", "prediction_dim"),
    "objective.chunks": ("accumulate_grad_batches", "gradient_accumulation_steps", "accumulation"),
    "model.encoder": ("arch", "backbone", "architecture"),
    "model.head.output_dim": ("proj_dim", "projection_dim", "z_dim"),
    "augment.crop_size": ("image_size", "img_size", "size", "resolution"),
    "data.num_workers": ("workers",),
    "data.shards": ("path", "url", "root", "data_dir", "dataset"),
    "engine.precision": ("dtype", "amp", "bf16", "fp16"),
    "engine.zero_stage": ("zero", "stage"),
    "run.dir": ("output", "output_dir", "out", "save_dir"),
    "log.wandb_project": ("wandb", "project"),
}


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config in a TOML file with `section.key=value` overrides laid over it.

    An override of `objective.name` leaves behind what the file said of another method: keys that the new one does not
    have, and those at the old one's default. Raises UserError naming the key, the file and, for a key that is not
    known, the nearest one that is.
    """
    values = _laid_over(_read(path), overrides)
    return validate(values, str(path), [override.partition("=")[0] for override in overrides])


def origins(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, str]:
    """Dotted key -> "file" or "--set", of the values of a config that `load` gave; the others are defaults."""
    given = _flatten(_laid_over({}, overrides))
    values = _flatten(_laid_over(_read(path), overrides))
    return {key: "--set" if key in given else "file" for key in values}


def loads(text: str, source: str = "config") -> Config:
    """The config in a TOML text, for one that a checkpoint carries."""
    return validate(tomllib.loads(text), source)


def validate(values: dict[str, Any], source: str, overridden: Sequence[str] = ()) -> Config:
    """A Config from nested dictionaries; `source` is named in errors, "--set" in those of the `overridden` keys."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        objective = values.get("objective")
        method = objective.get("name", "nt_xent") if isinstance(objective, dict) else "nt_xent"
        said = (_explain(one, source, overridden, str(method)) for one in error.errors())
        raise UserError("; ".join(said)) from None


def with_overrides(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """A new config; `train.steps` and `train.epochs` replace each other, and so do methods, as `load` says."""
    return validate(_laid_over(config.model_dump(mode="python", exclude_none=True), overrides), "--set")


def resume_diff(saved: Config, new: Config) -> list[str]:
    """Lines `key: saved -> new` for what a resumed run may not change; empty when the resume is allowed."""
    before, after = flat(saved), flat(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in MAY_DIFFER_ON_RESUME)
    ]


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of all keys that are set."""
    return _flatten(config.model_dump(exclude_none=True))


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


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from None


def _laid_over(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Values with overrides set, the method first: what is set of it beside its name is never left behind."""
    for override in sorted(overrides, key=lambda one: not one.startswith("objective.name=")):
        _set(values, override)
    return values


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or "." not in key:
        raise UserError(f"--set {override}: expected section.key=value, such as {nearest_key(key)}=...")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set model.encoder=resnet18
    *sections, name = key.split(".")
    whole = values
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {section!r} is a value, not a section")
    if sections == ["train"] and name in ("steps", "epochs"):
        values.pop("epochs" if name == "steps" else "steps", None)
    if (sections, name) == (["objective"], "name"):
        _leave_method(whole, value)
    values[name] = value


def _leave_method(values: dict[str, Any], new: Any) -> None:
    """Drop what [objective] says of its method, and its predictor, where `new` names another that has none such."""
    objective = values["objective"]
    old = objective.get("name", "nt_xent")
    if old == new or old not in METHODS or not isinstance(new, str) or new not in METHODS:
        return
    before, after = METHODS[old].model_fields, METHODS[new].model_fields
    for key in [key for key in before if key in objective]:
        if key not in after or objective[key] == before[key].default:
            del objective[key]
    if new not in WITH_PREDICTOR and isinstance(model := values.get("model"), dict):
        model.pop("predictor", None)


def nearest_key(wrong: str, method: str = "") -> str:
    """The known key that a wrong one most likely means: by its name in that section, elsewhere, in other libraries.

    With a method, keys of others are none.
    """
    keys = {key.dotted: key for key in known_keys() if not (method and key.methods) or method in key.methods}
    wrong = re.sub(r"\.\d+(?=\.|$)", "", wrong)  # the number of a set of views
    section, _, name = wrong.rpartition(".")
    if section in Config.model_fields or any(key.section == section for key in keys.values()):
        own = {key.name: dotted for dotted, key in keys.items() if key.section == section}
        near = [own_name for own_name in own if name in own_name and len(name) > 3]
        near += difflib.get_close_matches(name, own, n=1)
        if near:
            return own[near[0]]
    elif not section and (near := difflib.get_close_matches(name, Config.model_fields, n=1)):
        return near[0]  # a section of a file
    alike = [dotted for dotted, key in keys.items() if name == key.name or name in SYNONYMS.get(dotted, ())]
    return difflib.get_close_matches(wrong, alike or keys, n=1, cutoff=0.0)[0]


def _explain(error: Any, source: str, overridden: Sequence[str], method: str) -> str:
    loc = [str(part) for part in error["loc"]]
    # pydantic names the member of the union, which is no part of the key.
    if loc[:2] == ["objective", method]:
        del loc[1]
    compared = loc.pop(3) if loc[:2] == ["lab", "objectives"] and len(loc) > 4 else None
    key = ".".join(loc)
    if any(key.startswith(f"{whole}.") for whole in overridden):
        source = "--set"  # what is wrong stands inside a value that it gave
    if error["type"] == "extra_forbidden":
        # pydantic names the section where that is wrong already; --set said the whole key.
        given = next((whole for whole in overridden if f"{whole}.".startswith(f"{key}.")), None)
        source, key = ("--set", given) if given else (source, key)
        nearest = nearest_key(f"objective.{loc[-1]}", compared) if compared else nearest_key(key, method)
        said = f"{source}: unknown key {key!r}; did you mean {nearest!r}?"
        if loc[0] != "objective":
            return said
        names = ", ".join(name for name in METHODS[method].model_fields if name != "name")
        others = [one.methods for one in known_keys() if one.dotted == key]
        if others:
            said = f"{source}: unknown key {key!r}: a key of {', '.join(name for o in others for name in o)}"
        return f"{said}; objective.name = {method!r} has {names}"
    if error["type"] == "union_tag_invalid":
        key = f"{key}.name"
        error = error | {"msg": f"expected one of {', '.join(METHODS)}", "input": error["input"].get("name")}
    source = "--set" if key in overridden else source
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not key:
        return f"{source}: {message}"  # of several sections together, which it names itself
    if isinstance(error["input"], dict):
        return f"{source}: {key}: {message}"
    return f"{source}: {key}: {message}, got {error['input']!r}"
