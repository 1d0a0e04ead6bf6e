"""The commands `dist-ssl evaluate` and `embed`. They import what they need when they are called."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from dist_ssl.config import Config, StorageConfig, UserError, load, override, with_overrides
from dist_ssl.config.environment import rank_in_environment, ranks_in_environment, started_by_local_launcher
from dist_ssl.data.commands import Overrides
from dist_ssl.storage.layout import config_path

log = logging.getLogger(__name__)

app = typer.Typer()

OURS = ("features", "tensorboard")  # folders that an evaluation keeps beside those of other data, and removes


class DataSet(NamedTuple):
    """What probes are fitted and scored on (None: what the config says), and what it is called."""

    name: str | None  # that the user gave
    location: str | None  # of `--data`
    train: str | None = None
    test: str | None = None

    @property
    def called(self) -> str | None:
        """Where the user gave no name: that of its folder."""
        if self.name or self.location is None:
            return self.name
        return Path(self.location).name if "://" in self.location else Path(self.location).resolve().name


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run's directory.")] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Its step; the newest by default.")] = None,
    data: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]URL", help="Folder with train and test shards, or of images; one or several."),
    ] = [],  # noqa: B006
    train_shards: Annotated[str | None, typer.Option(help="Labelled shards that probes are fitted on.")] = None,
    test_shards: Annotated[str | None, typer.Option(help="Labelled shards that probes are scored on.")] = None,
    probes: Annotated[str | None, typer.Option(help="Comma-separated; see evaluation.probes.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Probe the run's teacher instead of its student.")] = False,
    name: Annotated[str | None, typer.Option(help="The data's name; theirs or their hash's by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Anybody's weights instead of a run.")] = None,
    encoder: Annotated[str | None, typer.Option(help="The encoder that the weights are of.")] = None,
    config: Annotated[Path | None, typer.Option(help="Config for the weights' evaluation.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the weights' results.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Probe a frozen encoder: linear, kNN, what each layer of the head keeps. Writes results.json, prints a table.

    Several data sets are evaluated one after another, each kept under its name, and end in one table.

    Example: dist-ssl evaluate runs/quickstart

    Example: dist-ssl evaluate --weights resnet50.pth --encoder resnet50 --data s3://bucket/cifar10

    Example: dist-ssl evaluate runs/imagenet --data pets=/data/pets --data cars=s3://bucket/cars --probes
    linear,knn,few_labels
    """
    if (run is None) == (weights is None) or (weights is None) != (encoder is None):
        raise UserError("evaluate: expected a run's directory, or --weights FILE --encoder NAME")
    if probes is not None and not any(probes.split(",")):
        raise UserError("--probes: expected names with commas between them, such as linear,knn")
    given = _given(data, name, several_excludes=[train_shards, test_shards])
    if run is not None:
        config_path(run)  # where there is none, before torch is imported, which takes seconds
    alone = ranks_in_environment() is None
    sets = [_found(one, train_shards, test_shards) for one in given] if alone else []  # all before the first is begun
    if rank_in_environment() == 0 and not started_by_local_launcher():
        log.info("%s: loading torch, which takes some seconds", run or weights)
    import rich

    from dist_ssl import distributed
    from dist_ssl.evaluation import evaluate as evaluation
    from dist_ssl.evaluation.results import FILE, show, show_several

    world, done = distributed.initialize(), []
    for one in sets or [_found(one, train_shards, test_shards) for one in given]:
        settings = [*overrides, *_settings(one, probes, teacher)]
        if run is not None:
            subject = evaluation.run_subject(run, checkpoint, settings, one.name, one.called)
        else:
            assert weights is not None
            assert encoder is not None
            called = one.called if len(given) > 1 else one.name
            subject = evaluation.weights_subject(
                weights, encoder, _config_of(weights, encoder, config, settings), output, called
            )
        done.append(evaluation.evaluate(subject, world.device))
        if world.rank == 0 and len(given) == 1:
            show(done[-1].values, rich.print)
        if world.rank == 0:
            typer.echo(done[-1].folder / FILE)
    if world.rank == 0:
        show_several(done, rich.print)
        typer.echo(f"as a page: dist-ssl report {shlex.quote(str(run or subject.folder))}")
    distributed.shutdown()


