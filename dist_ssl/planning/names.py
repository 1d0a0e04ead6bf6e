"""`dist-ssl list`: what a config may name."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ssl import config as configuration
from dist_ssl.config import ENCODERS, TIMM
from dist_ssl.data.sources import SOURCES


def names() -> Iterator[str]:
    """Lines: encoders, heads, objectives, probes, sources of images."""
    shown = {"encoders, model.encoder": dict.fromkeys((*ENCODERS, f"{TIMM}NAME"), "")}
    shown |= {"heads, model.head.kind": configuration.HEADS}
    shown |= {"evaluation.probes": dict.fromkeys(configuration.choices("evaluation.probes"), "")}
    shown["objectives, objective.name"] = {name: str(method.__doc__) for name, method in configuration.METHODS.items()}
    shown["sources of images, for shards write"] = SOURCES
    for what, of_kind in shown.items():
        yield f"{what}:"
        yield from (f"  {name:<28}{told}".rstrip() for name, told in of_kind.items())
    yield "what the keys of an objective mean: dist-ssl config --explain objective"
