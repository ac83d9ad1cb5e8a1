"""One video file, opened: which streams are read, when they end, and how to get to a time in them.

Times are seconds since the first stream of the file starts. A file is data of unknown origin: whatever is
wrong with it ends as a `ClipError` that says what.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import av
from av.stream import Disposition

from .headers import CUT_OFF, HEAD, cut_off, describe
from .sound import JITTER
from .survey import end_of

OPTIONS = {  # FFmpeg also opens playlists, which name other files and hosts
    "format_whitelist": "mov,matroska,avi,flv,mpegts,mpeg,asf,ogg,wav,flac,mp3,aac",
    "protocol_whitelist": "file",
}
OF_A_PART = {"protocol_whitelist": "file,subfile"}  # the latter reads a range of bytes of the former
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192
# Before PyAV 19, which does so by itself, bytes of metadata that are no text stop the opening of a file.
TEXT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
LAST = 2.0  # seconds at the end in which the last packets of all streams are looked for
FAR_BACK = -3600.0  # seconds: where the start is looked for, as packets begin before what they show
BACK = (0, 1, 4, 16, 64, 256, math.inf)  # seconds to seek further back, where a seek lands too late
# What decoders say of damage.
DAMAGED = (av.error.InvalidDataError, av.error.PermissionError, av.error.EOFError)
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


class ClipFile(AbstractContextManager):
    """A file, open until it is closed, and its streams that are read, of pictures and of sound."""

    def __init__(self, path: str | Path, part: Part | None = None):
        self.path, self.part = Path(path), part
        with self._explaining("cannot be opened"):
            self._container = open_file(self.path, part)
        try:
            self._origin = Fraction(self._container.start_time or 0, av.time_base)  # seconds
            self._video = self._prepare("video")
            self._audio = self._prepare("audio", self._video)  # that of the same programme of a broadcast
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
            with open_file(self.path, self.part) as container:
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


def open_file(path: Path, part: Part | None, **options: str) -> av.container.InputContainer:
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
