"""check: a manifest that says what is in every clip, a report, and training that goes by the manifest."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from trees import IN_VGGSOUND, audioset, plant, vggsound, videos
from videos import write_video

from avfuse.data import check as checking
from avfuse.data import manifest
from avfuse.data.check import JOURNAL, MISSING, REPORT, check
from avfuse.data.clips import ClipDataset, Failure
from avfuse.data.container import Streams
from avfuse.data.find import find_data, scan
from avfuse.inputs import InputSettings
from avfuse.train import cli
from avfuse.training.recipes import parse
from avfuse.training.run_folder import describe_data

SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)
QUIET = dict(progress=False, workers=0)
TINY = (
    *("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "2", "--decoder-dim", "32", "--workers", "1"),
    *("--decoder-depth", "1", "--decoder-heads", "2", "--fusion-layers", "1", "3", "--measure-every", "0"),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return videos(tmp_path_factory.mktemp("shapes"), 6)


@pytest.fixture
def root(tmp_path, sources):
    return vggsound(tmp_path / "vggsound", sources)


def entries(root) -> dict[str, manifest.Entry]:
    return {entry.path: entry for entry in manifest.read_entries(root)}


def find(root, **options):
    return find_data(root, lambda line: None, **QUIET, **options)


def test_every_clip_is_described(tmp_path):
    """Against what the clips were written with."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    write_video(tmp_path / "a.mp4", 2, 10, (64, 48), 16_000, g="5", keyint_min="5", sc_threshold="0")
    write_video(
        tmp_path / "b/still.mp4", 2, 10, (96, 64), 44_100, video=np.full((20, 64, 96, 3), 99, np.uint8)
    )
    write_video(tmp_path / "b/silent.mkv", 2, 10, audio=np.zeros((1, 32_000), np.float32), video=noise)
    write_video(tmp_path / "dark.mp4", 2, video=False)
    write_video(tmp_path / "mute.mp4", 2, audio=False)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    whole = (tmp_path / "a.mp4").read_bytes()
    at = whole.index(b"mdat") + 2000
    (tmp_path / "damaged.mp4").write_bytes(whole[:at] + bytes(3000) + whole[at + 3000 :])
    report = check(tmp_path, progress=False, workers=2)
    found = entries(tmp_path)
    assert list(found) == sorted(found) and len(found) == 7
    a = found["a.mp4"]
    assert (a.split, a.labels, a.bytes, a.error) == ("train", {}, len(whole), None)
    assert (a.video, a.audio, a.seconds, a.fps) == (True, True, 2.0, 10.0)
    assert (a.width, a.height, a.sample_rate, a.key_frame_every) == (64, 48, 16_000, 5)
    assert a.peak == pytest.approx(0.5, abs=0.1) and a.motion > 50
    assert len(a.sha256) == 64 and len({entry.sha256 for entry in found.values()}) == 7
    still, silent = found["b/still.mp4"], found["b/silent.mkv"]
    assert still.motion < 0.5 and (still.width, still.height, still.sample_rate) == (96, 64, 44_100)
    assert silent.peak < 1e-3 and silent.motion > 10
    dark, mute = found["dark.mp4"], found["mute.mp4"]
    assert (dark.video, dark.width, dark.motion) == (False, 0, 0.0) and dark.error is None
    assert (mute.audio, mute.sample_rate, mute.peak) == (False, 0, 0.0)
    assert found["broken.mp4"].error.startswith("cannot be opened") and found["broken.mp4"].sha256
    assert found["damaged.mp4"].error
    for words in (
        "7 clips looked at, 0.00 hours",
        "5 can be decoded",
        "2 cannot be decoded; training leaves them out, and stops over more than 1 % of such "
        "(--max-unreadable)\n    broken.mp4: cannot be opened",
        "1 have no sound\n    mute.mp4",
        "1 have no pictures\n    dark.mp4",
        "1 are silent (peak below 0.001)\n    b/silent.mkv",
        "1 show one still picture\n    b/still.mp4",
    ):
        assert words in report
    assert (tmp_path / REPORT).read_text() == report and not (tmp_path / JOURNAL).exists()


