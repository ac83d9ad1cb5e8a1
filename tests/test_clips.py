"""What a folder holds, items that depend on (seed, epoch, index) alone, failures named and never replaced."""

import itertools
import os
import pickle
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import Bomb
from torch.utils.data import BatchSampler
from videos import chirp, hostile_folder, number_of, read_audio, write_video

from avfuse.data.clips import (
    Clip,
    ClipDataset,
    ClipLoader,
    ClipSampler,
    Failure,
    collate,
    generator_of,
)
from avfuse.data.container import Streams
from avfuse.data.find import Scan, find_data, list_data, scan
from avfuse.data.listing import Listing
from avfuse.data.table import ClipTable
from avfuse.data.transforms import Spectrogram
from avfuse.inputs import InputSettings

SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five clips with pictures and sound, of 0.5 to 3 seconds; one that is broken; two that lack a stream."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", 3, 10)
    write_video(folder / "b/a.MP4", 2, 10)
    write_video(folder / "b/c/d.mkv", 2.5, 10)
    write_video(folder / "short.mp4", 0.5, 10)
    write_video(folder / "z.mov", 1.5, 10)
    (folder / "broken.mp4").write_bytes(b"no video")
    write_video(folder / "dark.mp4", 2, video=False)
    write_video(folder / "silent.mp4", 2, audio=False)
    (folder / "notes.txt").write_text("no video either")
    (folder / "._a.mp4").write_bytes(b"not meant to be seen")
    (folder / ".cache").mkdir()
    (folder / ".cache/a.mp4").write_bytes(b"nor is this")
    return folder


def masks(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"image_removed": torch.rand(4, generator=generator) < 0.5}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def scan_folder(folder: Path, **options) -> Scan:
    (scanned,) = scan(list_data(folder), {"train": "train"}, progress=False, **options).values()
    return scanned


def scan_clips(clips: list[Clip], **options) -> Scan:
    listing = Listing("", Path("/"), found={"train": clips})
    (scanned,) = scan(listing, {"train": "train"}, progress=False, **options).values()
    return scanned


# --------------------------------------------------------------------------------------------------- finding


def test_a_folder_is_scanned(folder):
    scan = scan_folder(folder, workers=0)
    names = [str(clip.path.relative_to(folder)) for clip in scan.clips]
    assert names == ["a.mp4", "b/a.MP4", "b/c/d.mkv", "short.mp4", "z.mov"]
    assert scan.clips[0] == Clip(folder / "a.mp4", {}, Streams(True, True, 3.0, 10.0), root=folder)
    assert scan.without_sound == [folder / "silent.mp4"]
    assert scan.without_pictures == [folder / "dark.mp4"]
    assert [error.path for error in scan.unreadable] == [folder / "broken.mp4"]
    assert scan.summary() == (
        "5 clips; 1 without sound dropped: silent.mp4; 1 without pictures dropped: dark.mp4; 1 unreadable: "
        f"broken.mp4 ({scan.unreadable[0].reason})"
    )


def test_clips_that_lack_a_stream_can_be_kept(folder):
    scan = scan_folder(folder, missing="keep", workers=0)
    assert len(scan.clips) == 7
    assert scan.without_sound == [folder / "silent.mp4"] and scan.without_pictures == [folder / "dark.mp4"]
    assert "7 clips; 1 without sound kept: silent.mp4" in scan.summary()


def test_a_manifest_is_scanned_alike(folder):
    names = ("z.mov", "broken.mp4", "a.mp4", "dark.mp4")
    scan = scan_clips([Clip(folder / name, {"kind": n}) for n, name in enumerate(names)], workers=0)
    assert [(clip.path.name, clip.labels["kind"], clip.streams.seconds) for clip in scan.clips] == [
        ("z.mov", 0, 1.5),
        ("a.mp4", 2, 3.0),
    ]
    dark, broken = ((folder / name).relative_to("/") for name in ("dark.mp4", "broken.mp4"))  # below the root
    assert f"2 clips; 1 without pictures dropped: {dark}; 1 unreadable: {broken} (" in scan.summary()
    assert scan_clips([], workers=0).summary() == "0 clips"


