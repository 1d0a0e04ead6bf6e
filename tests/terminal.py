"""Commands run as a user runs them, and the code of the pages that tell of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dist_ssl import cli
from tests import template

ROOT = Path(__file__).parent.parent


def dist_ssl(*arguments: str, timeout: float = 300, **environment: Any) -> subprocess.CompletedProcess[str]:
    """`dist-ssl ARGUMENTS` in the project's root."""
    return run([sys.executable, "-m", "dist_ssl.cli", *arguments], timeout, **environment)


def forked(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `dist_ssl`, by a process that has all imports behind it: for what comes after the start. Sees no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, name) for name in ("stdout", "stderr")]
        code = template.fork(main, arguments, environment, places).wait(300)
        return subprocess.CompletedProcess(arguments, code, *(place.read_text() for place in places))


def main(connection: Connection, arguments: tuple[str, ...], environment: dict[str, str], places: list[Path]) -> None:
    """`dist-ssl ARGUMENTS` in a process that `template.fork` made; `places` are the files of stdout and stderr."""
    os.environ |= environment
    for number, place in enumerate(places, 1):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["dist-ssl", *arguments]
    cli.main()


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


def blocks(page: str, language: str, heading: str = "") -> list[str]:
    """The blocks of one language on a page of docs/, those under a heading ("## heading") where one is named."""
    text = (ROOT / "docs" / page).read_text()
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
