"""Reading one video file: what it holds, the frame shown at a time, and the sound from a time on.

Times are seconds since the first stream of the file starts. A file is data of unknown origin: whatever is
wrong with it ends as a `ClipError` that says what.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition

OPTIONS = {  # FFmpeg also opens playlists, which name other files and hosts
    "format_whitelist": "mov,matroska,avi,flv,mpegts,asf,ogg,wav,flac",
    "protocol_whitelist": "file",
}
OF_A_PART = {"protocol_whitelist": "file,subfile"}  # the latter reads a range of bytes of the former
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192
MAX_RATE = 768_000  # Hz
WARM_UP = 0.3  # seconds of sound decoded before what is wanted, because codecs and filters look back
MARGIN = 0.05  # seconds of that which the resampling filter sees, on both sides
JITTER = 0.04  # seconds: time stamps are rounded, so a piece that starts this near to the last continues it
# Before PyAV 19, which does so by itself, bytes of metadata that are no text stop the opening of a file.
TEXT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
EPSILON = 1e-6  # seconds: a time that was meant to be that of a frame may have been rounded to just before it
THUMBNAIL, LOOKED_AT = (32, 32), 4  # pixels of pictures, one in four, to see whether anything moves
BACK = (0, 1, 4, 16, 64, 256, math.inf)  # seconds to seek further back, where a seek lands too late


class ClipError(Exception):
    """A file that cannot be read: `path` is the file and `reason` says why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)  # what unpickling calls it with
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


class Streams(NamedTuple):
    """What a file holds according to its header."""

    video: bool  # pictures; cover art is none
    audio: bool
    seconds: float  # when its sound ends, or its pictures where it has no sound
    fps: float  # mean frames per second, 0 where unknown


class Part(NamedTuple):
    """A range of bytes of a file that is a clip, such as a member of a tar archive."""

    file: Path
    start: int  # bytes
    size: int


class Survey(NamedTuple):
    """What decoding a whole file found; what it has not is 0."""

    width: int  # pixels
    height: int
    sample_rate: int  # Hz
    key_frame_every: int  # frames, where key frames are farthest apart
    peak: float  # of the mean of its channels: 1 is full scale
    motion: float | None  # mean grey levels by which a picture differs most from the first; None: not known


