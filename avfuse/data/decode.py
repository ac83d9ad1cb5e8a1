"""Reading one video file: what it holds, the frame shown at a time, and the sound from a time on.

Times are seconds since the first stream of the file starts. A file is data of unknown origin: whatever is
wrong with it ends as a `ClipError` that says what.
"""

import math
import os
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from fractions import Fraction
from functools import cached_property
from itertools import chain, groupby, islice, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition

from .headers import CUT_OFF, HEAD, adts_rate, cut_off, describe, has_damaged_page
from .sound import JITTER, channels_of, join, mix_of, resample
from .survey import BACKWARD, Track, end_of, summary

OPTIONS = {  # FFmpeg also opens playlists, which name other files and hosts
    "format_whitelist": "mov,matroska,avi,flv,mpegts,mpeg,asf,ogg,wav,flac,mp3,aac",
    "protocol_whitelist": "file",
}
OF_A_PART = {"protocol_whitelist": "file,subfile"}  # the latter reads a range of bytes of the former
GENERATION = 3  # of this reader: what an earlier one found in a file may be out of date
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192
MAX_RATE = 768_000  # Hz
# Seconds of sound decoded before what is wanted: codecs and filters look back, MP3 at low rates further.
WARM_UP, WARM_UP_MP3 = 0.3, 0.7
MARGIN = 0.05  # seconds of that which the resampling filter sees, on both sides
# Before PyAV 19, which does so by itself, bytes of metadata that are no text stop the opening of a file.
TEXT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
EPSILON = 1e-6  # seconds: a time that was meant to be that of a frame may have been rounded to just before it
RUN = 10.0  # seconds of pictures that one seek is for: beyond, seeking is cheaper than reading on
TRIES = 3  # such seeks, each further back, before every frame is read alone
LAST = 2.0  # seconds at the end in which the last packets of all streams are looked for
FAR_BACK = -3600.0  # seconds: where the start is looked for, as packets begin before what they show
HELD_BACK = 16  # pictures at most that are shown after one that follows them in the file
BACK = (0, 1, 4, 16, 64, 256, math.inf)  # seconds to seek further back, where a seek lands too late
# What decoders say of damage.
DAMAGED = (av.error.InvalidDataError, av.error.PermissionError, av.error.EOFError)
SQUARE = 0.01  # by which a pixel may be wider than high: what scaling to whole pixels leaves behind
TIMELESS = ("avi", "asf")  # formats that say when a picture is decoded, not when it is shown
GAPLESS = ("wav", "flac", "mp3", "aac")  # formats of one sound without gaps, times in which may be estimates
BROADCAST = ("mpegts", "mpeg")  # formats in which pixels may become wider or narrower
TIMED = ("mov", "matroska", "avi", "wav")  # formats that say exactly how long they are


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
    sha256: str = ""  # of these bytes, where they are to be fetched


