"""The command `dist-ssl` whole: what `dist_ssl.cli` offers, and beside it what starts further processes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_ssl.cli import Overrides, app, main


@app.command()
def lab(
    config: Annotated[Path, typer.Argument(help="A config with a [lab] section, such as configs/lab_cpu.toml.")],
    cell: Annotated[int | None, typer.Option(help="Run this cell only: for a job array.")] = None,
    summary_only: Annotated[bool, typer.Option("--summary", help="Run nothing; sum up what is done.")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Compare projection heads on one set of data: a grid of pretrainings, one table, one figure, one paragraph.

    Example: dist-ssl lab configs/lab_cpu.toml

    Example: sbatch --array=0-11 --wrap 'dist-ssl lab configs/lab_gpu.toml --cell $SLURM_ARRAY_TASK_ID'
    """
    import rich

    from dist_ssl import config as configuration
    from dist_ssl.config import UserError
    from dist_ssl.evaluation import lab_summary
    from dist_ssl.evaluation.lab import checked_cells
    from dist_ssl.evaluation.results import write_json
    from dist_ssl.report import lab_page
    from launch import lab as laboratory

    if cell is not None and summary_only:
        raise UserError("--cell runs one cell, --summary none: leave one of them out")
    loaded = configuration.load(config, overrides)
    grid = checked_cells(loaded) if summary_only else laboratory.run(loaded, cell)
    if cell is not None:
        raise typer.Exit(0 if grid[cell].results() is not None else 1)
    summary, folder = lab_summary.summarize_lab(grid), Path(loaded.run.dir)
    write_json(folder / "lab.json", lab_summary.to_json(summary))
    lab_summary.show(summary, rich.print)
    typer.echo(lab_page.build(summary, folder.name, folder / "lab.html"))
    if summary["done"] < summary["cells"] and not summary_only:
        raise typer.Exit(1)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="A TOML file; see configs/.")],
    sweep_keys: Annotated[list[str], typer.Option("--sweep", metavar="KEY=V1,V2", help="Every combination.")],
    ranks: Annotated[int | None, typer.Option(help="Of each run; one a GPU by default, 2 without GPUs.", min=1)] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Evaluate each run at its end.")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Pretrain every combination of values on this machine, one run after another, and print one table.

    Each run has a folder below run.dir, and below checkpoint.url where that is set. The same command goes on: what is
    complete is not run again. One that fails is named and the next one is run; exit code 1 then. On Slurm:
    `python -m launch.slurm pretrain CONFIG --sweep ...`.

    Example: dist-ssl sweep configs/quickstart.toml --sweep objective.temperature=0.05,0.1 --sweep run.seed=0,1
    """
    from dist_ssl import config as configuration
    from launch import sweep as sweeps

    base = configuration.load(config, overrides)
    failed = sweeps.run(config, base, overrides, sweep_keys, ranks, evaluate)
    typer.echo(sweeps.table(base.run.dir))
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