def test_key_frames_alone(tmp_path):
    write_video(tmp_path / "a.mp4", 2, 10, g="5", keyint_min="5", sc_threshold="0")
    write_video(tmp_path / "one.mp4", 2, 10)  # has one key frame: nobody can tell whether it is still
    check(tmp_path, every_picture=False, **QUIET)
    found = entries(tmp_path)
    assert found["a.mp4"].motion > 20 and found["one.mp4"].motion is None
    assert not found["a.mp4"].every_picture
    check(tmp_path, **QUIET)  # looks closer
    assert entries(tmp_path)["one.mp4"].motion > 50


def test_the_report_names_the_folders_that_would_be_classes(tmp_path, sources):
    names = "train/bel/1.mp4", "train/bell/2.mp4", "test/bell/3.mp4", "train/loose.mp4"
    for source, name in zip(sources, names[:3], strict=False):
        plant(source, tmp_path / name)
    report = check(tmp_path, **QUIET)
    assert "\n2 classes, as folders are called, and their clips: bel (1), bell (2)\n" in report
    assert "\nWARNING: folders of their own that may be meant as one class: bel and bell\n" in report
    plant(sources[3], tmp_path / names[3])  # it has no class, and there is nothing to say
    assert "classes" not in check(tmp_path, **QUIET)


def test_the_report_says_what_is_amiss_with_a_data_set(root, sources):
    leak = root / "clips/playing_harp/ddddddddddd_000120_000130.mp4"
    plant(sources[0], leak)  # to test on what is trained on
    plant(sources[5], root / "clips/other/extra.mp4")
    report = check(root, **QUIET)
    assert report.startswith("VGGSound: train 3 of 4 clips found (75.0%), test 2 of 2 clips found (100.0%)\n")
    assert "1 are missing\n    train: dog_barking/ggggggggggg_000001_000011.mp4\n" in report
    assert (root / MISSING).read_text() == "train\tdog_barking/ggggggggggg_000001_000011.mp4\n"
    assert (
        "1 are in two splits with the same content\n"
        "    test: clips/playing_harp/ddddddddddd_000120_000130.mp4 = train: "
        "clips/playing_harp/aaaaaaaaaaa_000000_000010.mp4\n" in report
    )
    assert report.endswith("\n1 videos in the folder are in no list, and not used\n")


def test_training_goes_by_the_manifest(root, monkeypatch):
    before = find(root)
    check(root, **QUIET)
    monkeypatch.setattr("avfuse.data.table.ClipReader", None)  # no file is opened
    monkeypatch.setattr("avfuse.data.listing.walk", None)
    after = find(root)
    assert [c.path for c in after.train] == [c.path for c in before.train]
    assert [c.labels for c in after.test] == [c.labels for c in before.test]
    assert [c.streams for c in after.train] == [c.streams for c in before.train]
    for name in ("coverage", "classes", "test_name", "looked_at", "unreadable"):
        assert getattr(after, name) == getattr(before, name)
    assert describe_data(after.train) == describe_data(before.train)  # a run may go on with either


def test_broken_clips_and_those_that_lack_a_stream(tmp_path):
    write_video(tmp_path / "a.mp4", 1)
    write_video(tmp_path / "mute.mp4", 1, audio=False)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for missing, names in (("drop", ["a.mp4"]), ("keep", ["a.mp4", "mute.mp4"])):
        before = find(tmp_path, missing=missing, data_set="folder")
        check(tmp_path, **QUIET)
        after = find(tmp_path, missing=missing)
        assert [clip.path.name for clip in after.train] == names
        assert [clip.path for clip in before.train] == [clip.path for clip in after.train]
        assert [error.path for error in after.unreadable] == [tmp_path / "broken.mp4"]
        assert after.looked_at == before.looked_at == 3


