"""Sound: its channels, their mix to mono, pieces put in their places, another sample rate, and encoding."""

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from itertools import chain

import av
import numpy as np

JITTER = 0.04  # seconds: time stamps are rounded, so a piece that starts this near to the last continues it
GUESSED = {3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # layouts of so many channels


def channels_of(frame: av.AudioFrame) -> np.ndarray:
    """(channels, samples) float32 in about -1..1."""
    if frame.format.is_planar and frame.layout.nb_channels >= 8:  # PyAV would look for one more
        resampler = av.AudioResampler(format=frame.format.packed)
        (frame,) = (*resampler.resample(frame), *resampler.resample(None))
    samples = frame.to_ndarray()  # (channels, samples), or (1, samples * channels) if packed
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    scale, is_unsigned = 2.0 ** (8 * samples.itemsize - 1), samples.dtype.kind == "u"
    return samples.astype(np.float32) / np.float32(scale) - np.float32(is_unsigned)  # of which 128 is silence


def mix_of(layout: av.AudioLayout) -> np.ndarray:
    """(channels,) how much of each channel is in mono."""
    return _weights(layout.name, layout.nb_channels)


@cache
def _weights(layout: str, count: int) -> np.ndarray:
    mean = np.full(count, 1 / count, np.float32)
    if count <= 2:
        return mean
    if layout.startswith("ambisonic"):  # the first channel is what comes from all sides, the rest from where
        return np.eye(count, dtype=np.float32)[0]
    if layout.endswith("channels"):  # without places: FFmpeg guesses these
        layout = GUESSED.get(count, layout)
    try:  # one sample in each channel after the other: what FFmpeg makes of them
        unit = np.eye(count, dtype=np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(unit, format="flt", layout=layout)
        frame.sample_rate = 48_000
        (mono,) = av.AudioResampler(format="flt", layout="mono").resample(frame)
        return mono.to_ndarray()[0].copy()
    except (av.FFmpegError, ValueError):  # channels without places
        return mean


def join(pieces: list[tuple[float, int, np.ndarray]], rate: int, begin: int, end: int) -> np.ndarray:
    """Samples `begin` to `end`, each piece in its place, zeros between; shorter where the last ends early."""
    sound, last = np.zeros(end - begin, np.float32), -math.inf
    for time, _, samples in pieces:
        at = round(time * rate)
        at = last if abs(at - last) < JITTER * rate else at
        last = at + len(samples)
        kept = samples[max(0, begin - at) : max(0, end - at)]
        place = max(at - begin, 0)
        sound[place : place + len(kept)] = kept
    return sound[: max(0, last - begin)]


def resample(sound: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """(samples,) at `rate` to (samples,) at `sample_rate`, the first samples coinciding."""
    if rate == sample_rate or not len(sound):
        return sound
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate)
    frames = (*resampler.resample(frame_of(sound, rate)), *resampler.resample(None))  # None gets what is left
    return np.concatenate([np.empty(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])


def frame_of(sound: np.ndarray, sample_rate: int) -> av.AudioFrame:
    """Mono sound (samples,), float32 or int16, as the first frame of a stream."""
    kind = "s16" if sound.dtype == np.int16 else "fltp"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound)[None], format=kind, layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), 0
    return frame


def encode(container: av.container.OutputContainer, stream: av.stream.Stream, frames: Iterable) -> None:
    """Writes all frames of a stream."""
    for frame in chain(frames, (None,)):  # None drains the encoder
        container.mux(stream.encode(frame))
