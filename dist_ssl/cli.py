"""The command `dist-ssl`. The only place that sets up logging and turns a user's mistake into one line and exit code 2.

Commands import what they need when they are called: `--help` should not wait for torch.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
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


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run's directory.")] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Its step; the newest valid one by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with train and test shards (transfer).")] = None,
    train_shards: Annotated[str | None, typer.Option(help="Labelled shards that probes are fitted on.")] = None,
    test_shards: Annotated[str | None, typer.Option(help="Labelled shards that probes are scored on.")] = None,
    probes: Annotated[str | None, typer.Option(help="Comma-separated; see evaluation.probes.")] = None,
    name: Annotated[str | None, typer.Option(help="Sub-folder for these results, such as the data's name.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Anybody's weights instead of a run.")] = None,
    encoder: Annotated[str | None, typer.Option(help="The encoder that the weights are of.")] = None,
    config: Annotated[Path | None, typer.Option(help="Config for the weights' evaluation.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the weights' results.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Probe a frozen encoder: linear, kNN, what each layer of the head keeps. Writes results.json, prints a table.

    Example: dist-ssl evaluate runs/quickstart

    Example: dist-ssl evaluate --weights resnet50.pth --encoder resnet50 --data s3://bucket/cifar10
    """
    import json

    import rich

    from dist_ssl import config as configuration
    from dist_ssl import distributed
    from dist_ssl.evaluation import evaluate as evaluation

    overrides = list(overrides)
    if data is not None:
        train_shards, test_shards = train_shards or f"{data}/train", test_shards or f"{data}/test"
        name = name or Path(data).name
    for key, value in (("train_shards", train_shards), ("test_shards", test_shards)):
        overrides += [f"evaluation.{key}={json.dumps(value)}"] if value is not None else []
    if probes is not None:
        overrides += [f"evaluation.probes={json.dumps([p for p in probes.split(',') if p])}"]
    if (run is None) == (weights is None) or (weights is None) != (encoder is None):
        raise UserError("evaluate: expected a run's directory, or --weights FILE --encoder NAME")
    world = distributed.initialize()
    try:
        if run is not None:
            subject = evaluation.run_subject(run, checkpoint, overrides, name)
        else:
            assert weights is not None
            assert encoder is not None
            base = configuration.load(config) if config is not None else configuration.Config()
            base = configuration.with_overrides(base, [f"model.encoder={json.dumps(encoder)}", *overrides])
            subject = evaluation.weights_subject(weights, encoder, base, output)
        results = evaluation.evaluate(subject, world.device)
        if world.rank == 0:
            evaluation.show(results, rich.print)
            rich.print(f"{subject.folder / 'results.json'}")
    finally:
        distributed.shutdown()


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
