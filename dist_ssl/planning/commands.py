"""The commands that look ahead: `dist-ssl doctor`, `plan`, `list`. They import what they need when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dist_ssl import config as configuration
from dist_ssl.config import UserError
from dist_ssl.config.environment import rank_in_environment
from dist_ssl.data.commands import DataFolder, Overrides

app = typer.Typer()
WITH = "With "  # begins the heading over the options that mean something beside another one only


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Also look at what this config needs.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Can this machine, and the cluster around it, run a config? One line a question; exit code 1 where one is red.

    Example: dist-ssl doctor configs/quickstart.toml

    Example: srun -N2 --ntasks-per-node=8 --gpus-per-node=8 dist-ssl doctor CONFIG
    """
    import rich

    from dist_ssl.planning import doctor as examination

    findings = examination.examine(configuration.load(config, overrides) if config is not None else None)
    red = examination.show(findings, rich.get_console().print if rank_in_environment() == 0 else None)
    raise typer.Exit(min(red, 1))


def _with(option: str, **settings: Any) -> Any:
    """An option that means something only where another one is given, in a part of its own of the help."""
    return typer.Option(rich_help_panel=WITH + option, **settings)


def _check_given(context: typer.Context) -> None:
    given = {
        parameter.opts[0]: getattr(parameter, "rich_help_panel", None) or ""
        for parameter in context.command.params
        if parameter.name and (source := context.get_parameter_source(parameter.name)) and source.name == "COMMANDLINE"
    }
    for option, panel in given.items():
        if panel.startswith(WITH) and (needed := panel.removeprefix(WITH)) not in given:
            raise UserError(f"{option}: expected {needed} beside it, without which it changes nothing")


