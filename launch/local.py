"""Start ranks on this machine: `python -m launch.local pretrain CONFIG --ranks N`, on torch's elastic launcher.

Ranks are started again, all of them, when one dies, up to `--max-restarts` times; not after a user's mistake (exit code
2) and not when they have committed on a signal (75). A signal to the launcher reaches the ranks, which commit; one
that hangs is ended by its own watchdog, and a second Ctrl-C kills all.

On several machines without Slurm the same command runs on each, with `--nodes`, `--node-rank` and `--master-addr`. It
then exits with its ranks' code at the first failure: whatever started it (docker/jobset.yaml) starts all of it again.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dist_ssl import cli
from dist_ssl import config as configuration
from dist_ssl.config import UserError
from dist_ssl.config.environment import (
    EXIT_CODE_FILE,
    EXIT_FENCED,
    EXIT_RUN_ME_AGAIN,
    EXIT_USERS_MISTAKE,
    STOP_SIGNALS,
)
from dist_ssl.data.commands import DataFolder
from dist_ssl.planning import before_start

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
FINAL_EXIT_CODES = (EXIT_USERS_MISTAKE, EXIT_RUN_ME_AGAIN, EXIT_FENCED)  # another start would end as this one did
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
RESTARTS_ON_ONE_MACHINE = 3


@dataclass(frozen=True)
class Nodes:
    """This machine's place among those that run the same command, and where the first of them is found."""

    count: int = 1
    rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    timeout_minutes: float = 10.0

    def checked(self) -> Nodes:
        if not 0 <= self.rank < self.count:
            raise UserError(f"--node-rank {self.rank}: expected one of 0 to {self.count - 1}, for --nodes {self.count}")
        if self.count > 1 and self.master_addr == Nodes.master_addr and self.rank > 0:
            raise UserError(f"--nodes {self.count}: expected --master-addr, the host where --node-rank 0 is started")
        return self


@app.command(context_settings=PASSED_ON)
def pretrain(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A TOML file; see configs/.")],
    ranks: Annotated[int | None, typer.Option(help="One a GPU by default; 2 without GPUs.", min=1)] = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="How often to start the ranks again when one dies; 3 on one machine.", min=0)
    ] = None,
    nodes: Annotated[int, typer.Option(help="Machines that run this command, each with as many ranks.", min=1)] = 1,
    node_rank: Annotated[int, typer.Option(help="Which of them this one is, from 0.", min=0)] = 0,
    master_addr: Annotated[str, typer.Option(help="The host of node 0.")] = Nodes.master_addr,
    master_port: Annotated[int, typer.Option(help="A free port of it.", min=1, max=65535)] = Nodes.master_port,
    data: DataFolder = None,
    overrides: Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE")] = [],  # noqa: B006
) -> None:
    """Pretrain on N local ranks; further options are those of `dist-ssl pretrain`.

    Example: python -m launch.local pretrain configs/quickstart.toml --data photos --set run.dir=runs/photos

    Example: python -m launch.local pretrain configs/quickstart.toml --ranks 2

    Example: python -m launch.local pretrain CONFIG --ranks 8 --nodes 2 --node-rank 1 --master-addr n0  (and 0 on n0)
    """
    place = Nodes(nodes, node_rank, master_addr, master_port).checked()
    if max_restarts and nodes > 1:
        raise UserError(
            f"--max-restarts {max_restarts}: expected 0 with --nodes {nodes}: what starts the nodes starts all again"
        )
    restarts = RESTARTS_ON_ONE_MACHINE if max_restarts is None and nodes == 1 else max_restarts or 0
    checked = configuration.load(config, overrides)
    if data is not None:
        if nodes > 1:
            raise UserError("--data: expected one machine; make the list once by `dist-ssl shards index folder:DIR`")
        from dist_ssl.data.given import training_overrides

        overrides = [*overrides, *training_overrides(data, checked.storage)]  # indexed once, before any rank starts
        checked = configuration.load(config, overrides)
    size = ranks or _default_ranks()
    before_start.check_config(checked, size * nodes)  # most mistakes are found before any rank starts
    before_start.check_extras(checked)
    settings = [part for override in overrides for part in ("--set", override)]
    arguments = ["pretrain", str(config), *settings, *context.args]
    # As long as a commit takes: ranks that come to no end give up, or their watchdogs end them, before this.
    seconds_to_end = checked.engine.grace_seconds + 60 * checked.engine.hang_minutes
    run_ranks(arguments, size, restarts, seconds_to_end, place, Path(checked.run.dir))


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


