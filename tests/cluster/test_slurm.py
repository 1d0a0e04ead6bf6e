"""One case of each class on the real cluster; `python -m tests.cluster.matrix` has them all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.scenes import Scene, assert_same_run, losses
from tests.cluster.slurm import MARKER, Cluster, marked_processes, missing, wait_until
from tests.s3 import s3_server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as started:
        yield started


@pytest.fixture(scope="module")
def scene(cluster, tmp_path_factory):
    made = Scene(tmp_path_factory.mktemp("cluster"), cluster)
    made.write_shards()
    return made


def mistake(scene: Scene, *arguments: str) -> str:
    """What a submission that must not happen says: one line; and nothing was submitted or written."""
    command = [sys.executable, "-m", "launch.slurm", "pretrain", *arguments]
    done = subprocess.run(command, env=scene.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    assert scene.cluster is not None
    assert scene.cluster.run("squeue", "--noheader") == ""
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_mistakes_are_found_before_submission(scene, tmp_path):
    config = scene.config("mistaken")
    assert "expected one of main, short, urgent" in mistake(scene, str(config), "--partition", "gpus")
    assert "has 3" in mistake(scene, str(config), "--nodes", "4")
    assert "allows at most 60" in mistake(scene, str(config), "--time-minutes", "61")
    assert "configuration is not available" in mistake(scene, str(config), "--gpus-per-node", "3")
    assert "less than the 6 ranks" in mistake(scene, str(config), "--nodes", "3", "--set", "train.global_batch_size=4")
    assert "did you mean 'train.steps'?" in mistake(scene, str(config), "--set", "train.step=3")
    assert "no such config file" in mistake(scene, str(tmp_path / "none.toml"))
    assert "is not a folder that can be written to" in mistake(scene, str(config), "--set", "run.dir=/proc/run")
    assert "expected section.key=value,value" in mistake(scene, str(config), "--sweep", "temperature")
    assert not (scene.directory / "mistaken").exists()


def test_a_dry_run_prints_the_script_and_leaves_nothing(scene):
    script = scene.call("launch.slurm", "pretrain", str(scene.config("dry")), "--nodes", "3", "--dry-run")
    for line in ("--nodes=3", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue", "--partition=main", "--time=60"):
        assert f"#SBATCH {line}\n" in script  # one task a GPU, all that a node claims
    assert not (scene.directory / "dry").exists()


def test_doctor_sees_the_cluster_and_measures_between_nodes(cluster):
    command = ("srun", "-N2", sys.executable, "-m", "dist_ssl.cli", "doctor")
    said = cluster.run(*command, timeout=120)
    assert "ok  Slurm: main " in said
    assert "Gbit/s all-reduce, 2 ranks, gloo" in said
    assert said.count("Python: ") == 1


def test_from_the_store_to_an_evaluated_encoder_through_a_requeue(scene):
    """One command: shards in S3, 2 nodes, requeued in the middle, evaluated by a job that waited for it."""
    with s3_server(scene.directory) as store:
        pretrain_requeue_evaluate(Scene(scene.directory, scene.cluster, store))


def pretrain_requeue_evaluate(scene: Scene) -> None:
    cluster, run = scene.cluster, scene.directory / "run"
    assert cluster is not None
    undisturbed = scene.undisturbed(2)
    job = scene.submit(scene.config("run"), 2, "--evaluate")
    with pytest.raises(RuntimeError, match="already trains this run"):
        scene.submit(scene.config("run"), 2)
    scene.wait_for_step(run, 15)
    (scene.directory / "run.toml").write_text("the run has its own copy")
    cluster.run("scontrol", "requeue", job)
    assert scene.wait_for_end(job) == "COMPLETED", scene.log(run)[-6000:]
    assert len([event for event in scene.starts(run) if event["event"] == "start"]) == 2
    assert_same_run(run, undisturbed)
    results = run / "evaluation" / f"step-{max(losses(run))}" / "results.json"
    wait_until(lambda: not cluster.run("squeue", "--noheader").strip(), 180, "the evaluation")
    assert results.exists(), scene.log(run)[-3000:]
    status = scene.call("launch.slurm", "status", str(run))
    assert "complete" in status
    assert "supervisor: srun" in scene.call("launch.slurm", "logs", str(run), "--follow")
    assert "no job of this run" in scene.call("launch.slurm", "cancel", str(run))
    accounted = cluster.run("sacct", "--noheader", "--allocations", "--duplicates", "--format=State", f"--jobs={job}")
    assert accounted.split() == ["REQUEUED", "COMPLETED"]


def test_a_sweep_ends_in_a_table(scene):
    scene.submit(scene.config("sweep", 10), 1, "--sweep", "model.head.kind=none,mlp", "--max-parallel", "2")
    table = scene.directory / "sweep" / "table.md"
    wait_until(table.exists, 180, "the table")
    text = table.read_text()
    assert text.count("| complete | 10 |") == 2, text
    assert all(f"kind={kind}" in text for kind in ("none", "mlp"))


def test_a_cluster_whose_owner_is_killed_leaves_nothing(tmp_path):
    """kill -9 of the process that started it: the guard ends every daemon and every job."""
    code = (
        "from tests.cluster.slurm import Cluster\nimport time\n"
        "with Cluster() as cluster:\n"
        "    cluster.run('sbatch', '--output=/dev/null', '--wrap=srun sleep 600')\n"
        "    time.sleep(2)\n    print(cluster.root, flush=True)\n    time.sleep(600)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != MARKER}
    root = Path(__file__).parent.parent.parent
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    directory = owner.stdout.readline().strip()
    assert len(marked_processes(directory)) > 8
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    time.sleep(0.5)
    wait_until(lambda: not marked_processes(directory) and not Path(directory).exists(), 30, "the cluster's end")