@app.command()
def plan(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A TOML file; see configs/.")],
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    images_per_second: Annotated[float | None, typer.Option(min=1e-3, help="Of a GPU: for hours, store rate.")] = None,
    gigabits_per_second: Annotated[float | None, typer.Option(min=1e-3, help="Between ranks: for time.")] = None,
    gpu_memory_gb: Annotated[float, typer.Option(min=1.0, help="Of one GPU: which ZeRO stages fit.")] = 80.0,
    at_ranks: Annotated[str | None, typer.Option(help="What grows with their number, counted: 8,64,1024.")] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="Then the shards are not read.")] = None,
    mtbf_hours: Annotated[
        float | None, typer.Option(min=1e-3, help="Between failures of a node: when to save.")
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate an object store in the first steps.")] = False,
    data: DataFolder = None,
    overrides: Overrides = [],  # noqa: B006
    num_classes: Annotated[int, _with("--num-images", min=0, help="Of the online probe.")] = 0,
    num_shards: Annotated[int, _with("--num-images", min=1, help="Of --simulate.")] = 1024,
    stall_seconds: Annotated[
        float | None, _with("--mtbf-hours", min=0.0, help="Of a save, as the log says it.")
    ] = None,
    restart_minutes: Annotated[float, _with("--mtbf-hours", min=0.0, help="From a failure to the next step.")] = 5.0,
    replacement_minutes: Annotated[float, _with("--mtbf-hours", min=0.0, help="Until another node is there.")] = 30.0,
    simulated_steps: Annotated[int, _with("--simulate", min=1)] = 20,
    store_requests_per_second: Annotated[float, _with("--simulate", min=1.0, help="Before it answers 503.")] = 5500.0,
    store_gbps: Annotated[float, _with("--simulate", min=1e-3, help="Gigabits a second of the store, in all.")] = 1e6,
    node_gbps: Annotated[float, _with("--simulate", min=1e-3, help="Gigabits a second of a node.")] = 25.0,
    latency_ms: Annotated[float, _with("--simulate", min=0.0, help="The median of a request.")] = 30.0,
) -> None:
    """Predict memory, traffic, checkpoints, store rate and hours of a run on any number of GPUs, formulas beside them;
    what each ZeRO stage would cost, and which one to take; from --mtbf-hours on, what failures cost and when to save.

    Example: dist-ssl plan configs/simclr_resnet50_imagenet.toml --nodes 64 --num-images 1281167

    Example: dist-ssl plan configs/simclr_resnet50_imagenet.toml --num-images 1281167 --at-ranks 8,64,1024

    Example: dist-ssl plan configs/simclr_resnet50_imagenet.toml --nodes 128 --num-images 1281167 --mtbf-hours 5000

    Example: dist-ssl plan configs/simclr_resnet50_imagenet.toml --nodes 8 --num-images 1281167 --simulate

    Example: dist-ssl plan configs/quickstart.toml --gpus-per-node 1 --data photos
    """
    import rich

    from dist_ssl.data.given import training_overrides
    from dist_ssl.data.manifest import load_manifest, read_member_index
    from dist_ssl.planning.before_start import check_ranks

    _check_given(context)
    if data is not None and num_images is not None:
        raise UserError("--data and --num-images both say how many images there are: leave one of them out")
    checked, columns = configuration.load(config, overrides), _numbers_of_ranks(at_ranks)
    if data is not None:
        checked = configuration.with_overrides(checked, training_overrides(data, checked.storage))
    configuration.check_encoder(checked.model.encoder)
    for ranks in (nodes * gpus_per_node, *columns):
        check_ranks(checked, ranks)
    manifest = load_manifest(checked.data.shards, checked.storage) if num_images is None else None
    from dist_ssl.planning import counts, estimate, failures, simulation, stages  # which load torch, for seconds

    rates = (images_per_second, gigabits_per_second)
    classes = len(manifest.classes) if manifest is not None else num_classes
    sizes = estimate.Sizes.of(checked, nodes * gpus_per_node, num_classes=classes)
    estimates = estimate.of_run(checked, nodes, gpus_per_node, manifest, num_images, *rates, sizes)
    rich.print(estimate.table(f"{config}: {nodes} x {gpus_per_node} GPUs", estimates))
    if mtbf_hours is not None:
        known = {found.name: found.value for found in estimates}
        reliability = failures.Reliability(
            mtbf_seconds=3600 * mtbf_hours,
            restart_seconds=60 * restart_minutes,
            replacement_seconds=60 * replacement_minutes,
            stall_seconds=stall_seconds,
        )
        of_run = (known["a checkpoint"], known.get("a step"), known.get("hours"))
        told = failures.failures(reliability, nodes, nodes * gpus_per_node, *of_run)
        rich.print(estimate.table(f"Failures, one in {mtbf_hours:g} h a node", told))
    rich.print(stages.table(stages.stages(checked, sizes), gpu_memory_gb))
    if columns:
        rich.print(counts.table("Counts by number of ranks", checked, sizes, columns))
    if simulate:
        store = simulation.Store(
            store_requests_per_second, node_gbps * 1e9 / 8, store_gbps * 1e9 / 8, latency_ms / 1e3,
            images_per_second=images_per_second or simulation.Store.images_per_second,
        )  # fmt: skip
        shards = manifest or simulation.even_shards(num_images or 1, num_shards)
        sizes_of_one = read_member_index(manifest.shards[0], checked.storage).sizes if manifest else None
        simulated = simulation.Simulation(
            checked, shards, nodes, gpus_per_node, simulated_steps, store, image_sizes=sizes_of_one
        ).run(progress=True)
        rich.print(simulation.table(checked, nodes, simulated, simulated_steps))
        if simulated.given_up:
            typer.echo(
                f"such a run ends: {simulated.given_up} requests were refused for longer than storage.retry_seconds; "
                "set storage.requests_per_second to what the store takes, or raise storage.retry_seconds"
            )
        if (better := simulation.recommended_streams(checked, shards, nodes * gpus_per_node)) != checked.data.streams:
            typer.echo(f"a new run on so many ranks had better set data.streams={better}: no two ranks share a stream")


def _numbers_of_ranks(given: str | None) -> list[int]:
    numbers = given.split(",") if given else []
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--at-ranks {given}: expected numbers of ranks with commas between them, such as 8,64,1024")
    return [int(number) for number in numbers]


@app.command("list")
def list_names() -> None:
    """List what a config may name: encoders, heads, objectives, probes, and sources of images.

    Example: dist-ssl list
    """
    from dist_ssl.planning.names import names

    typer.echo("\n".join(names()))
