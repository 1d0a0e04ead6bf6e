"""What the batch script of a Slurm job runs: starts the ranks with srun, and decides what happens when they have ended.

One process on the job's first node, without torch, that outlives a crash of any rank. It replaces submitit's signal
handlers: Slurm's signals go to the ranks, which commit together and exit with code 75; then this process requeues
the job. It decides with three rules: a run that was cancelled or is already requeued is left alone; requeues are
counted and limited; a run that committed nothing between two requeues stops and says so. A node on which the ranks of
two starts were the first to fail is left out of the next ones: Slurm is asked for another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError
from dist_ssl.config.environment import (
    EXIT_FENCED,
    EXIT_RUN_ME_AGAIN,
    EXIT_USERS_MISTAKE,
    FIRST_PORT,
    NUM_PORTS,
    slurm_port,
)
from dist_ssl.evaluation import results
from dist_ssl.storage.layout import checkpoint_store, committed_steps, exported_steps
from launch import queue

log = logging.getLogger(__name__)
POLL_SECONDS = 2.0
REQUEUE_PAUSES = (2, 4, 8, 15, 30, 60)  # seconds between tries: a controller may be restarting
FAILURES_OF_A_NODE = 2  # after so many it is a bad one
# What srun says of the first task that ended badly, or of a node that is gone; one node is named, no n[1-2].
FAILED_NODE = re.compile(
    rb"^srun: error: (?:([\w.-]+): tasks? [\d,-]+: |(?:Node failure on|Task launch for \S+ failed on node) ([\w.-]+))"
)
NOT_THE_NODES_FAULT = (0, EXIT_RUN_ME_AGAIN, EXIT_USERS_MISTAKE, EXIT_FENCED)
# What a shell may carry from another launcher, and Slurm's counts from before the job's size was changed.
NOT_FOR_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "SLURM_NPROCS")


class Job(BaseModel):
    """What a submission asks for, as the batch script reads it back from `job.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str  # the resolved config's file
    options: list[str]  # of `dist-ssl pretrain`
    folder: str  # RUN/slurm: logs, history
    python: list[str]  # the interpreter, behind a container's command where there is one
    srun: list[str]
    tasks_per_node: int
    max_requeues: int
    evaluation: list[str] | None  # the command that submits an evaluation; the step is appended


def supervise(job_file: str) -> None:
    """Run one start of a submitted pretraining to its end, and requeue it where it should go on.

    Raises SystemExit: 2 after a user's mistake, 1 where the run stops for good, 75 after a requeue.
    """
    logging.basicConfig(level="INFO", format="supervisor: %(message)s", force=True)
    job = Job.model_validate_json(Path(job_file).read_text())
    config = configuration.load(job.config)
    history = History(Path(job.folder) / "starts.jsonl", own_job_id())
    restart, step = int(os.environ.get("SLURM_RESTART_COUNT", "0")), _newest_known(config)
    earlier = history.steps_at_start()
    history.write(event="start", restart=restart, step=step, nodes=os.environ["SLURM_JOB_NODELIST"])
    # Requeued by Slurm (preempted, lost a node) it may have been ended while it started: two such starts are allowed.
    refusal = stop_reason(restart - 1, earlier.get(restart - 2), step, job.max_requeues)
    if refusal:
        _stop(history, refusal)
    code, failed_node = _run_ranks(job, config)
    now = _newest_known(config)
    blamed = {"failed_node": failed_node} if failed_node and code not in NOT_THE_NODES_FAULT else {}
    history.write(event="end", restart=restart, step=now, exit_code=code, **blamed)
    # First of all: srun exits with 0 when it loses a node, and Slurm has then requeued the job.
    outside = _ended_from_outside(restart, code)
    if outside:
        _stop(history, outside, EXIT_RUN_ME_AGAIN)
    elif code == 0:
        log.info("the run is complete at step %s", now)
        history.write(event="complete", restart=restart, step=now)
    elif code == EXIT_USERS_MISTAKE:
        _stop(history, "the ranks found a mistake of the user's; see the error above", EXIT_USERS_MISTAKE)
    elif code == EXIT_FENCED:
        _stop(history, "a newer start of this run has taken over")
    else:
        _requeue_or_stop(job, history, restart, step, now, code)


def evaluate(command: list[str], run_dir: str, step: int | None) -> None:
    """Run an evaluation of `step`, or of the newest commit unless that one has results already."""
    logging.basicConfig(level="INFO", format="supervisor: %(message)s", force=True)
    if step is None:
        step = newest_commit(configuration.load(Path(run_dir) / "config.toml"))
        if (results.step_folder(run_dir, step) / results.FILE).exists():
            log.info("step %d has been evaluated", step)
            return
    code = subprocess.run([*command, "--checkpoint", str(step)], env=_environment_of_ranks()).returncode
    if code != 0:
        raise SystemExit(code)


def stop_reason(ended: int, step_before: int | None, step_now: int | None, max_requeues: int) -> str | None:
    """Why start number `ended` (0 for the first) must be the last, or None where the job goes on by a requeue.

    The first start may end without a commit (a preemption within its first minute); one that a requeue began may not,
    as far as the steps are known.
    """
    if ended + 1 > max_requeues:
        return f"requeued {ended} times, the limit (--max-requeues); {_again(step_now)}"
    if ended >= 1 and step_before is not None and step_now is not None and step_now <= step_before:
        return (
            f"nothing was committed between two requeues (step {step_now} both times); look above for why, "
            "or lower checkpoint.every_steps, then submit again"
        )
    return None


def newest_commit(config: Config) -> int:
    """The newest step with a manifest, -1 where there is none. Whether it holds is for the ranks to find out."""
    return max(committed_steps(checkpoint_store(config)), default=-1)


def _newest_known(config: Config) -> int | None:
    """The newest commit, None where the store does not tell: an outage must not keep the job from its requeue."""
    try:
        return newest_commit(config)
    except OSError as error:
        log.warning("the newest commit is not known: %s", error)
        return None


def own_job_id() -> str:
    """The id that means this job alone: an array's last element has the number of the whole array as SLURM_JOB_ID."""
    environment = os.environ
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


class History:
    """`starts.jsonl`: one line for each start and end of a run's jobs, which counts survive a requeue."""

    def __init__(self, path: Path, job_id: str):
        self.path, self.job_id = path, job_id

    def write(self, **values: object) -> None:
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            line = json.dumps({"time": round(time.time(), 1), "job": self.job_id, **values})
            file.write("\n" * torn + line + "\n")

    def steps_at_start(self) -> dict[int, int | None]:
        """Restart number -> newest committed step when that start began, as far as it was known, of this job."""
        return {s["restart"]: s["step"] for s in self._lines() if s["event"] == "start"}

    def bad_nodes(self) -> list[str]:
        """Those on which ranks of this job were the first to fail in two starts or more; sorted."""
        failed = Counter(line["failed_node"] for line in self._lines() if "failed_node" in line)
        return sorted(node for node, times in failed.items() if times >= FAILURES_OF_A_NODE)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for line in self.path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # one that a kill, or a full disk, cut short
                lines.append(json.loads(line))
        return [line for line in lines if line["job"] == self.job_id]


class _Told:
    """Passes srun's stderr on as it comes, and remembers the node that it blamed first."""

    def __init__(self, source: IO[bytes]):
        self.node: str | None = None
        self._source, self._rest = source, b""
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _pass_on(self) -> None:
        while piece := os.read(self._source.fileno(), 65_536):
            with contextlib.suppress(OSError):  # a full disk: srun, whose pipe nobody empties, would stand still
                sys.stderr.buffer.write(piece)
                sys.stderr.buffer.flush()
            *lines, self._rest = (self._rest + piece).split(b"\n")
            for line in lines:
                if self.node is None and (found := FAILED_NODE.match(line)):
                    self.node = (found[1] or found[2]).decode()


def _run_ranks(job: Job, config: Config) -> tuple[int, str | None]:
    """srun's exit code, the largest of the ranks', and the node whose ranks failed first, where srun named one.

    Submits evaluations of what the ranks export meanwhile.
    """
    num_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    size = [f"--nodes={num_nodes}", f"--ntasks={num_nodes * job.tasks_per_node}"]
    command = ["srun", *size, *job.srun, *job.python, "-m", "dist_ssl.cli", "pretrain", job.config, *job.options]
    log.info("%s", " ".join(command))
    process = subprocess.Popen(command, env=_environment_of_ranks(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = _Told(process.stderr)

    def terminated(number: int, frame: FrameType | None) -> None:
        """Slurm signals the ranks itself: here it is enough to live on until they have committed."""

    def forwarded(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)  # srun passes it to every rank

    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGCONT, terminated)
    signal.signal(signal.SIGUSR1, forwarded)
    signal.signal(signal.SIGUSR2, forwarded)
    submitted = seen = exported_steps(config.run.dir)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL_SECONDS)
            break
        exported = exported_steps(config.run.dir)
        if exported != seen:  # what was refused is asked for again with the next one, not every two seconds
            submitted, seen = submitted | _submit_evaluations(job, exported - submitted), exported
    _submit_evaluations(job, exported_steps(config.run.dir) - submitted)
    told.join()
    return code, told.node


def _submit_evaluations(job: Job, steps: set[int]) -> set[int]:
    """Submit an evaluation of each of these steps, up to the first that is refused; those that were submitted.

    A failure is logged, since the training matters more.
    """
    submitted: set[int] = set()
    if job.evaluation is not None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        if "SLURM_CONF" in os.environ:
            environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
        for step in sorted(steps):
            command = [*job.evaluation, str(step)]
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                said = str(getattr(error, "stderr", None) or error).strip()
                log.warning("evaluation of step %d was not submitted: %s", step, said)
                break
            log.info("evaluation of step %d: %s", step, done.stdout.strip())
            submitted.add(step)
    return submitted


def _environment_of_ranks() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in NOT_FOR_RANKS}
    return kept | {"MASTER_PORT": str(_free_port())}


def _free_port() -> int:
    """The port of this job and restart, or the next one above it that nothing on this node listens on."""
    first = slurm_port(os.environ) - FIRST_PORT
    for offset in range(NUM_PORTS):
        port = FIRST_PORT + (first + offset) % NUM_PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise RuntimeError(f"no free port in {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1}")


def _ended_from_outside(restart: int, code: int) -> str | None:
    """What Slurm or the user did to this job while the ranks ran, or None where it still is this start's to decide."""
    fields = job_fields()
    if int(fields.get("Restarts", restart)) != restart:
        return f"Slurm has requeued this job by itself (exit code {code})"
    if fields.get("JobState", "RUNNING") != "RUNNING" and fields.get("Reason") != "TimeLimit":
        return f"the job was ended from outside (exit code {code})"
    return None


def job_fields() -> dict[str, str]:
    """What Slurm knows of this job; empty where it does not answer."""
    command = ["scontrol", "--oneliner", "show", "job", own_job_id()]
    try:
        return queue.fields_of(queue.ask(*command))
    except UserError as error:
        log.warning("%s", error)
        return {}


def _requeue_or_stop(job: Job, history: History, restart: int, step: int | None, now: int | None, code: int) -> None:
    refusal = stop_reason(restart, step, now, job.max_requeues)
    if refusal:
        _stop(history, refusal)
    log.info("requeueing: exit code %d at step %s", code, now)
    history.write(event="requeue", restart=restart, step=now, exit_code=code)
    # Slurm ends this process once it has requeued the job: by SIGTERM, then after its KillWait, 30 s, by SIGKILL. Only
    # a job that waits takes another list of nodes, so that is given in between.
    bad = history.bad_nodes()
    if not bad:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(EXIT_RUN_ME_AGAIN))
    complaint = _requeue(restart)
    if complaint:
        _stop(history, f"Slurm did not requeue it: {complaint}; {_again(now)}")
    if bad:
        _leave_out(bad)
    else:
        time.sleep(20)
    raise SystemExit(EXIT_RUN_ME_AGAIN)


def _requeue(restart: int) -> str | None:
    """Have Slurm requeue this job, and what Slurm complained of last where it would not; several tries."""
    for pause in (*REQUEUE_PAUSES, None):
        try:
            queue.ask("scontrol", "requeue", own_job_id())
            return None
        except UserError as error:
            complaint = str(error)
        # What failed may have been the answer alone.
        if int(job_fields().get("Restarts", restart)) != restart:
            return None
        if pause is not None:
            log.warning("%s; asking again in %d s", complaint, pause)
            time.sleep(pause)
    return complaint


def _leave_out(bad: list[str]) -> None:
    """Exclude nodes from this job, which is requeued; not where too few would be left. A failure is logged."""
    try:
        excluded = job_fields().get("ExcNodeList", "(null)")
        asked = bad if excluded == "(null)" else [excluded, *bad]
        partition = os.environ.get("SLURM_JOB_PARTITION")
        if partition is not None:
            queue.check_nodes(partition, int(os.environ["SLURM_JOB_NUM_NODES"]) + len(bad))
        queue.ask("scontrol", "update", f"JobId={own_job_id()}", f"ExcNodeList={','.join(asked)}")
        log.warning("left out from now on, where ranks failed %d times: %s", FAILURES_OF_A_NODE, ", ".join(bad))
    except UserError as error:
        log.warning("%s failed %d times, but can't be left out: %s", ", ".join(bad), FAILURES_OF_A_NODE, error)


def _again(step: int | None) -> str:
    return "submit again to go on" + ("" if step is None else f" from step {step}")


def _stop(history: History, reason: str, code: int = 1) -> None:
    log.error("stopped: %s", reason)
    history.write(event="stop", reason=reason)
    raise SystemExit(code)