def test_headers_that_crash_or_hang_are_named(folder):
    paths = [folder / "a.mp4", Bomb("crash.mp4"), Bomb("hang.mp4"), folder / "broken.mp4", folder / "z.mov"]
    known = Clip(Bomb("exit.mp4"), {}, Streams(True, True, 1.0, 10.0))  # not opened
    clips = [known, *map(Clip, paths)]
    scan = scan_clips(clips, workers=2, timeout=2.0)
    assert [clip.path.name for clip in scan.clips] == ["exit.mp4", "a.mp4", "z.mov"]
    assert [error.reason for error in scan.unreadable][:2] == [
        "crashed its reader (signal 11)",
        "took longer than 2 s",
    ]
    assert [error.path for error in scan.unreadable] == paths[1:4]


def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    outside = write_video(tmp_path / "outside/secret.mp4", 1).parent
    folder = tmp_path / "folder"
    inside = write_video(folder / "real.mp4", 1)
    (folder / "alias.mp4").symlink_to(inside)
    (folder / "secret.mp4").symlink_to(outside / "secret.mp4")
    (folder / "others").symlink_to(outside)
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (tmp_path / "linked").symlink_to(folder)
    for root in (folder, tmp_path / "linked"):
        said = []
        found = find_data(root, said.append, progress=False, workers=0)
        assert [clip.path.name for clip in found.train] == ["alias.mp4", "real.mp4"]
        assert [path.name for path in list_data(root).links] == ["loop.mp4", "others", "secret.mp4"]
        assert said[1:3] == [
            f"3 links to folders or out of the data folder, not followed: {root}/loop.mp4; {root}/others; "
            f"{root}/secret.mp4",
            "2 clips",
        ]


def test_folders_without_clips(tmp_path):
    for folder, reason in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no file ends in .mp4")):
        with pytest.raises(ValueError, match=f"folder {folder} .*{reason}"):
            find_data(folder, progress=False, workers=0)
    (tmp_path / "sides/val").mkdir(parents=True)
    write_video(tmp_path / "sides/train/a.mp4", 1)
    with pytest.raises(ValueError, match=f"folder {tmp_path}/sides/val has no clip to use"):
        find_data(tmp_path / "sides", progress=False, workers=0)
    shutil.rmtree(tmp_path / "sides")
    for n in range(5):
        write_video(tmp_path / f"silent{n}.mp4", 1, audio=False)
    with pytest.raises(ValueError, match="0 clips; 5 without sound dropped: .*silent2.mp4 and 2 more"):
        find_data(tmp_path, progress=False, workers=0)
    with pytest.raises(ValueError, match="missing must be one of 'drop', 'keep', got 'ignore'"):
        find_data(tmp_path, missing="ignore", progress=False, workers=0)


# --------------------------------------------------------------------------------------------------- reading


def test_an_evaluation_item_is_the_middle(folder):
    clip = Clip(folder / "a.mp4", {"shape": 3, "colour": 1})
    item = ClipDataset([clip], SETTINGS, train=False)[0]
    assert {name: (tuple(value.shape), value.dtype) for name, value in item.items()} == {
        "image": ((3, 32, 32), torch.float32),
        "audio": ((1, 32, 64), torch.float32),
        "image_present": ((), torch.bool),
        "audio_present": ((), torch.bool),
        "index": ((), torch.int64),
        "label_shape": ((), torch.int64),
        "label_colour": ((), torch.int64),
    }
    assert item["image_present"] and item["audio_present"]
    assert (item["index"], item["label_shape"], item["label_colour"]) == (0, 3, 1)
    mean, std = (torch.tensor(value)[:, None, None] for value in (SETTINGS.image_mean, SETTINGS.image_std))
    grey = 255 * (item["image"] * std + mean)
    assert number_of(grey.numpy()) == 15  # at 1.5 s
    truth = Spectrogram(SETTINGS)(torch.from_numpy(read_audio(clip.path, 1.0, 1.0, 16_000)))
    assert torch.equal(item["audio"], truth)


def test_training_draws_window_frame_crop_and_gain(folder):
    settings = replace(SETTINGS, image_mean=(0.0, 0.0, 0.0), image_std=(1 / 255, 1 / 255, 1 / 255))
    dataset = ClipDataset(scan_folder(folder, workers=0).clips, settings, train=True)
    items = [dataset[epoch, 0] for epoch in range(80)]
    numbers = torch.tensor([number_of(item["image"].numpy()) for item in items])
    assert numbers.min() < 4 and numbers.max() > 25 and len(numbers.unique()) > 20
    starts = starts_of(torch.stack([item["audio"] for item in items]))
    assert starts.min() < 0.2 and starts.max() > 1.8 and len(starts.unique()) > 14
    moments = numbers / 10 - starts
    assert moments.min() > -0.2 and moments.max() < 1.05  # the frame is one of the window...
    assert moments.min() < 0.1 and moments.max() > 0.8  # ...and any of it
    still = ClipDataset(dataset.clips, settings, train=True, still=True)
    items = [still[epoch, 0] for epoch in range(20)]
    numbers = torch.tensor([number_of(item["image"].numpy()) for item in items])
    starts = starts_of(torch.stack([item["audio"] for item in items]))
    assert (numbers / 10 - starts - 0.5).abs().max() < 0.16 and len(numbers.unique()) > 5
    loudness = torch.stack([item["audio"].amax() for item in items])
    assert 0.8 < loudness.max() - loudness.min() < 1.5  # 12 dB are 1.2


