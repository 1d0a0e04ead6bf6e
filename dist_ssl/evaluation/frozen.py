"""Encoders that an evaluation reads: loading them, holding them frozen, proving that they did not change.

Legend: B images, S their side, D width of h.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_ssl.config import UserError
from dist_ssl.models import ProjectionHead, build_encoder

CPU_ROWS = 32
CONTAINERS = ("state_dict", "model", "model_state_dict", "encoder", "teacher")


class EncoderChangedError(RuntimeError):
    """An encoder that was to stay frozen changed while it was evaluated: its results are void."""


@dataclass
class Readable:
    """An encoder and, where there is one, its head; `read` gives every layer's output under its name."""

    encoder: nn.Module
    head: ProjectionHead | None = None
    suffix: str = ""

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) -> {"h": (B, D), "g1": ..., "z": ...}, each name followed by the suffix."""
        # On a CPU activations of small pieces stay in the caches: twice as fast as 256 images at once (measured).
        pieces = images.split(CPU_ROWS) if images.device.type == "cpu" else (images,)
        outputs = [self.layers(piece) for piece in pieces]
        return {name + self.suffix: torch.cat([one[name] for one in outputs]) for name in outputs[0]}

    def layers(self, images: Tensor) -> dict[str, Tensor]:
        """The same in one forward, for training; names without the suffix."""
        h = self.encoder(images)
        return {"h": h} | (dict(self.head.layers(h)) if self.head is not None else {})

    def modules(self) -> list[nn.Module]:
        return [self.encoder] + ([self.head] if self.head is not None else [])


def digest(*modules: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, shapes, types and bytes."""
    sha = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, tensor in sorted(module.state_dict().items()):
            value = tensor.detach().cpu().contiguous()
            sha.update(f"{number}.{name}:{tuple(value.shape)}:{value.dtype}\n".encode())
            sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@contextlib.contextmanager
def frozen(readables: Iterable[Readable]) -> Iterator[list[dict[str, str]]]:
    """Holds models in eval mode without gradients; yields [{"before": digest}, ...] and adds "after" on leaving.

    Raises EncoderChangedError if a digest differs at the end or a module was put into training mode in between.
    """
    readables = list(readables)
    for readable in readables:
        for module in readable.modules():
            module.eval().requires_grad_(False)
    proofs = [{"before": digest(*readable.modules())} for readable in readables]
    yield proofs
    for readable, proof in zip(readables, proofs, strict=True):
        proof["after"] = digest(*readable.modules())
        name = f"encoder{readable.suffix}"
        training = [n for module in readable.modules() for n, m in module.named_modules() if m.training]
        if proof["before"] != proof["after"]:
            raise EncoderChangedError(
                f"{name} changed during its evaluation: digest {proof['before'][:12]} before, {proof['after'][:12]} "
                "after; nothing was written"
            )
        if training:
            raise EncoderChangedError(
                f"{name} left eval mode during its evaluation ({training[0] or 'root'}); nothing was written"
            )


def with_batch_statistics(encoder: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Sets batch norm's running statistics to their mean over `batches`, the encoder's only pass in training mode.

    An untrained net's running statistics are 0 and 1, which its activations are not: compared as it is, it would
    flatter the trained one. Collective with several ranks: each must bring as many batches. In place.
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        encoder.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over batches
            norm.train()
        with torch.inference_mode():
            for images in batches:
                encoder(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return encoder.eval()


def load_foreign(weights: Path, encoder_name: str, image_size: int) -> nn.Module:
    """Anybody's weights in the encoder of that name: safetensors, or a torch file of tensors only.

    Nothing is unpickled but tensors (`weights_only=True`). Names may carry a prefix (`module.`, `backbone.`,
    `encoder.`) and other entries (a classifier, a head) are left aside; every parameter of the encoder must be there.
    """
    encoder = build_encoder(encoder_name, image_size)
    wanted = {name: tensor for name, tensor in encoder.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = _tensors(weights)
    first = next(iter(wanted))
    prefixes = [name[: -len(first)] for name in found if name == first or name.endswith("." + first)]
    best: dict[str, Tensor] = {}
    for prefix in prefixes:
        matched = {name: found[prefix + name] for name in wanted if prefix + name in found}
        best = max(best, matched, key=len)
    missing = sorted(set(wanted) - set(best))
    if missing:
        raise UserError(
            f"{weights}: not the weights of {encoder_name}: {len(missing)} of {len(wanted)} tensors are missing, "
            f"the first is {missing[0]!r}; the file holds {len(found)} tensors, such as {next(iter(found), 'none')!r}"
        )
    for name, tensor in wanted.items():
        if best[name].shape != tensor.shape:
            raise UserError(
                f"{weights}: {name}: expected shape {tuple(tensor.shape)} for {encoder_name}, "
                f"got {tuple(best[name].shape)}"
            )
    encoder.load_state_dict(best, strict=False)
    return encoder.eval()


def _tensors(weights: Path) -> dict[str, Tensor]:
    if not weights.is_file():
        raise UserError(f"{weights}: no such file of weights")
    if weights.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(weights)
        except SafetensorError as error:
            raise UserError(f"{weights}: not a safetensors file: {error}") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said once, below
            values = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is not a file of tensors
        raise UserError(f"{weights}: not loadable as tensors only, so not loaded at all: {_reason(error)}") from None
    while isinstance(values, dict) and not any(isinstance(value, Tensor) for value in values.values()):
        inner = next((values[name] for name in CONTAINERS if isinstance(values.get(name), dict)), None)
        if inner is None:
            raise UserError(f"{weights}: expected a dictionary of tensors, got keys {sorted(map(str, values))[:5]}")
        values = inner
    if not isinstance(values, dict):
        raise UserError(f"{weights}: expected a dictionary of tensors, got {type(values).__name__}")
    return {str(name): value for name, value in values.items() if isinstance(value, Tensor)}


def _reason(error: Exception) -> str:
    """One line of the page that torch writes, without its control codes and its advice to trust the file."""
    if found := re.search(r"GLOBAL ([\w.]{1,100})", str(error)):
        return f"it holds a {found[1]}, which is code; save the model's state_dict() and give that file"
    said = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    line = said[1] if said else next(iter(str(error).splitlines()), type(error).__name__)
    return "".join(character for character in line if character.isprintable())[:200]
