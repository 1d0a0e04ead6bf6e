"""The command `dist-ssl`. The only place that sets up logging and turns a user's mistake into one line and exit code 2.

Commands import what they need when they are called: `--help` should not wait for torch.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_ssl import __version__
from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError
from dist_ssl.config.environment import (
    EXIT_FENCED,
    EXIT_USERS_MISTAKE,
    rank_in_environment,
    ranks_in_environment,
    started_by_local_launcher,
)
from dist_ssl.data.commands import DataFolder, Overrides
from dist_ssl.data.commands import app as shards_app
from dist_ssl.evaluation.commands import app as evaluation_app
from dist_ssl.planning.commands import app as planning_app
from dist_ssl.report.commands import app as runs_app
from dist_ssl.storage import StorageError
from dist_ssl.storage.layout import check_export_name, config_path

log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Contrastive pretraining of image encoders: exact, fast, restartable, and able to show what it learned.",
)
app.add_typer(shards_app, name="shards")


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
def pretrain(
    config: Annotated[Path, typer.Argument(help="A TOML file; see configs/.")],
    data: DataFolder = None,
    overrides: Overrides = [],  # noqa: B006
    restart: Annotated[bool, typer.Option("--restart", help="Set the run in run.dir aside and begin anew.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Allow the run to become longer than it was.")] = False,
) -> None:
    """Pretrain an encoder, or go on where run.dir's newest checkpoint is. Alone this is a world of one rank.

    Exit codes: 0 complete, 2 a mistake in the config, 75 told to stop and committed: run the same command again.

    Example: dist-ssl pretrain configs/quickstart.toml --data photos --set run.dir=runs/photos

    Example: dist-ssl pretrain configs/debug_cpu.toml --set train.steps=20

    Example: python -m launch.local pretrain configs/quickstart.toml --ranks 2
    """
    checked = configuration.load(config, overrides)
    # Until the loop takes signals, a time limit's or a user's waits: by default it would kill a rank that starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    from dist_ssl.planning.before_start import check_before_start, check_config, check_extras

    # Before torch is imported, which takes seconds, by all ranks; images are found then by one that is alone.
    check_extras(checked)
    if ranks_in_environment() is None:
        checked, data = _with_data(checked, data), None
    if data is None:
        check_config(checked, 1)
    if rank_in_environment() == 0 and not started_by_local_launcher():  # which has said so
        log.info("%s: loading torch, which takes some seconds", config)
    checked = _with_data(checked, data)
    from dist_ssl import distributed
    from dist_ssl.training import interrupts, train

    interrupts.end_with_the_launcher()
    check_before_start(checked)
    code = train.pretrain(checked, restart=restart, extend=extend)
    interrupts.tell_the_launcher(code)
    distributed.shutdown()
    raise typer.Exit(code)


def _with_data(config: Config, data: str | None) -> Config:
    """With the parts of `--data`, which rank 0 indexes first where they are images that nobody indexed."""
    if data is None:
        return config
    from dist_ssl.data.given import training_overrides

    if ranks_in_environment() is not None:
        from dist_ssl import distributed

        distributed.initialize(2 * config.engine.hang_minutes)  # as the training would
    return configuration.with_overrides(config, training_overrides(data, config.storage))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    file: Annotated[Path, typer.Argument(help="The safetensors file to write, its JSON beside it; for timm a folder.")],
    checkpoint: Annotated[int | None, typer.Option(help="Its step; the newest by default.")] = None,
    head: Annotated[bool, typer.Option("--head", help="Write the projection head too.")] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="Write its teacher's.")] = False,
    format: Annotated[str, typer.Option(help="safetensors, or timm: a folder for timm and the Hub.")] = "safetensors",
    batch_norm_from: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="Batch norm's statistics anew, of 4,096 whole images at most.")
    ] = None,
) -> None:
    """Write a run's encoder under torchvision's or timm's parameter names.

    Example: dist-ssl export runs/quickstart encoder.safetensors

    Example: dist-ssl export runs/imagenet resnet50.safetensors --batch-norm-from data/imagenet/train

    Example: dist-ssl export runs/imagenet resnet50-simclr --format timm
    """
    if format not in ("safetensors", "timm"):
        raise UserError(f"--format {format}: expected safetensors or timm")
    if format == "timm" and head:
        raise UserError("--head: not with --format timm, which has no place for a projection head; leave it out")
    if format == "safetensors":
        check_export_name(file)
    config_path(run)  # where there is none, before torch is imported, which takes seconds
    norms = None
    if batch_norm_from is not None:
        from dist_ssl.data.manifest import load_manifest

        load_manifest(batch_norm_from, configuration.load(config_path(run)).storage)  # likewise
        from dist_ssl.evaluation.whole_images import statistics

        norms = statistics(run, batch_norm_from, checkpoint, teacher)
    if format == "timm":
        from dist_ssl.report.timm_folder import export_for_timm

        step = export_for_timm(run, file, checkpoint, teacher, norms)
    else:
        from dist_ssl.checkpoint import export_encoder

        step = export_encoder(run, file, with_head=head, step=checkpoint, teacher=teacher, norms=norms)
    typer.echo(f"{file}: the {'teacher' if teacher else 'encoder'} of step {step}")


for commands in (evaluation_app, runs_app, planning_app):
    app.registered_commands += commands.registered_commands


def _set_up_logging() -> None:
    """On a terminal, rich; in a log file a line a message, whole, so that it can be searched."""
    if not sys.stderr.isatty():
        logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
        return
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level="INFO", format="%(message)s", handlers=[handler])


@app.command("config")
def show_config(
    file: Annotated[str, typer.Argument(help="A TOML file; see configs/. With --explain, a section's name.")] = "",
    explained: Annotated[bool, typer.Option("--explain", help="Say what each key means instead.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/config.md.")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Print every key of a config as TOML: those that its file sets, those of --set, and the defaults, told apart.

    Example: dist-ssl config configs/quickstart.toml --set train.steps=20

    Example: dist-ssl config --explain optimizer
    """
    if markdown or explained:
        lines = (f"{line}\n" for line in configuration.explain(file or None))
        typer.echo(configuration.explain_page() if markdown else "".join(lines), nl=False)
        return
    if not file:
        raise UserError("config: expected a TOML file, or --explain; see configs/")
    resolved = configuration.load(file, overrides)
    typer.echo(configuration.dumps_with_origins(resolved, configuration.origins(file, overrides)), nl=False)


