"""launch.slurm without a Slurm: rules, sweeps, profiles, snapshots, ports. The cluster itself is in tests/cluster."""

import itertools
import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError, environment
from dist_ssl.storage.layout import checkpoint_store
from launch import checks, profile, queue, slurm, snapshot, supervisor, sweep
from tests.test_shards import photo_folder


def test_ports_stay_below_the_ephemeral_range_and_differ_between_restarts():
    jobs = [1, 2, 3, 12345, 2**31, 67043328]
    ports = {
        (j, r): environment.slurm_port({"SLURM_JOB_ID": str(j), "SLURM_RESTART_COUNT": str(r)})
        for j in jobs
        for r in range(6)
    }
    assert all(1024 < port < 32768 for port in ports.values())
    assert all(ports[j, r] != ports[j, r + 1] for j in jobs for r in range(5))
    assert environment.slurm_port({"SLURM_JOB_ID": "7"}) == environment.slurm_port(
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    )


def test_ranks_come_from_the_environment_of_torchrun_or_of_srun(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD", "LOCAL_", "MASTER_"))]:
        monkeypatch.delenv(name)
    assert environment.ranks_in_environment() is None
    batch_script = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    step = {
        "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "MASTER_ADDR": "host",
    }  # fmt: skip
    for name, value in batch_script.items():
        monkeypatch.setenv(name, value)
    assert environment.ranks_in_environment() is None
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert environment.ranks_in_environment() == {
        "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "host",
        "MASTER_PORT": str(environment.slurm_port({"SLURM_JOB_ID": "5"})),
    }  # fmt: skip
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert environment.tasks_on_node(os.environ) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torchrun = environment.ranks_in_environment()
    assert torchrun is not None
    assert (torchrun["RANK"], torchrun["WORLD_SIZE"]) == ("1", "2")


def test_requeues_are_limited_and_need_a_commit_between_them():
    assert supervisor.stop_reason(0, -1, -1, 3) is None, "the first start may be preempted before it commits"
    assert supervisor.stop_reason(1, 10, 20, 3) is None
    assert "nothing was committed" in str(supervisor.stop_reason(1, 10, 10, 3))
    assert supervisor.stop_reason(2, 10, 20, 3) is None
    assert "the limit" in str(supervisor.stop_reason(3, 10, 20, 3))
    assert supervisor.stop_reason(0, -1, 5, 0).endswith("the limit (--max-requeues); submit again to go on from step 5")
    assert supervisor.stop_reason(1, 10, None, 3) is supervisor.stop_reason(1, None, 10, 3) is None
    assert supervisor.stop_reason(3, 10, None, 3).endswith("; submit again to go on")


def test_an_element_of_an_array_means_itself(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert supervisor.own_job_id() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert supervisor.own_job_id() == "12_3"


BLAMED = "srun: error: n3: task 5: Exited with exit code 1\nsrun: error: n[1-2]: tasks 0-3: Exited with exit code 1"


def supervised(folder, code, *overrides, restart=0, ranks=":", evaluation=None):
    """The supervisor's own process; srun and scontrol are programs that do what Slurm's would do with such `ranks`."""
    fields = f"JobState=RUNNING Restarts={restart} ExcNodeList=n7"
    for name, body in {
        "srun": f"{ranks}; echo '{BLAMED}' >&2; exit {code}",
        "scontrol": f"case $1 in requeue) touch {folder}/requeued; kill -TERM $PPID;; "
        f"update) echo $3 > {folder}/updated;; esac; echo {fields}",
        "sinfo": "echo 9",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    config = configuration.with_overrides(Config(), [f"run.dir={json.dumps(str(folder / 'run'))}", *overrides])
    (folder / "config.toml").write_text(configuration.dumps(config))
    values = {"options": [], "python": ["python"], "srun": [], "tasks_per_node": 1, "max_requeues": 3}
    values |= {"config": str(folder / "config.toml"), "folder": str(folder), "evaluation": evaluation}
    (folder / "job.json").write_text(json.dumps(values))
    slurm = {"SLURM_JOB_PARTITION": "main", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_RESTART_COUNT": str(restart), "PATH": f"{folder}:{os.environ['PATH']}"}
    given = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    program = "from launch import supervisor; supervisor.POLL_SECONDS = 0.05; "
    program += f"supervisor.supervise({str(folder / 'job.json')!r})"
    return subprocess.run(
        [sys.executable, "-c", program], env=given | slurm,
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "ends", "requeued", "left_out"),
    [(2, 2, False, None), (76, 1, False, None), (1, 75, True, "n7,n3"), (75, 75, True, None)],
)
def test_what_ends_for_good_is_not_requeued_and_a_node_that_failed_twice_is_left_out(
    tmp_path, code, ends, requeued, left_out
):
    history = supervisor.History(tmp_path / "starts.jsonl", "7")
    history.write(event="end", restart=0, step=0, exit_code=1, failed_node="n3")
    done = supervised(tmp_path, code)
    assert (done.returncode, (tmp_path / "requeued").exists()) == (ends, requeued), done.stderr
    assert BLAMED in done.stderr
    updated = tmp_path / "updated"
    assert (updated.read_text().strip() if updated.exists() else None) == (left_out and f"ExcNodeList={left_out}")


def test_an_outage_of_the_store_does_not_keep_a_job_from_its_requeue(tmp_path):
    history = supervisor.History(tmp_path / "starts.jsonl", "7")
    history.write(event="start", restart=0, step=100)
    store = ["checkpoint.url=s3://bucket/run", "storage.endpoint_url=http://127.0.0.1:9", "storage.anonymous=true"]
    done = supervised(tmp_path, 1, *store, "storage.retry_seconds=0.01", restart=1)
    assert (done.returncode, (tmp_path / "requeued").exists()) == (75, True), done.stderr
    assert [(line["event"], line["step"]) for line in history._lines()[1:]] == [
        ("start", None), ("end", None), ("requeue", None),
    ]  # fmt: skip
    assert done.stderr.count("the newest commit is not known: s3://bucket/run: gave up") == 2


def test_an_evaluation_that_is_refused_is_asked_for_again_with_the_next_export(tmp_path):
    exported, asked = tmp_path / "run" / "export", tmp_path / "asked"
    asked.touch()
    evaluation = ["sh", "-c", f"echo $0 >> {asked}; ls {exported} | grep -q 20 || {{ echo busy >&2; exit 1; }}"]
    wait = f"i=0; until [ $(wc -l < {asked}) -ge %d ] || [ $((i += 1)) = 99 ]; do sleep 0.05; done; sleep 0.3"
    export = f"mkdir -p {exported}; touch {exported}/step-%08d.safetensors"
    ranks = "; ".join([export % 10, wait % 1, export % 20, wait % 3])
    done = supervised(tmp_path, 0, ranks=ranks, evaluation=evaluation)
    assert done.returncode == 0, done.stderr
    assert "evaluation of step 10 was not submitted: busy" in done.stderr
    assert asked.read_text().split() == ["10", "10", "20"]
    job = supervisor.Job.model_validate_json((tmp_path / "job.json").read_text())
    for refused in ([str(tmp_path / "no_such_python")], ["sh", "-c", f"echo $0 >> {asked}; exit 1"]):
        assert supervisor._submit_evaluations(job.model_copy(update={"evaluation": refused}), {30, 40}) == set()
    assert asked.read_text().split()[3:] == ["30"]  # of a Slurm that refuses no more is asked


def test_a_full_disk_under_the_log_does_not_hold_up_srun():
    """Which says more than a pipe holds, and then blames a node."""
    program = """if True:
        import subprocess, sys
        from launch.supervisor import _Told
        said = "(head -c 300000 /dev/zero; echo; echo 'srun: error: n3: task 5: Killed') >&2"
        srun = subprocess.Popen(["sh", "-c", said], stderr=subprocess.PIPE)
        told = _Told(srun.stderr)
        told.join()
        print(told.node, srun.poll() if told.node is None else srun.wait(), flush=True)
        __import__("os")._exit(0)  # what is left for the full disk can't be written
    """
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, timeout=60,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
    assert done.stdout.split() == [b"n3", b"0"]


@pytest.mark.parametrize(
    ("refusals", "restarts", "calls", "complaint"), [(2, 0, 3, None), (9, 0, 4, "scontrol: busy"), (9, 1, 1, None)]
)
def test_a_requeue_is_asked_for_again_where_slurm_refuses(tmp_path, monkeypatch, refusals, restarts, calls, complaint):
    """Until it did so all the same: Restarts says it."""
    asked = tmp_path / "asked"
    program = f"""#!/bin/sh
        if [ "$1" != requeue ]; then echo JobState=RUNNING Restarts={restarts}; exit; fi
        echo >> {asked}
        [ $(wc -l < {asked}) -gt {refusals} ] || {{ echo busy >&2; exit 1; }}"""
    (tmp_path / "scontrol").write_text(program)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(supervisor, "REQUEUE_PAUSES", (0, 0, 0))
    said = supervisor._requeue(0)
    assert (said and said.partition(";")[0], asked.read_text().count("\n")) == (complaint, calls)


def test_every_local_path_of_a_submission_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = ["run.dir", "data.cache_dir", "data.shards", "model.init", "checkpoint.url", "evaluation.train_shards"]
    keys.append("evaluation.test_shards")
    config = checks.absolute(configuration.with_overrides(Config(), [f"{key}=here" for key in keys]))
    assert [attrgetter(key)(config) for key in keys] == [str(tmp_path / "here")] * len(keys)
    remote = configuration.with_overrides(config, ["model.init=s3://bucket/weights.safetensors"])
    assert checks.absolute(remote) == remote


@pytest.mark.slow
def test_data_of_a_submission(tmp_path):
    """`--data`, relative and of images, is in the job's config as absolute parts; Slurm is programs that answer."""
    photos = photo_folder(tmp_path / "photos", 2, each=10)
    answers = {"%P": "main*", "%G": "(null)", "%l": "1:00:00", "%D": "3"}
    told = " ".join(f"*{key}*) echo '{value}';;" for key, value in answers.items())
    for name, body in {"sinfo": f'case "$*" in {told} esac', "sbatch": "echo Submitted batch job 7"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "launch.slurm", "pretrain", str(root / "configs/debug_cpu.toml"), "--data", "photos",
         "--set", "run.dir=run", "--set", "train.global_batch_size=16"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(root)},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = configuration.load(tmp_path / "run" / "slurm" / "1" / "config-0.toml")
    assert config.data.shards == config.evaluation.train_shards == f"folder:{photos}/train"
    assert config.evaluation.test_shards == f"folder:{photos}/test"


def test_history_counts_the_starts_of_its_own_job(tmp_path):
    first = supervisor.History(tmp_path / "starts.jsonl", "7")
    assert first.steps_at_start() == {}
    first.write(event="start", restart=0, step=-1)
    supervisor.History(tmp_path / "starts.jsonl", "8").write(event="start", restart=0, step=99)
    first.write(event="requeue", restart=0, step=20)
    first.write(event="start", restart=1, step=20)
    assert first.steps_at_start() == {0: -1, 1: 20}
    with first.path.open("a") as file:
        file.write('{"time": 1, "job": "7", "event": "sta')  # a node died
    first.write(event="start", restart=2, step=30)
    assert first.steps_at_start() == {0: -1, 1: 20, 2: 30}


def test_newest_commit_counts_manifests_only(tmp_path):
    config = configuration.with_overrides(Config(), [f"run.dir={json.dumps(str(tmp_path))}"])
    assert supervisor.newest_commit(config) == -1
    for step, name in ((0, "manifest.json"), (20, "manifest.json"), (30, "state.json")):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")
    assert supervisor.newest_commit(config) == 20


def test_a_sweeps_table_takes_the_newest_evaluation_and_a_loss_that_was_not_finite(tmp_path):
    run = tmp_path / "lr=1"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "starts.jsonl").write_text(json.dumps({"event": "start", "restart": 0}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1000, "loss": None}))
    for folder, top1, converged in (("step-900", 0.9, True), ("step-1000", 0.5, False), ("step-900/cifar", 0.3, True)):
        (run / "evaluation" / folder).mkdir(parents=True)
        value = {"top1": top1, "fits": [{"converged": converged}]}
        results = {"data": {}, "probes": {"linear": {"h": value}}}
        (run / "evaluation" / folder / "results.json").write_text(json.dumps(results))
    head, _, row, *rest = sweep.table(tmp_path).splitlines()
    assert head == "| run | state | step | loss | linear h | cifar: linear h |"
    assert row == "| lr=1 | start | 1000 | not finite | 50.0%* | 30.0% |"
    assert "did not converge" in rest[-1]
    assert sweep.progress(run) == "step 1000, loss not finite; start after 0 requeues"


def test_a_sweep_is_every_combination_in_folders_of_their_own():
    base = configuration.with_overrides(Config(), ["run.dir=/runs/s"])
    given = ["objective.temperature=0.05,0.5", "model.head.kind=none,linear,mlp"]
    runs = [configuration.with_overrides(base, combination) for combination in sweep.combinations(base, given)]
    found = [(run.objective.temperature, run.model.head.kind) for run in runs]
    assert found == list(itertools.product((0.05, 0.5), ("none", "linear", "mlp")))
    assert len({run.run.dir for run in runs}) == 6
    assert runs[0].run.dir == "/runs/s/temperature=0.05_kind=none"
    assert {run.checkpoint.url for run in runs} == {None}
    assert sweep.combinations(base, []) == [[]]
    with pytest.raises(UserError, match="expected values whose letters and digits differ"):
        sweep.combinations(base, ["model.init=a/b,a-b"])
    lists = 'evaluation.probes=["knn"],["linear", "knn"]'
    runs = [configuration.with_overrides(base, combination) for combination in sweep.combinations(base, [lists])]
    assert [run.evaluation.probes for run in runs] == [["knn"], ["linear", "knn"]]
    assert runs[1].run.dir == "/runs/s/probes=--linear----knn--"
    texts = {
        "1,2": ["1", "2"],
        '"a,\\",b",\'c,"\',d': ['"a,\\",b"', "'c,\"'", "d"],
        "{a=[1,2],b=1},x": ["{a=[1,2],b=1}", "x"],
    }
    assert {text: sweep._values(text) for text in texts} == texts
    for wrong in ("temperature=1", "objective.temperature", "objective.temperature=", "objective.temperature=1,,2"):
        with pytest.raises(UserError, match=r"expected section\.key=value,value"):
            sweep.combinations(base, [wrong])


def test_no_two_runs_of_a_sweep_share_a_store_of_checkpoints():
    base = configuration.with_overrides(Config(), ["run.dir=/runs/s", "checkpoint.url=s3://bucket/s"])

    def roots(*keys):
        runs = [configuration.with_overrides(base, combination) for combination in sweep.combinations(base, keys)]
        return [checkpoint_store(run).root for run in runs]

    assert roots("run.seed=0,1") == ["s3://bucket/s/seed=0", "s3://bucket/s/seed=1"]
    of_both = roots("run.seed=0,1", "checkpoint.url=s3://bucket/a,s3://bucket/b")
    assert len(set(of_both)) == 4
    assert [root.rpartition("/")[0] for root in of_both] == ["s3://bucket/a", "s3://bucket/b"] * 2


def test_every_profile_loads_and_a_wrong_key_is_named(tmp_path):
    for path in profile.PROFILES.glob("*.toml"):
        assert profile.load(path.stem) == profile.load(str(path))
    with pytest.raises(UserError, match="expected one of apptainer, cpu,"):
        profile.load("none")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("partitions = 'gpu'\n")
    with pytest.raises(UserError, match=r"partitions.*the keys of a profile are partition,"):
        profile.load(str(wrong))


GPU_PROFILES = ("gpu", "apptainer", "enroot", "preemptible")
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", [p for p in CONFIGS if "launch.slurm" in p.read_text()], ids=lambda path: path.stem)
def test_a_config_and_the_profile_of_its_command_agree_about_cpus(path):
    """A rank's workers, and one core each for itself, NCCL, the pinning of memory and the writing of checkpoints."""
    (name,) = re.findall(r"--profile (\w+)", path.read_text())
    asked, given = configuration.load(path), profile.load(name)
    assert given.cpus_per_task == asked.data.num_workers + 4
    assert given.evaluation.cpus == asked.evaluation.num_workers + 4


def test_profiles_of_gpu_nodes_differ_in_what_they_are_about():
    sizes = {(p.cpus_per_task, p.evaluation.cpus) for p in map(profile.load, GPU_PROFILES)}
    assert len(sizes) == 1


def test_a_snapshot_is_imported_whatever_happens_to_the_checkout(tmp_path):
    folder = snapshot.take(tmp_path / "a folder" / "code")
    (folder / "dist_ssl" / "__init__.py").write_text('__version__ = "of the snapshot"\n')
    checkout = Path(__file__).parent.parent
    lines = [*snapshot.environment_lines(folder), f"{sys.executable} -m dist_ssl.cli --version"]
    said = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert said.stdout == "dist-ssl of the snapshot\n", said.stderr


def test_no_slurm_is_one_line(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path)}
    command = [sys.executable, "-m", "launch.slurm", "pretrain", "configs/debug_cpu.toml"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == "error: no Slurm here: sbatch is not installed; python -m launch.local runs on one machine\n"


def test_a_controller_that_does_not_answer_tells_a_job_nothing(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 20\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(queue, "COMMAND_SECONDS", 0.1)
    assert supervisor.job_fields() == {}


def test_what_no_run_directory_has_is_one_line(tmp_path, monkeypatch):
    for name, body in {"sinfo": "echo 'main*'", "sbatch": "echo Submitted batch job 7"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = tmp_path / "run"
    with pytest.raises(UserError, match="not a run directory"):
        slurm.evaluate(run)
    assert not run.exists()
    (run / "slurm").mkdir(parents=True)
    queue.record(run, job="7", kind="evaluate", log="log")
    with pytest.raises(UserError, match="no pretraining was submitted"):
        slurm.logs(run)


def test_states_that_are_over():
    assert queue.is_over("COMPLETED")
    assert queue.is_over("CANCELLED by 0")
    assert not any(map(queue.is_over, ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")))