class ClipReader(AbstractContextManager):
    """A video or sound file, open for reading in this thread alone; the `with` statement closes it.

    What is read is the stream of pictures, cover art aside, and the stream of sound that FFmpeg plays: the
    one marked as default, else the best.

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
            self._video = self._prepare("video")
            self._audio = self._prepare("audio", self._video)  # that of the same programme of a broadcast
            self._rate = self._audio and self._audio.codec_context.sample_rate  # that it begins with
            self._matrix = None  # how its pictures are to be turned
            if self._video is not None and self._video.codec_context.pix_fmt == "pal8":
                with self._explaining("its pictures cannot be decoded"):
                    next(self._container.demux(self._video)).decode()  # no other packet has the palette
                self._seek(self._video, FAR_BACK)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()

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

    @cached_property
    def picture_end(self) -> float:
        """When its last picture ends, in seconds; it is shown after that, too.

        Raises:
            ClipError: damage.
        """
        with self._explaining("cannot be read"):
            end = self._declared_end(self._video) if self._format in TIMED else None
            return float(self._last_ends.get(self._video.index, 0) if end is None else end)

    def frame(self, seconds: float) -> np.ndarray:
        """The frame shown at a time, turned upright, its pixels square: (height, width, 3) uint8 RGB.

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
                    return self._upright(frame)
        raise ClipError(self.path, f"shows nothing at {seconds:g} s")

    def frames(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """The frame shown at each of several rising times, each the one that `frame` gives.

        What lies near each other is read by one seek and decoded once; groups of pictures that nobody asks
        for are not decoded. Each frame is decoded when it is asked for: nothing else may be read meanwhile.

        Raises:
            ClipError: as `frame`.
            ValueError: `times` are no finite numbers, or do not rise.
        """
        for seconds in times:
            _check_finite("times", seconds)
        if any(later < earlier for earlier, later in pairwise(times)):
            raise ValueError(f"times must rise, got {list(times)}")
        while times:
            given, near = 0, [seconds for seconds in times if seconds <= times[0] + RUN]
            with suppress(ClipError):  # which is for `frame` to raise, if it meets the same
                for pixels in self._run(near):
                    yield pixels
                    given += 1
            if not given:
                yield self.frame(times[0])
            times = times[given or 1 :]

    def audio(self, start: float, seconds: float, sample_rate: int, *, extended: bool = True) -> np.ndarray:
        """Its sound from `start` on, mixed to mono: (round(seconds * sample_rate),) float32 in about -1..1.

        Of two channels it is the mean; more are mixed by their places, as FFmpeg does.
        The first sample is the one at `start`, to the nearest sample, or as near as the file's time stamps go
        (1 ms in Matroska); gaps of less than 40 ms are closed, as time stamps may be rounded. Where the file
        has no sound yet, or a longer gap, there are zeros. Where its sound ends early, the samples until then
        are `extended`, or all that there is.

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
        return extend(sound, wanted) if extended else sound

    def survey(self, *, every_picture: bool = True) -> dict:
        """Decode all sound and all pictures, or of these the key frames only, which takes a fraction of the
        time and misses damage in between. The reader is at its end afterwards: nothing else can be read.

        Raises:
            ClipError: something cannot be decoded.
        """
        streams = [stream for stream in (self._video, self._audio) if stream is not None]
        if self._video is not None and not every_picture:
            self._video.codec_context.skip_frame = "NONKEY"
        video, audio = Track(self._video, every_picture), Track(self._audio, every_picture)
        packets = self._checked(self._container.demux(streams))
        with self._explaining("cannot be decoded to its end"):
            for packet in packets:
                try:
                    (video if packet.stream is self._video else audio).add(packet)
                except (av.FFmpegError, ValueError) as error:
                    is_last = not any(p.size and p.stream is packet.stream for p in packets)
                    if is_last and self._format not in TIMED:
                        raise ClipError(self.path, CUT_OFF) from error
                    raise
            if self._format == "ogg" and self._has_damaged_page():
                raise ValueError("the data are damaged: fetch it again")
            for rate in audio.rates:
                self._check_rate(rate, {self._rate, 2 * self._rate})
        if not math.isfinite(audio.peak):
            raise ClipError(self.path, "its sound is not finite")
        return summary(video, audio, self._origin)

    def _has_damaged_page(self) -> bool:
        with open(self.part.file if self.part else self.path, "rb") as file:
            size = self.part.size if self.part else os.path.getsize(self.path)
            return has_damaged_page(file, self.part.start if self.part else 0, size)

    # --- streams --------------------------------------------------------------------------------------------

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Turn whatever a file can make FFmpeg and its wrapper raise into a ClipError."""
        try:
            yield
        except (av.FFmpegError, OSError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reason = "the data are damaged: fetch it again" if isinstance(error, DAMAGED) else reason
            raise ClipError(self.path, f"{what}: {reason}") from error

    def _prepare(self, kind: str, related: av.stream.Stream | None = None) -> av.stream.Stream | None:
        """The stream of a kind that is read, ready to be decoded; None if there is none."""
        streams = [s for s in self._container.streams if s.type == kind]
        streams = [s for s in streams if not s.disposition & Disposition.attached_pic]
        films = [s for s in streams if s.frames != 1] or streams  # a single picture may lie beside a film
        best = self._container.streams.best(kind, related=related)
        stream = best if best in films else next(iter(films), None)
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

    @cached_property
    def _format(self) -> str:
        return self._container.format.name.split(",")[0]

    def _end(self, stream) -> Fraction | None:
        """When a stream ends, in seconds; None if it has nothing in it."""
        if stream is None:
            return None
        end = self._declared_end(stream)
        is_told = end is not None and self._format in TIMED and stream.frames
        if is_told and (self._format != "avi" or stream is self._video):
            return end
        last = self._last_ends.get(stream.index)
        if is_told:  # in AVI B-frames that are held back may count as sound, and large packets of it twice
            return last and min(end, last)
        if self._format == "flac" and end is not None and end > (last or 0) + JITTER:
            raise ClipError(self.path, CUT_OFF)
        return last

    @cached_property
    def _last_ends(self) -> dict[int, Fraction]:
        """When each stream ends by its last packets, for formats of which FFmpeg estimates the length."""
        indices = {stream.index for stream in (self._video, self._audio) if stream is not None}
        for seconds in (None,) if self._is_adrift else (LAST, None):  # None: all packets, from the start
            ends = {}
            with _open(self.path, self.part) as container:
                if seconds is not None:
                    end = ((container.start_time or 0) + (container.duration or 0)) / av.time_base
                    with suppress(av.FFmpegError):  # some formats have no way to do so
                        container.seek(math.floor(max(0, end - seconds) * av.time_base))
                for packet in container.demux():
                    if packet.size and not packet.is_discard:
                        last = ends.get(packet.stream_index, Fraction(0))
                        ends[packet.stream_index] = max(last, end_of(packet) - self._origin)
            if ends.keys() >= indices:
                break
        return ends

    def _declared_end(self, stream) -> Fraction | None:
        """When a stream ends according to the header, in seconds; None if it does not tell. Of a stream that
        begins late in an mp4, what FFmpeg calls its duration may be its end.
        """
        is_late = self._format == "mov" and (stream.start_time or 0) > 0
        if is_late or not stream.duration or stream.duration < 0:
            return None
        end = (stream.duration + (stream.start_time or 0)) * stream.time_base
        return max(end - self._origin, Fraction(0))

    def _seek_back(self, stream, seconds: float) -> Iterator[bool]:
        """Seek to a time or before it; asked again, further back. Yields whether this is the start."""
        # In a program stream the first packets after a seek get times of others.
        for back in BACK if self._format != "mpeg" else BACK[2:]:
            at_start = seconds - back <= 0 or (stream is self._audio and self._is_adrift)
            self._seek(stream, FAR_BACK if at_start else seconds - back)
            yield at_start
            if at_start:
                return

    @cached_property
    def _is_adrift(self) -> bool:
        """Whether its sound has wrong times after a seek, so that it is read from its start.

        FFmpeg does not count the samples of FLAC in a page of Ogg, and takes what a WAV tells of bytes a
        second for exact: where it is compressed that is rounded, and in any it may be wrong.
        """
        if self._audio is None or self._format not in ("ogg", "wav"):
            return False
        context = self._audio.codec_context
        if self._format == "ogg":
            return context.name == "flac"
        if not context.name.startswith("pcm_"):
            return True
        bits = int(re.sub(r"\D", "", context.name) or 8)  # such as pcm_s16le; A-law and mu-law have 8
        return context.bit_rate != context.sample_rate * context.channels * bits

    def _seek(self, stream, seconds: float) -> None:
        if self._format == "matroska" and self._video is not None:  # its index is often of pictures alone
            if stream is self._audio and seconds == FAR_BACK:  # sound may begin before them
                self._seek(self._video, FAR_BACK)
                next(self._container.demux(self._audio), None)  # late reads leave FFmpeg without its start
            else:
                stream = self._video
        start, at = stream.start_time or 0, math.floor((seconds + self._origin) / stream.time_base)
        if self._format == "asf" and seconds == FAR_BACK:
            at = 0  # the one time that leads there whatever the file
        try:
            self._container.seek(at, stream=stream)
        except av.FFmpegError:  # some formats refuse times before the start
            try:
                self._container.seek(max(at, start), stream=stream)
            except av.FFmpegError as error:
                raise ClipError(self.path, f"has a damaged index: no way to {max(seconds, 0):g} s") from error

    # --- decoding -------------------------------------------------------------------------------------------

    def _decode_frame(self, seconds: float, at_start: bool) -> av.VideoFrame | None:
        """The frame shown at a time, decoding from here; None if that has to begin further back.

        The packets tell which one is wanted, so that only those it may refer to are decoded before it.
        """
        target, demuxed = self._tick(seconds), self._packets()
        packets = list(self._until(demuxed, target))
        if self._is_timeless or any(packet.pts is None for packet in packets):
            packets = chain(packets, demuxed)
            return next(self._decode_in_order(packets, [seconds], at_start), None)
        wanted = _shown_at(target, packets, at_start)
        if wanted is None:
            return None
        shown, (first, last) = None, _needed(packets, wanted)
        if not (at_start or packets[first].is_keyframe):
            return None  # of what refers to nothing MPEG-4 makes a grey picture, and says nothing
        # One frame is kept: all of a group would be gigabytes where pictures are large.
        for frame in self._whole(self._decoded(packets[first : last + 1], {wanted}), seconds):
            if frame.pts is not None and frame.pts <= wanted and (shown is None or frame.pts > shown.pts):
                shown = frame
        if shown is None and at_start:  # a stream that begins between key frames: the first frame there is
            self._seek(self._video, FAR_BACK)
            return next(self._decode_in_order(self._packets(), [seconds], at_start), None)
        return shown

    def _run(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """The frames shown at rising times near each other, by one seek: the first ones of them, as far as it
        is sure that `frame` gives the same.
        """
        if len(times) == 1 or self._video is None:
            return
        shown = None
        with self._explaining("its pictures cannot be decoded"):
            tries = 1 if self._is_timeless else TRIES
            for at_start in islice(self._seek_back(self._video, times[0]), tries):
                for frame in self._decode_run(times, at_start):
                    if frame is not shown:
                        shown, pixels = frame, self._upright(frame)
                    yield pixels
                if shown is not None:
                    return

    def _decode_run(self, times: Sequence[float], at_start: bool) -> Iterator[av.VideoFrame]:
        """As `_decode_frame`, for several rising times: it ends before one of which that is not sure.

        A frame is sure if it comes out with the time that its packet tells.
        """
        targets, demuxed, context = list(map(self._tick, times)), self._packets(), self._video.codec_context
        if self._is_timeless:  # where counting begins may matter: no further than to the next key frame
            packets = list(_to_next_key(self._until(demuxed, targets[-1])))
            keys = (p.dts for p in packets[1:] if p.is_keyframe and p.dts is not None)
            near = bisect_left(targets, next(keys, math.inf))
            yield from self._decode_in_order(chain(packets, demuxed), times[:near], at_start)
            return
        packets = list(self._until(demuxed, targets[-1]))
        if _go_back(packets) or any(packet.pts is None for packet in packets):
            return
        wanted = [_shown_at(target, packets, at_start) for target in targets]
        if None in wanted:
            return
        shown, needed = None, {time: _needed(packets, time) for time in wanted}
        if not (at_start or packets[needed[wanted[0]][0]].is_keyframe):
            return
        for first, times_of_group in groupby(wanted, lambda time: needed[time][0]):
            group = list(times_of_group)
            last = max(needed[time][1] for time in group)
            context.flush_buffers()
            frames = self._whole(self._decoded(packets[first : last + 1], set(group)), times[-1])
            for time in group:
                if shown is None or shown.pts != time:
                    shown = next((f for f in frames if f.pts is not None and f.pts >= time), None)
                if shown is None or shown.pts != time:
                    return
                yield shown

    def _decoded(self, packets: list[av.Packet], wanted: set[int]) -> Iterator[av.VideoFrame]:
        """The frames of the packets, except those that nothing refers to and nobody wants."""
        context = self._video.codec_context
        for packet in packets:
            if context.name in ("h264", "hevc"):  # others look at this only once
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from packet.decode()
        yield from context.decode(None)

    def _packets(self) -> Iterator[av.Packet]:
        """The packets of pictures from here on."""
        return (packet for packet in self._container.demux(self._video) if packet.size)

    def _until(self, packets: Iterable[av.Packet], target: int) -> Iterator[av.Packet]:
        """The packets as far as one that is decoded after a time, that one included. Matroska does not say
        when a picture is decoded, so there as many follow as may be held back.
        """
        later = 0
        for packet in packets:
            yield packet
            if self._format == "matroska" and packet.pts is not None:
                later += packet.pts > target
            elif packet.dts is not None and packet.dts > target:
                later = math.inf
            if later > HELD_BACK:
                return

    @cached_property
    def _is_timeless(self) -> bool:
        """Whether the times of packets are those of decoding, although pictures are shown in another order.

        FFmpeg guesses times of presentation for them, and is wrong where several pictures are held back, and
        of H.264 where none is.
        """
        context = self._video.codec_context
        from_avi = self._format == "matroska" and context.codec_tag.strip("\0") != ""
        is_guessed = context.reorder_depth or context.name == "h264"
        return bool(is_guessed) and (self._format in TIMELESS or from_avi)

    def _tick(self, seconds: float) -> int:
        """A time in units of the pictures' times."""
        tick = math.floor((seconds + EPSILON + self._origin) / self._video.time_base) - self._late
        return max(tick, self._video.start_time or 0)

    @cached_property
    def _late(self) -> int:
        """By how much pictures are shown later than FFmpeg says, in units of their times.

        Where the edit of an mp4 begins between two pictures, FFmpeg moves the second to its start. Without
        its care for edits, times are right. Those of several edits are left to it.
        """
        entries = self._video.index_entries
        if self._format != "mov" or not len(entries) or not entries[0].is_discard:
            return 0
        with _open(self.path, self.part, advanced_editlist="0") as container:
            plain = [(e.pos, e.timestamp) for e in container.streams[self._video.index].index_entries]
        shown = [entry.pos for entry in entries]
        begin = next((n for n, (pos, _) in enumerate(plain) if pos == shown[0]), len(plain))
        if [pos for pos, _ in plain[begin : begin + len(shown)]] != shown:
            return 0
        return max(0, plain[begin][1] - entries[0].timestamp)  # the first of several fragments may be later

    def _decode_in_order(
        self, packets: Iterable[av.Packet], times: Sequence[float], at_start: bool
    ) -> Iterator[av.VideoFrame]:
        """As `_decode_run`, by the order in which the decoder gives frames: that of their times."""
        context = self._video.codec_context
        rate = self._video.average_rate or self._video.guessed_rate
        step = 1 / (rate * self._video.time_base) if rate else 0
        # AVI counts pictures, but the times of ASF are those of its sound, too: a picture is shown at that of
        # the packet with which it comes out. Without sound the first one is the start.
        is_late = self._format == "asf" and self._audio is not None
        context.skip_frame = "DEFAULT"
        targets, shown, starts, last = deque(map(self._tick, times)), None, [], None
        for packet in chain(packets, (None,)):
            if packet is not None:
                before = starts[-1] if starts else None
                is_unknown = packet.dts is None and before is not None
                starts.append(before + step if is_unknown else packet.dts)
            held_back = (0 if is_late else context.reorder_depth) + (packet is not None)
            number = max(0, len(starts) - held_back)  # of the frame that comes out now
            for frame in self._whole(context.decode(packet), times[-1]):
                time = frame.pts
                if self._is_timeless:
                    beyond = max(0, number + 1 - len(starts))  # so many steps after the last packet
                    time = starts[number - beyond]
                    time = None if time is None else time + beyond * step
                if time is None:
                    if last is None:
                        continue
                    time = last + step
                number, last = number + 1, time
                while targets and time > targets[0]:
                    if shown is None and not at_start:
                        return
                    yield frame if shown is None else shown
                    targets.popleft()
                if not targets:
                    return
                shown = frame
        if shown is not None:
            yield from repeat(shown, len(targets))

    def _whole(self, frames: Iterable[av.VideoFrame], seconds: float) -> Iterator[av.VideoFrame]:
        """The frames, of which the first says how all are to be turned."""
        for frame in frames:
            if frame.is_corrupt:  # what the decoder made up is not what was recorded
                raise ClipError(self.path, f"its pictures are damaged before {seconds:g} s")
            if self._matrix is None:
                self._matrix = _matrix(frame)
            yield frame

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        """Its pixels as they are meant to be shown: square, turned and mirrored."""
        shapes = self._video.sample_aspect_ratio, self._video.codec_context.sample_aspect_ratio
        if self._format in BROADCAST:  # where that of the stream is the first that its pictures had
            shapes = shapes[::-1]
        wide = float(shapes[0] or shapes[1] or 1)
        wide = wide if abs(wide - 1) > SQUARE else 1.0
        width, other = round(frame.width * wide), {}
        if not 0 < width * frame.height <= MAX_PIXELS:
            raise ValueError(f"they are {wide:g} times as wide as high")
        if width != frame.width:
            other = dict(width=width, interpolation="BICUBIC")
        pixels = frame.to_ndarray(format="rgb24", threads=1, **other)
        (a, b), (c, d) = self._matrix[:2], self._matrix[3:5]  # right becomes (a, b) and down (c, d)
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return np.ascontiguousarray(pixels)

    def _decode_audio(self, first: int, wanted: int, sample_rate: int) -> np.ndarray:
        """At most `wanted` samples of mono sound from sample `first` on, fewer where the sound ends."""
        start, end = first / sample_rate, (first + wanted) / sample_rate
        before = WARM_UP_MP3 if self._audio.codec_context.name.startswith("mp3") else WARM_UP
        for at_start in self._seek_back(self._audio, start - before):
            pieces = list(self._pieces(start - before, end + MARGIN))
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
        sound = join(pieces, rate, begin, math.ceil((end + MARGIN) * rate))
        declared = self._declared_end(self._audio)
        if self._format == "mov" and declared is not None:  # the last packet is filled up with no sound
            sound = sound[: max(0, round(declared * rate) - begin)]
        return resample(sound, rate, sample_rate)[skip : skip + wanted]

    def _checked(self, packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
        """The packets, as far as they are whole: of FLAC those lack a time in which FFmpeg found a frame with
        a wrong sum, or bytes that belong to none; the headers of AAC without a container keep their rate.
        """
        for packet in packets:
            if self._format == "flac" and packet.size and packet.pts is None:
                raise ValueError("the data are damaged: fetch it again")
            if self._format == "aac" and packet.size and (rate := adts_rate(packet)):
                self._check_rate(rate, {self._rate, self._rate // 2})
            yield packet

    def _check_rate(self, rate: int, allowed: Collection[int]) -> None:
        """Of AAC without a container FFmpeg counts time as if the first rate stayed, which SBR may double."""
        if self._format == "aac" and rate not in allowed:
            raise ValueError(f"its sample rate is {self._rate} and then {rate}")

    def _pieces(self, begin: float, end: float) -> Iterator[tuple[float, int, np.ndarray]]:
        """Decoded sound until `end`: time in seconds, sample rate and mono samples of each piece. One without
        samples says that there is more later.

        Packets before `begin` are passed over: a seek may have ended far before it, at a key frame.
        """
        unit, origin, time, rate = float(self._audio.time_base), float(self._origin), None, None
        # Of some such packets FFmpeg does not know how long they are, so that all have to be decoded.
        is_counted = self._is_adrift and self._audio.codec_context.name.startswith("adpcm_")
        for packet in self._checked(self._container.demux(self._audio)):
            is_known = packet.pts is not None and packet.duration and not is_counted
            if is_known and (packet.pts + packet.duration) * unit - origin < begin:
                continue
            for frame in packet.decode():
                if frame.pts is not None and (time is None or self._format not in GAPLESS):
                    time = frame.pts * unit - origin  # which only the first one of a packet has
                if time is None or not frame.samples:
                    continue
                if time > end:
                    yield time, rate or frame.sample_rate, np.empty(0, np.float32)
                    return
                rate = frame.sample_rate
                self._check_rate(rate, {self._rate, 2 * self._rate})
                if time + frame.samples / rate >= begin:
                    yield time, rate, mix_of(frame.layout) @ channels_of(frame)
                time += frame.samples / rate


def extend(sound: np.ndarray, samples: int) -> np.ndarray:
    """So many samples: what is lacking at the end are mirrored copies, as often as needed."""
    return np.resize(np.concatenate((sound, sound[::-1])), samples) if len(sound) < samples else sound


def _open(path: Path, part: Part | None, **options: str) -> av.container.InputContainer:
    file, start = (part.file, part.start) if part else (path, 0)
    if not file.is_file():
        what = "it is a folder" if file.is_dir() else "it is not a file"
        raise OSError(what if file.exists() else "there is no such file")
    with open(file, "rb") as content:
        size = part.size if part else os.fstat(content.fileno()).st_size
        content.seek(start)
        head = content.read(min(HEAD, size))
        if start + size > os.fstat(content.fileno()).st_size:
            raise OSError(f"it reaches beyond the end of {file.name}")
        if not head:
            raise OSError("it is empty")
        if reason := cut_off(content, start, size):
            raise ClipError(path, reason)
    # The header of an mp4 says everything; for other formats FFmpeg decodes a little to find out.
    options |= OPTIONS | ({"probesize": "32"} if head[4:8] == b"ftyp" else {}) | (OF_A_PART if part else {})
    url = f"subfile,,start,{start},end,{start + size},,:file:{file}" if part else f"file:{file}"
    try:
        return av.open(url, options=options, **TEXT)
    except (*DAMAGED, av.error.ArgumentError) as error:
        raise OSError(describe(head) or "it is of no kind that is read here, or damaged") from error


def _to_next_key(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """The packets as far as the next key frame, that one included."""
    for number, packet in enumerate(packets):
        yield packet
        if number and packet.is_keyframe and packet.dts is not None:
            return


def _go_back(packets: list[av.Packet]) -> bool:
    """Whether times start again, as where files were joined."""
    times = [packet.dts * packet.time_base for packet in packets if packet.dts is not None]
    return any(later < earlier - BACKWARD for earlier, later in pairwise(times))


def _shown_at(target: int, packets: Iterable[av.Packet], at_start: bool) -> int | None:
    """When the picture that is shown at a time begins; None if that may be in an earlier packet."""
    times = [packet.pts for packet in packets if not packet.is_discard]
    before = [time for time in times if time <= target]
    if before:
        return max(before)
    return min(times, default=None) if at_start else None


def _needed(packets: list[av.Packet], wanted: int) -> tuple[int, int]:
    """The first and the last packet that have to be decoded for the picture that begins at a time."""
    last = next(n for n, packet in enumerate(packets) if packet.pts == wanted)
    keys = (n for n in range(last, 0, -1) if packets[n].is_keyframe and packets[n].pts <= wanted)
    return next(keys, 0), last


def _matrix(frame: av.VideoFrame) -> list[int]:
    """How a frame is to be turned, as FFmpeg's display matrix has it."""
    # Not of the frame itself: one that was asked for its side data holds on to its pixels.
    small = frame.reformat(2, 2, "gray", interpolation="POINT", threads=1)
    with suppress(ValueError):  # of a kind that PyAV does not know
        if Type.DISPLAYMATRIX in small.side_data:
            return np.frombuffer(small.side_data[Type.DISPLAYMATRIX], np.int32).tolist()
    return [1, 0, 0, 0, 1, 0, 0, 0, 1]


def _check_finite(name: str, value: float, *, above: float = -math.inf) -> None:
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"{name} must be a finite number above {above}, got {value}")
