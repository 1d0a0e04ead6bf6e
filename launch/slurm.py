"""`python -m launch.slurm`: pretraining, evaluations and sweeps as Slurm jobs, submitted through submitit.

Everything that can be wrong is looked for before a job is submitted. A submission is a folder of the run directory,
RUN/slurm/<n>, of mode 700: the resolved config, a snapshot of the code, and submitit's pickle, which holds nothing but
the path of `job.json`. What runs in the job is `launch/supervisor.py`.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import submitit
import typer
from rich import print as rich_print
from rich.table import Table

from dist_ssl import cli
from dist_ssl import config as configuration
from dist_ssl.config import Config, UserError
from dist_ssl.data.commands import DataFolder
from dist_ssl.storage.layout import config_path
from launch import checks, queue, snapshot, supervisor, sweep
from launch import profile as profiles
from launch.profile import Profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretraining, evaluations and sweeps as Slurm jobs.",
)

RunDir = Annotated[Path, typer.Argument(help="A run's directory, or a sweep's.")]
ProfileName = Annotated[str | None, typer.Option("--profile", help="A name in launch/profiles, or a .toml file.")]
Partition = Annotated[str | None, typer.Option(help="Instead of the profile's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the sbatch script and submit nothing.")]


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="A config's TOML file.")],
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Default: all of the partition's nodes.")] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Default: one a GPU, one where there is none.")
    ] = None,
    time_minutes: Annotated[
        int | None, typer.Option(min=1, help="Of each start; default: the most, up to a day.")
    ] = None,
    partition: Partition = None,
    profile: ProfileName = None,
    max_requeues: Annotated[int, typer.Option(min=0, help="Stop after this many.")] = 100,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Evaluate at the end, and what is exported.")] = False,
    sweep_keys: Annotated[list[str], typer.Option("--sweep", metavar="KEY=V1,V2", help="Every combination.")] = [],  # noqa: B006
    max_parallel: Annotated[int, typer.Option(min=1, help="Runs of a sweep at the same time.")] = 8,
    extend: Annotated[bool, typer.Option("--extend", help="Allow the run to become longer than it was.")] = False,
    dry_run: DryRun = False,
    data: DataFolder = None,
    overrides: Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE")] = [],  # noqa: B006
) -> None:
    """Submit a pretraining; preempted or out of time it is requeued and goes on.

    Example: python -m launch.slurm pretrain configs/simclr_resnet50_imagenet.toml --nodes 4 --profile gpu --evaluate

    Example: python -m launch.slurm pretrain configs/simclr_resnet50_imagenet.toml --data /shared/photos

    Example: python -m launch.slurm pretrain CONFIG --sweep objective.temperature=0.05,0.1 --sweep run.seed=0,1,2
    """
    chosen = profiles.load(profile)
    name = queue.check_partition(partition or chosen.partition)
    queue.check_nodes(name, nodes)
    gpus = queue.gpus_of_a_node(name) if gpus_per_node is None else gpus_per_node
    tasks = tasks_per_node or max(1, gpus)
    base = checks.absolute(checks.with_data(configuration.load(config, overrides), data))
    combined = sweep.combinations(base, sweep_keys)
    runs = [checks.absolute(configuration.with_overrides(base, combination)) for combination in combined]
    for run in runs:
        checks.check_run(run, nodes * tasks, same_environment=chosen.python is None)
    root = Path(base.run.dir)
    sizes = {
        "job_name": f"dist_ssl-{root.name}",
        "partition": name,
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": chosen.cpus_per_task,
        "time": queue.time_limit(name, time_minutes),
        "array_parallelism": max_parallel,
        **({"gpus_per_node": gpus} if gpus else {}),
    }
    script = _script(_executor(_next_folder(root, create=False), chosen, root, sizes, len(runs) > 1), len(runs))
    if dry_run:
        typer.echo(script)
        return
    queue.ask("sbatch", "--test-only", stdin=script)  # the last question; from here on files are written
    folder = _next_folder(root)
    executor = _executor(folder, chosen, root, sizes, len(runs) > 1)
    snapshot.take(folder / "code")
    evaluation = _evaluation_command(profile, partition) if evaluate else None
    options = ["--extend"] if extend else []
    job_files = [
        _write_job(run, folder, index, chosen, tasks, max_requeues, evaluation, options)
        for index, run in enumerate(runs)
    ]
    jobs = executor.map_array(supervisor.supervise, job_files)
    for run, job in zip(runs, jobs, strict=True):
        log = str(root / "slurm" / f"{job.job_id}.log")
        queue.record(Path(run.run.dir), job=job.job_id, kind="pretrain", log=log)
    _after_submission(root, runs, jobs, evaluate, profile, partition, bool(sweep_keys))


@app.command()
def evaluate(
    run: RunDir,
    checkpoint: Annotated[int | None, typer.Option(help="Its step; default: the newest when the job starts.")] = None,
    after: Annotated[str | None, typer.Option(help="Wait for the end of this job.")] = None,
    partition: Partition = None,
    profile: ProfileName = None,
    dry_run: DryRun = False,
) -> None:
    """Submit an evaluation as a job of its own, on one node.

    Example: python -m launch.slurm evaluate runs/imagenet --profile gpu
    """
    chosen = profiles.load(profile)
    resources = chosen.evaluation
    name = queue.check_partition(partition or resources.partition or chosen.partition)
    run = run.absolute()
    if after is None:
        config_path(run)  # raises where there is no run; one that is waited for need not have begun
    gpus = min(1, queue.gpus_of_a_node(name)) if resources.gpus is None else resources.gpus
    sizes = {
        "job_name": f"dist_ssl-{run.name}-evaluate",
        "partition": name,
        "nodes": 1,
        "ntasks_per_node": max(1, gpus),
        "cpus_per_task": resources.cpus,
        "time": queue.time_limit(name, None, resources.time_minutes),
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"dependency": f"afterany:{after}"} if after else {}),
    }
    if dry_run:
        typer.echo(_script(_executor(_next_folder(run, create=False), chosen, run, sizes), 1))
        return
    folder = _next_folder(run)
    executor = _executor(folder, chosen, run, sizes)
    snapshot.take(folder / "code")
    command = [
        "srun",
        *_step_options(resources.cpus, chosen),
        *_python(chosen),
        "-m",
        "dist_ssl.cli",
        "evaluate",
        str(run),
    ]
    job = executor.submit(supervisor.evaluate, command, str(run), checkpoint)
    queue.record(
        run, job=job.job_id, kind="evaluate", log=str(run / "slurm" / f"{job.job_id}.log"), checkpoint=checkpoint
    )
    typer.echo(f"evaluation: job {job.job_id}{f' after {after}' if after else ''}")


@app.command()
def status(run: RunDir) -> None:
    """Jobs of a run with their states, how far it is, and why it stopped.

    Example: python -m launch.slurm status runs/imagenet
    """
    table = Table("job", "what", "state", "requeues")
    for entry in queue.recorded(run):
        state, restarts = queue.state(entry["job"])
        table.add_row(entry["job"], entry["kind"], state, str(restarts))
    rich_print(table)
    typer.echo(f"logs: {run / 'slurm'}")
    typer.echo(sweep.progress(run))


@app.command()
def cancel(run: RunDir) -> None:
    """Cancel every job of a run that is not over; the ranks commit first.

    Example: python -m launch.slurm cancel runs/imagenet
    """
    live = [entry["job"] for entry in queue.recorded(run) if not queue.is_over(queue.state(entry["job"])[0])]
    if live:
        queue.ask("scancel", *live)
    typer.echo(f"cancelled: {', '.join(live)}" if live else "no job of this run is waiting or running")


@app.command()
def logs(run: RunDir, follow: Annotated[bool, typer.Option("--follow", help="Until the job is over.")] = False) -> None:
    """Print the log of a run's newest pretraining job.

    Example: python -m launch.slurm logs runs/imagenet --follow
    """
    trained = [entry for entry in queue.recorded(run) if entry["kind"] == "pretrain"]
    if not trained:
        raise UserError(f"{run}: no pretraining was submitted for it; other logs are in {run / 'slurm'}")
    entry = trained[-1]
    path, position = Path(entry["log"]), 0
    while True:
        over = not follow or queue.is_over(queue.state(entry["job"])[0])  # asked before the last read
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                typer.echo(file.read(), nl=False)
                position = file.tell()
        if over:
            return
        time.sleep(2)


@app.command()
def table(folder: Annotated[Path, typer.Argument(help="A sweep's folder.")]) -> None:
    """One row a run of a sweep: what it varies, how far it is, its loss and its probes. Also writes FOLDER/table.md.

    Example: python -m launch.slurm table runs/sweep
    """
    typer.echo(sweep.table(folder))


def _next_folder(run_dir: Path, create: bool = True) -> Path:
    """RUN/slurm/<n>, made by this process alone. submitit's pickles run as the user: nobody else may write here."""
    base = run_dir / "slurm"
    if create:
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o700)
    for number in itertools.count(1):
        folder = base / str(number)
        try:
            if create:
                folder.mkdir()
            if create or not folder.exists():
                return folder
        except FileExistsError:  # another submission's
            continue
    raise AssertionError