def starts_of(audio: torch.Tensor) -> torch.Tensor:
    """Where windows (N, 1, mel_bins, frames) of the chirp start, in steps of 0.1 s, by their shape."""
    starts = torch.arange(0, 2.01, 0.1)
    windows = chirp(starts[:, None].numpy() + np.arange(16_000) / 16_000)
    shapes, known = (
        (spectrogram - spectrogram.amax((1, 2, 3), keepdim=True)).clamp(min=-2).flatten(1)
        for spectrogram in (audio, Spectrogram(SETTINGS)(torch.from_numpy(windows)))
    )
    return starts[torch.cdist(shapes, known).argmin(1)]


def test_a_short_clip_is_mirrored_and_a_missing_modality_is_zeros(folder):
    clips = scan_folder(folder, missing="keep", workers=0).clips
    dataset = ClipDataset(clips, SETTINGS, train=False)
    items = {clip.path.name: dataset[n] for n, clip in enumerate(clips)}
    there = read_audio(folder / "short.mp4", 0, 0.5, 16_000)
    truth = Spectrogram(SETTINGS)(torch.from_numpy(np.concatenate([there, there[::-1]])))
    torch.testing.assert_close(items["short.mp4"]["audio"], truth)
    for name, absent, present in (("silent.mp4", "audio", "image"), ("dark.mp4", "image", "audio")):
        assert not items[name][f"{absent}_present"] and items[name][f"{present}_present"]
        assert not items[name][absent].any() and items[name][present].any()


def test_clips_that_were_not_scanned_read_the_same(folder):
    scanned = scan_folder(folder, missing="keep", workers=0).clips
    unknown = [Clip(clip.path) for clip in scanned]
    for train in (False, True):
        one, two = (ClipDataset(clips, SETTINGS, train=train, extras=masks) for clips in (scanned, unknown))
        for n in range(len(scanned)):
            assert same(one[4, n], two[4, n])


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    clips = [Clip(folder / "a.mp4"), Clip(folder / "a.mp4")]
    dataset = ClipDataset(clips, SETTINGS, train=True, seed=5, extras=masks)
    item = dataset[2, 1]
    torch.manual_seed(99)
    dataset[0, 0]
    assert same(dataset[2, 1], item) and same(dataset[2, -1], item)
    assert same(dataset[1], dataset[0, 1])
    reseeded = ClipDataset(clips, SETTINGS, train=True, seed=6, extras=masks)
    for other in (dataset[2, 0], dataset[1, 1], reseeded[2, 1]):
        assert not any(torch.equal(other[name], item[name]) for name in ("image", "audio"))
    with pytest.raises(IndexError):
        dataset[0, 2]
    removed = torch.stack([dataset[epoch, 0]["image_removed"] for epoch in range(40)])
    assert (removed.any(0) & ~removed.all(0)).all()


def test_failures_are_named_and_never_replaced(folder):
    names = ("a.mp4", "broken.mp4", "gone.mp4", "z.mov")
    clips = [Clip(folder / name, {"n": n}, Streams(True, True, 1.5, 10.0)) for n, name in enumerate(names)]
    dataset = ClipDataset(clips, SETTINGS, train=False)
    assert isinstance(dataset[1], Failure)
    assert dataset[2] == Failure(2, folder / "gone.mp4", "cannot be opened: there is no such file")
    batch = collate([dataset[n] for n in range(4)], dataset.blank)
    assert batch["index"].tolist() == batch["label_n"].tolist() == [0, 3]
    assert len(batch["image"]) == len(batch["audio"]) == 2
    assert [failure.index for failure in batch["failures"]] == [1, 2]


