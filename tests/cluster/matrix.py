"""Every way in which a run on Slurm is disturbed, one after the other: `python -m tests.cluster.matrix [CASE ...]`.

About a quarter of an hour on two cores. The suite runs a few of these; here are all, each with what it showed.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.scenes import MANY_STEPS, STEPS, Scene, assert_same_run, consumed, losses
from tests.cluster.slurm import Cluster, missing, wait_until
from tests.s3 import s3_server


def _disturbed(
    scene: Scene,
    name: str,
    disturb: Callable[[Cluster, str], None],
    *options: str,
    nodes: int = 2,
    steps: int = STEPS,
) -> str:
    """Submit, disturb after step 15, wait for the end; the run must be the undisturbed one, by one requeue."""
    cluster = scene.cluster
    assert cluster is not None
    run = scene.directory / name
    undisturbed = scene.undisturbed(2, steps)
    job = scene.submit(scene.config(name, steps), nodes, *options)
    scene.wait_for_step(run, 15)
    disturb(cluster, job)
    state = scene.wait_for_end(job)
    assert state == "COMPLETED", f"{state}\n{scene.log(run)[-6000:]}"
    starts = [event["step"] for event in scene.starts(run) if event["event"] == "start"]
    assert len(starts) == 2, scene.starts(run)
    assert_same_run(run, undisturbed)
    return f"went on from step {starts[1]}; {steps} losses and ledgers equal to the undisturbed run's"


def requeue(scene: Scene) -> str:
    """scontrol requeue, as an administrator or a preempting scheduler does it."""
    return _disturbed(scene, "requeue", lambda cluster, job: cluster.run("scontrol", "requeue", job) and None)


def signal(scene: Scene) -> str:
    """scancel --signal: the ranks commit, and the supervisor requeues."""
    return _disturbed(scene, "signal", lambda cluster, job: cluster.run("scancel", "--signal=USR1", job) and None)


def preemption(scene: Scene) -> str:
    """A job of a partition with a higher priority takes the nodes."""

    def take_all_nodes(cluster: Cluster, job: str) -> None:
        script = scene.directory / "urgent.sh"
        script.write_text("#!/bin/bash\nsleep 5\n")
        cluster.run("sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", str(script))

    return _disturbed(scene, "preemption", take_all_nodes)


def killed_rank(scene: Scene) -> str:
    """One rank dies of a kill -9, as by the out-of-memory killer; what was committed before counts."""

    def kill(cluster: Cluster, job: str) -> None:
        cluster.run("scancel", "--signal=KILL", f"{job}.0")

    return _disturbed(scene, "killed_rank", kill)


def bad_node(scene: Scene) -> str:
    """A rank is killed on the same node in two starts: the third is on another one."""
    cluster, run, nodes = scene.cluster, scene.directory / "bad_node", []
    assert cluster is not None
    job = scene.submit(scene.config("bad_node", MANY_STEPS), 1)
    for step in (15, 45):
        scene.wait_for_step(run, step, 240)
        nodes.append(cluster.job(job)["NodeList"])
        cluster.run("scancel", "--signal=KILL", f"{job}.0")
        restarts = str(len(nodes))
        wait_until(lambda restarts=restarts: cluster.job(job)["Restarts"] == restarts, 60, "the requeue")
    assert scene.wait_for_end(job) == "COMPLETED", scene.log(run)[-6000:]
    starts = [event["nodes"] for event in scene.starts(run) if event["event"] == "start"]
    assert starts[0] == starts[1] != starts[2], scene.starts(run)
    assert_same_run(run, scene.undisturbed(1, MANY_STEPS))
    return f"starts on {', '.join(starts)}"


def _killed_node(scene: Scene, name: str, which: int) -> str:
    cluster = scene.cluster
    assert cluster is not None
    stopped: list[str] = []

    def kill(cluster: Cluster, job: str) -> None:
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
        stopped.append(nodes[which])
        cluster.stop_node(nodes[which])

    try:
        return _disturbed(scene, name, kill, steps=MANY_STEPS)
    finally:
        for node in stopped:
            cluster.start_node(node)


def killed_node(scene: Scene) -> str:
    """The slurmd of a node other than the first is killed."""
    return _killed_node(scene, "killed_node", 1)


def killed_first_node(scene: Scene) -> str:
    """The slurmd of the node that the batch script is on is killed."""
    return _killed_node(scene, "killed_first_node", 0)


def orphans(scene: Scene, steps: int = MANY_STEPS) -> str:
    """A slurmd is killed while all its ranks live on, and the requeued job starts beside them."""
    cluster = scene.cluster
    assert cluster is not None
    stopped: list[str] = []

    def kill(cluster: Cluster, job: str) -> None:
        stopped.append(cluster.job(job)["NodeList"])
        cluster.stop_node(stopped[0])

    try:
        shown = _disturbed(scene, "orphans", kill, "--tasks-per-node", "2", nodes=1, steps=steps)
    finally:
        for node in stopped:
            cluster.start_node(node)
    run = scene.directory / "orphans"
    assert [event["event"] for event in scene.starts(run)].count("complete") == 1, scene.starts(run)
    wait_until(lambda: not _ranks_of(run), 90, "the orphans' end")
    return shown


def _ranks_of(run: Path) -> list[str]:
    """Command lines of the processes, on any node, that train this run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = file.read_text().replace("\0", " ")
            found += [command] if f"pretrain {run}/" in command else []
    return found


