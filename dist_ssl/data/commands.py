"""The commands `dist-ssl shards write`, `index`, `merge`, `verify`. They import what they need when they are called."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a config key.")]
DataFolder = Annotated[
    str | None, typer.Option("--data", help="Folder with train and test shards, or of images: sets the three keys.")
]

app = typer.Typer(no_args_is_help=True, help="Write, index and verify WebDataset shards.")


@app.command("write")
def write(
    source: Annotated[
        str,
        typer.Argument(
            help="folder:DIR, parquet:PATTERN[:COLUMN], shapes:COUNT[:SIZE] or others: see `dist-ssl list`."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="Directory or URL.")],
    test_fraction: Annotated[float, typer.Option(help="Hold out this part: DEST/train and DEST/test.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the global permutation, and of shapes.")] = 0,
    shard_mb: Annotated[float, typer.Option(min=0.01, help="Size of a shard that is aimed at.")] = 64.0,
    resize: Annotated[int | None, typer.Option(min=8, help="Scale the shorter side down to this.")] = None,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode each image, or look at headers.")] = True,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; one a core by default.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write WebDataset shards, samples permuted globally. Interrupted, the same command goes on.

    Images are files that end in .jpg, .jpeg, .png, .webp, .tif, .tiff, .bmp or .gif (the first frame); what has another
    ending is left out and counted. EPS and other formats are not taken.

    Each image is decoded once, under the limits of training (--set data.max_pixels=N). What is bad is left out, named,
    and listed beside its shard in *.left-out.jsonl. Where that is more than data.max_bad_fraction of the files (of 1000
    files at least), the exit code is 2 and no manifest is written; --set data.max_bad_fraction=1 puts up with it.

    Example: dist-ssl shards write folder:photos s3://bucket/photos --test-fraction 0.1

    Example: dist-ssl shards write shapes:10000 data/shapes --test-fraction 0.2

    Example: dist-ssl shards write 'parquet:hf://datasets/org/name/data/train-*.parquet' data/train

    Example: dist-ssl shards write idx:train-images-idx3-ubyte.gz:train-labels-idx1-ubyte.gz data/fashion
    """
    from dist_ssl.config import Config, with_overrides
    from dist_ssl.data.shards import write_shards
    from dist_ssl.data.sources import open_source

    config = with_overrides(Config(), overrides)
    manifests = write_shards(
        open_source(source, seed, config.storage), destination, config.storage, seed=seed, test_fraction=test_fraction,
        shard_mb=shard_mb, resize=resize, decode_images=decode, data=config.data, num_workers=workers, progress=True,
    )  # fmt: skip
    for manifest in manifests:
        typer.echo(f"{manifest.url}: {manifest.num_samples} samples in {len(manifest.shards)} shards")


@app.command("index")
def index(
    location: Annotated[
        str,
        typer.Argument(
            help="Pattern of braces or * (no ? in a URL), or a directory of tars; folder:DIR or idx:IMAGES[:LABELS]."
        ),
    ],
    output: Annotated[str | None, typer.Option(help="Where manifest and indexes go; next to the shards.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Of a folder: hold out this part, folder:DIR/test.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of a folder's permutation.")] = 0,
    json_label: Annotated[str | None, typer.Option(help="The field of each .json that holds the label.")] = None,
    checksums: Annotated[bool, typer.Option("--checksums", help="Read every byte, for crc32 of images.")] = False,
    rebuild: Annotated[bool, typer.Option(help="Read shards again that have an index.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that index shards.")] = 1,
    part: Annotated[str, typer.Option(metavar="K/N", help="Only the K-th of N parts of the shards, 1 to N.")] = "1/1",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Shards at a time, a process; 32, with --checksums two a core.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Index shards that were made elsewhere (WebDataset, img2dataset, GNU tar). Interrupted, the same command goes on.

    Only tar headers and labels are read, by ranges; with --checksums each byte is, so that a changed image is told from
    the one that was indexed though its name and size are the same. --part splits the work over machines, such as a
    Slurm array's; then `dist-ssl shards merge` joins the parts.

    Or images that stay where they are, a folder's or MNIST's, to train on without a copy; the index goes to
    DIR/.dist_ssl. Where images lie on a network's file system or in a store, `shards write` is the faster way.

    Example: dist-ssl shards index 's3://bucket/train-{0000..1023}.tar' --output data/index

    Example: dist-ssl shards index 'hf://datasets/org/name/train-*.tar' --output index; then data.shards = "index"

    Example: dist-ssl shards index 's3://bucket/*.tar' --output data/index --part 3/64 --jobs 8

    Example: dist-ssl shards index folder:photos --test-fraction 0.1; then data.shards = "folder:photos/train"
    """
    from dist_ssl.config import Config, UserError, with_overrides
    from dist_ssl.data.in_place_index import index_in_place
    from dist_ssl.data.indexing import index_shards, summary
    from dist_ssl.data.manifest import manifest_folder
    from dist_ssl.data.parts import parse

    config = with_overrides(Config(), overrides)
    if manifest_folder(location) is not None:
        if part != "1/1" or jobs > 1:
            raise UserError(f"--part, --jobs: {location} is indexed by one command; they are for shards")
        manifests = index_in_place(
            location, config.storage, output=output, test_fraction=test_fraction, seed=seed, rebuild=rebuild,
            data=config.data, num_workers=workers, progress=True,
        )  # fmt: skip
    else:
        if test_fraction:
            raise UserError("--test-fraction: shards are not split; name some of them for the test")
        manifests = [
            index_shards(
                location, config.storage, output=output, json_label=json_label, checksums=checksums, rebuild=rebuild,
                num_workers=workers, num_processes=jobs, part=None if part == "1/1" else parse(part), progress=True,
            )
        ]  # fmt: skip
    for manifest in manifests:
        typer.echo(summary(manifest))


@app.command("merge")
def merge(
    folder: Annotated[str, typer.Argument(help="Where `shards index --part` wrote: its --output, or the shards'.")],
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Join the parts of an index into one manifest; all of them are there, or the missing ones are named.

    Example: dist-ssl shards merge data/index
    """
    from dist_ssl.config import Config, with_overrides
    from dist_ssl.data import parts
    from dist_ssl.data.indexing import summary

    typer.echo(summary(parts.merge(folder, with_overrides(Config(), overrides).storage)))


@app.command("verify")
def verify(
    location: Annotated[str, typer.Argument(help="Directory, manifest or brace pattern.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too, as training does.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Shards at a time; two a core by default, one with --decode.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Read every shard and compare bytes, counts and checksums; names each damaged member and exits with 1.

    With --decode, also each image that training would replace: that is cut, or has more than data.max_pixels pixels.
    Of shards that were indexed without --checksums, headers are compared: names, sizes, places.

    Example: dist-ssl shards verify s3://bucket/photos/train --decode
    """
    from dist_ssl.config import Config, with_overrides
    from dist_ssl.data.indexing import compared, verify_shards
    from dist_ssl.data.manifest import load_manifest

    config = with_overrides(Config(), overrides)
    manifest = load_manifest(location, config.storage)
    damages = verify_shards(
        manifest, config.storage, max_pixels=config.data.max_pixels if decode else None, num_workers=workers,
        progress=True,
    )  # fmt: skip
    for damage in damages:
        typer.echo(str(damage))
    if damages:
        raise typer.Exit(1)
    typer.echo(f"{location}: {compared(manifest, decode)}")
