"""Member indexes and manifests: tars of every kind against `tarfile` and webdataset, hostile and damaged ones."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from dist_ssl.config import StorageConfig, UserError
from dist_ssl.data.indexing import index_shards, verify_shards
from dist_ssl.data.manifest import MemberIndex, load_manifest, read_member_index
from dist_ssl.data.patterns import expand
from dist_ssl.data.tar import _members, index_tar

LOCAL = StorageConfig()


def make_tar(path: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def images(n: int, prefix: str = "", size: int = 900) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(n)
    members = []
    for i in range(n):
        members.append((f"{prefix}{i:05d}.jpg", rng.bytes(size + i)))
        members.append((f"{prefix}{i:05d}.cls", str(i % 10).encode()))
    return members


def index_of(path: Path, json_label: str | None = None) -> tuple[MemberIndex, list[str]]:
    data = path.read_bytes()
    return index_tar(io.BytesIO(data), str(path), len(data), zlib.crc32(data), json_label)


FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
KINDS = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CONTTYPE]
NAMES = st.text("ab/.ü ", min_size=1, max_size=12).flatmap(
    lambda text: st.sampled_from([text, text * 9, "folder/" * 15 + text])  # the last wants ustar's prefix
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.integers(0, 1500), st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=8),
    st.sampled_from(FORMATS),
    st.booleans(),
)
def test_members_are_those_that_tarfile_reads(
    members: list[tuple[str, int, bytes, bool]], kind: int, with_global: bool
) -> None:
    """Names of all lengths, directories, links, pax times before a member, a global pax header before all of them."""
    buffer = io.BytesIO()
    headers = {"comment": "x", "path": "renamed"} if with_global else {}
    with tarfile.open(fileobj=buffer, mode="w", format=kind, pax_headers=headers) as tar:
        for name, size, type_, fraction in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = type_, 1.5 if fraction else 1
            if info.isreg():
                info.size = size
            with contextlib.suppress(ValueError):  # a name that is too long for ustar
                tar.addfile(info, io.BytesIO(bytes(info.size)))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        everything = tar.getmembers()
    theirs = [(one.name, one.size, one.offset_data) for one in everything if one.isreg()]
    if everything:
        assert [tuple(one) for one in _members(buffer, "a.tar", buffer.getbuffer().nbytes)] == theirs


def webdatasets(path: Path) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])))


LONG = "deep/" * 30 + "folder/"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./train/n01/", LONG, "ünï/"])
def test_index_is_webdatasets_reading(tmp_path: Path, kind: int, prefix: str) -> None:
    path = make_tar(tmp_path / "a.tar", images(20, prefix), kind)
    index, missing = index_of(path)
    data = path.read_bytes()
    theirs = webdatasets(path)
    assert missing == []
    assert list(index.keys) == [sample["__key__"] for sample in theirs]
    for i, sample in enumerate(theirs):
        start, size = int(index.offsets[i]), int(index.sizes[i])
        assert data[start : start + size] == sample["jpg"]
        assert zlib.crc32(sample["jpg"]) == index.crcs[i]
        assert int(sample["cls"]) == index.labels[i]


def test_extensions_in_any_case_and_keys_up_to_the_first_dot(tmp_path: Path) -> None:
    members = [
        ("a.JPG", b"1"), ("a.json", b'{"label": 7}'), ("b.b.JPEG", b"not an image: its extension is b.jpeg"),
        ("c.PNG", b"22"), ("c.cls", b"3\n"), ("d.webp", b"333"), ("d.seg.png", b"a mask"), ("e.txt", b"no image"),
        ("dir.with.dot/f.jpeg", b"4444"), ("README", b"no extension"),
    ]  # fmt: skip
    index, missing = index_of(make_tar(tmp_path / "a.tar", members), json_label="label")
    assert list(index.keys) == ["a", "c", "d", "dir.with.dot/f"]
    assert index.labels.tolist() == [7, 3, -1, -1]
    assert missing == ["b", "e"]
    assert [sample["__key__"] for sample in webdatasets(tmp_path / "a.tar")] == [
        "a",
        "b",
        "c",
        "d",
        "e",
        "dir.with.dot/f",
    ]


def test_gnu_tars_own_files(tmp_path: Path) -> None:
    """By the tar command, with directories and links among the members."""
    folder = tmp_path / "set"
    (folder / "n1").mkdir(parents=True)
    for name, data in images(9):
        (folder / "n1" / name).write_bytes(data)
    (folder / "n1" / "link.jpg").symlink_to("00000.jpg")
    subprocess.run(["tar", "-C", str(folder), "--sort=name", "-cf", str(tmp_path / "a.tar"), "."], check=True)
    index, _ = index_of(tmp_path / "a.tar")
    assert list(index.keys) == [f"./n1/{i:05d}" for i in range(9)]


def test_member_index_survives_its_file_and_nothing_less(tmp_path: Path) -> None:
    index, _ = index_of(make_tar(tmp_path / "a.tar", images(50, "ünï/")))
    data = index.to_bytes()
    again = MemberIndex.from_bytes(data, "x")
    assert list(again.keys) == list(index.keys)
    assert again.keys[3:5] == list(index.keys)[3:5]
    for name in ("offsets", "sizes", "crcs", "labels", "json_offsets", "json_sizes"):
        assert np.array_equal(getattr(again, name), getattr(index, name))
    for damaged in (b"", data[:-1], data[:30], data[:99] + b"\xff" + data[100:], b"DSSLIDX1" + bytes(100)):
        with pytest.raises(UserError, match="member index"):
            MemberIndex.from_bytes(damaged, "x")


def test_truncation_anywhere_is_caught(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar", images(6))
    data = whole.read_bytes()
    index, _ = index_of(whole)
    boundaries = [int(start) - 512 for start in index.offsets]  # where members begin: tarfile takes these for the end
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    cuts = [*boundaries, *(int(start) + 100 for start in index.offsets), end, end - 300, 100, 0]
    for cut in cuts:
        (tmp_path / "b.tar").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut after|not a whole tar|empty file"):
            index_of(tmp_path / "b.tar")


def test_damaged_headers_are_caught(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar", images(6))
    index, _ = index_of(whole)
    for at in (0, 100, 148, 257):
        data = bytearray(whole.read_bytes())
        data[int(index.offsets[3]) - 512 + at] ^= 0x55
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"damaged header|not a whole tar|cut"):
            index_of(tmp_path / "b.tar")


@pytest.mark.parametrize("name", ["/etc/cron.d/x.jpg", "../x.jpg", "a/../../x.jpg", "a/.."])
def test_names_that_climb_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="names may not be absolute or hold"):
        index_of(make_tar(tmp_path / "a.tar", [*images(2), (name, b"x")]))


def test_hostile_headers_take_no_memory(tmp_path: Path) -> None:
    """A long name and a pax header that claim gigabytes, and a gz file that calls itself a tar."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**40
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
        with pytest.raises(UserError, match=r"a header of .* bytes"):
            index_of(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    with pytest.raises(UserError, match="not a whole tar"):
        index_of(tmp_path / "a.tar")


def test_pickles_and_archives_among_the_members_are_not_opened(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    members = [("a.jpg", b"1"), ("a.pyd", bomb), ("a.pickle", bomb), ("a.json.gz", b"\x1f\x8b"), ("b.pkl", bomb)]
    index, missing = index_of(make_tar(tmp_path / "a.tar", members))
    assert list(index.keys) == ["a"]
    assert missing == ["b"]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("label", [b"cat", b"", b"3" * 500, b"0x3"])
def test_labels_that_are_no_numbers(tmp_path: Path, label: bytes) -> None:
    make_tar(tmp_path / "a.tar", [("k.jpg", b"1"), ("k.cls", label)])
    if len(label) > 100:
        assert index_of(tmp_path / "a.tar")[0].labels.tolist() == [-1]
    else:
        with pytest.raises(UserError, match="k: its label is no whole number"):
            index_of(tmp_path / "a.tar")


def test_samples_torn_apart_are_refused(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")]
    with pytest.raises(UserError, match="do not stand together"):
        index_of(make_tar(tmp_path / "a.tar", members))


# --- many shards --------------------------------------------------------------------------------------------------


def shards(folder: Path, count: int = 4, samples: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        make_tar(folder / f"train-{i:04d}.tar", images(samples + i))
    return folder


def test_expand() -> None:
    assert expand("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    assert expand("plain.tar") == ["plain.tar"]
    for wrong in ("{0..99999999999}.tar", "{5..1}.tar", "{a.tar", "{a}.tar", "{0..9999}{0..9999}.tar", "x}.tar"):
        with pytest.raises(UserError, match="expected"):
            expand(wrong)


@pytest.mark.parametrize("workers", [0, 2])
def test_index_and_verify(tmp_path: Path, workers: int) -> None:
    folder = shards(tmp_path / "set")
    pattern = f"{folder}/train-{{0000..0003}}.tar"
    manifest = index_shards(pattern, LOCAL, num_workers=workers)
    assert manifest.counts.tolist() == [12, 13, 14, 15]
    for location in (str(folder), str(folder / "manifest.json"), pattern):
        assert load_manifest(location, LOCAL).hash == manifest.hash
    part = load_manifest(f"{folder}/train-{{0001..0002}}.tar", LOCAL)
    assert part.counts.tolist() == [13, 14]
    assert part.hash != manifest.hash
    assert read_member_index(part.shards[0], LOCAL).labels.tolist() == [i % 10 for i in range(13)]
    assert verify_shards(pattern, LOCAL, num_workers=workers) == []
    elsewhere = index_shards(pattern, LOCAL, output=str(tmp_path / "elsewhere"), num_workers=0)
    assert elsewhere.hash == manifest.hash
    assert load_manifest(str(tmp_path / "elsewhere"), LOCAL).shards[2].url == str(folder / "train-0002.tar")


def test_an_interrupted_index_goes_on_and_a_changed_shard_is_read_again(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set")
    (folder / "train-0003.tar").rename(folder / "away")
    (folder / "train-0003.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-0003.tar: an empty file"):
        index_shards(str(folder), LOCAL, num_workers=0)
    assert not (folder / "manifest.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.idx")}
    assert len(done) == 3
    (folder / "away").rename(folder / "train-0003.tar")
    make_tar(folder / "train-0001.tar", images(40))
    manifest = index_shards(str(folder), LOCAL, num_workers=0)
    assert manifest.counts.tolist() == [12, 40, 14, 15]
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.idx")}
    assert {name for name, time in done.items() if again[name] == time} == {"train-0000.tar.idx", "train-0002.tar.idx"}


def test_verify_names_each_damaged_member(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set")
    manifest = index_shards(str(folder), LOCAL, checksums=True, num_workers=0)
    paths = [Path(shard.url) for shard in manifest.shards]
    for shard, member in ((0, 3), (0, 7)):
        data = bytearray(paths[shard].read_bytes())
        data[int(read_member_index(manifest.shards[shard], LOCAL).offsets[member]) + 5] ^= 1
        paths[shard].write_bytes(data)
    cut = int(read_member_index(manifest.shards[1], LOCAL).offsets[11]) - 512  # at a member's boundary
    paths[1].write_bytes(paths[1].read_bytes()[:cut])
    data = bytearray(paths[2].read_bytes())
    data[105] ^= 1  # a header's mode field
    paths[2].write_bytes(data)
    paths[3].unlink()
    damages = [(Path(one.shard).name, one.key) for one in verify_shards(str(folder), LOCAL, num_workers=0)]
    assert damages == [
        ("train-0000.tar", "00003"),
        ("train-0000.tar", "00007"),
        ("train-0001.tar", None),
        ("train-0001.tar", "00011"),
        ("train-0001.tar", "00012"),
        ("train-0002.tar", None),
        ("train-0003.tar", None),
    ]


def test_manifests_that_lie_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set")
    index_shards(str(folder), LOCAL, num_workers=0)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    for change in (
        lambda v: v["shards"][0].update(samples=5),
        lambda v: v["shards"].reverse(),
        lambda v: v["shards"][0].update(url="pipe:touch /tmp/owned"),
        lambda v: v["shards"][0].update(index="ftp://host/x"),
        lambda v: v.pop("shards"),
        lambda v: v.update(format="another"),
        lambda v: v.update(shards=7),
    ):
        changed = json.loads(json.dumps(values))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"manifest|expected|hash"):
            load_manifest(str(folder), LOCAL)
    path.write_text("[]")
    with pytest.raises(UserError, match="not a manifest"):
        load_manifest(str(folder), LOCAL)


def test_a_manifest_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    for location, hint in (
        ("", "data.shards is empty"),
        (str(tmp_path), "shards write"),
        (str(tmp_path / "x.json"), "shards index"),
        (f"{tmp_path}/a-{{0..3}}.tar", "shards index"),
        ("pipe:ls {0..3}.tar", "schemes"),
    ):
        with pytest.raises(UserError, match=hint):
            load_manifest(location, LOCAL)
    shards(tmp_path / "train", 1)
    index_shards(str(tmp_path / "train"), LOCAL, num_workers=0)
    with pytest.raises(UserError, match=r"did you mean .*/train"):
        load_manifest(str(tmp_path), LOCAL)


def test_labels_that_are_asked_for_later_are_read(tmp_path: Path) -> None:
    make_tar(
        tmp_path / "a.tar", [("0.jpg", b"x"), ("0.json", b'{"label": 7}'), ("1.jpg", b"y"), ("1.json", b'{"label": 8}')]
    )
    unlabelled = index_shards(str(tmp_path), StorageConfig(), num_workers=0)
    assert read_member_index(unlabelled.shards[0], StorageConfig()).labels.tolist() == [-1, -1]
    labelled = index_shards(str(tmp_path), StorageConfig(), json_label="label", num_workers=0)
    assert read_member_index(labelled.shards[0], StorageConfig()).labels.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (b"99999999999999999999", "a label from 0 to 2147483647, got 9+"),
        (b"-2", "got -2"),
        (b"a", "is no whole number"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, label: bytes, expected: str) -> None:
    with pytest.raises(UserError, match=rf"a.tar: 0: .*{expected}"):
        index_of(make_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.cls", label)]))
    with pytest.raises(UserError, match=r"0: its .json has no field 'label'"):
        index_of(make_tar(tmp_path / "b.tar", [("0.jpg", b"x"), ("0.json", b"{}")]), json_label="label")