def time_limit(scene: Scene) -> str:
    """A run of several minutes in starts of one minute each."""
    run, undisturbed = scene.directory / "time_limit", scene.undisturbed(2, MANY_STEPS)
    job = scene.submit(scene.config("time_limit", MANY_STEPS), 2, "--time-minutes", "1")
    state = scene.wait_for_end(job, 900)
    assert state == "COMPLETED", f"{state}\n{scene.log(run)[-6000:]}"
    requeues = [event["step"] for event in scene.starts(run) if event["event"] == "requeue"]
    assert requeues, "the run ended within a minute: make it longer"
    assert_same_run(run, undisturbed)
    return f"requeued at steps {requeues}; {MANY_STEPS} losses and ledgers equal to the undisturbed run's"


def fewer_nodes(scene: Scene) -> str:
    """3 nodes; requeued and changed to 2 while it waits; cancelled and submitted again on 1."""
    cluster = scene.cluster
    assert cluster is not None
    run, three = scene.directory / "fewer_nodes", scene.undisturbed(3)
    config = scene.config("fewer_nodes")
    job = scene.submit(config, 3)
    scene.wait_for_step(run, 15)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for_state(job, ("PENDING",), 60)
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=2", "NumTasks=2")
    scene.wait_for_step(run, 35)
    scene.call("launch.slurm", "cancel", str(run))
    assert scene.wait_for_end(job) == "CANCELLED"
    again = scene.submit(config, 1)
    assert scene.wait_for_end(again) == "COMPLETED", scene.log(run)[-6000:]
    assert consumed(run) == consumed(three)
    starts = [(event["nodes"], event["step"]) for event in scene.starts(run) if event["event"] == "start"]
    assert [event["exit_code"] for event in scene.starts(run) if event["event"] == "end"] == [75, 75, 0]
    ours, theirs = losses(run), losses(three)
    switched = starts[1][1]
    assert all(ours[step] == theirs[step] for step in range(1, switched + 1))
    worst = max(abs(ours[step] / theirs[step] - 1) for step in ours)
    assert worst < 0.05
    return f"starts (nodes, step): {starts}; same ledger; losses equal up to the change, within {worst:.1%} after it"


