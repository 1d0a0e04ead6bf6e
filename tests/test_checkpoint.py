"""Checkpoints: elastic over ranks and stages, committed or absent, damaged ones passed over, nothing unpickled."""

import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from math import prod
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from dist_ssl import checkpoint, config, distributed
from dist_ssl.checkpoint import table
from dist_ssl.config import StorageConfig, UserError
from dist_ssl.evaluation.features import open_split
from dist_ssl.evaluation.whole_images import statistics
from dist_ssl.storage import Store
from tests import engines
from tests.pool import ranks
from tests.proxy import faulty_proxy
from tests.s3 import s3_server
from tests.trajectory import small_config

PLACES = list(itertools.product((1, 2, 3), (0, 1, 2, 3)))
# Optimizer, (W, stage) where it is saved, where it is loaded: each stage from each, more ranks and fewer and the same.
QUICK = [("adamw", (2, 1), [(2, 1), (3, 3)])]
ELASTIC = [
    ("lars", (3, 3), [(2, 2), (1, 0)]),
    ("adamw", (2, 0), [(2, 0), (3, 1), (1, 2), (3, 3)]),
    ("lars", (3, 1), [(1, 0), (3, 1), (2, 2), (2, 3)]),
    ("lars", (2, 2), [(3, 0), (1, 1), (2, 2), (1, 3)]),
    ("adamw", (3, 3), [(2, 0), (2, 1), (1, 2), (3, 3)]),
    ("adamw", (1, 0), [(2, 1)]),
]


def saved_at(optimizer, place, path):
    """Whole tensors as they were when a checkpoint of step 3 was saved at one (W, stage), and two steps later."""
    settings = at(optimizer, place, path)
    return whole(ranks(place[0]).run(engines.save_after, settings, 3, 2))


def loaded_equals(optimizer, place, path, saved, exactly):
    """Right after a load at another (W, stage) all is equal bit by bit, and so it stays at the same one."""
    before, continued = saved
    after, resumed = whole(ranks(place[0]).run(engines.load_and_step, at(optimizer, place, path), 3, 2))
    assert after.keys() == before.keys()
    for key, values in before.items():
        assert torch.equal(values, after[key]), key
    for key, values in continued.items():
        if exactly:
            assert torch.equal(values, resumed[key]), key
        else:
            torch.testing.assert_close(values, resumed[key], rtol=1e-5, atol=1e-6)


def at(optimizer, place, path):
    return small_config(
        path, "", f"engine.zero_stage={place[1]}", f"optimizer.name={optimizer}", "optimizer.weight_decay=1e-4"
    )


