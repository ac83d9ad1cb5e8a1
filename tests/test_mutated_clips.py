"""Clips with bytes flipped, cut, moved and spliced: every one is read or named, and nothing grows."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import BatchSampler
from videos import write_video

from avfuse.data.clips import Clip, ClipDataset, ClipLoader, ClipSampler
from avfuse.inputs import InputSettings

SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)
KINDS = {  # suffix: codecs of pictures and sound
    "mp4": ("libx264", "aac"),
    "mov": ("libx265", "pcm_s16le"),
    "mkv": ("libsvtav1", "flac"),
    "webm": ("libvpx-vp9", "libopus"),
    "avi": ("mpeg4", "libmp3lame"),
    "ts": ("mpeg2video", "mp2"),
    "flv": ("libx264", "aac"),
    "wmv": ("wmv2", "libmp3lame"),
}


def mutated(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """One to three changes of a file; half of them are near its start or its end, where headers are."""
    data = bytearray(data)
    for _ in range(random.integers(1, 4)):
        length = max(1, int(len(data) ** random.random()))  # from a byte to all of it, alike in logarithm
        at = int(random.integers(max(1, len(data) - length + 1)))
        at = random.choice([at, at, min(at, 2048), max(at, len(data) - 2048)])
        start = int(random.integers(len(other)))
        match random.integers(7):
            case 0:  # a few bits, far apart
                for place in random.integers(len(data) or 1, size=random.integers(1, 65)):
                    data[place : place + 1] = [data[place] ^ 1 << random.integers(8)] if data else []
            case 1:
                data[at : at + length] = random.bytes(length)
            case 2:
                data[at : at + length] = bytes(length) if random.random() < 0.5 else b"\xff" * length
            case 3:
                del data[at:]
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                data[at : at + length] = other[start : start + length]
    return bytes(data)


def mutated_clips(folder: Path, count: int) -> list[Clip]:
    """Alike in every kind of file; the seed of each is its number."""
    whole = [
        write_video(folder / f"whole.{suffix}", 1.5, sample_rate=48_000, codecs=codecs).read_bytes()
        for suffix, codecs in KINDS.items()
    ]
    clips = []
    for number in range(count):
        random = np.random.default_rng(number)
        path = folder / f"{number}.{list(KINDS)[number % len(KINDS)]}"
        path.write_bytes(mutated(whole[number % len(whole)], whole[random.integers(len(whole))], random))
        clips.append(Clip(path))
    return clips


def resident(pid: int | str) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_clips_are_read_or_named(tmp_path, count):
    """And neither this process nor its workers use more after all of them than after a quarter."""
    clips = mutated_clips(tmp_path, count)
    dataset = ClipDataset(clips, SETTINGS, train=True)
    keys = BatchSampler(ClipSampler(dataset, train=False), 20, drop_last=False)
    read, failures, use = [], [], []
    with ClipLoader(dataset, workers=2, timeout=20.0) as loader:
        for number, batch in enumerate(loader.batches(keys), 1):
            if len(batch["index"]):
                assert batch["image"].isfinite().all() and batch["audio"].isfinite().all()
                read += batch["index"].tolist()
            failures += batch["failures"]
            if number in (len(keys) // 4, len(keys)):
                processes = [worker.process for worker in loader._pool._running]
                pids = [os.getpid(), *(process.pid for process in processes)]
                use.append([(resident(pid) >> 20, len(os.listdir(f"/proc/{pid}/fd"))) for pid in pids])
    print(f"\n{len(read)} read, {len(failures)} not; MiB and open files of this process and workers: {use}")
    print(*Counter(failure.reason for failure in failures).most_common(40), sep="\n")
    assert sorted(read + [failure.index for failure in failures]) == list(range(count))
    assert all(failure.path == clips[failure.index].path and failure.reason for failure in failures)
    assert count // 4 < len(read) < count * 3 // 4
    for before, after in zip(*use, strict=True):
        assert after[0] < before[0] + 100 and after[1] <= before[1] + 3