def run(app: typer.Typer) -> None:
    """Run a command line and exit with its code; a user's mistake is one line on stderr and code 2.

    Of several ranks the first that fails says why, and all exit with its code.
    """
    usage_error: Any = typer.BadParameter.__base__  # typer exports no name for it
    code = EXIT_USERS_MISTAKE
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except usage_error as error:
        if error.ctx is None or not error.format_message().strip():
            sys.exit(EXIT_USERS_MISTAKE)  # called without arguments: its help is on the screen
        problem = f"{error.format_message().rstrip('.')}; see {error.ctx.command_path} --help"
    except UserError as error:
        problem = str(error)
    except (FileNotFoundError, PermissionError) as error:
        problem = f"{error}; expected a path that exists and that you may read or write"
        problem += ", by the credentials in the environment" if "://" in problem else ""
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        problem = f"{error}; expected another path: a file is where a folder would be, or a folder where a file would"
    except MemoryError as error:
        problem = f"out of memory: {error}; lower train.global_batch_size, augment.crop_size or data.num_workers"
    except StorageError as error:
        problem, code = str(error), 1  # unlike a mistake of the user's, this may pass: launchers start again
    except Exception as error:
        code = EXIT_FENCED if type(error).__name__ == "Fenced" else 1
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"{error}; the disk or your quota is full: make room, then run the same command again"
        else:
            problem = str(error) if code == EXIT_FENCED else f"unexpected\n{traceback.format_exc()}".rstrip()
    if code == EXIT_FENCED:  # on all ranks alike
        from dist_ssl.training.interrupts import tell_the_launcher

        tell_the_launcher(code)
    sys.exit(_fail(code, lambda: print(f"error: {problem}", file=sys.stderr, flush=True)))


def _fail(code: int, say: Callable[[], None]) -> int:
    """The code to exit with; the rank that failed first has said why."""
    distributed = sys.modules.get("dist_ssl.distributed")  # a mistake that is found at once does not wait for torch
    if distributed is None or distributed.world_size() == 1:
        if code != EXIT_USERS_MISTAKE or rank_in_environment() == 0:  # a mistake is found by all ranks alike
            say()
        return code
    return int(distributed.fail(code, say))


def main() -> None:
    """The command line of this process, be it one of many ranks."""
    # Read when torch is loaded. By default a thread that waits for others spins, on cores that data workers, other
    # ranks and other people's programs want.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _set_up_logging()
    run(app)


if __name__ == "__main__":
    main()
