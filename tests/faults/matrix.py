"""Every checkpoint loaded at every place: W in 1, 2, 3 and ZeRO 0 to 3, each to each, AdamW and LARS: 288 cases.

python -m tests.faults.matrix
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

from rich.progress import track

from tests.test_checkpoint import PLACES, places


def main() -> int:
    failed = []
    cases = list(itertools.product(("adamw", "lars"), PLACES, PLACES))
    for case in track(cases, "save here, load there"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                places(*case, Path(folder))
            except AssertionError as error:
                failed.append(case)
                print(case, error)
    print(f"{len(cases) - len(failed)} of {len(cases)} cases equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
