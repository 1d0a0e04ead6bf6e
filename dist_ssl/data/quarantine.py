"""The log of samples that could not be used, and the limit on how many a run puts up with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from dist_ssl.config import DataConfig, UserError

GRACE_SAMPLES = 1000  # the fraction is of at least so many samples, else the first bad one would stop a run
NUM_TOLD = 10


class Quarantine:
    """RUN_DIR/quarantine.jsonl, one object a bad sample: shard, key, reason. Each is written once.

    All ranks append to one file, a line a write. `record` raises UserError with the list when more than
    `data.max_bad_fraction` of what this rank consumed was bad; raise it on all ranks.
    """

    def __init__(self, run_dir: str | Path, data: DataConfig, num_samples: int):
        self._path = Path(run_dir) / "quarantine.jsonl"
        self._limit, self._least = data.max_bad_fraction, min(GRACE_SAMPLES, num_samples)
        self._known: set[tuple[str, str]] = set()
        self._consumed = self._bad = 0
        self._reasons: list[str] = []

    def record(self, num_consumed: int, quarantined: Sequence[dict[str, str]]) -> None:
        """Count `num_consumed` samples, write what was bad among them, and raise UserError above the limit."""
        self._consumed += num_consumed
        # A bad sample's replacement may be bad too, and be met again by the next: each counts once a batch.
        self._bad += min(len({(entry["shard"], entry["key"]) for entry in quarantined}), num_consumed)
        if not quarantined:
            return
        if not self._known and self._path.exists():
            for line in self._path.read_text().splitlines():
                entry = json.loads(line)
                self._known.add((entry["shard"], entry["key"]))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            for entry in quarantined:
                if (entry["shard"], entry["key"]) not in self._known:
                    self._known.add((entry["shard"], entry["key"]))
                    self._reasons.append(f"{entry['key']} ({entry['reason']})")
                    os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)
        if self._bad > self._limit * max(self._consumed, self._least):
            raise UserError(
                f"{self._bad} of {self._consumed} samples were bad, more than data.max_bad_fraction = {self._limit:g}: "
                f"{', '.join(self._reasons[:NUM_TOLD])}; all are listed in {self._path}, and `dist-ssl shards verify` "
                "tells whether a shard is damaged"
            )
