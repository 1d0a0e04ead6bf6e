"""The names of encoders. Needs no torch, so that a mistyped one is told before the seconds that torch takes."""

from __future__ import annotations

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path

from dist_ssl.config.section import UserError, require

TIMM = "timm/"  # begins the name of an encoder that timm builds
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
_OURS, _VITS = ("resnet_tiny", "resnet_tiny_pyramid"), ("vit_s_16", "vit_b_16")
ENCODERS = (*_OURS, *_RESNETS, *(f"{name}_small" for name in _RESNETS), *_VITS)


def check_encoder(name: str) -> None:
    """Raises UserError for what is no encoder's name, with what there is, or for timm's with the nearest one."""
    if not name.startswith(TIMM):
        if name not in ENCODERS:
            raise UserError(f"model.encoder: expected one of {', '.join(ENCODERS)}, or {TIMM}NAME; got {name!r}")
        return
    require("timm", f"model.encoder = {name}")
    of_timm = name.removeprefix(TIMM)
    if of_timm not in (known := timms_models()):
        near = difflib.get_close_matches(of_timm.partition(".")[0], known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"model.encoder: expected {TIMM} and the name of a model of the timm that is installed, got {name!r}; "
            f"did you mean {TIMM + near!r}? (weights come by model.init)"
        )


@cache
def timms_models() -> tuple[str, ...]:
    """What timm.list_models() gives, sorted, read from its source: importing it imports torch.

    Without names that have a tag of weights, and those that would reach for the network. timm must be installed.
    """
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations
    sources = Path(spec.submodule_search_locations[0], "models").glob("*.py")
    registered = re.compile(r"^@register_model\s*\ndef (\w+)", re.MULTILINE)
    return tuple(sorted(name for source in sources for name in registered.findall(source.read_text("utf-8"))))
