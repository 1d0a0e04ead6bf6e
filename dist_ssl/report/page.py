"""Builds the page: sections from runs, inside `page.html` with `style.css` embedded. A run's texts are escaped."""

from __future__ import annotations

import os
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
    runs = _distinct([read_run(folder) for folder in folders])
    output = output or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    parts = [summary.summary(runs)]
    parts += sections.compared(runs) if len(runs) > 1 else sections.of_one(runs[0])
    parts += [curves.curves(runs)]
    if len(runs) == 1:
        parts += sections.pictures(runs[0])
    parts += [sections.bad_samples(runs), sections.settings(runs), sections.reproduce(runs)]
    return write_page(runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared", parts, output)


def write_page(title: str, parts: list[str], output: Path) -> Path:
    """A page of HTML parts under a title (plain text), written whole or not at all."""
    files = resources.files("dist_ssl.report")
    html = Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style=(files / "style.css").read_text(encoding="utf-8"),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        body="\n".join(part for part in parts if part),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, output)
    return output


def _distinct(runs: list[Run]) -> list[Run]:
    """Runs whose folders share a name are told apart by their parent's."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]
