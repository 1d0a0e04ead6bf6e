"""A copy of this project's code in the run directory, so that editing the checkout does not change a queued run."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import dist_ssl
import launch


def take(folder: Path) -> Path:
    """Copy the packages dist_ssl and launch, as they are imported now, into `folder`; returns it.

    What they depend on is not copied: it belongs to the environment (or the container) that the job names.
    """
    folder.mkdir(parents=True)
    for package in (dist_ssl, launch):
        assert package.__file__ is not None
        source = Path(package.__file__).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


def environment_lines(folder: Path) -> list[str]:
    """Shell lines after which Python imports the packages from `folder`, whatever directory it starts in."""
    # Without PYTHONSAFEPATH `python -m` would import from the working directory first: the checkout, often.
    return [f"export PYTHONPATH={shlex.quote(str(folder))}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]
