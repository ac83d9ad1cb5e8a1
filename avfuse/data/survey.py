"""What decoding a whole file finds: sizes, loudness, motion, ends, and times that go back."""

import math
from fractions import Fraction

import av
import numpy as np

from .sound import channels_of, mix_of

THUMBNAIL, LOOKED_AT = (32, 32), 4  # pixels of pictures, one in four, to see whether anything moves
BACKWARD = 0.5  # seconds by which times may go back without a word


class Track:
    """What a survey finds in one stream; None is one that the file lacks."""

    def __init__(self, stream: av.stream.Stream | None, every_picture: bool):
        self.stream, self.every_picture = stream, every_picture
        self.packets, self.keys, self.frames = 0, [], 0
        self.end, self.latest, self.goes_back = -math.inf, -math.inf, False  # seconds
        self.rates: set[int] = set()  # Hz
        self.first, self.motion, self.peak, self.loudest = None, 0.0, 0.0, 0.0

    def add(self, packet: av.Packet) -> None:
        if packet.size:
            self.keys += [self.packets] if packet.is_keyframe else []
            self.packets += 1
            self.end = max(self.end, end_of(packet))
        if packet.dts is not None:
            time = packet.dts * packet.time_base
            self.goes_back |= time < self.latest - BACKWARD
            self.latest = max(self.latest, time)
        for frame in packet.decode():
            if frame.is_corrupt:
                raise ValueError("the data are damaged: fetch it again")
            self._hear(frame) if isinstance(frame, av.AudioFrame) else self._see(frame)

    def _see(self, frame: av.VideoFrame) -> None:
        self.frames += 1
        if self.frames % LOOKED_AT == 1 or not self.every_picture:
            grey = frame.reformat(*THUMBNAIL, format="gray").to_ndarray().astype(np.float32)
            self.first = grey if self.first is None else self.first
            self.motion = max(self.motion, float(np.abs(grey - self.first).mean()))

    def _hear(self, frame: av.AudioFrame) -> None:
        channels, mix = channels_of(frame), mix_of(frame.layout)
        self.peak = np.maximum(self.peak, np.abs(mix @ channels).max(initial=0.0))  # NaN stays
        self.loudest = max(self.loudest, float(np.abs(channels[mix > 0]).max(initial=0.0)))
        self.rates.add(frame.sample_rate)


def summary(video: Track, audio: Track, origin: Fraction) -> dict:
    """What both tracks found, in seconds from `origin` on, by the names of `manifest.Entry`; 0 is what a file
    has not.
    """
    pictures, sound = video.stream, audio.stream
    gaps = np.diff([*video.keys, video.packets])
    return dict(
        width=pictures.width if pictures is not None else 0,
        height=pictures.height if pictures is not None else 0,
        sample_rate=sound.sample_rate if sound is not None else 0,
        key_frame_every=int(gaps.max(initial=0)),
        peak=round(float(audio.peak), 4),
        loudest=round(audio.loudest, 4),
        motion=round(video.motion, 2) if video.every_picture or video.frames != 1 else None,
        picture_end=round(max(0.0, float(video.end - origin)), 3),
        sound_end=round(max(0.0, float(audio.end - origin)), 3),
        goes_back=video.goes_back or audio.goes_back,
    )


def end_of(packet: av.Packet) -> Fraction | float:
    """When a packet ends, in seconds; -inf if it has no time."""
    time = packet.dts if packet.pts is None else packet.pts
    return -math.inf if time is None else (time + (packet.duration or 0)) * packet.time_base