def whole(answers):
    return tuple(engines.assembled(list(parts)) for parts in zip(*answers, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "place", "others"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ELASTIC)]
)
def test_saved_here_loaded_there(tmp_path, optimizer, place, others):
    """A choice; `python -m tests.faults.matrix` runs all."""
    saved = saved_at(optimizer, place, tmp_path)
    for other in others:
        loaded_equals(optimizer, other, tmp_path, saved, exactly=place == other)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_parameter_that_is_one_number_is_resumed(tmp_path, stage):
    """Under ZeRO 0 AdamW's `step` has its shape; with it the number of parameters is odd."""
    settings = at("adamw", (2, stage), tmp_path)
    answers = ranks(2).run(engines.saved_and_loaded_with_a_lone_number, settings)
    assert all(saved == loaded for saved, loaded in answers)
    assert answers[0][0].keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert answers[0][0]["master"] != 0.5
    found = checkpoint.open_checkpoint(checkpoint.checkpoint_store(settings), 2)
    assert {kind for _, kind in found.table.shapes} == {"master", "exp_avg", "exp_avg_sq", "replicated"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run directory with committed steps 0, 3 and 5."""
    path = tmp_path_factory.mktemp("whole") / "run"
    settings = small_config(path, "", "checkpoint.keep_last=5")
    for steps in (0, 3, 5):
        ranks(2).run(engines.save_after, settings, steps)
    (path / "config.toml").write_text(config.dumps(settings))
    return path


@pytest.fixture
def run(tmp_path, whole_run):
    """A copy of it to damage."""
    shutil.copytree(whole_run, tmp_path / "run")
    return small_config(tmp_path / "run", "", "checkpoint.keep_last=5")


def files_of(settings, step):
    root = Path(settings.run.dir, "checkpoints", f"step-{step:08d}")
    return sorted(path for path in root.rglob("*") if path.is_file())


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def poison(path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {path.parent}/ran",)

    path.write_bytes(pickle.dumps(Payload()))


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, poison, Path.unlink])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_damage_falls_back_to_the_one_before(run, harm, number):
    files = files_of(run, 5)
    assert len(files) == 4  # two ranks, the state, the manifest
    harm(files[number])
    (step, said), (step_of_other, _) = ranks(2).run(engines.newest_step, run)
    assert (step, step_of_other) == (3, 3)
    if harm is Path.unlink and files[number].name == "manifest.json":
        return  # never committed: nothing to warn of
    assert "step 5 is damaged" in said[0]
    assert files[number].name in said[0]
    assert not list(Path(run.run.dir).rglob("ran"))


def test_all_damaged_is_an_error_on_all_ranks(run):
    for step in (0, 3, 5):
        flip_a_bit(files_of(run, step)[0])
    for answer, _ in ranks(2).run(engines.newest_step, run):
        assert "all 3 checkpoints are damaged" in answer


def error_of_a_start(settings, endpoint, environment):
    """What `newest_valid` raises on this rank, and what it warns of, where rank 1 has an endpoint of its own."""
    with pytest.MonkeyPatch.context() as patch, engines.messages() as said:
        for name, value in environment[distributed.rank()].items():
            patch.setenv(name, value)
        if distributed.rank() == 1:
            settings = config.with_overrides(settings, [f"storage.endpoint_url={endpoint}"])
        try:
            return checkpoint.newest_valid(checkpoint.checkpoint_store(settings)).step, said
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}", said


def test_a_file_that_one_rank_cant_read_now_is_not_damaged(run, tmp_path):
    """A store that refuses, wrong keys, none: all ranks end with that error, and the newest step is there as before."""
    shutil.copytree(Path(run.run.dir, "checkpoints"), tmp_path / "s3" / "bucket" / "run")
    with s3_server(tmp_path / "s3") as server, faulty_proxy(server.port, refused=1.0) as proxy:
        url, known = server.endpoint_url, server.environment
        at_once = ["checkpoint.url=s3://bucket/run", f"storage.endpoint_url={url}", "storage.retry_seconds=0"]
        settings = config.with_overrides(run, at_once)
        none = known | {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_CONFIG_FILE": "/nonexistent"}
        for endpoint, environment, expected in (
            (url, known, "5"),
            (proxy.endpoint_url, known, r"StorageError: (rank 1: )?s3://bucket/run/step-0\S+: gave up after 1 "),
            (url, known | {"AWS_SECRET_ACCESS_KEY": "another"}, "PermissionError: (rank 1: )?s3://bucket/run/step-0"),
            (url, none | {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}, "UserError: (rank 1: )?.*credentials"),
            (url, known, "5"),
        ):
            for answer, said in ranks(2).run(error_of_a_start, settings, endpoint, (known, environment)):
                assert re.match(expected, str(answer)), answer
                assert said == []


def sign(manifest, body):
    """Write a manifest whose own checksum holds, whatever is in it."""
    text = json.dumps(body)
    manifest.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "manifest": text}))


def without_places(path):
    header = b'{"a": [1, 2]}   '
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("harm", [poison, without_places])
def test_a_forged_manifest_does_not_make_a_pickle_load(run, harm):
    """Even with its checksum put right, what is no safetensors file is refused, and nothing runs."""
    file, manifest = files_of(run, 5)[0], files_of(run, 5)[-1]
    harm(file)
    body = json.loads(json.loads(manifest.read_text())["manifest"])
    data = file.read_bytes()
    body["files"]["/".join(file.parts[-2:])] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    sign(manifest, body)
    (step, said), _ = ranks(2).run(engines.newest_step, run)
    assert step == 3
    assert "not a safetensors file" in said[0]
    forged = checkpoint.open_checkpoint(checkpoint.checkpoint_store(run), 5)
    with pytest.raises(ValueError, match="not a safetensors file"):
        forged.tensors("master")
    assert not list(Path(run.run.dir).rglob("ran"))


def test_a_header_that_is_longer_than_its_file_is_damage_in_a_store_too(run):
    file, manifest = files_of(run, 5)[0], files_of(run, 5)[-1]
    data = (2**20).to_bytes(8, "little") + b"{}"
    body = json.loads(json.loads(manifest.read_text())["manifest"])
    name = "/".join(file.parts[-2:])
    body["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    sign(manifest, body)
    store = Store(f"memory://{run.run.dir}", StorageConfig())
    store.at("step-00000005").write(name, data)
    store.at("step-00000005").write("manifest.json", manifest.read_bytes())
    problem = checkpoint.open_checkpoint(store, 5).verify(name)
    assert re.search("expected bytes 8 to 1048584, but there are 10", problem)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {}}, "tells neither size nor checksum of i0003/rank-00000.safetensors"),
        ({"files": [1]}, "no attribute 'items'"),
        ({"tensors": [{}]}, "'at'"),
        ({"files_of_ranks": []}, "expected files of ranks"),
        ({"tensors": [{"name": "a", "kind": "master", "shape": [2], "at": "anywhere"}]}, "got 'anywhere'"),
        ({"tensors": [{"name": "a", "kind": "master", "shape": [2], "at": [[9, 0, 2]]}]}, "out of range"),
        ({"format": 99}, "expected format 1 or 2, got 99"),
    ],
)
def test_a_manifest_of_another_form_is_named(run, change, said):
    manifest = files_of(run, 5)[-1]
    sign(manifest, json.loads(json.loads(manifest.read_text())["manifest"]) | change)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=rf"step-00000005/manifest\.json: .*{said}"):
        checkpoint.open_checkpoint(checkpoint.checkpoint_store(run), 5)


def in_format_1(body):
    """A manifest as it was before: a dictionary a fragment, shares and slices spelled out by this test's own sums."""
    fragments = []
    for entry in body.pop("tensors"):
        name, kind, at, size = entry["name"], entry["kind"], entry.pop("at"), prod(entry["shape"])
        files = body["files_of_ranks"]
        edges = [size * rank // len(files) for rank in range(len(files) + 1)]
        if at == "slices":
            edges = [min(size, rank * math.ceil(size / len(files))) for rank in range(len(files) + 1)]
        spelled = [[rank, edges[rank], edges[rank + 1] - edges[rank]] for rank in range(len(files))]
        for rank, offset, length in spelled if isinstance(at, str) else at:
            key = f"{name}/{kind}" if kind == "replicated" else f"{name}/{kind}@{offset}"
            if length:
                fragments.append(entry | {"offset": offset, "length": length, "file": files[rank], "key": key})
    del body["files_of_ranks"]
    return body | {"format": 1, "fragments": fragments}


@pytest.mark.parametrize("place", [(2, 0), pytest.param((3, 3), marks=pytest.mark.slow)])
def test_checkpoints_of_before_are_read(tmp_path, place):
    """Also what is in a manifest now: a line a tensor where all ranks hold a part."""
    settings = at("adamw", place, tmp_path)
    ranks(place[0]).run(engines.save_after, settings, 3)
    expected, manifest = engines.full_state(settings, 3), files_of(settings, 3)[-1]
    body = json.loads(json.loads(manifest.read_text())["manifest"])
    told = [entry["at"] for entry in body["tensors"] if entry["kind"] != "replicated"]
    assert told.count("shares") + told.count("slices") == len(told)
    assert len(body["tensors"]) == 3 * len(list(engines.build_model(settings).parameters())) + len(
        dict(engines.build_model(settings).named_buffers())
    )
    sign(manifest, in_format_1(body))
    found = engines.full_state(settings, 3)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_the_manifest_does_not_grow_with_the_ranks():
    """A ResNet-50's 161 tensors and their momenta on 1,024 ranks, under ZeRO 0 and 3: 53 MB in format 1."""
    shapes = {name: tuple(p.shape) for name, p in torchvision.models.resnet50().named_parameters()}
    for rule in (table.shares, table.slices):
        written = [[] for _ in range(1024)]
        for (name, shape), kind in itertools.product(shapes.items(), ("master", "momentum")):
            for rank, offset, length in rule(prod(shape), 1024):
                written[rank].append((name, kind, shape, offset, length))
        assert sum(map(len, written)) > 100_000
        told = table.entries(written)
        assert len(told) == 2 * len(shapes)
        assert len(json.dumps(told)) < 50_000


def test_tables_go_to_rank_0_alone(tmp_path):
    for sent in ranks(2).run(engines.sent_for_a_commit, at("adamw", (2, 0), tmp_path)):
        assert [size for name, size in sent if name.startswith("allgather") and size > 8] == []
        assert sum(size for name, size in sent if name == "broadcast") < 1000


@pytest.mark.slow
def test_export_is_loaded_by_plain_torchvision(tmp_path):
    settings = small_config(tmp_path / "run", "", "model.encoder=resnet18")
    ranks(2).run(engines.save_after, settings, 1)
    (tmp_path / "run" / "config.toml").write_text(config.dumps(settings))
    assert checkpoint.export_encoder(tmp_path / "run", tmp_path / "encoder.safetensors") == 1
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    encoder.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    _, _, model = checkpoint.load_run(tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(encoder.eval()(images), model.encoder(images), atol=1e-5)
    described = json.loads((tmp_path / "encoder.json").read_text())
    assert described["encoder"] == "resnet18"
    assert described["step"] == 1


def test_an_exported_batch_norm_has_the_statistics_of_whole_images(tmp_path, small_shards):
    settings = small_config(tmp_path / "run", small_shards, f'evaluation.train_shards="{small_shards}"')
    ranks(2).run(engines.save_after, settings, 1)
    (tmp_path / "run" / "config.toml").write_text(config.dumps(settings))
    checkpoint.export_encoder(tmp_path / "run", tmp_path / "plain.safetensors")
    command = ["export", str(tmp_path / "run"), str(tmp_path / "whole.safetensors"), "--batch-norm-from", small_shards]
    subprocess.run([sys.executable, "-m", "dist_ssl.cli", *command], check=True, timeout=120)
    plain, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "whole"))
    told = [json.loads((tmp_path / f"{name}.json").read_text())["batch_norm_from"] for name in ("plain", "whole")]
    assert told == [None, str(small_shards)]
    changed = {name for name in plain if not torch.equal(plain[name], whole[name])}
    assert changed == {name for name in plain if "running_" in name}
    split = open_split("train", settings, torch.device("cpu"))
    (images,) = (split.pixels(batch.images) for batch in split.batches())
    x = torch.nn.functional.conv2d(images, whole["stem.0.weight"], stride=2, padding=1).transpose(0, 1).flatten(1)
    assert torch.allclose(whole["stem.1.running_mean"], x.mean(1), atol=1e-5)
    assert torch.allclose(whole["stem.1.running_var"], x.var(1), rtol=1e-4)


def test_bad_images_are_left_out_of_batch_norms_statistics(tmp_path, small_shards, caplog):
    settings = small_config(tmp_path / "run", small_shards)
    ranks(2).run(engines.save_after, settings, 1)
    (tmp_path / "run" / "config.toml").write_text(config.dumps(settings))
    shutil.copytree(small_shards, damaged := tmp_path / "damaged")
    shard = next(damaged.glob("*.tar"))
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    where = next(member.offset_data for member in members if member.name.endswith((".jpg", ".png", ".webp")))
    with shard.open("r+b") as file:
        file.seek(where)
        file.write(bytes(64))
    with pytest.raises(UserError, match=r"1 of 90 images are bad, more than data.max_bad_fraction = 0.01 .* first: "):
        statistics(tmp_path / "run", str(damaged))
    allowed = config.with_overrides(settings, ["data.max_bad_fraction=0.5"])
    (tmp_path / "run" / "config.toml").write_text(config.dumps(allowed))
    found = statistics(tmp_path / "run", str(damaged))
    assert "1 bad images are left out" in caplog.text
    assert "statistics of 89 images are rough" in caplog.text
    split = open_split(
        "train", config.with_overrides(allowed, [f'evaluation.train_shards="{damaged}"']), torch.device("cpu")
    )
    (batch,) = split.batches()
    assert len(batch.replaced) == 1
    good = [row for row in range(90) if row not in batch.replaced]
    weight = checkpoint.load_run(tmp_path / "run")[2].encoder.stem[0].weight
    x = torch.nn.functional.conv2d(split.pixels(batch.images[good]), weight, stride=2, padding=1)
    assert torch.allclose(found.buffers["stem.1.running_mean"], x.mean((0, 2, 3)), atol=1e-5)


def test_an_encoder_without_batch_norm_has_no_statistics(tmp_path, small_shards):
    settings = small_config(tmp_path / "run", small_shards, "model.encoder=timm/test_vit")
    ranks(2).run(engines.save_after, settings, 1)
    (tmp_path / "run" / "config.toml").write_text(config.dumps(settings))
    with pytest.raises(UserError, match="--batch-norm-from: timm/test_vit has no batch norm; leave it out"):
        statistics(tmp_path / "run", str(small_shards))


@pytest.mark.slow
def test_retention_keeps_the_last_every_nth_and_step_zero(tmp_path):
    settings = small_config(tmp_path / "run", "", "checkpoint.keep_last=2", "checkpoint.keep_every_steps=4")
    for steps in (0, 2, 4, 5, 6):
        ranks(2).run(engines.save_after, settings, steps)
    kept = [0, 4, 5, 6]
    assert engines.step_directories(settings) == [f"step-{step:08d}" for step in kept]


def test_what_is_damaged_holds_no_place_of_the_last_ones(run):
    truncate(files_of(run, 5)[0])
    settings = config.with_overrides(run, ["checkpoint.keep_last=2"])
    assert ranks(2).run(engines.go_on_and_save, settings, 7) == [3, 3]
    assert engines.step_directories(settings) == [f"step-{step:08d}" for step in (0, 3, 7)]


def test_what_a_killed_save_left_is_removed_by_the_one_that_commits_the_step(run):
    left = Path(run.run.dir, "checkpoints", "step-00000007", "i0002")
    left.mkdir(parents=True)
    for name in ("rank-00000.safetensors", ".rank-00001.safetensors.x2f81q"):
        (left / name).write_bytes(bytes(10))
    other = left.parent / "notes"
    other.mkdir()
    (other / "of the user").touch()
    assert ranks(2).run(engines.go_on_and_save, run, 7) == [5, 5]
    assert sorted(path.name for path in left.parent.iterdir()) == ["i0004", "manifest.json", "notes"]
    assert [step for step, _ in ranks(2).run(engines.newest_step, run)] == [7, 7]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount what can't be removed")
def test_a_removal_that_fails_does_not_fail_the_commit_and_is_told_once(tmp_path):
    settings = small_config(tmp_path / "run", "", "checkpoint.keep_last=1")
    ranks(1).run(engines.save_after, settings, 0)
    stays = tmp_path / "run" / "checkpoints" / "step-00000001" / "i0001"
    stays.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", stays], check=True)
    try:
        (stays / "rank-00000.safetensors").touch()
        (said,) = ranks(1).run(engines.warnings_of_commits, settings, [2, 3, 4])
        assert len(said) == 1
        assert re.match(r"step 2 is committed, but older files can't be removed .*: .*step-00000001", said[0])
        assert checkpoint.committed_steps(checkpoint.checkpoint_store(settings))[-1] == 4
    finally:
        subprocess.run(["umount", stays], check=True)


@pytest.mark.parametrize(
    ("kind", "value", "poisoned_rank", "stage"),
    [
        ("master", float("nan"), 1, 1),
        ("exp_avg", float("-inf"), 1, 3),
        ("exp_avg_sq", float("inf"), 1, 0),
        ("buffer", float("nan"), 0, 1),
    ],
)
def test_what_is_not_finite_is_refused_on_all_ranks_and_named(run, kind, value, poisoned_rank, stage):
    settings = config.with_overrides(run, [f"engine.zero_stage={stage}"])
    name = {"buffer": "running_mean/replicated"}.get(kind, f"{kind}@")
    expected = (
        rf"checkpoint of step 4 not written: rank \d: NaN or infinite: [\w./]*{name}\S*; "
        "the one of step 2 is the last good one"
    )
    said = ranks(2).run(engines.refusal, settings, kind, value, poisoned_rank)
    assert all(re.fullmatch(expected, one) for one in said), said
    assert checkpoint.committed_steps(checkpoint.checkpoint_store(run)) == [0, 3, 5]


def test_an_object_store_is_asked_for_neighbours_at_once(whole_run, tmp_path, monkeypatch):
    """What all ranks need is 16 tensors in one file."""
    shutil.copytree(whole_run / "checkpoints", tmp_path / "bucket" / "run")
    with s3_server(tmp_path) as server, faulty_proxy(server.port) as proxy:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        found = checkpoint.open_checkpoint(Store("s3://bucket/run", StorageConfig(endpoint_url=proxy.endpoint_url)), 5)
        local = checkpoint.open_checkpoint(Store(str(whole_run / "checkpoints"), StorageConfig()), 5)
        for kind, most in (("replicated", 3), ("master", 6)):
            asked = proxy.requests
            tensors, expected = found.tensors(kind), local.tensors(kind)
            assert proxy.requests - asked <= most
            assert tensors.keys() == expected.keys()
            assert len(tensors) > 10
            assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_refused_write_is_an_error_and_leaves_the_one_before(run):
    """A file stands where the directory of the next checkpoint must be made."""
    Path(run.run.dir, "checkpoints", "step-00000007").write_text("in the way")
    for error in ranks(2).run(engines.save_error, run, 7):
        assert re.match(r"checkpoint of step 7 not written: rank 0: .*step-00000007", error)
    assert [step for step, _ in ranks(2).run(engines.newest_step, run)] == [5, 5]


def test_evaluation_reads_what_was_saved(run):
    state = engines.full_state(run, 5)
    _, step, model = checkpoint.load_run(run.run.dir)
    assert step == 5
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="expected a checkpoint of step 4"):
        checkpoint.load_run(run.run.dir, 4)
    shutil.rmtree(Path(run.run.dir, "checkpoints"))
    with pytest.raises(UserError, match="there are none"):
        checkpoint.load_run(run.run.dir)


