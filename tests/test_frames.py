"""Several frames of a clip: each the one that is read alone, by one seek; one crop for all; when they end."""

import struct
import weakref
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from models import make_vit
from videos import GREYS, chirp, lag, number_of, numbered_frames, write_video

from avfuse import AVEncoder
from avfuse.data.check import check
from avfuse.data.clips import (
    Clip,
    ClipDataset,
    ClipLoader,
    SlidingWindowDataset,
    collate,
    generator_of,
    read_clip,
)
from avfuse.data.container import ClipError, Streams
from avfuse.data.decode import ClipReader
from avfuse.data.find import find_data
from avfuse.data.scenes import Moment, Scene, SceneDataset
from avfuse.data.shards import shard
from avfuse.inputs import InputSettings
from avfuse.tasks.classify import MultiWindowDataset, mix
from avfuse.tasks.separate import MixtureDataset
from avfuse.tasks.separator import Separator
from avfuse.training.pictures import rgb

CASES = Path(__file__).parent / "cases"
PLAIN = dict(image_mean=(0.0, 0.0, 0.0), image_std=(1 / 255, 1 / 255, 1 / 255))  # frames keep their greys
SETTINGS = InputSettings(image_size=32, audio_seconds=1.0, mel_bins=32, image_frames=5, **PLAIN)
B_FRAMES = "bframes=3:keyint=8:scenecut=0"
KINDS = {
    "B-frames.mp4": ("libx264", {"x264-params": B_FRAMES}),
    "B-frames.mkv": ("libx264", {"x264-params": B_FRAMES}),
    "B-frames.ts": ("libx264", {"x264-params": B_FRAMES}),
    "B-frames.flv": ("libx264", {"x264-params": B_FRAMES}),
    "open.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=8:scenecut=0"}),
    "long.mov": ("libx264", {"g": "250"}),
    "interlaced.mp4": ("libx264", {"x264-params": f"interlaced=1:{B_FRAMES}"}),
    "timeless.avi": ("libx264", {"x264-params": B_FRAMES}),
    "timeless_mpeg4.avi": ("mpeg4", {"g": "10", "bf": "2", "qmax": "2", "sc_threshold": "1000000000"}),
    "timeless_baseline.avi": ("libx264", {"bf": "0", "g": "10"}),
    "mpeg4.avi": ("mpeg4", {"g": "10", "qmax": "2"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=10:log-level=none"}),
    "av1.mp4": ("libsvtav1", {"preset": "12"}),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8", "g": "10"}),
    "hidden.webm": ("libvpx", {"cpu-used": "4", "lag-in-frames": "16", "auto-alt-ref": "1", "crf": "4"}),
}


@pytest.fixture
def seeks(monkeypatch) -> list[float]:
    """Where every reader has sought to."""
    seeks, seek = [], ClipReader._seek
    monkeypatch.setattr(ClipReader, "_seek", lambda *place: seeks.append(float(place[-1])) or seek(*place))
    return seeks


def evenly(count: int, seconds: float, start: float = 0.0) -> list[float]:
    return [start + (t + 0.5) * seconds / count for t in range(count)]


def read_frames(path: Path, times: list[float]) -> list[np.ndarray]:
    with ClipReader(path) as clip:
        return list(clip.frames(times))


def outcome(frames) -> list[np.ndarray | str]:
    """The frames of an iterator, and what went wrong."""
    given = []
    try:
        for frame in frames:
            given.append(frame)
    except ClipError as error:
        given.append(error.reason)
    return given


def assert_as_alone(path: Path, times: list[float]) -> None:
    """Frames and errors are those of `frame`, for one time after the other."""
    with ClipReader(path) as clip:
        alone = outcome(map(clip.frame, times))
    with ClipReader(path) as clip:
        several = outcome(clip.frames(times))
    for number, (one, other) in enumerate(zip(alone, several, strict=True)):
        assert np.array_equal(one, other), (path.name, times[number])


def times_around(seconds: float) -> list[list[float]]:
    """Evenly spaced, at random, near and far, the same twice, before the start and after the end."""
    random = np.random.default_rng(0)
    return [
        evenly(8, seconds),
        evenly(50, seconds),
        [0.13 * seconds, 0.75 * seconds],
        [0.0, 0.0, 0.01, 0.02, seconds / 2, seconds / 2],
        [-1.0, 0.0, seconds, seconds + 5.0, 1e6],
        *(sorted(random.uniform(-0.2, 1.2 * seconds, count).tolist()) for count in (2, 3, 5, 9)),
    ]


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", KINDS)
def test_frames_of_every_kind_of_file(tmp_path, seeks, name):
    codec, options = KINDS[name]
    path = write_video(tmp_path / name, 3, codecs=(codec, ""), audio=False, **options)
    for times in times_around(3.0):
        assert_as_alone(path, times)
    seeks.clear()
    times = [*evenly(16, 2.95), 5.0, 6.0]
    shown = [min(int(10 * time), 29) for time in times]
    assert [number_of(frame) for frame in read_frames(path, times)] == shown
    if "timeless" in name:  # one for each key frame, and for frames shown before it that come after it
        assert len(seeks) < len(times)
    else:
        assert len(seeks) <= (3 if name.endswith(".ts") else 1)  # in a stream some end too late


def test_a_format_whose_start_is_hard_to_find(tmp_path):
    """In ASF a seek to before the start ends after it, once there are more packets than fit into one."""
    noise = np.random.default_rng(0).integers(-14, 15, (60, 96, 128, 1))
    video = (numbered_frames(60, (128, 96)) + noise).astype(np.uint8)
    path = tmp_path / "a.asf"
    write_video(path, video=video, audio=False, **{"x264-params": "open-gop=1:keyint=8:scenecut=0"})
    for times in times_around(6.0):
        assert_as_alone(path, times)
    assert [number_of(frame) for frame in read_frames(path, [0.405, 2.205])] == [4, 22]


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", "0"), ("libx264", "3"), ("mpeg4", "2")])
def test_pictures_of_asf_belong_to_its_sound(tmp_path, codec, b_frames):
    """It says when they are decoded, and any seek but one to 0 may end after the first of them."""
    noise = np.random.default_rng(0).integers(-14, 15, (60, 96, 128, 1))
    video = (numbered_frames(60, (128, 96)) + noise).astype(np.uint8)
    options = {"g": "24", "bf": b_frames, "qmax": "4"}
    path = write_video(tmp_path / "a.asf", 6, codecs=(codec, "aac"), video=video, **options)
    with ClipReader(path) as clip:
        sound = clip.audio(1, 3, 16_000)
        later = lag(sound, chirp(1 + np.arange(48_000) / 16_000), most=4_000) / 16_000
        times = {number: later + 0.1 * number + 0.05 for number in (0, 1, 5, 23, 24, 31, 47, 48, 58, 59)}
        for shown in clip.frames([*times.values()]), map(clip.frame, times.values()):
            assert [number_of(frame) for frame in shown] == [number % GREYS for number in times]


@pytest.mark.parametrize("path", sorted(CASES.glob("*.*")), ids=lambda path: path.name)
def test_frames_of_cases(path):
    try:
        with ClipReader(path) as clip:
            seconds = clip.streams.seconds
    except ClipError as error:
        assert "is cut off" in error.reason
        return
    for times in times_around(seconds):
        assert_as_alone(path, times)


def test_frames_whose_rate_varies(tmp_path):
    times = np.cumsum(np.random.default_rng(1).choice([0.01, 0.04, 0.3, 1.1], 30))
    path = write_video(tmp_path / "a.mp4", times=times.tolist(), video=numbered_frames(30), g="7", bf="2")
    wanted = evenly(24, times[-1] + 0.5)
    shown = np.searchsorted(np.round(times, 3), wanted, side="right") - 1
    assert [number_of(frame) for frame in read_frames(path, wanted)] == shown.clip(0).tolist()
    assert_as_alone(path, wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_frames_of_clips_with_few(tmp_path, count):
    path = write_video(tmp_path / "a.mp4", 3, video=numbered_frames(count))
    times = [0.0, 0.05, 0.1, 0.15, 2.0]
    assert [number_of(frame) for frame in read_frames(path, times)] == [0, 0, *3 * [count - 1]]


@pytest.mark.parametrize(("cut", "b_frames"), [(0.8, "2"), (0.75, "0")])
def test_frames_that_an_edit_list_hides(tmp_path, cut, b_frames):
    whole = write_video(tmp_path / "whole.mp4", 3, audio=False, g="30", bf=b_frames, sc_threshold="0")
    path, options = tmp_path / "cut.mp4", {"avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options) as output:
        copy_packets(source, output, -cut)
    shown = read_frames(path, [-1, 0, 0.07, 0.17, 1.07, 9])
    assert [number_of(frame) for frame in shown] == [8, 8, 8, 9, 18, 29]


def copy_packets(source, output, *later: float) -> None:
    """The pictures of a file, once for each of these delays in seconds."""
    stream = output.add_stream_from_template(source.streams.video[0])
    for delay in later:
        source.seek(0)
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(delay / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                output.mux(packet)


def test_frames_are_turned_and_their_pixels_square(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2, audio=False, aspect="4/3")
    data = path.read_bytes()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    at = data.index(plain, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])
    frames = read_frames(path, [0.15, 0.85, 1.55])
    assert [(frame.shape, number_of(frame)) for frame in frames] == [((85, 48, 3), n) for n in (1, 8, 15)]


def joined(path: Path, *parts: np.ndarray, starts: tuple[float, ...]) -> Path:
    """Pictures, 10 a second, of which each part starts at its time, in one stream."""
    with av.open(str(path), "w") as output:
        for number, (frames, start) in enumerate(zip(parts, starts, strict=True)):
            one = write_video(path.with_name(f"{number}.ts"), audio=False, video=frames)
            with av.open(str(one)) as source:
                if not number:
                    stream = output.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts += round(start * 90_000)
                        packet.dts += round(start * 90_000)
                        packet.stream = stream
                        output.mux(packet)
    return path


def test_frames_that_change_in_size(tmp_path):
    """They are cropped as if they had the size of the first."""
    places = np.stack(np.broadcast_arrays(*np.ogrid[:48, :64], 0), -1) * np.array([5, 4, 0]) + 16
    small = np.uint8(places)[None].repeat(10, 0)
    path = joined(tmp_path / "a.ts", small, small.repeat(2, 1).repeat(2, 2), starts=(0.0, 1.0))
    times = evenly(10, 2.0)
    assert_as_alone(path, times)
    shapes = [frame.shape for frame in read_frames(path, times)]
    assert shapes == 5 * [(48, 64, 3)] + 5 * [(96, 128, 3)]
    settings = replace(SETTINGS, audio_seconds=2.0, image_frames=10)
    for train in (False, True):
        for epoch in range(5):
            image = ClipDataset([Clip(path)], settings, train=train)[epoch, 0]["image"]
            assert (image[4] - image[5]).abs().mean() < 3


@pytest.mark.parametrize("start", [0.0, 1.5, 2.5])
def test_a_stream_whose_times_start_again(tmp_path, start):
    """Other pictures have the same times: which are shown is for `frame` to say."""
    one = joined(tmp_path / "one.ts", numbered_frames(30), starts=(0.0,))
    two = joined(tmp_path / "two.ts", numbered_frames(30)[::-1], starts=(start,))
    path = tmp_path / "joined.ts"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    for times in times_around(3.0):
        assert_as_alone(path, times)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_frames_of_a_file_that_is_cut_off(tmp_path, share):
    """In a format that does not tell so when it is opened."""
    path = write_video(tmp_path / "a.ts", 3, audio=False, g="10")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    for times in times_around(3.0):
        assert_as_alone(path, times)


@pytest.fixture
def groups(tmp_path) -> tuple[Path, bytearray, list[av.Packet]]:
    """300 frames in groups of 20, its bytes, and where the packets lie."""
    path = write_video(tmp_path / "groups.mp4", 30, audio=False, g="20", bf="0", sc_threshold="0")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [number for number, packet in enumerate(packets) if packet.is_keyframe] == list(range(0, 300, 20))
    return path, bytearray(path.read_bytes()), packets


def test_groups_without_a_wanted_frame_are_passed_over(groups, seeks):
    """What lies outside is overwritten, so decoding any of it would fail or show in the frames."""
    path, data, packets = groups
    for packet in packets[:140] + packets[144:200] + packets[206:]:
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    times = [14.05, 14.35, 20.05, 20.55]
    assert [number_of(frame) for frame in read_frames(path, times)] == [
        140 % 32,
        143 % 32,
        200 % 32,
        205 % 32,
    ]
    assert len(seeks) == 1
    with ClipReader(path) as clip:
        given = outcome(clip.frames([14.05, 16.05, 20.05]))
        assert given[1:] == outcome(clip.frames([16.05]))  # what is wrong with the one
        assert number_of(given[0]) == 140 % 32 and "damaged" in given[1]


def test_a_moment_that_is_far_away_is_sought(groups, seeks):
    path, *_ = groups
    times = [0.05, 0.55, 14.05, 14.55, 29.95]
    assert [number_of(frame) for frame in read_frames(path, times)] == [n % 32 for n in (0, 5, 140, 145, 299)]
    assert [round(place) for place in seeks] == [0, 14, 30]


def test_every_picture_is_decoded_once(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 3, audio=False, g="250", bf="0")
    decoded, whole = [], ClipReader._whole
    monkeypatch.setattr(ClipReader, "_whole", lambda *a: (decoded.append(f.pts) or f for f in whole(*a)))
    frames = read_frames(path, evenly(16, 3.0))
    assert len(frames) == 16 and len(decoded) == len(set(decoded)) <= 30


def test_moments_far_apart_cost_no_more_than_alone(tmp_path, monkeypatch):
    """Where pictures are counted from a key frame on to know their times, too."""
    options = {"g": "5", "bf": "1", "sc_threshold": "1000000000"}
    path = write_video(tmp_path / "a.avi", 3, audio=False, codecs=("mpeg4", ""), **options)
    decoded, whole = [], ClipReader._whole
    monkeypatch.setattr(ClipReader, "_whole", lambda *a: (decoded.append(f.pts) or f for f in whole(*a)))
    assert [number_of(frame) for frame in read_frames(path, [0.05, 2.55])] == [0, 25]
    assert len(decoded) < 20


def test_large_frames_do_not_lie_in_memory_together(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 2)
    alive, most, upright = set(), [], ClipReader._upright

    def counted(reader, frame):
        pixels = upright(reader, frame)
        weakref.finalize(pixels, alive.discard, id(pixels))
        alive.add(id(pixels))
        most.append(len(alive))
        return pixels

    monkeypatch.setattr(ClipReader, "_upright", counted)
    settings = replace(SETTINGS, image_frames=16, audio_seconds=2.0)
    for train in (False, True):
        assert ClipDataset([Clip(path)], settings, train=train)[0]["image"].shape == (16, 3, 32, 32)
    assert len(most) == 32 and max(most) <= 2


def test_times_that_are_none(tmp_path):
    path = write_video(tmp_path / "a.mp4", 1)
    for times, message in (([0.0, float("nan")], "times .* got nan"), ([0.2, 0.1], "times must rise")):
        with pytest.raises(ValueError, match=message):
            read_frames(path, times)
    assert read_frames(path, []) == []
    with pytest.raises(ClipError, match="has no pictures"):
        read_frames(write_video(tmp_path / "dark.mp4", 1, video=False), [0.0, 0.5])


def test_a_stream_without_key_frames_and_times_of_decoding(tmp_path):
    """The first frame there is, where a seek ends between them."""
    path = write_video(
        tmp_path / "a.mkv", 3, audio=False, **{"x264-params": "intra-refresh=1:keyint=10:bframes=3"}
    )
    for times in times_around(3.0):
        assert_as_alone(path, times)


# ------------------------------------------------------------------------------------------------------ items


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures for 2 s, sound for 3 s, in formats that tell so and not; shorter ones; some lack a stream."""
    folder = tmp_path_factory.mktemp("videos")
    tone = 0.3 * np.sin(0.1 * np.arange(48_000, dtype=np.float32))[None]
    for suffix in ("mp4", "mkv", "ts", "flv", "avi"):
        codecs = ("libx264", "libmp3lame" if suffix == "avi" else "aac")
        rate = 44_100 if suffix == "flv" else 16_000
        sound = tone if rate == 16_000 else np.tile(tone, 3)[:, : 3 * rate]
        write_video(folder / f"ends.{suffix}", 2, audio=sound, sample_rate=rate, codecs=codecs)
    write_video(folder / "whole.mp4", 3)
    write_video(folder / "short.mp4", 0.5)
    write_video(folder / "dark.mp4", 2, video=False)
    write_video(folder / "silent.mp4", 2, audio=False)
    return folder


def numbers(image: torch.Tensor) -> list[int]:
    return [number_of(frame.numpy()) for frame in image]


@pytest.mark.parametrize("train", [False, True])
def test_frames_have_their_times(folder, train):
    """In training too, wherever the window lies."""
    dataset = ClipDataset([Clip(folder / "whole.mp4")], SETTINGS, train=train, seed=3)
    for epoch in range(20 if train else 1):
        item = dataset[epoch, 0]
        assert item["image"].shape == (5, 3, 32, 32) and item["image"].dtype == torch.float32
        assert item["frames_shown"] == 5 and item["frames_shown"].dtype == torch.long
        place = float(torch.rand(2, generator=generator_of(3, epoch, 1))[0]) if train else 0.5
        times = [2 * place + time for time in (0.1, 0.3, 0.5, 0.7, 0.9)]
        assert numbers(item["image"]) == [int(10 * time) for time in times]


def test_one_frame_is_as_it_was(folder):
    """The same draws give the same window, crop, flip and gain as with several frames."""
    one = replace(SETTINGS, image_frames=1)
    still = write_video(folder / "still.mp4", 3, video=pattern()[None], audio=True)
    for train in (False, True):
        alone, several = (ClipDataset([Clip(still)], s, train=train) for s in (one, SETTINGS))
        for epoch in range(6):
            image = alone[epoch, 0].pop("image")
            item = several[epoch, 0]
            assert image.shape == (3, 32, 32) and "frames_shown" not in alone[epoch, 0]
            assert torch.equal(item["audio"], alone[epoch, 0]["audio"])
            for frame in item["image"]:
                assert torch.equal(frame, image)
    assert not torch.equal(several[0, 0]["image"], several[1, 0]["image"])


def pattern() -> np.ndarray:
    """A picture of which every crop differs."""
    return np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv", "avi"])
def test_pictures_that_end_before_the_sound(folder, suffix):
    settings = replace(SETTINGS, audio_seconds=3.0, image_frames=6)
    clip = Clip(folder / f"ends.{suffix}")
    for streams in (None, Streams(True, True, 3.0, 10.0)):  # not known, and known
        item = ClipDataset([replace(clip, streams=streams)], settings, train=False)[0]
        assert numbers(item["image"])[:3] == pytest.approx([2, 7, 12], abs=1)  # some coders start late
        assert numbers(item["image"])[-2:] == [19, 19]
        assert item["frames_shown"] == 4


def test_frames_of_short_clips_and_of_clips_that_lack_a_stream(folder):
    settings = replace(SETTINGS, image_frames=4)
    clips = [Clip(folder / f"{name}.mp4") for name in ("short", "dark", "silent")]
    for train in (False, True):
        dataset = ClipDataset(clips, settings, train=train)
        short, dark, silent = items = [dataset[n] for n in range(3)]
        assert numbers(short["image"]) == [1, 3, 4, 4] and short["frames_shown"] == 2
        assert not dark["image"].any() and not dark["image_present"] and dark["frames_shown"] == 0
        assert silent["frames_shown"] == 4 and not silent["audio_present"]
        batch = collate(items, dataset.blank)
        assert batch["image"].shape == (3, 4, 3, 32, 32) and batch["frames_shown"].tolist() == [2, 0, 4]
        blank = collate([], dataset.blank)
        assert blank["image"].shape == (1, 4, 3, 32, 32) and blank["frames_shown"].tolist() == [0]
        assert blank.keys() == batch.keys()


def test_workers_shards_and_a_manifest_give_the_same(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("whole.mp4", "short.mp4"):
        (data / name).write_bytes((folder / name).read_bytes())
    tone = 0.3 * np.sin(0.1 * np.arange(64_000, dtype=np.float32))[None]
    write_video(data / "ends.mkv", 2, audio=tone)
    quiet = dict(progress=False, workers=0)
    report = check(data, **quiet)
    assert "1 have pictures and sound of unequal length" in report and "ends.mkv (pictures end at 2" in report
    shard(data, tmp_path / "shards", **quiet)
    items = []
    for root in (data, tmp_path / "shards"):
        clips = find_data(root, lambda line: None, missing="keep", **quiet).train
        dataset = ClipDataset(sorted(clips, key=lambda clip: clip.size), SETTINGS, train=False)
        items.append([dataset[n] for n in range(3)])
        with ClipLoader(dataset, workers=1) as loader:
            (batch,) = loader.batches([[(0, n) for n in range(3)]])
        assert not batch.pop("failures")
        for name, values in batch.items():
            assert torch.equal(values, torch.stack([item[name] for item in items[-1]])), name
    for one, other in zip(*items, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one.keys() - {"index"})


def test_windows_and_single_files(folder):
    clip = Clip(folder / "ends.mp4", streams=Streams(True, True, 3.0, 10.0))
    item = MultiWindowDataset([clip], SETTINGS, windows=3)[0]
    assert item["image"].shape == (3, 5, 3, 32, 32) and item["audio"].shape == (3, 1, 32, 64)
    assert item["frames_shown"].tolist() == [5, 5, 0]
    assert numbers(item["image"][1]) == [11, 13, 15, 17, 19] and numbers(item["image"][2]) == 5 * [19]
    windows = SlidingWindowDataset([clip], SETTINGS, every=1.0)
    assert [windows[n]["frames_shown"].item() for n in range(3)] == [5, 5, 0]
    assert torch.equal(windows[1]["image"], item["image"][1])
    image, audio = read_clip(clip.path, SETTINGS, start=1.0)
    assert torch.equal(image[0], item["image"][1]) and audio.shape == (1, 1, 32, 64)
    shown = rgb(item["image"][1], SETTINGS)
    assert shown.shape == (32, 5 * 32, 3)  # a strip
    assert [number_of(255 * frame.numpy()) for frame in shown.chunk(5, 1)] == [11, 13, 15, 17, 19]


def test_clips_of_several_frames_are_mixed():
    image, audio = torch.randn(4, 4, 3, 8, 8), torch.randn(4, 1, 8, 8)
    mixed, target = mix(dict(image=image, audio=audio), torch.arange(4), 4, alpha=1.0, smoothing=0.0)
    weight = target[torch.arange(4), torch.arange(4)]
    expected = torch.stack(
        [w * one + (1 - w) * other for w, one, other in zip(weight, image, image.flip(0), strict=True)]
    )
    torch.testing.assert_close(mixed["image"], expected)


def test_what_takes_one_frame_refuses_several(folder):
    clip = Clip(folder / "whole.mp4")
    scene = Scene(path=clip.path, sound=clip.path, moments=(Moment(truth=None),))
    inputs = InputSettings(image_size=24, mel_bins=16, hop=256, audio_seconds=0.64, image_frames=2)
    encoder = AVEncoder(make_vit(), make_vit((1, 16, 40)), fusion_tokens=2, inputs=inputs)
    for refused in (
        lambda: SceneDataset([scene], SETTINGS, train=True),
        lambda: MixtureDataset([clip, clip], SETTINGS, train=True),
        lambda: Separator(encoder, decoder_dim=8),
    ):
        with pytest.raises(ValueError, match="image_frames must be 1 for .*, got"):
            refused()
