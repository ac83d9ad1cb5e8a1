"""Reading one video file: what it holds, the frame shown at a time, and the sound from a time on.

Times are seconds since the first stream of the file starts. A file is data of unknown origin: whatever is
wrong with it ends as a `ClipError` that says what.
"""

import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain, groupby, islice, pairwise, repeat
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type

from .container import FAR_BACK, MAX_PIXELS, TIMED, ClipError, ClipFile, Part, open_file
from .headers import CUT_OFF, adts_rate, has_damaged_page
from .sound import channels_of, join, mix_of, resample
from .survey import BACKWARD, Track, summary

GENERATION = 3  # of this reader: what an earlier one found in a file may be out of date
MAX_RATE = 768_000  # Hz
# Seconds of sound decoded before what is wanted: codecs and filters look back, MP3 at low rates further.
WARM_UP, WARM_UP_MP3 = 0.3, 0.7
MARGIN = 0.05  # seconds of that which the resampling filter sees, on both sides
EPSILON = 1e-6  # seconds: a time that was meant to be that of a frame may have been rounded to just before it
RUN = 10.0  # seconds of pictures that one seek is for: beyond, seeking is cheaper than reading on
TRIES = 3  # such seeks, each further back, before every frame is read alone
HELD_BACK = 16  # pictures at most that are shown after one that follows them in the file
SQUARE = 0.01  # by which a pixel may be wider than high: what scaling to whole pixels leaves behind
TIMELESS = ("avi", "asf")  # formats that say when a picture is decoded, not when it is shown
GAPLESS = ("wav", "flac", "mp3", "aac")  # formats of one sound without gaps, times in which may be estimates
BROADCAST = ("mpegts", "mpeg")  # formats in which pixels may become wider or narrower


class ClipReader(ClipFile):
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
        super().__init__(path, part)
        self._rate = self._audio and self._audio.codec_context.sample_rate  # that it begins with
        self._matrix = None  # how its pictures are to be turned
        if self._video is not None and self._video.codec_context.pix_fmt == "pal8":
            self._read_palette()

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

    # --- pictures -------------------------------------------------------------------------------------------

    def _read_palette(self) -> None:
        """Decodes the first packet of pictures: no other one has it."""
        try:
            with self._explaining("its pictures cannot be decoded"):
                next(self._container.demux(self._video)).decode()
            self._seek(self._video, FAR_BACK)
        except BaseException:
            self.close()
            raise

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
        with open_file(self.path, self.part, advanced_editlist="0") as container:
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

    # --- sound ----------------------------------------------------------------------------------------------

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
        before = None
        for packet in packets:
            if self._format == "flac" and packet.size and packet.pts is None:
                raise ValueError("the data are damaged: fetch it again")
            if self._format == "aac" and packet.size and (rate := adts_rate(packet)):
                if rate == before:  # one alone may be damaged
                    self._check_rate(rate, {self._rate, self._rate // 2})
                before = rate
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
