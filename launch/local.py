"""Start ranks on this machine: `python -m launch.local pretrain CONFIG --ranks N`, on torch's elastic launcher.

Ranks are started again, all of them, when one dies, up to `--max-restarts` times; not after a user's mistake (exit code
2) and not when they have committed on a signal (75). A signal to the launcher reaches the ranks, which commit.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dist_ssl import cli
from dist_ssl import config as configuration
from dist_ssl.config import UserError
from dist_ssl.config.environment import EXIT_CODE_FILE, EXIT_FENCED, EXIT_RUN_ME_AGAIN, EXIT_USERS_MISTAKE
from dist_ssl.data.commands import DataFolder
from dist_ssl.planning import before_start

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
FINAL_EXIT_CODES = (EXIT_USERS_MISTAKE, EXIT_RUN_ME_AGAIN, EXIT_FENCED)  # another start would end as this one did
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=PASSED_ON)
def pretrain(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A TOML file; see configs/.")],
    ranks: Annotated[int | None, typer.Option(help="One a GPU by default; 2 without GPUs.", min=1)] = None,
    max_restarts: Annotated[int, typer.Option(help="How often to start the ranks again when one dies.", min=0)] = 3,
    data: DataFolder = None,
    overrides: Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE")] = [],  # noqa: B006
) -> None:
    """Pretrain on N local ranks; further options are those of `dist-ssl pretrain`.

    Example: python -m launch.local pretrain configs/quickstart.toml --data photos --set run.dir=runs/photos

    Example: python -m launch.local pretrain configs/quickstart.toml --ranks 2
    """
    checked = configuration.load(config, overrides)
    if data is not None:
        from dist_ssl.data.given import training_overrides

        overrides = [*overrides, *training_overrides(data, checked.storage)]  # indexed once, before any rank starts
        checked = configuration.load(config, overrides)
    size = ranks or _default_ranks()
    before_start.check_config(checked, size)  # most mistakes are found before any rank starts
    before_start.check_extras(checked)
    settings = [part for override in overrides for part in ("--set", override)]
    run_ranks(["pretrain", str(config), *settings, *context.args], size, max_restarts, checked.engine.grace_seconds)


@app.command(context_settings=PASSED_ON)
def evaluate(
    context: typer.Context,
    ranks: Annotated[int | None, typer.Option(help="One a GPU by default; 2 without GPUs.", min=1)] = None,
) -> None:
    """Evaluate on N local ranks; further arguments are those of `dist-ssl evaluate`.

    Example: python -m launch.local evaluate runs/quickstart --ranks 2
    """
    run_ranks(["evaluate", *context.args], ranks or _default_ranks(), 0, 5.0)


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2


def run_ranks(arguments: list[str], size: int, max_restarts: int, grace_seconds: float) -> NoReturn:
    """Run `dist-ssl ARGUMENTS` on `size` local ranks and exit as they did."""
    print(f"starting {size} rank{'s' * (size > 1)}, which takes some seconds", file=sys.stderr, flush=True)
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if 0 < torch.cuda.device_count() < size:
        raise UserError(f"--ranks {size}: expected at most one a GPU, this machine shows {torch.cuda.device_count()}")
    logging.getLogger("torch.distributed.elastic").setLevel("CRITICAL")  # we say it in one line
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # dist_ssl sets its own number; torch warns otherwise
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,  # we restart, since not every exit code wants it
            monitor_interval=0.2,
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
            shutdown_timeout=int(grace_seconds) + 5,
        ),
        sys.executable,
    )
    exit_code = Path(tempfile.mkdtemp(prefix="dist_ssl-")) / "exit_code"
    os.environ[EXIT_CODE_FILE] = str(exit_code)
    atexit.register(shutil.rmtree, exit_code.parent, ignore_errors=True)
    for attempt in range(max_restarts + 1):
        exit_code.unlink(missing_ok=True)
        try:
            launch("-m", "dist_ssl.cli", *arguments)
            sys.exit(0)
        except SignalException as stopped:
            code = int(exit_code.read_text()) if exit_code.exists() and exit_code.read_text() else 128 + stopped.sigval
            said = "committed" if code == EXIT_RUN_ME_AGAIN else f"exit code {code}"
            print(f"stopped by {stopped.sigval.name}, {said}; run the same command again to go on", file=sys.stderr)
            sys.exit(code)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            code = failure.exitcode
            if code in FINAL_EXIT_CODES:
                sys.exit(code)
            cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            again = f"starting all {size} again" if attempt < max_restarts else "giving up"
            print(
                f"rank {rank} of {size} {cause}; {again} ({attempt} of {max_restarts} restarts used)", file=sys.stderr
            )
    sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    cli.run(app)