def run_ranks(
    arguments: list[str],
    size: int,
    max_restarts: int,
    seconds_to_end: float,
    nodes: Nodes | None = None,
    run_dir: Path | None = None,
) -> NoReturn:
    """Run `dist-ssl ARGUMENTS` on `size` local ranks, of one node of several where told, and exit as they did.

    After a signal they have `seconds_to_end`, and no more after a second Ctrl-C. Both end in SIGKILL.
    Once a start has set the run in `run_dir` aside, as `--restart` asks, the next ones go on with what it began.
    """
    nodes, held = nodes or Nodes(), _held(run_dir)
    which = f" of node {nodes.rank} of {nodes.count}" * (nodes.count > 1)
    print(f"starting {size} rank{'s' * (size > 1)}{which}, which takes some seconds", file=sys.stderr, flush=True)
    import torch
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if 0 < torch.cuda.device_count() < size:
        raise UserError(f"--ranks {size}: expected at most one a GPU, this machine shows {torch.cuda.device_count()}")
    logging.getLogger("torch.distributed.elastic").setLevel("CRITICAL")  # we say it in one line
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # dist_ssl sets its own number; torch warns otherwise
    launch = elastic_launch(_launch_config(size, seconds_to_end, nodes), sys.executable)
    interrupted_at: list[float] = []

    def interrupted(number: int, frame: FrameType | None) -> None:
        if not interrupted_at:
            interrupted_at.append(time.monotonic())
            os.write(2, b"told the ranks to end; Ctrl-C again kills them\n")
            raise SignalException("Ctrl-C", signal.SIGINT)
        if time.monotonic() - interrupted_at[0] > 1:  # sooner it is the same one, passed on by a sweep
            _kill_ranks()

    signal.signal(signal.SIGINT, interrupted)
    exit_code = Path(tempfile.mkdtemp(prefix="dist_ssl-")) / "exit_code"
    os.environ[EXIT_CODE_FILE] = str(exit_code)
    atexit.register(shutil.rmtree, exit_code.parent, ignore_errors=True)
    for attempt in range(max_restarts + 1):
        exit_code.unlink(missing_ok=True)
        if _held(run_dir) != held:
            arguments = [argument for argument in arguments if argument != "--restart"]
        try:
            launch("-m", "dist_ssl.cli", *arguments)
            sys.exit(0)
        except SignalException as stopped:
            code = int(exit_code.read_text()) if exit_code.exists() and exit_code.read_text() else 128 + stopped.sigval
            said = "committed" if code == EXIT_RUN_ME_AGAIN else f"exit code {code}"
            print(f"stopped by {stopped.sigval.name}, {said}; run the same command again to go on", file=sys.stderr)
            sys.exit(code)
        except (DistNetworkError, DistStoreError) as unreachable:
            raise UserError(
                f"node {nodes.rank} of {nodes.count}: not all met at {nodes.master_addr}:{nodes.master_port} within "
                f"{nodes.timeout_minutes:g} minutes (expected the same command on each, one with --node-rank 0 there)"
            ) from unreachable
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            code = failure.exitcode
            if code in FINAL_EXIT_CODES:
                sys.exit(code)
            cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            again = f"starting all {size} again" if attempt < max_restarts else "giving up"
            used = f" ({attempt} of {max_restarts} restarts used)" * (nodes.count == 1)
            print(f"rank {rank} of {size * nodes.count} {cause}; {again}{used}", file=sys.stderr)
    sys.exit(code if code > 0 else 128 - code)


def _held(run_dir: Path | None) -> int | None:
    """Which directory of that name it is, None where it holds nothing yet."""
    return run_dir.stat().st_ino if run_dir is not None and run_dir.is_dir() and any(run_dir.iterdir()) else None


def _kill_ranks() -> None:
    import psutil

    for rank in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # a session of its own, with its data workers


def _launch_config(size: int, seconds_to_end: float, nodes: Nodes) -> LaunchConfig:
    """`size` ranks here, no restarts (not every exit code wants one); among several nodes ranks go by the node's."""
    from torch.distributed.launcher.api import LaunchConfig

    alone = nodes.count == 1
    return LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex if alone else "dist_ssl",  # the nodes' own
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="127.0.0.1:0" if alone else f"{nodes.master_addr}:{nodes.master_port}",
        rdzv_configs={} if alone else {"rank": nodes.rank, "timeout": int(nodes.timeout_minutes * 60)},
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle=",".join(
            one.name for one in {*STOP_SIGNALS, signal.SIGQUIT} - {signal.SIGINT}
        ),  # which is ours
        shutdown_timeout=int(seconds_to_end) + 5,
    )


if __name__ == "__main__":
    cli.run(app)