def _settings(one: DataSet, probes: str | None, teacher: bool) -> list[str]:
    """What the options say, as overrides of a config."""
    values: dict[str, Any] = {"train_shards": one.train, "test_shards": one.test, "teacher": teacher or None}
    values["probes"] = None if probes is None else [probe for probe in probes.split(",") if probe]
    return [override(f"evaluation.{key}", value) for key, value in values.items() if value is not None]


def _config_of(weights: Path, encoder: str, config: Path | None, settings: list[str]) -> Config:
    """The config of the evaluation of a file of weights: that of the JSON that `export` writes beside it."""
    if config is not None:
        return with_overrides(load(config), [override("model.encoder", encoder), *settings])
    # What a head keeps is nobody's question about weights without one, until it is asked.
    unasked = [override("model.encoder", encoder), 'evaluation.probes=["linear", "knn"]']
    with contextlib.suppress(OSError, ValueError, TypeError):
        told = dict(json.loads(weights.with_suffix(".json").read_text()))
        keys = {"evaluation.image_size": "evaluated_size", "augment.mean": "mean", "augment.std": "std"}
        unasked += [override(key, told[name]) for key, name in keys.items() if name in told]
    return with_overrides(Config(), [*unasked, *settings])


def _given(data: list[str], name: str | None, several_excludes: list[str | None]) -> list[DataSet]:
    """The data sets of the command line, named by NAME=URL or `--name`; where none is given, one without a place."""
    sets = [_split(one) for one in data] or [DataSet(None, None)]
    if len(sets) > 1 and (name is not None or any(several_excludes)):
        raise UserError(
            "--data: given several times, it goes without --name, --train-shards and --test-shards; "
            "name each by --data NAME=URL"
        )
    sets = [one._replace(name=name or one.name) for one in sets]
    called = [one.called for one in sets]
    for folder in called:
        if folder is not None and (Path(folder).name != folder or folder in ("", "..", *OURS)):
            raise UserError(
                f"data set {folder!r}: expected the name of a folder, without a path, and not {', '.join(OURS)} or ..; "
                "give another by --name, or by --data NAME=URL"
            )
    if twice := [one for one in called if called.count(one) > 1]:
        raise UserError(f"--data: two sets are called {twice[0]}; give each a name of its own, --data NAME=URL")
    return sets


def _split(given: str) -> DataSet:
    """NAME=URL or URL; a path that is there, such as a=b/c, is a path."""
    found = re.fullmatch(r"([\w.-]+)=(.+)", given)
    return DataSet(found[1], found[2]) if found and not os.path.exists(given) else DataSet(None, given)


def _found(one: DataSet, train: str | None, test: str | None) -> DataSet:
    """With where its parts are, `train` and `test` where they are given. Collective."""
    if one.location is not None:
        from dist_ssl.data.given import train_and_test

        parts = train_and_test(one.location, StorageConfig())
        train, test = train or parts[0], test or parts[1]
        if test is None:  # the config's own is of other images
            raise UserError(
                f"--data {one.location}: holds no test part to score probes on; expected folders train and test in it, "
                "or --test-shards URL"
            )
    return one._replace(train=train, test=test)


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    folder: Annotated[Path, typer.Argument(help="A folder of images, whatever lies in it.")],
    file: Annotated[Path, typer.Argument(help="OUT.npy, with the paths in OUT.json; or OUT.parquet.")],
    checkpoint: Annotated[int | None, typer.Option(help="Its step; the newest by default.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="By the run's teacher.")] = False,
) -> None:
    """Write h of every image under a folder, by a run's encoder. What can't be decoded is left out and named.

    Example: dist-ssl embed runs/imagenet photos photos.npy
    """
    config_path(run)  # where there is none, before torch is imported, which takes seconds
    from dist_ssl.evaluation import embed as embedding

    embedding.check_output(file)
    paths, left_out = embedding.images_in(folder), dict[int, str]()
    encoder = embedding.load_encoder(run, checkpoint, teacher)
    h = embedding.embed(encoder, paths, left_out=left_out, progress=True)
    kept = [path for place, path in enumerate(paths) if place not in left_out]
    embedding.write_embeddings(file, h, kept, encoder)
    if left_out:
        log.warning("%d of %d files left out, such as %s", len(left_out), len(paths), next(iter(left_out.values())))
    typer.echo(f"{file}: h of {len(h)} images, {h.shape[1]} numbers each, by step {encoder.step}")
