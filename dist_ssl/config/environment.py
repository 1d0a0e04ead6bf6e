"""What a launcher and a rank tell each other: ranks, master address and port one way, exit codes the other way.

Needs no torch: the process that supervises a Slurm job asks for the port too, and should be small.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 20000, 12000  # ends below 32768, where Linux starts to hand out ports of its own

EXIT_USERS_MISTAKE = 2  # one line said which: it would be the same again
EXIT_HANGING = 70
EXIT_RUN_ME_AGAIN = 75  # BSD's EX_TEMPFAIL: told to stop and committed, start the same command again
EXIT_FENCED = 76  # a newer incarnation of the run is alive: a launcher must not start this one again

# What tells a run to commit and stop, and whoever waits for one to pass on. SIGHUP, of a terminal that was closed, too,
# but where it is ignored from the start: by nohup.
STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS += (signal.SIGHUP,)

# The local launcher's, for the first of its ranks: a launcher that was signalled does not see its ranks' exit codes.
EXIT_CODE_FILE = "DIST_SSL_EXIT_CODE_FILE"


def ranks_on_this_node() -> int:
    """As the launcher, or `distributed.initialize` for it, put it into the environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def ranks_in_environment() -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun or srun gave them.

    None where this process was started alone. The batch script of a Slurm job is a process started alone
    (SLURM_STEP_NUM_TASKS is set by srun only, while SLURM_NTASKS and SLURM_PROCID are set in both).
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        values = {name: environment[name] for name in ("RANK", "WORLD_SIZE")}
        values["LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")
        values["LOCAL_WORLD_SIZE"] = environment.get("LOCAL_WORLD_SIZE", "1")
        values["MASTER_ADDR"] = environment.get("MASTER_ADDR", "127.0.0.1")
        values["MASTER_PORT"] = environment.get("MASTER_PORT", "29500")
        return values
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(environment)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(slurm_port(environment)),
    }


def rank_in_environment() -> int:
    """This process's rank, 0 where it was started alone. Asks no other program, unlike `ranks_in_environment`."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if "SLURM_STEP_NUM_TASKS" in os.environ else 0


def exit_code_file() -> str | None:
    """Where this rank writes the code that it exits with: of a node's first rank under `launch.local` only."""
    return os.environ.get(EXIT_CODE_FILE) if os.environ.get("LOCAL_RANK", "0") == "0" else None


def started_by_local_launcher() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port below Linux's ephemeral range (32768), another one for every job and every restart of it."""
    job, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
    return FIRST_PORT + (job * 7 + restart) % NUM_PORTS


def first_host(nodelist: str) -> str:
    """The first node of a Slurm node list, by a name or address that resolves here.

    A node's name need not be a host's name; Slurm's own address of it then is what it is reached by.
    """
    listed = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    name = listed.stdout.split()[0]
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror:
        shown = subprocess.run(["scontrol", "--oneliner", "show", "node", name], capture_output=True, text=True)
        address = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
        return address[1] if address else name
    return name


def tasks_on_node(environment: Mapping[str, str]) -> int:
    """How many tasks of this job step run on this task's node."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):  # "2(x3),1" means 2, 2, 2, 1
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * (int(repeat.rstrip(")")) if repeat else 1)
    return counts[int(environment["SLURM_NODEID"])]
