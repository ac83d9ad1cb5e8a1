"""Tiny videos for tests of the reader, written with PyAV; their frames and sound say where they are from."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

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
    with av.open(str(path), "w", options=container or {}) as output:
        if title:
            output.metadata["title"] = title
        if video is not False:
            pictures = output.add_stream(codecs[0], rate=fps, options=options)
            pictures.width, pictures.height, pictures.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
            if times is not None:
                pictures.codec_context.time_base = Fraction(1, 1000)
        if audio is not False:
            layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[len(audio[0][1])]
            sound = output.add_stream(codecs[1], rate=sample_rate, layout=layout)
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