def test_a_batch_that_nobody_could_read_holds_a_blank(folder):
    clips = [Clip(folder / name, {"n": 1, "m": (0, 2)}) for name in ("a.mp4", "broken.mp4", "gone.mp4")]
    table = ClipTable(clips, classes={"m": "abc"})
    dataset = ClipDataset(table, SETTINGS, train=True, extras=masks)
    batch = collate([dataset[1], dataset[2]], dataset.blank)
    assert batch.pop("failures") == [dataset[1], dataset[2]]
    assert batch["index"].shape == (0,) and batch["index"].dtype == torch.long
    assert not batch["image_present"].any() and not batch["audio_present"].any()
    assert not batch["image"].any() and not batch["audio"].any()
    read = dataset[0]
    assert batch.keys() == read.keys()
    for name in read.keys() - {"index"}:
        assert (batch[name].shape, batch[name].dtype) == ((1, *read[name].shape), read[name].dtype), name


def test_a_stream_that_the_scan_promised_is_not_made_up(folder):
    clip = Clip(folder / "silent.mp4", {}, Streams(True, True, 2.0, 10.0))
    assert ClipDataset([clip], SETTINGS, train=False)[0] == Failure(0, clip.path, "has no sound")


# ---------------------------------------------------------------------------------------------------- loader


@pytest.mark.parametrize("train", [True, False])
def test_batches_are_the_same_for_any_number_of_workers(folder, train):
    clips = scan_folder(folder, missing="keep", workers=0).clips
    clips = [*clips, *clips]
    clips.insert(5, Clip(folder / "broken.mp4"))
    dataset = ClipDataset(clips, SETTINGS, train=train, seed=1, extras=masks)
    sampler = ClipSampler(dataset, train=train, seed=1)
    batches = BatchSampler(sampler, batch_size=4, drop_last=False)
    with ClipLoader(dataset, workers=1) as one, ClipLoader(dataset, workers=3) as three:
        for epoch in range(2):
            sampler.set_epoch(epoch)
            keys = list(batches)
            assert [len(batch) for batch in keys] == [4, 4, 4, 3]
            for loader in (ClipLoader(dataset, workers=0), one, three):
                for batch, its_keys in zip(loader.batches(batches), keys, strict=True):
                    truth = collate([dataset[key] for key in its_keys], dataset.blank)
                    assert batch.pop("failures") == truth.pop("failures")
                    assert same(batch, truth)


def test_workers_killed_from_outside_change_no_batch(folder):
    dataset = ClipDataset([Clip(folder / "a.mp4"), Clip(folder / "z.mov")], SETTINGS, train=True)
    keys = [[(epoch, 0), (epoch, 1)] for epoch in range(30)]
    with ClipLoader(dataset, workers=2) as loader:
        for number, batch in enumerate(loader.batches(keys)):
            if number % 10 == 0:
                for process in [worker.process for worker in loader._pool._running]:
                    if process is not None:  # not just being replaced
                        process.kill()
            assert batch.pop("failures") == []
            truth = collate([dataset[key] for key in keys[number]], dataset.blank)
            assert same(batch, {name: truth[name] for name in batch}) and len(truth) == len(batch) + 1


