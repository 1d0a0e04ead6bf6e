"""A real Slurm on loopback: munge, MariaDB, slurmdbd, slurmctld and three slurmd nodes, from Debian's packages.

`with Cluster() as cluster:` starts it in a directory of its own and leaves nothing running. Every process of it,
its jobs' included, carries MARKER in its environment; a guard process, started first, kills them all when the pipe
to it closes, so that a test session that is itself killed with -9 cleans up too.

Nodes n1, n2 and n3 are one machine: the same memory, the same disk, 2 claimed GPUs each that are not there.
Partitions: `main` (default), whose jobs `urgent` preempts by requeueing them; `short` allows one minute.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

MARKER = "DIST_SSL_TEST_CLUSTER"
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "srun", "sacct", "sacctmgr")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
CLAIMED_CPUS = 8  # each node; a job's tasks are not bound to cores


def missing() -> str | None:
    """Why this machine can't run the cluster, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of its own needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:{SBIN}") is None]
    return f"not installed: {', '.join(absent)} (CI=true or --system installs them)" if absent else None


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll five times a second; TimeoutError naming `what` when it takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


def marked_processes(root: str) -> list[int]:
    """Process ids of the cluster at `root`: those that carry its marker, and slurmd's job step daemons.

    slurmstepd writes its title over its environment, but listens on a socket in its node's spool directory.
    """
    wanted = f"{MARKER}={root}".encode()
    sockets = {
        f"socket:[{line.split()[6]}]" for line in Path("/proc/net/unix").read_text().splitlines() if root in line
    }
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                marked = wanted in (entry / "environ").read_bytes().split(b"\0")
                if marked or any(os.readlink(link) in sockets for link in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
    return found


def guard(root: str) -> None:
    """Wait for the end of standard input, then kill every process of the cluster at `root` and remove its files."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    deadline = time.monotonic() + 30
    # Jobs that a dying daemon just started are found in a later pass.
    while (alive := marked_processes(root)) and time.monotonic() < deadline:
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(root, ignore_errors=True)


class Cluster:
    nodes = ("n1", "n2", "n3")

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="dist_ssl_slurm_"))
        self.root.chmod(0o755)  # mariadbd gives up root
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.slurm", str(self.root)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is not its signal
        )
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Every variable of an enclosing Slurm job would be taken for this cluster's.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = inherited | {
            MARKER: str(self.root),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
            "SLURM_CONF": str(self.root / "slurm.conf"),
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(40)
        finally:
            for daemon in self._daemons.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(1)  # reaped: no zombie stays

    def run(self, *command: str, timeout: float = 60, check: bool = True) -> str:
        """Standard output of a command that talks to this cluster; RuntimeError with its stderr where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`: JobState, Restarts, ExitCode, NodeList, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.split("=", 1) for field in shown if "=" in field)

    def wait_for_state(self, job_id: str, states: tuple[str, ...], seconds: float) -> str:
        wait_until(lambda: self.job(job_id)["JobState"] in states, seconds, f"job {job_id} in {'/'.join(states)}")
        return self.job(job_id)["JobState"]

    def stop_node(self, name: str) -> None:
        """Kill a node's slurmd with -9; the tasks that it started live on."""
        self._daemons[f"slurmd-{name}"].kill()
        self._daemons.pop(f"slurmd-{name}").wait(5)

    def start_node(self, name: str) -> None:
        self._daemon(f"slurmd-{name}", "slurmd", "-D", "-N", name)
        self._await_nodes(20)

    def _start(self) -> None:
        ports = _free_ports(3 + len(self.nodes))
        self._write_configuration(*ports)
        self._start_munge()
        self._start_database(ports[0])
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._wait(lambda: _accepts(ports[1]), 20, "slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "loopback")
        self._daemon("slurmctld", "slurmctld", "-D")
        for name in self.nodes:
            self._daemon(f"slurmd-{name}", "slurmd", "-D", "-N", name)
        self._await_nodes(30)

    def _await_nodes(self, seconds: float) -> None:
        def all_up() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
            return len(states) == len(self.nodes) and all(s in ("idle", "mixed", "allocated") for s in states)

        self._wait(all_up, seconds, "the nodes")

    def _wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        try:
            wait_until(condition, seconds, what)
        except TimeoutError as error:
            logs = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in self.root.glob("*.log")]
            raise RuntimeError(f"{error}\n" + "\n".join(logs)) from None

    def _daemon(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self._daemon(
            "munged",
            "munged",
            "--foreground",
            f"--key-file={key}",
            f"--socket={folder}/socket",
            *(f"--{name}-file={folder}/{name}" for name in ("pid", "seed", "log")),
        )
        self._wait((folder / "socket").exists, 10, "munged")

    def _start_database(self, port: int) -> None:
        data = self.root / "mariadb"
        # A server that starts removes every temporary table in its folder of temporary files, others' too.
        temporary = self.root / "mariadb-tmp"
        temporary.mkdir()
        shutil.chown(temporary, "mysql")
        places = (f"--datadir={data}", f"--tmpdir={temporary}")
        install = ("mariadb-install-db", "--no-defaults", *places, "--user=mysql", "--skip-test-db")
        self.run(*install, "--auth-root-authentication-method=normal", timeout=60)
        self._daemon(
            "mariadbd",
            "mariadbd",
            "--no-defaults",
            "--user=mysql",
            *places,
            f"--socket={data}/socket",
            "--bind-address=127.0.0.1",
            f"--port={port}",
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",  # nothing here needs to survive
            "--skip-log-bin",
        )
        self._wait(lambda: _accepts(port), 30, "mariadbd")

    def _write_configuration(self, sql: int, dbd: int, ctld: int, *slurmds: int) -> None:
        auth = f"AuthType=auth/munge\nAuthInfo=socket={self.root}/munge/socket,cred_expire=5\n"
        accounting = self.root / "slurmdbd.conf"
        accounting.touch(mode=0o600)  # slurmdbd refuses a file that others can read
        accounting.write_text(
            auth + f"DbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={dbd}\nSlurmUser=root\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={sql}\nStorageUser=root\n"
            f"PidFile={self.root}/slurmdbd.pid\nLogFile={self.root}/slurmdbd-own.log\n"
        )
        host = socket.gethostname().partition(".")[0]
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CLAIMED_CPUS}"
            " RealMemory=16000 Gres=gpu:2 State=UNKNOWN\n"
            for name, port in zip(self.nodes, slurmds, strict=True)
        )
        # A GPU is a device file to Slurm; any will do, since no task of the tests opens it.
        (self.root / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.root / "slurm.conf").write_text(
            auth
            + f"""ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool-%n
SlurmctldPidFile={self.root}/slurmctld.pid
SlurmdPidFile={self.root}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={self.root}/munge/socket
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
MinJobAge=600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=1 PriorityTier=1 PreemptMode=REQUEUE
"""
        )
        (self.root / "state").mkdir()
        for name in self.nodes:
            (self.root / f"spool-{name}").mkdir()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    guard(sys.argv[1])