@pytest.mark.parametrize("changed", ["annotations/vggsound.csv", "clips", "clips/playing_harp"])
def test_a_stale_manifest_is_announced(root, changed):
    """It still decides, so that a run goes on with its clips, but not in silence."""
    check(root, **QUIET)
    now = (root / manifest.FILE).stat().st_mtime
    for path in root.rglob("*"):
        os.utime(path, (now, now))
    os.utime(root.parent, (now + 10, now + 10))  # something was put beside the folder, not into it
    lines = []
    clips = [clip.path for clip in find_data(root, lines.append, **QUIET).train]
    assert not any("WARNING" in line for line in lines)
    os.utime(root / changed, (now + 10, now + 10))
    assert [clip.path for clip in find_data(root, lines.append, **QUIET).train] == clips
    (warning,) = [line for line in lines if "WARNING" in line]
    assert str(root / changed) in warning and f"avfuse.data check {root}" in warning


@pytest.mark.parametrize(
    "clips", [("a.mp4", "b.mp4"), ("cat/a.mp4", "dog/b.mp4"), ("train/x/a.mp4",)], ids=str
)
@pytest.mark.parametrize("place", ["", "cat", "new/deep"])
def test_files_that_are_added_are_counted_in_the_first_line(tmp_path, clips, place):
    for name in clips:
        write_video(tmp_path / name, 1)
    (tmp_path / "broken.mov").write_bytes(b"no video")
    (tmp_path / "away.mp4").symlink_to("/dev/null")
    base = tmp_path / "train" if "train" in clips[0] else tmp_path
    if base != tmp_path:
        (tmp_path / "broken.mov").unlink()
        (tmp_path / "away.mp4").unlink()
    check(tmp_path, **QUIET)
    lines = []
    before = find_data(tmp_path, lines.append, **QUIET).train
    assert not any("WARNING" in line for line in lines)
    for name in "new.mp4", "NEW.WAV", ".hidden.mp4", "avfuse-x.mp4", "notes.txt":
        (base / place).mkdir(parents=True, exist_ok=True)
        (base / place / name).touch()
    lines.clear()
    after = find_data(tmp_path, lines.append, **QUIET).train
    assert [clip.path for clip in after] == [clip.path for clip in before]
    where = (base / place).relative_to(tmp_path).as_posix()
    assert lines[0].startswith(f"WARNING: 2 files (2 in {where}) are not in {manifest.FILE}, which is used")
    assert f"avfuse.data check {tmp_path}" in lines[0]


def test_a_vanished_clip_is_a_failure_by_name(root):
    check(root, **QUIET)
    before = describe_data(find(root).train)
    gone = root / "clips" / next(iter(IN_VGGSOUND))
    gone.unlink()
    found = find(root)
    assert describe_data(found.train) == before  # so that the run goes on
    item = ClipDataset(found.train, SETTINGS, train=False)[0]
    assert item == Failure(0, gone, "cannot be opened: there is no such file")
    assert isinstance(ClipDataset(found.train, SETTINGS, train=False)[1], dict)


def test_a_clip_that_is_mended_during_a_scan_gives_no_other_clip_its_streams(tmp_path, monkeypatch):
    """The scan goes through the manifest twice, side by side: first here, then for the clips to be opened."""
    broken = dict(split="train", labels={}, modified=0, error="damaged")
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(bytes(50))
    entries = [manifest.Entry("a.mp4", bytes=50, **broken), manifest.Entry("b.mp4", bytes=40, **broken)]
    manifest.write(tmp_path, manifest.Header(expected={"train": 2}), entries)
    once = manifest.Manifest.clips

    def clips(self):
        for split, clip in once(self):
            yield split, clip
            (tmp_path / "a.mp4").write_bytes(bytes(60))

    monkeypatch.setattr(manifest.Manifest, "clips", clips)
    held = {"a.mp4": Streams(True, True, 1.0, 25.0), "b.mp4": Streams(True, True, 2.0, 25.0)}
    options = dict(QUIET, look=lambda clip: held[clip.path.name])
    scanned = scan(manifest.Manifest("", tmp_path), {"train": "train"}, **options)["train"]
    assert [(clip.path.name, clip.streams.seconds) for clip in scanned.clips] == [("b.mp4", 2.0)]
    assert [error.path.name for error in scanned.unreadable] == ["a.mp4"]