class Trap:
    """Masks, except that one clip brings its worker down, and another never ends."""

    def __init__(self, crash: int, hang: int):
        self.crash, self.hang = crash, hang

    def __call__(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        number = generator.initial_seed()
        if number == self.crash:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == self.hang:
            signal.pause()
        return {}


def test_clips_that_crash_or_hang_are_named(folder):
    dataset = ClipDataset([Clip(folder / "short.mp4")] * 9, SETTINGS, train=True)
    dataset.extras = Trap(*(generator_of(0, 3, 1 + index).initial_seed() for index in (2, 7)))
    batches = [[(3, 0), (3, 1), (3, 2)], [(3, 7)], [], [(3, 8), (2, 7)]]
    with ClipLoader(dataset, workers=2, timeout=2.0) as loader:
        first, hung, empty, last = loader.batches(batches)
    assert first["index"].tolist() == [0, 1]
    assert first["failures"] == [Failure(2, folder / "short.mp4", "crashed its reader (signal 11)")]
    assert hung["failures"] == [Failure(7, folder / "short.mp4", "took longer than 2 s")]
    assert empty["failures"] == [] and not len(empty["index"]) and not len(hung["index"])
    assert last["index"].tolist() == [8, 7] and last["failures"] == []


def test_a_clip_that_takes_too_much_memory_is_named(folder, tmp_path):
    large = write_video(tmp_path / "large.mp4", 1, 2, size=(4096, 4096), audio=False, g="1")
    dataset = ClipDataset([Clip(folder / "a.mp4"), Clip(large)], SETTINGS, train=False)
    for memory, read in ((2**25, [0]), (2**29, [0, 1])):
        with ClipLoader(dataset, workers=1, memory=memory) as loader:
            (batch,) = loader.batches([[(0, 0), (0, 1)]])
        assert batch["index"].tolist() == read
        assert [failure.path for failure in batch["failures"]] == [large] * (2 - len(read))


def test_frames_on_the_way_to_the_wanted_one_are_not_kept(tmp_path):
    long = write_video(
        tmp_path / "a.mp4", 10, 20, size=(640, 480), audio=False, g="250", bf="0", sc_threshold="0"
    )
    dataset = ClipDataset([Clip(long)], SETTINGS, train=False)
    with ClipLoader(dataset, workers=1, memory=2**25) as loader:  # 100 frames take 46 MB
        (batch,) = loader.batches([[(0, 0)]])
    assert batch["failures"] == []


def test_a_loader_reads_no_further_than_it_says(folder):
    """Two batches of 2, or 4 clips for each of 2 workers: 8 clips, which are 4 batches."""
    dataset = ClipDataset([Clip(folder / "short.mp4")], SETTINGS, train=False)
    read = itertools.count()
    keys = iter(lambda: [(next(read), 0)] * 2, None)
    with ClipLoader(dataset, workers=2) as loader:
        for _ in zip(range(10), loader.batches(keys), strict=False):
            pass
    assert next(read) <= 10 + 4 + 1


# ------------------------------------------------------------------------------------------- a hostile folder


def test_a_hostile_folder(tmp_path):
    folder = tmp_path / "folder"
    hostile_folder(folder)
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 200

    scan, alone = scan_folder(folder, workers=2), scan_folder(folder, workers=0)
    assert (list(scan.clips), scan.summary()) == (list(alone.clips), alone.summary())
    dataset = ClipDataset(scan.clips, SETTINGS, train=True, extras=masks)
    with ClipLoader(dataset, workers=2) as loader:
        keys = BatchSampler(ClipSampler(dataset, train=True), batch_size=16, drop_last=False)
        batches = list(loader.batches(keys))

    read = {scan.clips[index].path.name for batch in batches for index in batch["index"]}
    failed = [failure.path.name for batch in batches for failure in batch["failures"]]
    unreadable = [error.path.name for error in scan.unreadable]
    dark, silent = ([path.name for path in paths] for paths in (scan.without_pictures, scan.without_sound))
    assert sorted(failed + unreadable + dark + silent) == sorted(names - read)  # each of them once
    kinds = Counter(re.match("[a-z]+", name)[0] for name in read)
    assert kinds == {"good": 80, "misnamed": 20, "lying": 4}  # a wrong length of Matroska does no harm
    for kind, found in (("dark", dark), ("silent", silent), ("lying", failed)):
        assert found and all(name.startswith((kind, "garbage")) for name in found)


def test_sampler():
    clips = range(50)
    ordered, shuffled = ClipSampler(clips, train=False), ClipSampler(clips, train=True, seed=3)
    assert len(ordered) == len(shuffled) == 50
    assert list(ordered) == [(0, n) for n in range(50)]
    first = list(shuffled)
    assert sorted(first) == list(ordered) and first != list(ordered) and list(shuffled) == first
    iterator = iter(shuffled)
    shuffled.set_epoch(7)
    assert list(iterator) == first  # an epoch under way is not disturbed
    assert sorted(shuffled) == [(7, n) for n in range(50)]
    assert [n for _, n in shuffled] != [n for _, n in first]
    assert [n for _, n in ClipSampler(clips, train=True, seed=4)] != [n for _, n in first]


def test_arguments(folder):
    clip = Clip(folder / "a.mp4", {"shape": 1})
    with pytest.raises(ValueError, match="clips must not be empty"):
        ClipDataset([], SETTINGS, train=True)
    with pytest.raises(ValueError, match=r"label names, got \['shape'\] .* but \[\] for .*z.mov"):
        ClipDataset([clip, Clip(folder / "z.mov")], SETTINGS, train=True)
    with pytest.raises(ValueError, match="seed must be 0 or above, got -1"):
        ClipDataset([clip], SETTINGS, train=True, seed=-1)
    with pytest.raises(ValueError, match="seed must be 0 or above, got -2"):
        ClipSampler([], train=True, seed=-2)


def test_datasets_can_be_sent_to_workers(folder):
    dataset = ClipDataset([Clip(folder / "a.mp4")], SETTINGS, train=True, extras=masks)
    assert same(pickle.loads(pickle.dumps(dataset))[0], dataset[0])
