"""Encoders that an evaluation reads: loading them, holding them frozen, proving that they did not change.

Legend: B images, S their side, D width of h.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.models import ProjectionHead, build_encoder
from dist_ssl.models.weights import Match, read_tensors

CPU_ROWS = 32


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
    found = read_tensors(str(weights), StorageConfig())
    match = Match.of(encoder, found)
    if match.missing:
        raise UserError(
            f"{weights}: not the weights of {encoder_name}: {len(match.missing)} of {len(match.wanted)} tensors are "
            f"missing, the first is {match.missing[0]!r}; the file holds {len(found)} tensors, such as "
            f"{next(iter(found), 'none')!r}"
        )
    for name, (expected, got) in match.misshapen.items():
        raise UserError(f"{weights}: {name}: expected shape {expected} for {encoder_name}, got {got}")
    encoder.load_state_dict(match.taken, strict=False)
    return encoder.eval()