def test_files_that_were_written_anew_since(tmp_path):
    """Into the same names, by which no folder changes. A good one is not read by what was known of another; a
    broken one is looked at again.
    """
    longer, broken = (write_video(tmp_path / f"{name}.mp4", 1) for name in ("longer", "broken"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    check(tmp_path, **QUIET)
    write_video(longer, 2)
    broken.write_bytes(whole)
    found = find(tmp_path)
    assert not found.unreadable and [clip.path for clip in found.train] == [broken, longer]
    first, second = (ClipDataset(found.train, SETTINGS, train=False)[index] for index in range(2))
    assert isinstance(first, dict) and isinstance(second, Failure) and second.path == longer
    assert second.reason.startswith("is another file than its manifest tells of: check the folder again")
    check(tmp_path, **QUIET)
    assert all(isinstance(item, dict) for item in ClipDataset(find(tmp_path).train, SETTINGS, train=False))


def test_only_what_has_changed_is_opened_again(root, monkeypatch):
    looked = []
    real = checking._look
    monkeypatch.setattr(checking, "_look", lambda *a: looked.append(a[-1].path.name) or real(*a))
    first = check(root, **QUIET)
    before = (root / manifest.FILE).read_bytes()
    assert len(looked) == 5
    assert check(root, **QUIET) == first and len(looked) == 5
    assert (root / manifest.FILE).read_bytes() == before
    changed = root / "clips" / next(iter(IN_VGGSOUND))
    os.utime(changed, ns=(0, 0))
    write_video(root / "clips/dog_barking/ggggggggggg_000001_000011.mp4", 1)
    assert "train 4 of 4 clips found" in check(root, **QUIET)
    assert sorted(looked[5:]) == [changed.name, "ggggggggggg_000001_000011.mp4"]


def test_an_interrupted_check_goes_on(root, monkeypatch):
    looked = []
    real = checking._look

    def look(*arguments):
        looked.append(arguments[-1].path.name)
        if len(looked) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(checking, "_look", look)
    with pytest.raises(KeyboardInterrupt):
        check(root, **QUIET)
    assert sorted(path.name for path in root.iterdir()) == [JOURNAL, "annotations", "clips"]
    with open(root / JOURNAL, "a") as journal:
        journal.write('{"path": "clips/half wri')
    check(root, **QUIET)
    assert len(looked) == 3 + 3 and len(entries(root)) == 5 and not (root / JOURNAL).exists()


def test_a_killed_check_leaves_nothing_half_written(root):
    command = [sys.executable, "-m", "avfuse.data", "check", str(root), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((root / JOURNAL).exists() and (root / JOURNAL).stat().st_size > 9):
        psutil.wait_procs([psutil.Process(process.pid)], timeout=0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / manifest.FILE).exists() or len(entries(root)) == 5
    assert "5 clips looked at" in check(root, **QUIET)
    assert len(entries(root)) == 5


def test_a_manifest_is_not_trusted(root, tmp_path):
    check(root, **QUIET)
    path = root / manifest.FILE
    header, first, *rest = path.read_text().splitlines()
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"secret")

    def with_first(**changes) -> str:
        return "\n".join([header, json.dumps(json.loads(first) | changes), *rest]) + "\n"

    for changes, reason in (
        (dict(path="../outside.mp4"), "path '../outside.mp4' leaves the data folder"),
        (dict(path=str(outside)), "leaves the data folder"),
        (dict(path="clips/../../outside.mp4"), "leaves the data folder"),
        (dict(path="a\0b"), "leaves the data folder"),
        (dict(path=""), "leaves the data folder"),
        (dict(path="\ud800"), "surrogates not allowed"),
        (dict(path=3), "path is 3"),
        (dict(start=10), None),
        (dict(path="outside.mp4", start=10), "names no member of a shard"),
        (dict(split="../train"), "split is '../train'"),
        (dict(labels={"class": "harp"}), "label class is 'harp'"),
        (dict(labels={"class": -1}), "label class is -1"),
        (dict(labels={"class": 99}), "label class must be in 0..3, got 99"),
        (dict(labels={}), "must share their label names"),
        (dict(labels=[1]), r"labels is \[1\]"),
        (dict(seconds=float("nan")), "seconds nan"),
        (dict(bytes=-1), "bytes -1"),
        (dict(bytes=2**70), "bytes 1180591620717411303424"),
        (dict(video=1), "video is 1"),
        (dict(error=False), "error is False"),
        (dict(colour="red"), "unexpected keyword argument 'colour'"),
    ):
        path.write_text(with_first(**changes))
        if reason is None:  # of a shard that there is not
            item = ClipDataset(find(root).train, SETTINGS, train=False)[0]
            assert isinstance(item, Failure) and "cannot be opened" in item.reason
            continue
        with pytest.raises(ValueError, match=reason):
            find(root)
    for text, reason in (
        ("", "is no manifest"),
        ("[]\n", "is no manifest"),
        ("[" * 100_000, "is no manifest"),
        (json.dumps(dict(manifest=2)), "is of version 2, not 1"),
        (json.dumps(dict(classes={"class": 3})), "is no manifest"),
        (header.replace('"train": 4', '"train": "4"'), "is no manifest"),
        (f"{header}\nno entry\n", "line 2: Expecting value"),
        (f"{header}\n[1]\n", "line 2: it is no entry"),
        (f"{header}\n{first[:50]}", "line 2: Unterminated|line 2: Expecting"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            find(root)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the data folder: it is not read"):
        find(root)
    clip = root / "clips" / next(iter(IN_VGGSOUND))
    path.unlink()
    path.write_text(with_first())
    clip.unlink()
    clip.symlink_to(outside)  # since it was checked
    item = ClipDataset(find(root).train, SETTINGS, train=False)[0]
    assert item == Failure(0, clip, "leads out of the data folder")


def test_links_in_the_folder_are_not_written_through(root, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in (manifest.FILE, REPORT, MISSING):
        (root / name).symlink_to(precious)
    check(root, **QUIET)
    assert precious.read_text() == "precious" and len(entries(root)) == 5
    (root / JOURNAL).symlink_to(precious)
    with pytest.raises(ValueError, match="is a link: it is not written to"):
        check(root, **QUIET)
    assert precious.read_text() == "precious"


def test_the_command(root, tmp_path):
    command = [sys.executable, "-m", "avfuse.data", "check"]
    out = tmp_path / "elsewhere"
    options = "--workers", "1", "--pictures", "key-frames", "--out", str(out)
    done = subprocess.run([*command, str(root), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "VGGSound: train 3 of 4 clips found" in done.stdout
    assert {path.name for path in out.iterdir()} == {manifest.FILE, REPORT, MISSING}
    assert {path.name for path in root.iterdir()} == {"annotations", "clips"}
    done = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and re.fullmatch(r"error: folder .*none does not exist\n", done.stderr)


@pytest.mark.parametrize("tree", [vggsound, audioset])
@pytest.mark.usefixtures("undrawn")
def test_training_by_the_command_line(tree, tmp_path, sources, capsys):
    root, run = tree(tmp_path / "data", sources), tmp_path / "run"
    check(root, **QUIET)
    assert cli(parse(["--data", str(root), "--run-dir", str(run), *TINY])) == 0
    said = capsys.readouterr().out
    assert "clips found (75.0%)" in said or "clips found (66.7%)" in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["clips"] for row in rows if "loss" in row] == [2]
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows if "loss" in row])).all()