def sweep_of_four(scene: Scene) -> str:
    """Two temperatures by two kinds of head, two at a time, each evaluated, and a table at the end."""
    cluster = scene.cluster
    assert cluster is not None
    grid = ("--sweep", "objective.temperature=0.1,0.5", "--sweep", "model.head.kind=linear,mlp")
    job = scene.submit(scene.config("sweep", STEPS), 1, *grid, "--evaluate", "--max-parallel", "2")
    last = scene.directory / "sweep" / "temperature=0.5_kind=mlp"
    scene.wait_for_step(last, 5, 300)
    # Its number is the whole array's: the requeue must be of this run alone.
    cluster.run("scancel", "--signal=USR1", job.replace("_0", "_3"))
    table = scene.directory / "sweep" / "table.md"
    wait_until(table.exists, 400, "the table")
    text = table.read_text()
    assert text.count(f"| complete | {STEPS} |") == 4, text
    starts = [sum(event["event"] == "start" for event in scene.starts(run)) for run in sorted(last.parent.glob("t*=*"))]
    assert starts == [1, 1, 1, 2], starts
    assert "knn h" in text
    return "\n" + text


def store_to_evaluation(scene: Scene) -> str:
    """Two nodes, shards in S3, evaluations of what is exported and of the end, by one command."""
    cluster = scene.cluster
    assert cluster is not None
    with s3_server(scene.directory) as store:
        remote = Scene(scene.directory, cluster, store)
        run = scene.directory / "store"
        job = remote.submit(remote.config("store", 20), 2, "--evaluate", "--set", "checkpoint.export_every_commits=1")
        assert remote.wait_for_end(job) == "COMPLETED", remote.log(run)[-6000:]
        wait_until(lambda: not cluster.run("squeue", "--noheader").strip(), 300, "the evaluations")
    results = sorted(file.parent.name for file in run.glob("evaluation/*/results.json"))
    assert results == ["step-10", "step-20"], f"{results}\n{remote.log(run)[-6000:]}"
    return f"evaluated: {results}"


def no_progress(scene: Scene) -> str:
    """Shards that can't be reached: one requeue, then a clear word instead of another."""
    run = scene.directory / "no_progress"
    unreachable = ("storage.endpoint_url=http://127.0.0.1:9", "data.shards=s3://bucket/none", "storage.retry_seconds=0")
    scene.environment |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    job = scene.submit(scene.config("no_progress"), 1, *(part for key in unreachable for part in ("--set", key)))
    assert scene.wait_for_end(job) == "FAILED"
    status = scene.call("launch.slurm", "status", str(run))
    assert "nothing was committed between two requeues" in status, status
    return status.splitlines()[-1]


def srun_alone(scene: Scene) -> str:
    """`srun dist-ssl pretrain CONFIG` without launch.slurm."""
    cluster = scene.cluster
    assert cluster is not None
    config = scene.config("srun_alone")
    command = (str(Path(sys.executable).with_name("dist-ssl")), "pretrain", str(config))
    cluster.run("srun", "-N2", "-n2", "--export=ALL,OMP_NUM_THREADS=1", *command, timeout=300)
    assert_same_run(scene.directory / "srun_alone", scene.undisturbed(2))
    return "equal to the undisturbed run"


CASES: tuple[Callable[[Scene], str], ...] = (
    *(
        requeue,
        signal,
        preemption,
        killed_rank,
        bad_node,
        killed_node,
        killed_first_node,
        orphans,
        time_limit,
        fewer_nodes,
    ),
    *(sweep_of_four, store_to_evaluation, no_progress, srun_alone),
)


def main(names: list[str]) -> int:
    known = {case.__name__: case for case in CASES}
    if unknown := set(names) - set(known):
        raise SystemExit(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    if reason := missing():
        raise SystemExit(reason)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="dist_ssl_matrix_") as directory, Cluster() as cluster:
        scene = Scene(Path(directory), cluster)
        scene.write_shards()
        for name in names or known:
            began = time.monotonic()
            try:
                shown, word = known[name](scene), "passed"
            except Exception as error:
                log = scene.log(scene.directory / name)[-4000:]
                shown, word, failed = f"{type(error).__name__}: {error}\n{log}", "FAILED", failed + 1
                cluster.run("scancel", "--user=root", check=False)
            print(f"{word} {name} ({time.monotonic() - began:.0f} s): {shown}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
