"""An index that is made in parts, by the jobs of a Slurm array say: each writes a manifest of its shards, and `merge`
joins them into that of all.

A part is a manifest like any other, whose details say of which list it is a part, and where in that list it begins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.manifest import MANIFEST, Manifest, read_manifest
from dist_ssl.data.patterns import absolute

NUM_NAMED = 8  # parts that a message names
_SHARED = ("parts", "shards", "list", "checksums", "json_label")  # of the details, what all parts of an index share


def span(part: tuple[int, int], total: int) -> range:
    """Which of `total` shards part (k, n), of 1 to n, has."""
    k, n = part
    return range(total * (k - 1) // n, total * k // n)


def parse(text: str) -> tuple[int, int]:
    """(k, n) of "k/n". Raises UserError unless 1 <= k <= n."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    k, n = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= k <= n:
        raise UserError(f"--part: expected K/N with 1 <= K <= N, such as 1/64, got {text}")
    return k, n


def url_of(folder: str, part: tuple[int, int]) -> str:
    return storage.join(folder, f"manifest.part-{part[0]:05d}-of-{part[1]:05d}.json")


def details_of(part: tuple[int, int], urls: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """What a part says of itself: its place in the list of all shards, and how it was indexed."""
    listed = hashlib.sha256("\n".join(urls).encode()).hexdigest()
    k, n = part
    return {"part": k, "parts": n, "first": span(part, len(urls)).start, "shards": len(urls), "list": listed, **options}


def merge(folder: str, config: StorageConfig) -> Manifest:
    """Join the parts in a folder into its manifest, and remove them.

    Raises UserError, and writes nothing, where parts are missing, overlap, or are of different lists or options.
    """
    folder = absolute(folder).rstrip("/")
    urls = storage.glob(storage.join(folder, "manifest.part-*-of-*.json"), config)
    if not urls:
        raise UserError(f"{folder}: no parts there; write them with `dist-ssl shards index ... --part K/N`")
    parts = [read_manifest(url, config) for url in urls]  # whose names sort as their numbers
    try:
        kinds = {_kind(part): part for part in parts}
        numbers = [int(part.details["part"]) for part in parts]
        firsts = [int(part.details["first"]) for part in parts]
        num_parts, total = int(parts[0].details["parts"]), int(parts[0].details["shards"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{folder}: a part does not say of what: {type(error).__name__}: {error}") from None
    if len(kinds) > 1:
        one, another = list(kinds.values())[:2]
        key = next(key for key in _SHARED if one.details[key] != another.details[key])
        said = f"{key} {one.details[key]} and {another.details[key]}"
        raise UserError(f"{one.url} and {another.url} are parts of different indexes ({said}); remove those of one")
    missing = sorted(set(range(1, num_parts + 1)) - set(numbers))
    if missing:
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise UserError(
            f"{folder}: of {num_parts} parts {', '.join(map(str, missing[:NUM_NAMED]))}{more} are missing; run "
            f"`dist-ssl shards index` with --part {missing[0]}/{num_parts}"
        )
    ends = [start + len(part.shards) for start, part in zip(firsts, parts, strict=True)]
    if len(parts) > num_parts or firsts != [0, *ends[:-1]] or ends[-1] != total:
        raise UserError(f"{folder}: its parts overlap, or leave a gap; remove them and index again")
    details = {"source": parts[0].details["source"]}
    details |= {key: value for key, value in parts[0].details.items() if key == "json_label" and value is not None}
    details["without_image"] = sum(int(part.details["without_image"]) for part in parts)
    merged = Manifest(
        storage.join(folder, MANIFEST), tuple(shard for part in parts for shard in part.shards), (), details
    )
    write(merged, config)
    for part in parts:
        storage.remove(part.url, config)
    return merged


def write(manifest: Manifest, config: StorageConfig) -> None:
    """Write a manifest. Raises UserError where it holds no image."""
    if manifest.num_samples == 0 and "part" not in manifest.details:
        raise UserError(f"{manifest.details['source']}: its {len(manifest.shards)} shards hold no image")
    storage.write_bytes(manifest.url, manifest.to_json().encode(), config)


def _kind(part: Manifest) -> tuple[Any, ...]:
    return tuple(part.details[key] for key in _SHARED)