def _executor(
    folder: Path, profile: Profile, run_dir: Path, sizes: dict[str, Any], is_array: bool = False
) -> submitit.SlurmExecutor:
    """What submits a job of these sizes from the submission `folder`. Writes nothing."""
    executor = submitit.SlurmExecutor(folder=folder)
    output = run_dir / "slurm" / ("%A_%a.log" if is_array else "%j.log")
    given = {"account": profile.account, "qos": profile.qos, "constraint": profile.constraint}
    if profile.memory_gb is not None:
        given["mem"] = f"{round(profile.memory_gb * 1024)}M"
    executor.update_parameters(
        **sizes,
        **{key: value for key, value in given.items() if value is not None},
        **({"exclusive": True} if profile.exclusive else {}),
        # bash would die of the SIGTERM with which Slurm asks the ranks to commit, and the job with it.
        setup=["trap : TERM USR1 USR2", *profiles.setup_lines(profile), *snapshot.environment_lines(folder / "code")],
        signal_delay_s=profile.signal_seconds,
        use_srun=False,  # one supervisor; it starts the ranks
        stderr_to_stdout=True,
        additional_parameters={"output": str(output), "requeue": True, **profile.sbatch},
    )
    return executor


def _script(executor: submitit.SlurmExecutor, num_runs: int) -> str:
    """The sbatch script as submitit writes it."""
    if num_runs > 1:
        executor.parameters["map_count"] = num_runs
    text = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    executor.parameters.pop("map_count", None)
    return str(text)


