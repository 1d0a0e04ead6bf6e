"""Builds the page: sections from runs, inside `page.html` with `style.css` embedded. A run's texts are escaped."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from dist_ssl.report import curves, sections, summary
from dist_ssl.report.runs import Run, read_run


def build(folders: list[Path], output: Path | None = None) -> Path:
    """Writes the report of one run (RUN/report.html by default) or of several compared, and returns its path."""
    return _write([read_run(folder) for folder in folders], output)


def watch(folders: list[Path], output: Path | None, seconds: float) -> Path:
    """Writes it again every so many seconds, and has the page reload itself, until all runs are complete.

    An interrupt ends it too; the last page stands still.
    """
    try:
        while True:
            runs = [read_run(folder) for folder in folders]
            if all(run.progress.get("state", "complete") == "complete" for run in runs):
                break
            _write(runs, output, seconds)
            time.sleep(seconds)
    except KeyboardInterrupt:
        runs = [read_run(folder) for folder in folders]
    return _write(runs, output)


def _write(runs: list[Run], output: Path | None, reload_seconds: float | None = None) -> Path:
    runs = _distinct(runs)
    output = output or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    parts = [summary.summary(runs)]
    parts += sections.compared(runs) if len(runs) > 1 else sections.of_one(runs[0])
    parts += [curves.curves(runs)]
    if len(runs) == 1:
        parts += sections.pictures(runs[0])
    parts += [sections.bad_samples(runs), sections.settings(runs), sections.reproduce(runs)]
    return write_page(runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared", parts, output, reload_seconds)


def write_page(title: str, parts: list[str], output: Path, reload_seconds: float | None = None) -> Path:
    """A page of HTML parts under a title (plain text), written whole or not at all; it may reload itself."""
    files = resources.files("dist_ssl.report")
    html = Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style=(files / "style.css").read_text(encoding="utf-8"),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        reload=f'<meta http-equiv="refresh" content="{reload_seconds:g}">\n' if reload_seconds else "",
        said=f"; it reloads itself every {reload_seconds:g} s" if reload_seconds else "",
        body="\n".join(part for part in parts if part),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(html, encoding="utf-8", errors="backslashreplace")  # names of folders are any bytes
    os.replace(temporary, output)
    return output


def _distinct(runs: list[Run]) -> list[Run]:
    """Runs whose folders share a name are told apart by their parent's."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]
