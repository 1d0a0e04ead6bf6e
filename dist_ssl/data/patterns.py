"""Many files by one name: braces, `*` and `?`, directories."""

from __future__ import annotations

import re
from itertools import product

from dist_ssl import storage
from dist_ssl.config import StorageConfig, UserError

MAX_URLS = 10_000_000


def matching(location: str, ending: str, config: StorageConfig, hint: str = "") -> list[str]:
    """The URLs of what a pattern of braces, `*` and `?` names, or of a directory's files of that ending.

    Files that braces alone name need not be there. Raises UserError where nothing is found; `hint` is for local paths.
    """
    storage.check_url(location)
    if set(location) & set("{*?") or location.endswith(ending):
        found = [storage.glob(one, config) if set(one) & set("*?") else [one] for one in expand(location)]
        urls = list(dict.fromkeys(absolute(url) for of_one in found for url in of_one))
        if not urls:
            raise UserError(f"{location}: nothing there is called so")
        return urls
    urls = [absolute(url) for url in storage.list_files(location, config) if url.endswith(ending)]
    if not urls:
        hint = hint if storage.is_local(location) else ""
        raise UserError(
            f"{location}: no {ending} there; expected a directory of them, or a pattern of braces or *{hint}"
        )
    return urls


def expand(pattern: str) -> list[str]:
    """The URLs of a brace pattern: `{0000..1023}` (leading zeros kept) and `{a,b}`, any number of them."""
    parts: list[list[str]] = []
    total = 1
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            total *= max(last - first + 1, 1)
            if last < first or total > MAX_URLS:
                raise UserError(f"{storage.redact(pattern)}: expected up to {MAX_URLS} shards in rising order")
            width = len(numbers[1]) if numbers[1].startswith("0") else 0
            parts.append([str(number).zfill(width) for number in range(first, last + 1)])
        elif piece.startswith("{") and piece.endswith("}") and "," in piece:
            parts.append(piece[1:-1].split(","))
            total *= len(parts[-1])
        elif "{" in piece or "}" in piece:
            raise UserError(f"{storage.redact(pattern)}: expected braces of the form {{0000..1023}} or {{a,b}}")
        else:
            parts.append([piece])
    if total > MAX_URLS:
        raise UserError(f"{storage.redact(pattern)}: expected up to {MAX_URLS} shards, got {total}")
    return ["".join(combination) for combination in product(*parts)]


def absolute(url: str) -> str:
    """Local paths in one spelling, so that they compare; other URLs as they are."""
    return storage.local_path(url) or url
