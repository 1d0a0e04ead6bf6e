"""What Slurm says about itself and about jobs, and which jobs a run has had (`RUN/slurm/jobs.jsonl`)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from dist_ssl.config import UserError

COMMAND_SECONDS = 60
# Slurm's own words for a job that will not run again. COMPLETING is not among them: it may be on its way to a requeue.
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "REVOKED"),
}


def ask(*command: str, stdin: str | None = None) -> str:
    """Standard output of a Slurm command. Raises UserError with the first line of what it complained about."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except FileNotFoundError:
        raise UserError(
            f"no Slurm here: {command[0]} is not installed; python -m launch.local runs on one machine"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm did not answer {command[0]} within {COMMAND_SECONDS} s; is slurmctld up?") from None
    if done.returncode != 0:
        complaint = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise UserError(f"{command[0]}: {complaint}; `dist-ssl doctor` says whether this machine reaches a Slurm")
    return done.stdout


def check_partition(partition: str | None) -> str:
    """The partition's name, the default one's for None. Raises UserError naming those that there are."""
    if shutil.which("sbatch") is None:
        raise UserError("no Slurm here: sbatch is not installed; python -m launch.local runs on one machine")
    marked = ask("sinfo", "--noheader", "--format=%P").split()  # the default one ends in *
    known = sorted({name.rstrip("*") for name in marked})
    if partition is None:
        default = [name.rstrip("*") for name in marked if name.endswith("*")]
        if not default:
            raise UserError(f"--partition: this cluster has no default one; expected one of {', '.join(known)}")
        return default[0]
    if partition not in known:
        raise UserError(f"--partition {partition}: expected one of {', '.join(known)}")
    return partition


def gpus_of_a_node(partition: str) -> int:
    """How many GPUs the partition's nodes have: the smallest number of those that have any; 0 where none has."""
    counts = []
    for resources in ask("sinfo", "--noheader", f"--partition={partition}", "--format=%G").split():
        found = re.findall(r"gpu(?::[^,:()]+)?:(\d+)", resources)
        counts += [sum(map(int, found))] if found else []
    return min(counts, default=0)


def time_limit(partition: str, minutes: int | None, default: int = 1440) -> int:
    """`minutes`, or by default the partition's limit and at most a day.

    Raises UserError for more than the partition allows: Slurm takes such a job and leaves it pending for ever.
    """
    shown = ask("sinfo", "--noheader", f"--partition={partition}", "--format=%l").split()[0]
    days, _, clock = shown.rpartition("-")
    if not re.fullmatch(r"[\d:]+", clock):  # "infinite"
        return minutes or default
    hours, minute = ([0, 0, *map(int, clock.split(":"))])[-3:-1]
    longest = int(days or 0) * 1440 + hours * 60 + minute
    if minutes is not None and minutes > longest:
        raise UserError(f"--time-minutes {minutes}: partition {partition} allows at most {longest}")
    return minutes or min(default, longest)


def check_nodes(partition: str, nodes: int) -> None:
    """Raises UserError where the partition has fewer nodes, up or down."""
    there = sum(map(int, ask("sinfo", "--noheader", f"--partition={partition}", "--format=%D").split()))
    if nodes > there:
        raise UserError(f"--nodes {nodes}: partition {partition} has {there}")


def state(job_id: str) -> tuple[str, int]:
    """(state, restarts) of a job: from the controller, from accounting once it has forgotten it, else UNKNOWN."""
    try:
        fields = fields_of(ask("scontrol", "--oneliner", "show", "job", job_id))
        return fields["JobState"], int(fields.get("Restarts", "0"))
    except UserError:
        pass
    try:
        listed = ask(
            "sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job_id}"
        ).split()
        return (listed[0] if listed else "UNKNOWN"), 0
    except UserError:
        return "UNKNOWN", 0


def fields_of(shown: str) -> dict[str, str]:
    """What `scontrol --oneliner show job` says of one."""
    return dict(field.split("=", 1) for field in shown.split() if "=" in field)


def is_over(job_state: str) -> bool:
    return job_state.split()[0] in ENDED or job_state == "UNKNOWN"


def record(run_dir: Path, **values: Any) -> None:
    """Add a job to those of a run."""
    with (run_dir / "slurm" / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"submitted": round(time.time(), 1), **values}) + "\n")


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The jobs of a run, oldest first. Raises UserError where it has had none."""
    try:
        return [json.loads(line) for line in (run_dir / "slurm" / "jobs.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{run_dir}: no job was submitted for this run directory") from None
