"""Shards: the clips of a folder in tar files, byte for byte, read and trained on as before."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace

import psutil
import pytest
import torch
from trees import audioset, plant, videos, write_list

from avfuse.data import manifest, shards
from avfuse.data.check import check
from avfuse.data.clips import ClipDataset, ClipLoader, ClipSampler, Failure
from avfuse.data.container import ClipError, Part
from avfuse.data.decode import ClipReader
from avfuse.data.find import find_data
from avfuse.data.hold_out import Sides, hold_out
from avfuse.data.shards import shard
from avfuse.data.table import ClipTable
from avfuse.files import read_rows
from avfuse.inputs import InputSettings

SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)
QUIET = dict(progress=False, workers=0)
SMALL = 40_000  # bytes of a shard: about three clips
TINY = (
    *("--epochs", "6", "--warmup-epochs", "1", "--batch-size", "4", "--decoder-dim", "32", "--workers", "1"),
    *("--decoder-depth", "1", "--decoder-heads", "2", "--fusion-layers", "1", "3", "--measure-every", "0"),
    *("--checkpoint-every", "1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checked VGGSound of 14 clips, 12 to train on."""
    root = tmp_path_factory.mktemp("data") / "vggsound"
    sources = videos(tmp_path_factory.mktemp("shapes"), 14)
    rows = [f"video{n:06d},0,class {n % 3},{'test' if n > 11 else 'train'}" for n in range(14)]
    write_list(root / "annotations/vggsound.csv", "\n".join(rows))
    for n, source in enumerate(sources):
        plant(source, root / f"clips/class_{n % 3}/video{n:06d}_000000_000010.mp4")
    check(root, **QUIET)
    return root


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    said = shard(folder, out, size=SMALL, progress=False, workers=2)
    assert re.match(r"14 clips in \d+ shards in ", said)
    return out


def find(root, **options):
    return find_data(root, lambda line: None, **QUIET, **options)