def _step_options(cpus_per_task: int, profile: Profile) -> list[str]:
    # --wait: the ranks that outlive a failed one get this long to fail by themselves, with their own messages.
    return ["--unbuffered", f"--cpus-per-task={cpus_per_task}", "--kill-on-bad-exit=0", "--wait=60", *profile.srun]


def _python(profile: Profile) -> list[str]:
    return [*profile.container, profile.python or sys.executable]


def _write_job(
    run: Config,
    folder: Path,
    index: int,
    profile: Profile,
    tasks: int,
    max_requeues: int,
    evaluation: list[str] | None,
    options: list[str],
) -> str:
    """Writes a run's resolved config and job description into the submission; returns the description's path."""
    own = Path(run.run.dir) / "slurm"
    own.mkdir(parents=True, exist_ok=True)
    own.chmod(0o700)
    config_file, job_file = folder / f"config-{index}.toml", folder / f"job-{index}.json"
    config_file.write_text(configuration.dumps(run))
    job = supervisor.Job(
        config=str(config_file),
        options=options,
        folder=str(own),
        python=_python(profile),
        srun=_step_options(profile.cpus_per_task, profile),
        tasks_per_node=tasks,
        max_requeues=max_requeues,
        evaluation=[*evaluation, run.run.dir, "--checkpoint"] if evaluation else None,
    )
    job_file.write_text(job.model_dump_json(indent=1))
    return str(job_file)


def _evaluation_command(profile: str | None, partition: str | None) -> list[str]:
    options = []
    if profile:
        options = ["--profile", str(Path(profile).absolute()) if profile.endswith(".toml") else profile]
    options += ["--partition", partition] if partition else []
    return [sys.executable, "-m", "launch.slurm", "evaluate", *options]


def _after_submission(
    root: Path,
    runs: list[Config],
    jobs: list[Any],
    evaluate_too: bool,
    profile: str | None,
    partition: str | None,
    is_sweep: bool,
) -> None:
    """Submits what waits for the runs' end, and says how to watch them."""
    last = [job.job_id for job in jobs]
    if evaluate_too:
        for run, job in zip(runs, jobs, strict=True):
            evaluate(Path(run.run.dir), None, job.job_id, partition, profile, False)
        last = [queue.recorded(Path(run.run.dir))[-1]["job"] for run in runs]
    if is_sweep:
        _submit_table(root, ":".join(last), partition, profile)
    for run, job in zip(runs, jobs, strict=True):
        typer.echo(f"job {job.job_id}: {run.run.dir}, log {root / 'slurm' / f'{job.job_id}.log'}")
    typer.echo(f"follow it: python -m launch.slurm logs {runs[0].run.dir} --follow")
    typer.echo(f"state:     python -m launch.slurm {'table' if is_sweep else 'status'} {root}")


def _submit_table(root: Path, after: str, partition: str | None, profile: str | None) -> None:
    chosen = profiles.load(profile)
    folder = _next_folder(root)
    sizes = {
        "job_name": f"dist_ssl-{root.name}-table",
        "partition": queue.check_partition(partition or chosen.evaluation.partition or chosen.partition),
        "time": 10,
        "dependency": f"afterany:{after}",
    }
    executor = _executor(folder, chosen, root, sizes)
    snapshot.take(folder / "code")
    job = executor.submit(sweep.table, root)
    queue.record(root, job=job.job_id, kind="table", log=str(root / "slurm" / f"{job.job_id}.log"))


if __name__ == "__main__":
    cli.run(app)
