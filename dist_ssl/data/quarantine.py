"""The log of samples that could not be used, and the limit on how many a run puts up with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dist_ssl.config import DataConfig, UserError

GRACE_SAMPLES = 1000  # the fraction is of at least so many samples, else the first bad one would stop a run
NUM_TOLD = 10


class Quarantine:
    """RUN_DIR/quarantine-rank<r>.jsonl, one object a bad sample: shard, key, reason. Each is written once.

    A file a rank, since appends of several hosts to one file are torn on NFS. `record` raises UserError with the list
    when more than `data.max_bad_fraction` of what this rank consumed was bad; raise it on all ranks.
    """

    def __init__(self, run_dir: str | Path, data: DataConfig, num_samples: int):
        from dist_ssl.distributed import rank  # here, since a report reads `bad_samples` without torch

        self._run_dir, self._rank = Path(run_dir), rank()
        self._limit, self._least = data.max_bad_fraction, min(GRACE_SAMPLES, num_samples)
        self._known: set[tuple[str, str]] | None = None
        self._consumed = self._bad = 0
        self._met: dict[tuple[str, str], str] = {}  # in this start

    def record(self, num_consumed: int, quarantined: Sequence[dict[str, str]]) -> None:
        """Count `num_consumed` samples, write what was bad among them, and raise UserError above the limit."""
        self._consumed += num_consumed
        # A bad sample's replacement may be bad too, and be met again by the next: each counts once a batch.
        met = {_place(entry): f"{entry['key']} ({entry['reason']})" for entry in quarantined}
        self._bad += min(len(met), num_consumed)
        if not met:
            return
        self._met |= met
        self._write(quarantined)
        if self._bad > self._limit * max(self._consumed, self._least):
            named = ", ".join(list(self._met.values())[:NUM_TOLD])
            raise UserError(
                f"{self._bad} of the {self._consumed} samples that rank {self._rank} took since it started were bad, "
                f"more than data.max_bad_fraction = {self._limit:g} of them (of {self._least} at least): "
                f"{named}; all are in {self._run_dir}/quarantine-rank*.jsonl, and "
                "`dist-ssl shards verify --decode` names every bad one of the shards"
            )

    def _write(self, quarantined: Sequence[dict[str, str]]) -> None:
        if self._known is None:
            self._known = {_place(entry) for entry in bad_samples(self._run_dir)}
        path = self._run_dir / f"quarantine-rank{self._rank}.jsonl"
        lines = []
        for entry in quarantined:
            if _place(entry) not in self._known:
                self._known.add(_place(entry))
                lines.append(json.dumps(entry) + "\n")
        if lines and path.exists() and not path.read_bytes().endswith(b"\n"):
            lines.insert(0, "\n")  # after a line that a kill has torn
        if lines:
            with open(path, "a") as file:
                file.write("".join(lines))


def bad_samples(run_dir: str | Path) -> list[dict[str, str]]:
    """What a run could not use and replaced, over all its ranks and starts: shard, key, reason; each sample once.

    Reads `quarantine.jsonl` of older runs too. A torn line, left by a kill or still being written, is passed over.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for path in sorted(Path(run_dir).glob("quarantine*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                found.setdefault(_place(entry), entry)
            except (ValueError, KeyError, TypeError):
                continue
    return list(found.values())


def _place(entry: dict[str, str]) -> tuple[str, str]:
    return entry["shard"], entry["key"]
