"""The command `dist-ssl`. The only place that sets up logging and turns a user's mistake into one line and exit code 2.

Commands import what they need when they are called: `--help` should not wait for torch.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from dist_ssl import __version__
from dist_ssl.config import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Contrastive pretraining of image encoders: exact, fast, restartable, and able to show what it learned.",
)
shards_app = typer.Typer(no_args_is_help=True, help="Write, index and verify WebDataset shards.")
app.add_typer(shards_app, name="shards")

Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a config key.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dist-ssl {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """The entry point: runs the command; UserError becomes `error: ...` on stderr and exit code 2."""
    from rich.logging import RichHandler

    logging.basicConfig(level="INFO", format="%(message)s", handlers=[RichHandler(show_path=False)])
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
