"""Where each fragment of each tensor stands, as a manifest tells it: an entry a tensor, whatever the number of ranks.

Under ZeRO 0 every rank writes its near-equal share of a tensor, under ZeRO 3 its piece of ceil(n / W) elements; two
words say so. Else (ZeRO 1 and 2, what rank 0 alone writes) ranks are listed, some for each tensor. Format 1 listed all:
207,000 fragments in 53 MB for a ResNet-50 on 1,024 ranks.

Legend: W ranks that wrote, n elements of a tensor, kind: "master", a state of the optimizer, "teacher", "replicated".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

FORMAT = 2  # 1 is read too

Piece = tuple[str, str, tuple[int, ...], int, int]  # name, kind, shape of the whole, offset, length: what a rank wrote
Place = tuple[int, int, int]  # rank, offset, length


class Fragment(NamedTuple):
    """Elements [offset, offset + length) of a flat tensor are the tensor `key` of a file."""

    file: str
    key: str
    offset: int
    length: int


def key_of(name: str, kind: str, offset: int) -> str:
    return f"{name}/{kind}" if kind == "replicated" else f"{name}/{kind}@{offset}"


def shares(size: int, num_ranks: int) -> Iterator[Place]:
    """Near-equal ones, those of no element left out."""
    edges = [size * rank // num_ranks for rank in range(num_ranks + 1)]
    yield from ((r, a, b - a) for r, (a, b) in enumerate(pairwise(edges)) if b > a)


def slices(size: int, num_ranks: int) -> Iterator[Place]:
    """All of ceil(size / num_ranks) elements, but the last ones."""
    each = -(-size // num_ranks)
    yield from ((rank, rank * each, min(each, size - rank * each)) for rank in range(num_ranks) if rank * each < size)


RULES = {"shares": shares, "slices": slices}


def entries(pieces_of_ranks: Sequence[Sequence[Piece]]) -> list[dict[str, Any]]:
    """The manifest's "tensors", from what each rank wrote."""
    places: dict[tuple[str, str, tuple[int, ...]], list[Place]] = {}
    for rank, pieces in enumerate(pieces_of_ranks):
        for name, kind, shape, offset, length in pieces:
            places.setdefault((name, kind, shape), []).append((rank, offset, length))
    return [
        {"name": name, "kind": kind, "shape": list(shape), "at": _told(found, prod(shape), len(pieces_of_ranks))}
        for (name, kind, shape), found in places.items()
    ]


def _told(places: list[Place], size: int, num_ranks: int) -> str | list[list[int]]:
    for name, rule in RULES.items():
        if places == list(rule(size, num_ranks)):
            return name
    return [list(place) for place in places]


class Table:
    """The fragments of a manifest, of format 1 or 2. Raises ValueError, KeyError and such where it is no manifest."""

    def __init__(self, manifest: dict[str, Any]):
        self._files: list[str] = []
        self.shapes: dict[tuple[str, str], list[int]] = {}
        self._at: dict[tuple[str, str], str | list[Fragment]] = {}
        match manifest["format"]:
            case 1:
                for entry in manifest["fragments"]:
                    fragment = Fragment(entry["file"], entry["key"], int(entry["offset"]), int(entry["length"]))
                    self._add(entry, [fragment])
            case 2:
                self._files = manifest["files_of_ranks"]
                if not isinstance(self._files, list) or not self._files:
                    raise ValueError(f"expected files of ranks, got {self._files!r}")
                for entry in manifest["tensors"]:
                    self._add(entry, entry["at"] if isinstance(entry["at"], str) else self._listed(entry))
            case other:
                raise ValueError(f"expected format 1 or {FORMAT}, got {other}")

    def files(self) -> set[str]:
        """All that fragments are in."""
        listed = (at for at in self._at.values() if not isinstance(at, str))
        return {*self._files, *(fragment.file for at in listed for fragment in at)}

    def fragments(self, name: str, kind: str) -> Iterator[Fragment]:
        """Of one tensor, in the order of ranks; none where there is no such tensor."""
        at = self._at.get((name, kind), [])
        if not isinstance(at, str):
            yield from at
            return
        for rank, offset, length in RULES[at](prod(self.shapes[name, kind]), len(self._files)):
            yield Fragment(self._files[rank], key_of(name, kind, offset), offset, length)

    def _listed(self, entry: dict[str, Any]) -> list[Fragment]:
        return [
            Fragment(self._files[rank], key_of(entry["name"], entry["kind"], offset), int(offset), int(length))
            for rank, offset, length in entry["at"]
        ]

    def _add(self, entry: dict[str, Any], at: str | list[Fragment]) -> None:
        tensor = entry["name"], entry["kind"]
        if isinstance(at, str) and at not in RULES:
            raise ValueError(f"expected one of {sorted(RULES)}, got {at!r}")
        self.shapes[tensor] = [int(side) for side in entry["shape"]]
        before = self._at.setdefault(tensor, at)
        if before is not at:
            if isinstance(before, str) or isinstance(at, str):
                raise ValueError(f"it tells of {tensor} twice")
            before += at
