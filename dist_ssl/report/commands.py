"""The commands that look at runs: `dist-ssl report`, `runs`, `status`, `prune`. None needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.")],
    output: Annotated[Path | None, typer.Option(help="RUN/report.html by default, ./report.html for several.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again while the runs go on; it reloads itself.")
    ] = False,
    every_seconds: Annotated[float, typer.Option(min=1.0, help="How often --watch does.")] = 15.0,
) -> None:
    """Write one self-contained HTML page of a run, or of several side by side.

    With --watch until all of them are complete, or Ctrl-C; no server is needed, the browser opens the file.

    Example: dist-ssl report runs/quickstart

    Example: dist-ssl report runs/quickstart --watch

    Example: dist-ssl report runs/none runs/linear runs/mlp --output heads.html
    """
    from dist_ssl.report import page

    typer.echo(page.watch(runs, output, every_seconds) if watch else page.build(runs, output))


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where runs are, such as runs/.")]) -> None:
    """List the runs in a folder: step, loss, last accuracy, state.

    Example: dist-ssl runs runs
    """
    import rich
    from rich.table import Table

    from dist_ssl.config import UserError
    from dist_ssl.report.status import runs_below, status

    table = Table("run", "state", "step", "loss", "accuracy", "objective", "encoder")
    found = runs_below(folder)
    if not found:
        raise UserError(f"{folder}: no run in it, up to three folders deep")
    problems = []
    for run in found:
        try:
            one = status(run)
        except UserError as error:  # of another version, say: the others are still listed
            table.add_row(str(run.relative_to(folder)), "not readable")
            problems.append(f"not readable: {error}")
            continue
        table.add_row(str(run.relative_to(folder)), *_cells(one), one["objective"], one["encoder"])
    rich.print(table)
    for problem in problems:
        typer.echo(problem)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON, for tools.")] = False,
) -> None:
    """Say how far a run is.

    The JSON holds run, state (not begun, running, stopped, complete), step, steps (all of them), epoch, loss (null: not
    finite), images_per_second, silent_seconds (since its last line of metrics; running means less than 300),
    checkpoint (the newest committed step), objective, encoder, accuracy (probe, layer, top1, step, data) or null.

    Example: dist-ssl status runs/quickstart --json
    """
    import json

    from dist_ssl.report import status as progress

    found = progress.status(run)
    if as_json:
        typer.echo(json.dumps(found))
        return
    state, step, loss, accuracy = _cells(found)
    committed = "no checkpoint" if found["checkpoint"] is None else f"checkpoint of step {found['checkpoint']}"
    typer.echo(f"{run}: {state}, step {step}, loss {loss or 'none yet'}, {committed}, {accuracy or 'not evaluated'}")


@app.command()
def prune(
    folder: Annotated[Path, typer.Argument(help="Where runs are, such as runs/.")],
    older_than_days: Annotated[float, typer.Option(min=0, help="Leave younger ones alone.")] = 0.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; else they are listed only.")] = False,
) -> None:
    """List the runs that --restart has set aside, with what they take on the disk, and remove them with --delete.

    Checkpoints in an object store (checkpoint.url) are not touched.

    Example: dist-ssl prune runs --older-than-days 30 --delete
    """
    from dist_ssl.report.status import remove, set_aside

    chosen = [one for one in set_aside(folder) if one[2] >= older_than_days]
    for run, num_bytes, days in chosen:
        if delete:
            remove(run)
        typer.echo(f"{'removed ' if delete else ''}{run}: {num_bytes / 1e9:.2f} GB, {days:.0f} days old")
    total = sum(num_bytes for _, num_bytes, _ in chosen) / 1e9
    what = "removed" if delete else "to remove with --delete"
    typer.echo(f"{len(chosen)} set aside, {total:.2f} GB {what}" if chosen else f"{folder}: nothing was set aside")


def _cells(one: dict[str, Any]) -> tuple[str, str, str, str]:
    """State, step, loss and accuracy as they are shown."""
    loss = "" if one["loss"] is None else f"{one['loss']:.4f}"
    found = one["accuracy"]
    accuracy = f"{found['probe']} {found['layer']} {found['top1']:.1%}" if found else ""
    if found and found["step"] != one["step"]:
        accuracy += f" (step {found['step']})"
    return one["state"], f"{one['step']}/{one['steps'] or '?'}", loss, accuracy