def in_store(function, environment, *arguments):
    os.environ.update(environment)
    return function(*arguments)


@pytest.mark.slow
def test_in_an_object_store_and_a_store_that_refuses(tmp_path):
    """The manifest, put last, is the commit; when writes fail the run stops, and goes on from the one before."""
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    with s3_server(tmp_path / "store") as server:
        settings = small_config(
            tmp_path / "run",
            "",
            "checkpoint.url=s3://bucket/run",
            f"storage.endpoint_url={server.endpoint_url}",
            "storage.retry_seconds=3.0",
            "storage.timeout_seconds=4.0",
        )

        def run(size, function, *arguments):
            return ranks(size).run(in_store, function, server.environment, settings, *arguments)

        for steps in (0, 3):
            before, _ = whole(run(2, engines.save_after, steps))
        loaded, _ = whole(run(3, engines.load_and_step, 3, 1))
        assert all(torch.equal(values, loaded[key]) for key, values in before.items())
        refused = r"checkpoint of step 5 not written: rank \d: s3://bucket/run/step-00000005/\S+: gave up after .*"
        server.stop()
        assert all(re.match(refused + "Connect", error) for error in run(2, engines.save_error, 5))
        server.start("--read-only")
        assert all(re.match(refused + "Internal Error", error) for error in run(2, engines.save_error, 5))
        assert [step for step, _ in run(2, engines.newest_step)] == [3, 3]
        secret = server.environment["AWS_SECRET_ACCESS_KEY"]
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(secret.encode() in path.read_bytes() for path in written)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_is_an_error_and_the_one_before_stays(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], check=True)
    try:
        settings = small_config(tmp_path / "run", "", f"checkpoint.url={small}/checkpoints", "checkpoint.keep_last=9")
        ranks(2).run(engines.save_after, settings, 3)
        for error in ranks(2).run(engines.save_error, settings, 5):
            assert re.match(r"checkpoint of step 5 not written: rank .*No space left on device", error)
        assert [step for step, _ in ranks(2).run(engines.newest_step, settings)] == [3, 3]
    finally:
        subprocess.run(["umount", small], check=True)
