"""What would end a pretraining for good and can be known before it has a run directory.

`dist-ssl pretrain` asks on rank 0 and raises on all; `launch.local` and `launch.slurm` ask for what they can see before
they start any rank. A mistake then costs one line and exit code 2, and leaves nothing behind.
"""

from __future__ import annotations

from dist_ssl import storage
from dist_ssl.config import Config, StorageConfig, UserError, check_encoder, require
from dist_ssl.data.manifest import Manifest, MemberIndex, load_manifest, manifest_folder


def check_config(config: Config, num_ranks: int) -> None:
    """Raises UserError for what the config alone tells. Needs no torch."""
    if not config.data.shards:
        raise UserError("data.shards: expected where the training shards are, got nothing; --set data.shards=URL")
    if manifest_folder(config.data.shards) is None:
        storage.check_url(config.data.shards)
    if config.model.init:
        storage.check_url(config.model.init)
    check_ranks(config, num_ranks)


def check_ranks(config: Config, num_ranks: int) -> None:
    """Raises UserError for a batch that so many ranks can't share. Needs no torch."""
    if config.train.global_batch_size < num_ranks * config.objective.chunks:
        raise UserError(
            f"train.global_batch_size: {config.train.global_batch_size} is less than the {num_ranks} ranks x "
            f"{config.objective.chunks} chunks; take fewer ranks or a larger batch"
        )
    slices = config.batch_norm_slices
    if slices % num_ranks and num_ranks % slices:
        fitting = [n for n in range(1, num_ranks + slices + 1) if slices % n == 0 or n % slices == 0]
        near = f"{max(n for n in fitting if n < num_ranks)} or {min(n for n in fitting if n > num_ranks)}"
        raise UserError(
            f"model.batch_norm_images: {num_ranks} ranks can't share {slices} slices of "
            f"{config.model.batch_norm_images} images evenly; take {near} ranks"
        )


def check_extras(config: Config) -> None:
    """Raises UserError for an encoder or a package that the config needs and this environment lacks. Needs no torch."""
    check_encoder(config.model.encoder)
    if config.log.wandb_project:
        require("wandb", f"log.wandb_project = {config.log.wandb_project}", ", or leave the key out")
    if config.log.mlflow_experiment:
        require("mlflow", f"log.mlflow_experiment = {config.log.mlflow_experiment}", ", or leave the key out")


def check_before_start(config: Config) -> None:
    """All of it, by rank 0, the shards too; errors are raised on every rank alike. Collective: makes the process group.

    Raises UserError for what would be wrong at every start; StorageError where the store can't be reached now.
    """
    from dist_ssl import distributed, engine
    from dist_ssl.data.stream import check_working_set, plan_of, rank_streams

    world = distributed.initialize(2 * config.engine.hang_minutes)  # as the training would
    with distributed.together():
        if world.rank > 0:
            return
        check_config(config, world.size)
        check_extras(config)
        engine.deepspeed_config(config, 1)  # refuses raw keys
        manifest = load_manifest(config.data.shards, config.storage)
        _check_labels(config, manifest)
        plan_of(config, manifest)
        largest = max(range(world.size), key=lambda rank: len(rank_streams(config, rank, world.size)))
        check_working_set(config, manifest, largest, world.size)


def has_labels(manifest: Manifest, config: StorageConfig) -> bool:
    """By the first shard's: samples are mixed before they are written."""
    url = manifest.shards[0].index_url
    return bool((MemberIndex.from_bytes(storage.read_bytes(url, config), url).labels >= 0).any())


def _check_labels(config: Config, manifest: Manifest) -> None:
    if config.objective.name == "supervised" and not has_labels(manifest, config.storage):
        raise UserError(
            f"objective.name = supervised: expected labelled images, got none in {config.data.shards} with a label; "
            "take another objective, or a folder of class folders"
        )
