"""Tiny videos for tests of the reader, written with PyAV; their frames and sound say where they are from."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS = 32  # grey levels that tell frames apart after compression, 7 apart


def write_video(
    path: Path,
    seconds: float = 2.0,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    sample_rate: int = 16_000,
    *,
    video: np.ndarray | bool = True,
    audio: np.ndarray | bool = True,
    codecs: tuple[str, str] = ("libx264", "aac"),
    times: list[int] | None = None,
    delay: float = 0.0,
    rotation: int = 0,
    **options: str,
) -> Path:
    """Write pictures and sound to a file, and return its path.

    Args:
        size: width, height.
        video: True is frames whose grey tells their number, False is none; or (T, height, width, 3) uint8.
        audio: True is a chirp, False is none; or samples (channels, samples) float32.
        codecs: of pictures and sound.
        times: when the frames are shown, in units of 1/fps; default 0, 1, 2...
        delay: seconds until the pictures start.
        rotation: degrees that a player turns the pictures counter-clockwise.
        options: of the picture codec.
    """
    if video is True:
        video = numbered_frames(round(seconds * fps), size)
    if audio is True:
        audio = chirp(np.arange(round(seconds * sample_rate)) / sample_rate)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        pictures = sound = None
        if video is not False:
            pictures = container.add_stream(codecs[0], rate=fps, options=options)
            pictures.width, pictures.height, pictures.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
            if rotation:
                pictures.set_display_rotation(rotation)
        if audio is not False:
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(audio)]
            sound = container.add_stream(codecs[1], rate=sample_rate, layout=layout)
        if pictures is not None:
            for number, picture in enumerate(video):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.time_base = Fraction(1, 1000 * fps)
                frame.pts = round(1000 * ((number if times is None else times[number]) + delay * fps))
                container.mux(pictures.encode(frame))
            container.mux(pictures.encode(None))
        if sound is not None:
            for begin in range(0, audio.shape[1], 1024):
                kind = sound.codec_context.format.name
                samples = np.ascontiguousarray(audio[:, begin : begin + 1024], np.float32)
                if kind.startswith("s16"):
                    samples = (32767 * samples).round().astype(np.int16)
                if not kind.endswith("p"):
                    samples = samples.T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(samples, format=kind, layout=layout)
                frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), begin
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def numbered_frames(count: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """(count, height, width, 3) uint8: the grey of a frame tells its number, which `number_of` reads."""
    grey = 16 + 7 * (np.arange(count) % LEVELS)
    return np.broadcast_to(grey[:, None, None, None].astype(np.uint8), (count, size[1], size[0], 3)).copy()


def number_of(frame: np.ndarray) -> int:
    """The number, modulo LEVELS, of a frame of `numbered_frames`."""
    number = (float(frame.mean()) - 16) / 7
    assert abs(number - round(number)) < 0.3, f"between two frames: {number}"
    return round(number)


def chirp(times: np.ndarray) -> np.ndarray:
    """A tone that rises from 200 Hz by 500 Hz a second, so that every moment of it sounds different."""
    return (0.5 * np.sin(2 * np.pi * (200 * times + 250 * times**2))).astype(np.float32)


def lag(sound: np.ndarray, truth: np.ndarray, most: int = 40) -> int:
    """By how many samples `sound` comes later than `truth`: where they agree best."""
    middle = truth[most : len(truth) - most]
    return max(range(-most, most + 1), key=lambda n: float(sound[most + n : len(sound) - most + n] @ middle))
