"""Commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def dist_ssl(*arguments: str, timeout: float = 300, **environment: Any) -> subprocess.CompletedProcess[str]:
    """`dist-ssl ARGUMENTS` in the project's root."""
    return run([sys.executable, "-m", "dist_ssl.cli", *arguments], timeout, **environment)


def run(command: list[str], timeout: float = 300, **environment: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
