"""Tiny videos for tests of the reader, written with PyAV; their frames and sound say where they are from."""

import contextlib
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from avfuse.data.container import Streams
from avfuse.data.decode import ClipReader

GREYS = 32  # levels that tell frames apart after compression, 7 apart


def write_video(
    path: Path,
    seconds: float = 2.0,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    sample_rate: int = 16_000,
    *,
    video: np.ndarray | bool = True,
    audio: np.ndarray | list[tuple[float, np.ndarray]] | bool = True,
    codecs: tuple[str, str] = ("libx264", "aac"),
    times: list[float] | None = None,
    aspect: str = "",
    layout: str = "",
    title: str = "",
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write pictures and sound to a file, and return its path.

    Args:
        size: width, height.
        video: (T, height, width, 3) uint8; True is `numbered_frames`, False none.
        audio: (channels, samples) float32, or such pieces and when they start; True is a `chirp`, False none.
        codecs: of pictures and sound.
        times: when the frames are shown, in seconds; None is one frame every 1 / fps.
        layout: of the channels; by default the usual one of so many.
        aspect: width of a pixel over its height, such as "4/3".
        title: kept in the file if given.
        container: options of the container.
        options: of the picture codec.
    """
    if video is True:
        video = numbered_frames(round(seconds * fps), size)
    if audio is True:
        audio = chirp(np.arange(round(seconds * sample_rate)) / sample_rate)[None]
    if isinstance(audio, np.ndarray):
        audio = [(0.0, audio)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ordinary_priority(), av.open(str(path), "w", options=container or {}) as output:
        if title:
            output.metadata["title"] = title
        if video is not False:
            pictures = output.add_stream(codecs[0], rate=fps, options=options)
            pictures.width, pictures.height, pictures.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
            if aspect:
                pictures.codec_context.sample_aspect_ratio = Fraction(aspect)
            if times is not None:
                pictures.codec_context.time_base = Fraction(1, 1000)
        if audio is not False:
            usual = {1: "mono", 2: "stereo", 4: "quad", 6: "5.1", 8: "7.1"}
            layout = layout or usual[len(audio[0][1])]
            sound = output.add_stream(codecs[1], rate=sample_rate, layout=layout, bit_rate=256_000)
        if video is not False:
            for number, picture in enumerate(video):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.time_base = Fraction(1, 1000)
                frame.pts = round(1000 * (number / fps if times is None else times[number]))
                output.mux(pictures.encode(frame))
            output.mux(pictures.encode(None))
        if audio is not False:
            for start, samples in audio:
                for begin in range(0, samples.shape[1], 1024):
                    piece = np.float32(samples[:, begin : begin + 1024]).T.reshape(1, -1).copy()
                    frame = av.AudioFrame.from_ndarray(piece, format="flt", layout=layout)
                    frame.sample_rate, frame.time_base = sample_rate, Fraction(1, sample_rate)
                    frame.pts = round(start * sample_rate) + begin
                    output.mux(sound.encode(frame))
            output.mux(sound.encode(None))
    return path


@contextlib.contextmanager
def ordinary_priority():
    """Started by root, SVT-AV1 makes the thread that calls it a real-time one, which starves all others."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def numbered_frames(count: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """(count, height, width, 3) uint8: the grey of a frame tells its number, which `number_of` reads."""
    grey = 16 + 7 * (np.arange(count) % GREYS)
    return np.broadcast_to(grey[:, None, None, None].astype(np.uint8), (count, size[1], size[0], 3)).copy()


def number_of(frame: np.ndarray) -> int:
    """The number, modulo GREYS, of a frame of `numbered_frames`."""
    number = (float(frame.mean()) - 16) / 7
    assert abs(number - round(number)) < 0.3, f"between two frames: {number}"
    return round(number)


def chirp(times: np.ndarray) -> np.ndarray:
    """A tone that rises from 200 Hz by 500 Hz a second, so that every moment of it sounds different."""
    return (0.5 * np.sin(2 * np.pi * (200 * times + 250 * times**2))).astype(np.float32)


def lag(sound: np.ndarray, truth: np.ndarray, most: int = 1200) -> int:
    """By how many samples `sound` comes later than `truth`: where they agree best."""
    middle = truth[most : len(truth) - most]
    return int(np.correlate(sound, middle, "valid").argmax()) - most


def png() -> bytes:
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt, context.time_base = 64, 48, "rgb24", Fraction(1, 10)
    frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
    return bytes(context.encode(frame)[0])


def hostile_folder(folder: Path) -> None:
    """200 clips: 100 good ones, 40 that lack a stream, 60 that cannot be read, each named for what it is."""
    noise = np.random.default_rng(0)
    made = folder.with_name("made")
    good = [write_video(made / name, 2) for name in ("a.mp4", "b.mkv", "c.mov", "d.ts")]
    whole, matroska = good[0].read_bytes(), bytearray(good[1].read_bytes())
    quick = write_video(made / "quick.mp4", 2, container={"movflags": "faststart"}).read_bytes()
    media = quick.index(b"mdat") + 4
    duration = matroska.index(b"\x44\x89\x88") + 3  # float64 milliseconds
    matroska[duration : duration + 8] = struct.pack(">d", 1e9)
    sizes = whole.index(b"stsz") + 12  # how many samples there are, then the size of each

    kinds = {
        "good": [(path.suffix, path.read_bytes()) for path in good],
        "misnamed": [(".avi", whole), (".mp4", bytes(good[1].read_bytes()))],  # no harm done
        "dark": [(".mp4", write_video(made / "dark.mp4", 1, video=False).read_bytes())],
        "silent": [(".mp4", write_video(made / "silent.mp4", 1, audio=False).read_bytes())],
        "truncated": [(".mp4", whole[: len(whole) // 2]), (".mp4", quick[: (media + len(quick)) // 2])],
        "empty": [(".mp4", b"")],
        "garbage": [(".mp4", noise.bytes(20_000)), (".mp4", quick[:media] + noise.bytes(len(quick) - media))],
        "text": [(".mp4", b"no video\n" * 500), (".mkv", b"#EXTM3U\n#EXTINF:3,\na.mp4\n#EXT-X-ENDLIST\n")],
        "picture": [(".mp4", png())],
        "lying": [
            (".mkv", bytes(matroska)),
            (".mp4", whole[:sizes] + struct.pack(">2I", 2**31 - 1, 2**30) + whole[sizes + 8 :]),
        ],
        "nothing": [(".mp4", whole[: whole.index(b"mdat") - 4])],
    }
    counts = {"good": 80, "misnamed": 20, "dark": 20, "silent": 20, "truncated": 16, "lying": 8, "nothing": 2}
    folder.mkdir()
    for kind, contents in kinds.items():
        for number in range(counts.get(kind, 0) or (8 if kind != "garbage" else 10)):
            suffix, content = contents[number % len(contents)]
            (folder / f"{kind}{number}{suffix}").write_bytes(content)


def probe(path: str | Path) -> Streams:
    with ClipReader(path) as clip:
        return clip.streams


def read_frame(path: str | Path, seconds: float) -> np.ndarray:
    with ClipReader(path) as clip:
        return clip.frame(seconds)


def read_audio(path: str | Path, start: float, seconds: float, sample_rate: int) -> np.ndarray:
    with ClipReader(path) as clip:
        return clip.audio(start, seconds, sample_rate)
