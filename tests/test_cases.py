"""Small files of kinds that readers get wrong (tests/cases): by the reader, in data sets and in check.

In most of them frame n, 25 a second, shows the number n: a grid of 4 x 4 blocks, black or white, the bits of
n, lowest first, row by row. The sound is a burst of 2 ms at 0.5 s, 1.5 s, 2.5 s, ...
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from videos import numbered_frames, probe, read_audio, read_frame, write_video

from avfuse.data.check import JOURNAL, check
from avfuse.data.clips import Clip, ClipDataset, Failure
from avfuse.data.decode import ClipReader
from avfuse.data.find import find_data
from avfuse.data.manifest import Header, read_entries, write
from avfuse.data.shards import shard
from avfuse.data.transforms import Spectrogram, evaluation_image
from avfuse.inputs import InputSettings

CASES = Path(__file__).parent / "cases"
SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32)
QUIET = dict(progress=False, workers=0)
BROKEN = {
    "part.mkv": "is cut off: fetch it again",
    "moovless.mp4": "is cut off before its index: fetch it again",
    "damaged.mp4": "its sound cannot be decoded: the data are damaged: fetch it again",
}


def grid_number(frame: np.ndarray) -> int:
    height, width = frame.shape[:2]
    blocks = frame[height // 8 :: height // 4, width // 8 :: width // 4].mean(2)  # a pixel of each
    return sum(int(grey > 128) << bit for bit, grey in enumerate(blocks.ravel()))


def numbers(path: Path, frames: range, late: float = 0.0) -> list[int]:
    """The numbers that are shown in the middle of each of these frames, of a stream that starts `late`."""
    with ClipReader(path) as clip:
        return [grid_number(clip.frame(late + (n + 0.5) / 25)) for n in frames]


def bursts(path: Path) -> list[float]:
    """When each burst begins, in seconds."""
    sound = np.abs(read_audio(path, 0, probe(path).seconds, 16_000))
    loud = np.flatnonzero(sound > 0.4) / 16_000
    return [loud[0], *loud[1:][np.diff(loud) > 0.5]]


# -------------------------------------------------------------------------------------------- by the reader


@pytest.mark.parametrize(
    ("name", "frames", "late", "first"),
    [
        ("h264.avi", 100, 0, 0),
        ("two.mkv", 100, 0.023, 0),
        ("sar.mp4", 100, 0, 0),
        ("damaged.mp4", 75, 0, 0),
        ("mpeg1_program_stream.mpg", 26, 0.0109, 0),
        ("mid.ts", 48, 0.9087, 50),
    ],
)
def test_frames_in_the_order_shown(name, frames, late, first):
    assert numbers(CASES / name, range(frames), late) == list(range(first, first + frames))
    assert numbers(CASES / name, range(frames - 1, -1, -7), late) == list(range(first, first + frames))[::-7]


def test_a_stream_that_begins_between_key_frames():
    """The first frame there is stands for those that cannot be decoded."""
    assert numbers(CASES / "mid.ts", range(24)) == [50] * 24


def test_the_picture_is_mirrored():
    with av.open(str(CASES / "q_hflip.mp4")) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert (read_frame(CASES / "q_hflip.mp4", 0) == stored[:, ::-1]).all()
    assert np.abs(stored - stored[:, ::-1].astype(int)).max() > 100


def test_pixels_are_square():
    assert read_frame(CASES / "sar.mp4", 0).shape == (128, 256, 3)


@pytest.mark.parametrize(
    "name", ["h264.avi", "two.mkv", "sar.mp4", "centre_only_5.1.mkv", "mid.ts", "late.ts"]
)
def test_bursts_are_heard_where_they_are(name):
    """Of the stream marked as default, to the last packet; what is said in the centre, in full."""
    truth = {"mid.ts": [0.407, 1.407, 2.407], "centre_only_5.1.mkv": [0.5], "late.ts": [3.923]}
    coder = {"h264.avi": 0.023, "two.mkv": 0.023}.get(name, 0.0)  # what it starts with
    heard = bursts(CASES / name)
    assert heard == pytest.approx(truth.get(name, [n + 0.5 for n in range(4)]) + np.float64(coder), abs=0.006)


def test_every_frame_of_a_packet_is_heard():
    sound = read_audio(CASES / "adpcm_ms.wav", 0.1, 1.8, 48_000)
    assert not (np.abs(sound).reshape(-1, 480).max(1) < 0.4).any()  # a continuous tone
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
    peak = spectrum.argmax()
    assert spectrum[peak - 4 : peak + 5].sum() > 0.999 * spectrum.sum()


def test_a_centre_channel_is_in_full():
    sound = read_audio(CASES / "centre_only_5.1.mkv", 0.4, 0.4, 48_000)
    with av.open(str(CASES / "centre_only_5.1.mkv")) as container:
        centre = np.concatenate([frame.to_ndarray()[2] for frame in container.decode(audio=0)])
    assert np.abs(sound).max() == pytest.approx(np.abs(centre).max(), rel=1e-4)


# -------------------------------------------------------------------------------- in data sets and in check


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CASES, tmp_path / "cases")
    (tmp_path / "cases/notes.txt").write_text("no video")
    (tmp_path / "cases/film.rm").write_bytes(b"of no kind that is known")
    return tmp_path / "cases"


def test_every_case_is_an_item_or_a_failure_by_name():
    """Its frame and sound are those of the reader at the middle."""
    for path in sorted(CASES.iterdir()):
        settings = SETTINGS if path.name != "damaged.mp4" else replace(SETTINGS, audio_seconds=4.0)
        item = ClipDataset([Clip(path)], settings, train=False)[0]
        if path.name in BROKEN:
            assert item == Failure(0, path, BROKEN[path.name])
            continue
        streams = probe(path)
        start = max(0, streams.seconds - 1) / 2
        if streams.video:
            moment = start + min(1.0, streams.seconds) / 2
            picture = np.ascontiguousarray(read_frame(path, moment).transpose(2, 0, 1))
            assert (item["image"] == evaluation_image(torch.from_numpy(picture), SETTINGS)).all(), path.name
        if streams.audio:
            sound = torch.from_numpy(read_audio(path, start, 1.0, 16_000))
            assert (item["audio"] == Spectrogram(SETTINGS)(sound)).all(), path.name


def test_training_names_what_it_leaves_out(folder):
    said = []
    found = find_data(folder, said.append, missing="keep", **QUIET)
    names = {path.name for path in CASES.iterdir()}
    unreadable = {error.path.name: error.reason for error in found.unreadable}
    assert unreadable == {name: BROKEN[name] for name in ("part.mkv", "moovless.mp4")}
    assert {clip.path.name for clip in found.train} == names - unreadable.keys()
    assert "passed over by suffix: 1 .rm, 1 .txt" in said
    dropped = find_data(folder, said.append, missing="drop", **QUIET)
    assert {clip.path.suffix for clip in dropped.train} == {".avi", ".ts", ".mpg", ".mkv", ".mp4"}


def test_check_names_what_a_person_should_know(folder):
    report = check(folder, **QUIET)
    entries = {entry.path: entry for entry in read_entries(folder)}
    assert {name for name, entry in entries.items() if entry.error} == BROKEN.keys()
    assert entries["part.mkv"].error == BROKEN["part.mkv"]
    assert entries["moovless.mp4"].error == BROKEN["moovless.mp4"]
    assert re.search("cannot be decoded.*the data are damaged: fetch it again", entries["damaged.mp4"].error)
    assert "1 have channels that cancel each other" in report and "    out_of_phase.wav\n" in report
    assert "are silent" not in report
    assert "passed over by suffix: 1 .rm, 1 .txt" in report
    assert entries["late.ts"].seconds == pytest.approx(4.04, abs=0.01)
    found = find_data(folder, lambda line: None, missing="keep", **QUIET)
    assert {error.path.name for error in found.unreadable} == BROKEN.keys()


# ------------------------------------------------------------------------------------ other files of a kind


def test_check_names_lengths_times_and_channels(tmp_path):
    """That differ, go back, or cancel; and says nothing of files that are in order."""
    tone = 0.5 * np.sin(0.2 * np.arange(96_000, dtype=np.float32))
    write_video(tmp_path / "good.mp4", 2)
    write_video(
        tmp_path / "good.mkv", 2, times=[0.2 * number for number in range(10)], video=numbered_frames(10)
    )
    write_video(tmp_path / "long_sound.mp4", 2, audio=tone[None])
    write_video(tmp_path / "long_pictures.mkv", 6, audio=tone[None, :32_000])
    write_video(
        tmp_path / "inverted.wav", audio=np.stack([tone, -tone]), video=False, codecs=("", "pcm_s16le")
    )
    write_video(
        tmp_path / "quiet.wav", audio=0 * np.stack([tone, tone]), video=False, codecs=("", "pcm_s16le")
    )
    one = write_video(tmp_path / "one.ts", 3)
    (tmp_path / "joined.ts").write_bytes(2 * one.read_bytes())
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "README").write_text("")
    report = check(tmp_path, **QUIET)

    def named(words: str) -> list[str]:
        lines = report.splitlines()
        (at,) = [n for n, line in enumerate(lines) if words in line]
        return [line.split()[0] for line in lines[at + 1 : at + 1 + int(lines[at].split()[0])]]

    assert named("of unequal length") == ["long_pictures.mkv", "long_sound.mp4"]
    assert "long_sound.mp4 (pictures end at 2.0 s, sound at 6.0 s)" in report
    assert named("times that go back") == ["joined.ts"]
    assert named("channels that cancel") == ["inverted.wav"]
    assert named("are silent") == ["quiet.wav"]
    assert report.endswith("\npassed over by suffix: 1 without one, 1 .txt\n")


def test_files_of_a_data_set_that_a_suffix_hides_are_counted(tmp_path):
    shutil.copy(CASES / "mpeg1_program_stream.mpg", tmp_path / "a.MPG")
    shutil.copy(CASES / "adpcm_ms.wav", tmp_path / "a.wav")
    shutil.copy(CASES / "adpcm_ms.wav", tmp_path / "a.rm")
    said = []
    found = find_data(tmp_path, said.append, missing="keep", **QUIET)
    assert [clip.path.name for clip in found.train] == ["a.MPG", "a.wav"]
    assert "passed over by suffix: 1 .rm" in said


@pytest.mark.parametrize("to", ["pipe", "link to a pipe"])
def test_pipes_in_a_folder_are_named_at_once(tmp_path, to):
    """Nothing waits for somebody to write to them."""
    write_video(tmp_path / "data/good.mp4", 1)
    os.mkfifo(tmp_path / "data/pipe.mp4" if to == "pipe" else tmp_path / "data/pipe")
    if to != "pipe":
        (tmp_path / "data/pipe.mp4").symlink_to("pipe")
    check(tmp_path / "data", progress=False, workers=1, timeout=20)
    entries = {entry.path: entry for entry in read_entries(tmp_path / "data")}
    assert entries["pipe.mp4"].error == "cannot be opened: it is not a file" and not entries["good.mp4"].error
    found = find_data(tmp_path / "data", lambda line: None, data_set="folder", **QUIET)
    assert [error.reason for error in found.unreadable] == ["cannot be opened: it is not a file"]
    assert shard(tmp_path / "data", tmp_path / "shards", **QUIET).startswith("1 clips in 1 shards")


def test_what_an_earlier_reader_found_is_looked_at_again(tmp_path):
    path = shutil.copy(CASES / "part.mkv", tmp_path)
    check(tmp_path, **QUIET)
    (entry,) = read_entries(tmp_path)
    write(tmp_path, Header(), [replace(entry, error=None, generation=0)])
    check(tmp_path, **QUIET)
    (entry,) = read_entries(tmp_path)
    assert entry.error == BROKEN[Path(path).name]


def test_lists_and_journals_that_are_pipes_are_not_read(tmp_path):
    write_video(tmp_path / "a.mp4", 1)
    os.mkfifo(tmp_path / JOURNAL)
    with pytest.raises(ValueError, match="journal is not a file"):
        check(tmp_path, **QUIET)
    (tmp_path / "annotations").mkdir()
    os.mkfifo(tmp_path / "annotations/vggsound.csv")
    with pytest.raises(ValueError, match="vggsound.csv is not a file"):
        find_data(tmp_path, **QUIET)
