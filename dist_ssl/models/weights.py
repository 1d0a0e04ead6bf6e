"""Weights that somebody trained, from a file of tensors: what of it is an encoder's, by name and shape.

Safetensors, or a torch file that `weights_only=True` reads: nothing else is unpickled.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.distributed import rank
from dist_ssl.storage import local_path, read_bytes, redact

log = logging.getLogger(__name__)
CONTAINERS = ("state_dict", "model", "model_state_dict", "encoder", "teacher")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """What a file has of the tensors that an encoder wants; counters of batches are not asked for."""

    wanted: tuple[str, ...]
    taken: dict[str, Tensor]
    missing: list[str]
    misshapen: dict[str, tuple[Shape, Shape]]  # name -> (expected, got)
    left_aside: list[str]  # of the file, under its own names

    @staticmethod
    def of(encoder: nn.Module, found: dict[str, Tensor]) -> Match:
        """The file's names may carry a prefix, the one that most of them match by."""
        wanted = {n: t for n, t in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}
        parts = ((name, name.split(".")) for name in found)
        prefixes = Counter(
            name.removesuffix(ending)
            for name, words in parts
            for start in range(len(words))
            if (ending := ".".join(words[start:])) in wanted
        )
        prefix = prefixes.most_common(1)[0][0] if prefixes else ""
        here = {name: found[prefix + name] for name in wanted if prefix + name in found}
        return Match(
            tuple(wanted),
            {name: tensor for name, tensor in here.items() if tensor.shape == wanted[name].shape},
            sorted(set(wanted) - set(here)),
            {n: (tuple(wanted[n].shape), tuple(t.shape)) for n, t in here.items() if t.shape != wanted[n].shape},
            [name for name in found if name.removeprefix(prefix) not in here and "num_batches_tracked" not in name],
        )


def start_from(encoder: nn.Module, url: str, storage: StorageConfig) -> None:
    """Give an encoder the weights of a file, where names and shapes match; the others stay as they were drawn.

    One line of the log says what matched. Raises UserError where nothing does.
    """
    found = read_tensors(url, storage)
    match = Match.of(encoder, found)
    shapes = [f"{name} (expected {expected}, got {got})" for name, (expected, got) in match.misshapen.items()]
    if not match.taken:
        raise UserError(
            f"model.init = {redact(url)}: nothing in it has the name and shape of one of the encoder's "
            f"{len(match.wanted)} tensors, such as {match.wanted[0]!r}; it holds {_some(list(found))}"
            + (f"; of another shape: {_some(shapes)}" if shapes else "")
        )
    encoder.load_state_dict(match.taken, strict=False)
    if rank() == 0:
        log.info(
            "model.init = %s: %d of the encoder's %d tensors; not there: %s; of another shape: %s; left aside: %s",
            redact(url), len(match.taken), len(match.wanted),
            _some(match.missing), _some(shapes), _some(match.left_aside),
        )  # fmt: skip


def _some(names: Collection[str]) -> str:
    """How many, and the first three."""
    first = ", ".join(list(names)[:3])
    return f"{len(names)} ({first}{', ...' if len(names) > 3 else ''})" if names else "none"


def read_tensors(url: str, storage: StorageConfig) -> dict[str, Tensor]:
    """All tensors of a file, by the file's names, on the CPU. Raises UserError where it is not a file of tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    path = local_path(url)
    if path is not None and not os.path.isfile(path):
        raise UserError(f"{url}: no such file of weights")
    try:
        content = read_bytes(url, storage) if path is None else b""
        if url.endswith(".safetensors"):
            return load_file(path) if path is not None else load(content)
    except FileNotFoundError:
        raise UserError(f"{redact(url)}: no such file of weights") from None
    except SafetensorError as error:
        raise UserError(f"{redact(url)}: not a safetensors file: {error}") from None
    return _of_torch(redact(url), path if path is not None else io.BytesIO(content))


def _of_torch(shown: str, file: str | io.BytesIO) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said once, below
            values: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is not a file of tensors
        raise UserError(f"{shown}: not loadable as tensors only, so not loaded at all: {_reason(error)}") from None
    while isinstance(values, dict) and not any(isinstance(value, Tensor) for value in values.values()):
        inner = next((values[name] for name in CONTAINERS if isinstance(values.get(name), dict)), None)
        if inner is None:
            raise UserError(f"{shown}: expected a dictionary of tensors, got keys {sorted(map(str, values))[:5]}")
        values = inner
    if not isinstance(values, dict):
        raise UserError(f"{shown}: expected a dictionary of tensors, got {type(values).__name__}")
    return {str(name): value for name, value in values.items() if isinstance(value, Tensor)}


def _reason(error: Exception) -> str:
    """One line of the page that torch writes, without its control codes and its advice to trust the file."""
    if found := re.search(r"GLOBAL ([\w.]{1,100})", str(error)):
        return f"it holds a {found[1]}, which is code; save the model's state_dict() and give that file"
    said = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    line = said[1] if said else next(iter(str(error).splitlines()), type(error).__name__)
    return "".join(character for character in line if character.isprintable())[:200]