class ClipReader:
    """A video or sound file, open for reading in this thread alone; the `with` statement closes it.

    What is read is its first stream of pictures, cover art aside, and its first stream of sound.

    Args:
        path: the file.
        part: where its bytes lie, if not in a file of that name; `path` then only names it.

    Raises:
        ClipError: it cannot be opened.
    """

    def __init__(self, path: str | Path, part: Part | None = None):
        self.path, self.part = Path(path), part
        with self._explaining("cannot be opened"):
            self._container = _open(self.path, part)
        try:
            self._origin = Fraction(self._container.start_time or 0, av.time_base)  # seconds
            videos, audios = self._container.streams.video, self._container.streams.audio
            self._video = self._prepare(s for s in videos if not s.disposition & Disposition.attached_pic)
            self._audio = self._prepare(audios)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @cached_property
    def streams(self) -> Streams:
        """What the file holds, from its header, or from its packets where the header does not tell.

        Raises:
            ClipError: neither pictures nor sound, or damage.
        """
        with self._explaining("cannot be read"):
            video, audio = self._end(self._video), self._end(self._audio)
        if video is None and audio is None:
            raise ClipError(self.path, "holds neither pictures nor sound")
        fps = 0.0 if video is None else float(self._video.average_rate or 0)
        return Streams(video is not None, audio is not None, float(video if audio is None else audio), fps)

    def frame(self, seconds: float) -> np.ndarray:
        """The frame shown at a time, turned upright: (height, width, 3) uint8 RGB.

        Decoding begins at the key frame before it. Before the first frame that one is shown, after the last
        frame the last one.

        Raises:
            ClipError: the file has no pictures, or they cannot be decoded there.
            ValueError: `seconds` is not a finite number.
        """
        _check_finite("seconds", seconds)
        if self._video is None:
            raise ClipError(self.path, "has no pictures")
        with self._explaining("its pictures cannot be decoded"):
            for at_start in self._seek_back(self._video, seconds):
                frame = self._decode_frame(seconds, at_start)
                if frame is not None:
                    pixels = frame.to_ndarray(format="rgb24", threads=1)
                    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        raise ClipError(self.path, f"shows nothing at {seconds:g} s")

    def audio(self, start: float, seconds: float, sample_rate: int) -> np.ndarray:
        """The mean of its channels from `start` on: (round(seconds * sample_rate),) float32 in about -1..1.

        The first sample is the one at `start`, to the nearest sample, or as near as the file's time stamps go
        (1 ms in Matroska). Where the file has no sound yet, or a gap, there are zeros. Where its sound ends
        early, the samples until then are extended by mirrored copies.

        Raises:
            ClipError: the file has no sound, or none from `start` on, or it cannot be decoded there.
            ValueError: `start` is not a finite number, or `seconds` or `sample_rate` not a positive one.
        """
        _check_finite("start", start)
        _check_finite("seconds", seconds, above=0)
        _check_finite("sample_rate", sample_rate, above=0)
        if self._audio is None:
            raise ClipError(self.path, "has no sound")
        first, wanted = round(start * sample_rate), round(seconds * sample_rate)
        with self._explaining("its sound cannot be decoded"):
            sound = self._decode_audio(first, wanted, sample_rate)
        if not len(sound):
            raise ClipError(self.path, f"has no sound from {start:g} s on")
        if not np.isfinite(sound).all():
            raise ClipError(self.path, "its sound is not finite")
        if len(sound) < wanted:
            sound = np.resize(np.concatenate((sound, sound[::-1])), wanted)  # repeats as often as needed
        return sound

    def survey(self, *, every_picture: bool = True) -> Survey:
        """Decode all sound and all pictures, or of these the key frames only, which takes a fraction of the
        time and misses damage in between. The reader is at its end afterwards: nothing else can be read.

        Raises:
            ClipError: something cannot be decoded.
        """
        streams = [stream for stream in (self._video, self._audio) if stream is not None]
        if self._video is not None and not every_picture:
            self._video.codec_context.skip_frame = "NONKEY"
        keys, packets, pictures, peak, motion, first = [], 0, 0, 0.0, 0.0, None
        with self._explaining("cannot be decoded to its end"):
            for packet in self._container.demux(streams):
                if packet.stream.type == "video" and packet.size:
                    keys += [packets] if packet.is_keyframe else []
                    packets += 1
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise ValueError("damaged")
                    if packet.stream.type == "audio":
                        peak = max(peak, float(np.abs(_mono(frame)).max(initial=0.0)))
                        continue
                    pictures += 1
                    if pictures % LOOKED_AT == 1 or not every_picture:
                        grey = frame.reformat(*THUMBNAIL, format="gray").to_ndarray().astype(np.float32)
                        first = grey if first is None else first
                        motion = max(motion, float(np.abs(grey - first).mean()))
        if not math.isfinite(peak):
            raise ClipError(self.path, "its sound is not finite")
        gaps = np.diff([*keys, packets])
        return Survey(
            width=self._video.width if self._video is not None else 0,
            height=self._video.height if self._video is not None else 0,
            sample_rate=self._audio.sample_rate if self._audio is not None else 0,
            key_frame_every=int(gaps.max(initial=0)),
            peak=round(peak, 4),
            motion=round(motion, 2) if every_picture or pictures != 1 else None,
        )

    # --- streams --------------------------------------------------------------------------------------------

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Turn whatever a file can make FFmpeg and its wrapper raise into a ClipError."""
        try:
            yield
        except (av.FFmpegError, OSError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ClipError(self.path, f"{what}: {reason}") from error

    def _prepare(self, streams: Iterable) -> av.stream.Stream | None:
        """The first of the streams, ready to be decoded; None if there is none."""
        stream = next(iter(streams), None)
        if stream is None:
            return None
        if stream.codec_context is None:
            raise ClipError(self.path, f"its {stream.type} has a codec that is not supported here")
        entries = stream.index_entries
        if len(entries) and entries[-1].pos + entries[-1].size > self._container.size:
            raise ClipError(self.path, "is cut off: its header tells of more than there is")
        stream.codec_context.thread_count = 1  # each core has a reader of its own
        if stream.type == "video":
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return stream

    def _end(self, stream) -> Fraction | None:
        """When a stream ends, in seconds; None if it has nothing in it."""
        if stream is None:
            return None
        end = self._declared_end(stream)
        if end is None and self._container.duration:
            end = Fraction(self._container.duration, av.time_base)
        if end is not None and stream.frames:
            return end
        with _open(self.path, self.part) as container:
            packets = (packet for packet in container.demux(container.streams[stream.index]) if packet.size)
            if end is not None:
                return end if next(packets, None) else None
            last = max(((_pts(packet) or 0) + (packet.duration or 0) for packet in packets), default=None)
        return None if last is None else max(last * stream.time_base - self._origin, Fraction(0))

    def _declared_end(self, stream) -> Fraction | None:
        if not stream.duration or stream.duration < 0:
            return None
        end = (stream.duration + (stream.start_time or 0)) * stream.time_base
        return max(end - self._origin, Fraction(0))

    def _seek_back(self, stream, seconds: float) -> Iterator[bool]:
        """Seek to a time or before it; asked again, further back. Yields whether this is the start."""
        for back in BACK:
            at_start = seconds - back <= 0
            # -1: codecs start with some sound before 0 that they build on
            self._seek(stream, -1 if at_start else seconds - back)
            yield at_start
            if at_start:
                return

    def _seek(self, stream, seconds: float) -> None:
        start, at = stream.start_time or 0, math.floor((seconds + self._origin) / stream.time_base)
        try:
            self._container.seek(at, stream=stream)
        except av.FFmpegError:  # some formats refuse times before the start
            try:
                self._container.seek(max(at, start), stream=stream)
            except av.FFmpegError as error:
                raise ClipError(self.path, f"has a damaged index: no way to {seconds:g} s") from error

    # --- decoding -------------------------------------------------------------------------------------------

    def _decode_frame(self, seconds: float, at_start: bool) -> av.VideoFrame | None:
        """The frame shown at a time, decoding from here; None if that has to begin further back.

        The packets tell which one is wanted, so that only those it may refer to are decoded before it.
        """
        target = math.floor((seconds + EPSILON + self._origin) / self._video.time_base)
        target = max(target, self._video.start_time or 0)
        packets = list(self._packets_until(target))
        times = [_pts(packet) for packet in packets if not packet.is_discard]
        before = [time for time in times if time <= target]
        if not before and not (at_start and times):
            return None
        wanted = max(before) if before else min(times)
        shown = None  # one frame is kept: all of a group would be gigabytes where pictures are large
        for frame in self._decoded(packets, wanted):
            if frame.is_corrupt:  # what the decoder made up is not what was recorded
                raise ClipError(self.path, f"its pictures are damaged before {seconds:g} s")
            if frame.pts is not None and frame.pts <= wanted and (shown is None or frame.pts > shown.pts):
                shown = frame
        return shown

    def _decoded(self, packets: list[av.Packet], wanted: int) -> Iterator[av.VideoFrame]:
        """The frames of the packets until the wanted one, without those that nothing refers to."""
        context = self._video.codec_context
        for packet in packets:
            is_wanted = _pts(packet) == wanted
            if context.name in ("h264", "hevc"):  # others look at this only once
                context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            yield from packet.decode()
            if is_wanted:
                break
        yield from context.decode(None)

    def _packets_until(self, target: int) -> Iterator[av.Packet]:
        """The video packets from here, in decoding order, that may be shown until `target`."""
        for packet in self._container.demux(self._video):
            if packet.dts is not None and packet.dts > target:
                return
            if packet.size and _pts(packet) is not None:
                yield packet

    def _decode_audio(self, first: int, wanted: int, sample_rate: int) -> np.ndarray:
        """At most `wanted` samples of mono sound from sample `first` on, fewer where the sound ends."""
        start, end = first / sample_rate, (first + wanted) / sample_rate
        for at_start in self._seek_back(self._audio, start - WARM_UP):
            pieces = list(self._pieces(end + MARGIN))
            if pieces and (at_start or pieces[0][0] < start - MARGIN):
                break
        else:
            return np.empty(0, np.float32)
        rates = {rate for _, rate, _ in pieces}
        if len(rates) > 1 or not 0 < max(rates) <= MAX_RATE:
            raise ValueError(f"its sample rate is {' and then '.join(map(str, rates))}")
        rate = rates.pop()
        # The file's samples that the filter sees begin where one of them coincides with one that is wanted.
        common = math.gcd(rate, sample_rate)
        block, wanted_block = rate // common, sample_rate // common
        blocks = (first - math.ceil(MARGIN * sample_rate)) // wanted_block
        begin, skip = blocks * block, first - blocks * wanted_block
        sound = _join(pieces, rate, begin, math.ceil((end + MARGIN) * rate))
        declared = self._declared_end(self._audio)
        if declared is not None:  # the last packet is filled up with what is no sound
            sound = sound[: max(0, round(declared * rate) - begin)]
        return _resample(sound, rate, sample_rate)[skip : skip + wanted]

    def _pieces(self, end: float) -> Iterator[tuple[float, int, np.ndarray]]:
        """Decoded sound from here to `end`: time in seconds, sample rate and mono samples of each piece."""
        unit, origin = float(self._audio.time_base), float(self._origin)
        for packet in self._container.demux(self._audio):
            for frame in packet.decode():
                if frame.pts is None or not frame.samples:
                    continue
                time = frame.pts * unit - origin
                if time > end:
                    return
                yield time, frame.sample_rate, _mono(frame)


def _open(path: Path, part: Part | None) -> av.container.InputContainer:
    file, start = (part.file, part.start) if part else (path, 0)
    if not file.is_file():
        raise OSError("it is not a file" if file.exists() else "there is no such file")
    with open(file, "rb") as content:
        content.seek(start)
        head = content.read(min(8, part.size) if part else 8)
        if part and part.start + part.size > os.fstat(content.fileno()).st_size:
            raise OSError(f"it reaches beyond the end of {file.name}")
    if not head:
        raise OSError("it is empty")
    # The header of an mp4 says everything; for other formats FFmpeg decodes a little to find out.
    quick = {"probesize": "32"} if head[4:] == b"ftyp" else {}
    if part is None:
        return av.open(f"file:{file}", options=OPTIONS | quick, **TEXT)
    url = f"subfile,,start,{start},end,{start + part.size},,:file:{file}"
    return av.open(url, options=OPTIONS | OF_A_PART | quick, **TEXT)


def _pts(packet: av.Packet) -> int | None:
    """When it is shown, in its stream's time base; AVI tells only when it is decoded."""
    return packet.dts if packet.pts is None else packet.pts


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """Mean of the channels: (samples,) float32."""
    if frame.format.is_planar and frame.layout.nb_channels >= 8:  # PyAV would look for one more
        resampler = av.AudioResampler(format=frame.format.packed)
        (frame,) = (*resampler.resample(frame), *resampler.resample(None))
    samples = frame.to_ndarray()  # (channels, samples), or (1, samples * channels) if packed
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    mean = samples.mean(0, dtype=np.float32)
    if samples.dtype.kind == "f":
        return mean
    return mean / 2.0 ** (8 * samples.itemsize - 1) - (samples.dtype.kind == "u")  # unsigned: 128 is silence


def _join(pieces: list[tuple[float, int, np.ndarray]], rate: int, begin: int, end: int) -> np.ndarray:
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


def _resample(sound: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """(samples,) at `rate` to (samples,) at `sample_rate`, the first samples coinciding."""
    if rate == sample_rate or not len(sound):
        return sound
    frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate)
    frames = (*resampler.resample(frame), *resampler.resample(None))  # None gets what the filter still holds
    return np.concatenate([np.empty(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])


def _check_finite(name: str, value: float, *, above: float = -math.inf) -> None:
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"{name} must be a finite number above {above}, got {value}")
