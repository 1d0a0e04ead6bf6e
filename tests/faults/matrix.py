"""Every checkpoint loaded at every place: W in 1, 2, 3 and ZeRO 0 to 3, each to each, AdamW and LARS: 288 cases.

python -m tests.faults.matrix
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

from rich.progress import track

from tests.test_checkpoint import PLACES, loaded_equals, saved_at


def main() -> int:
    failed = []
    cases = list(itertools.product(("adamw", "lars"), PLACES))
    for optimizer, place in track(cases, "save here, load everywhere"):
        with tempfile.TemporaryDirectory() as folder:
            saved = saved_at(optimizer, place, Path(folder))
            for other in PLACES:
                try:
                    loaded_equals(optimizer, other, Path(folder), saved, exactly=place == other)
                except AssertionError as error:
                    failed.append((optimizer, place, other))
                    print(*failed[-1], error)
    print(f"{len(cases) * len(PLACES) - len(failed)} of {len(cases) * len(PLACES)} cases equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