def tars(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def test_shards_hold_every_clip_once(folder, sharded):
    """As the library for the format reads them."""
    webdataset = pytest.importorskip("webdataset")
    assert len(tars(sharded)) >= 4
    read = {}
    for path in sorted(sharded.glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
            entry = json.loads(sample["json"])
            assert entry["path"] not in read and path.name.startswith(entry["split"] + "-0")
            assert sample["mp4"] == (folder / entry["path"]).read_bytes()
            read[entry["path"]] = entry["labels"]
    assert read == {entry.path: entry.labels for entry in manifest.read_entries(folder)}


def test_they_are_read_like_the_folder(folder, sharded):
    """The same items, whatever the augmentation, as those of the file that the clip came from."""
    plain, packed = find(folder), find(sharded)
    assert packed.coverage == plain.coverage == {"train": (12, 12), "test": (2, 2)}
    assert packed.classes == plain.classes and packed.test_name == plain.test_name
    origin = {}
    for path in sharded.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    name = json.load(tar.extractfile(member))["path"]
                    origin[f"{path.name}/{member.name[:-5]}.mp4"] = name
    index = {str(clip.path.relative_to(folder)): n for n, clip in enumerate(plain.train)}
    order = [index[origin[str(clip.path.relative_to(sharded))]] for clip in packed.train]
    assert sorted(order) == list(range(12)) and order != sorted(order)
    with ClipLoader(ClipDataset(packed.train, SETTINGS, train=False), workers=2) as loader:
        (batch,) = loader.batches([[(0, n) for n in range(12)]])
    assert not batch["failures"]
    truth = ClipDataset(plain.train, SETTINGS, train=False)
    for at, n in enumerate(order):
        for name in ("image", "audio", "label_class"):
            assert torch.equal(batch[name][at], truth[n][name]), (name, at)


def test_clips_keep_their_names(folder, sharded):
    """By which recordings are told apart, and clips of a run from others."""
    clips = find(sharded).train
    names = {clip.name(sharded) for clip in clips}
    assert names == {clip.name(folder) for clip in find(folder).train} and len(names) == len(clips) == 12
    sides = Sides("", str(folder), names, [], {clip.name(folder): clip.size for clip in clips})
    assert set(sides.of(clips, sharded)) == {"train"}
    recordings = {f"a/talk{'abc'[n % 3]}_{n:03d}.mp4": n % 3 for n in range(12)}
    table = ClipTable(replace(c, source=n, labels={}) for c, n in zip(clips, recordings, strict=True))
    train, test = hold_out(table, sharded, share=0.3, seed=0)
    assert {recordings[c.source] for c in test}.isdisjoint(recordings[c.source] for c in train) and len(test)


def test_splits_of_a_plain_folder_keep_their_names(folder, tmp_path):
    sources, said = sorted(folder.glob("clips/*/*.mp4")), []
    for number, source in enumerate(sources[:3]):
        plant(source, tmp_path / "clips" / ("test", "train")[number > 0] / f"{number}.mp4")
    check(tmp_path / "clips", **QUIET)
    shard(tmp_path / "clips", tmp_path / "shards", **QUIET)
    find_data(tmp_path / "shards", said.append, **QUIET)
    assert "splits: train to train on, test to test on, by avfuse-manifest.jsonl" in said


def test_shards_of_before_are_named(folder, tmp_path):
    """Which a reader of *.tar would take for more clips."""
    shard(folder, tmp_path, size=SMALL, progress=False, workers=0)
    said = shard(folder, tmp_path, size=10**9, progress=False, workers=0)
    assert said.splitlines()[0].startswith("14 clips in 2 shards")
    assert re.search(r"^[1-9] other files there are no part of these: .*train-000001.tar", said, re.M)


def test_splits_of_another_name_are_those_of_the_manifest(tmp_path):
    root = audioset(tmp_path / "audioset", videos(tmp_path / "shapes", 4))
    check(root, **QUIET)
    shard(root, tmp_path / "shards", **QUIET)
    plain, packed = find(root), find(tmp_path / "shards")
    assert len(packed.train) == len(plain.train) > 0 and len(packed.test) == len(plain.test) > 0


def test_the_shards_do_not_depend_on_workers(folder, sharded, tmp_path):
    shard(folder, tmp_path / "one", size=SMALL, **QUIET)
    assert tars(tmp_path / "one") == tars(sharded)
    shard(folder, tmp_path / "two", size=SMALL, seed=1, **QUIET)
    assert tars(tmp_path / "two") != tars(sharded)


def test_whole_shards_are_kept_and_others_written_anew(folder, sharded, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tars(sharded)
    shutil.copytree(sharded, out)
    (out / manifest.FILE).unlink()
    first, second, third, *_ = whole
    (out / first).write_bytes(whole[first][: len(whole[first]) // 2])
    (out / second).unlink()
    with tarfile.open(out / third, "w") as tar:  # of the right names and another content
        for member in tarfile.open(fileobj=io.BytesIO(whole[third])):
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    written = []
    real = shards._write_tar
    monkeypatch.setattr(shards, "_write_tar", lambda *a: written.append(a[-1].name) or real(*a))
    shard(folder, out, size=SMALL, **QUIET)
    assert sorted(written) == [first, second, third] and tars(out) == whole
    assert sorted(path.name for path in out.iterdir()) == sorted([*whole, manifest.FILE])


@pytest.mark.parametrize(
    "kind", ["bytes", "hard link", "symbolic link", "sparse", "twice", "pipe", "device", "link"]
)
def test_a_shard_that_only_looks_right_is_written_anew(folder, sharded, tmp_path, kind):
    """Right names, sizes and descriptions; but other bytes, or members and shards that are no plain files."""
    out, whole = tmp_path / "out", tars(sharded)
    shutil.copytree(sharded, out)
    name = min(whole)
    path = out / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("device", "link"):
        path.symlink_to("/dev/zero" if kind == "device" else sharded / name)
    else:
        with tarfile.open(fileobj=io.BytesIO(whole[name])) as right, tarfile.open(path, "w") as tar:
            for member in right:
                content = right.extractfile(member).read()
                changed = member.name.endswith(".mp4")
                if changed and kind in ("hard link", "symbolic link"):
                    member.type = tarfile.LNKTYPE if kind == "hard link" else tarfile.SYMTYPE
                    member.linkname = "nowhere"
                if changed and kind == "sparse":
                    member.pax_headers = {"GNU.sparse.size": str(member.size), "GNU.sparse.map": "0,0"}
                if changed and kind in ("bytes", "twice"):
                    content = content[:-1] + bytes([content[-1] ^ 1])
                tar.addfile(member, io.BytesIO(content))
                if changed and kind == "twice":
                    tar.addfile(member, io.BytesIO(content))
    shard(folder, out, size=SMALL, **QUIET)
    assert tars(out) == whole and not path.is_symlink()


def test_exchanged_shards_give_no_other_clip(tmp_path):
    """Two clips of the same size, at the same place of shards of two splits."""
    root, out = tmp_path / "videos", tmp_path / "out"
    sources = videos(tmp_path / "sources", 4)
    size = max(source.stat().st_size for source in sources)
    for n, source in enumerate(sources):
        path = root / ("test" if n % 2 else "train") / f"{n // 2}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes().ljust(size, b"\0"))
    check(root, **QUIET)
    shard(root, out, size=2 * size, **QUIET)
    starts = [entry.start for entry in manifest.read_entries(out)]
    assert starts[:2] == starts[2:]
    clips = list(find(out).train)
    right = [clip.open().frame(0.0) for clip in clips]
    train, test = out / "train-000000.tar", out / "test-000000.tar"
    os.rename(train, out / "aside")
    os.rename(test, train)
    os.rename(out / "aside", test)
    found = find(out)
    assert len(found.train) == len(found.test) == 0 and len(found.unreadable) == 4
    assert all("-000000.tar is not the shard that it was" in error.reason for error in found.unreadable)
    shard(root, out, size=2 * size, **QUIET)  # writes them anew
    assert all(
        (clip.open().frame(0.0) == frame).all() for clip, frame in zip(find(out).train, right, strict=True)
    )
    with pytest.raises(ClipError, match="train-000000.tar holds another clip there"):
        replace(clips[0], path=clips[1].path).open()


def test_interrupted_it_leaves_no_manifest_and_goes_on(folder, sharded, tmp_path, monkeypatch):
    real, written = shards._write_tar, []

    def write(path, root, plan):
        written.append(plan.name)
        real(path, root, plan)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_write_tar", write)
    with pytest.raises(KeyboardInterrupt):
        shard(folder, tmp_path, size=SMALL, **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]
    shard(folder, tmp_path, size=SMALL, **QUIET)
    assert tars(tmp_path) == tars(sharded) and len(written) == len(tars(sharded)) + 1


def test_what_cannot_go_into_shards_is_said(folder, tmp_path):
    root = tmp_path / "vggsound"
    shutil.copytree(folder, root)
    first, second, *_ = sorted(root.glob("clips/*/*.mp4"))
    first.write_bytes(b"no video")
    check(root, **QUIET)
    second.unlink()
    said = shard(root, tmp_path / "out", size=SMALL, **QUIET)
    assert said.startswith("12 clips in ")
    assert f"1 were broken, and are in no shard: {first.relative_to(root)}" in said
    assert f"1 have gone or changed since the check, and are in no shard: {second.relative_to(root)}" in said
    third = sorted(root.glob("clips/*/*.mp4"))[2]
    third.write_bytes(bytes(third.stat().st_size))  # which its size does not tell
    with pytest.raises(OSError, match="has changed since it was checked: check again"):
        shard(root, tmp_path / "again", size=SMALL, **QUIET)

    for arguments, options, reason in (
        ((tmp_path, tmp_path / "x"), {}, "has no manifest: python -m avfuse.data check"),
        ((tmp_path / "out", tmp_path / "x"), {}, "holds shards already"),
        ((root, folder), {}, "holds another data set"),
        ((root, tmp_path / "x"), dict(size=0), "size must be a positive number of bytes, got 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            shard(*arguments, **QUIET, **options)
    with pytest.raises(ValueError, match="holds shards: check the folder that they were made of"):
        check(tmp_path / "out", **QUIET)


@pytest.mark.parametrize("name", ["a.tar", "we,ird ü%20:x'.tar", "a,,:b.tar", "\udcff.tar"])
def test_a_part_of_a_file_is_read_like_a_file(folder, tmp_path, name):
    source = next(folder.glob("clips/*/*.mp4"))
    content = source.read_bytes()
    file = tmp_path / name
    file.write_bytes(b"before" + content + b"after")
    part = Part(file, 6, len(content))
    with ClipReader(source) as one, ClipReader(tmp_path / "b", part) as two:
        assert one.streams == two.streams
        assert (one.frame(0.5) == two.frame(0.5)).all()
        assert (one.audio(0.2, 0.5, 16_000) == two.audio(0.2, 0.5, 16_000)).all()
    for start, size, reason in (
        (6, len(content) + 6, "reaches beyond the end of"),
        (6, len(content) // 2, "cut off|Invalid data|cannot"),
        (len(content) + 100, 10, "reaches beyond the end of"),
        (6, 0, "it is empty"),
    ):
        with pytest.raises(ClipError, match=reason):
            ClipReader(tmp_path / "b", Part(file, start, size))


def test_a_shard_that_has_gone_or_is_damaged(sharded, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    found = find(out)
    table = found.train
    (out / "train-000000.tar").unlink()
    cut = (out / "train-000001.tar").read_bytes()
    (out / "train-000001.tar").write_bytes(cut[: len(cut) // 3])
    dataset = ClipDataset(table, SETTINGS, train=False)
    failures = [item for item in map(dataset.__getitem__, range(12)) if isinstance(item, Failure)]
    affected = [clip for clip in table if clip.part.file.name in ("train-000000.tar", "train-000001.tar")]
    assert 3 <= len(failures) <= len(affected) < 12
    assert len({failure.path for failure in failures}) == len(failures)  # each by its own name
    assert all(re.search(r"train-00000[01].tar/0000000\d\d.mp4$", str(f.path)) for f in failures)


def test_processes_share_an_epoch(sharded):
    """As training deals it out: each clip once, by one of the processes, whatever their number."""
    from avfuse.training.settings import Schedule

    table = find(sharded).train
    for processes in (1, 2, 3):
        for epoch in range(2):
            seen = []
            for rank in range(processes):
                schedule = Schedule(len(table), 2, 4, 1, rank, processes)
                sampler = ClipSampler(table, train=True)
                sampler.set_epoch(epoch)
                order = list(sampler)
                for step in range(3 * epoch, 3 * epoch + 3):
                    seen += [key for batch in schedule.micro_batches(order, step) for key in batch]
            assert sorted(seen) == [(epoch, n) for n in range(12)]


def train(root, run, *options, processes=1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "avfuse.train"]
    command += ["--data", str(root), "--run-dir", str(run), *TINY, *options]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def finish(process: subprocess.Popen) -> None:
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr.decode()


def losses(run) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row}


@pytest.mark.slow
def test_training_on_shards_in_two_processes_and_killed(sharded, tmp_path):
    """The losses are those of one process that was left alone: no clip was lost, none came twice."""
    finish(train(sharded, tmp_path / "whole"))
    truth = losses(tmp_path / "whole")
    assert sorted(truth) == list(range(1, 19))
    process = train(sharded, tmp_path / "killed")
    while process.poll() is None and len(losses(tmp_path / "killed")) < 7:
        psutil.wait_procs([psutil.Process(process.pid)], timeout=0.02)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=60)
    process.communicate()
    assert len(losses(tmp_path / "killed")) < 18
    finish(train(sharded, tmp_path / "killed"))
    assert losses(tmp_path / "killed") == truth
    finish(train(sharded, tmp_path / "two", processes=2))
    assert losses(tmp_path / "two") == pytest.approx(truth, rel=2e-5)
