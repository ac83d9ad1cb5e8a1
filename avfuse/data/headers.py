"""What the bytes of a file tell without FFmpeg: that it has been cut off, or is no video at all."""

import mmap
import re
import struct
import zlib
from typing import BinaryIO

CUT_OFF = "is cut off: fetch it again"
HEAD, TAIL = 4096, 2**16  # bytes looked at; a page of Ogg is no longer than TAIL
BOXES = 64  # of mp4 that are looked at
UNKNOWN = 0x7FFFF000  # bytes of a RIFF: this or more stands in those that were written to a pipe
CONTROL = re.compile(r"[\0-\b\x0e-\x1f\x7f]")  # characters that no text has
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # Matroska: its first element, and the main one
ASF = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # of which object the size of the file is part
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bits of each byte
# Sample rates by their number in the headers of AAC without a container.
ADTS = tuple(map(int, "96000 88200 64000 48000 44100 32000 24000 22050 16000 12000 11025 8000 7350".split()))
PACKETS = ((188, 0), (192, 4), (204, 0))  # of MPEG-TS: bytes, and where the first one begins


def cut_off(file: BinaryIO, start: int, size: int) -> str | None:
    """Why a file that is `size` bytes from `start` on is incomplete, by the length that its own headers
    declare; None if it is complete, or declares none.
    """
    file.seek(start)
    head = file.read(min(HEAD, size))
    if head[4:8] == b"ftyp":
        return _cut_in_a_box(file, start, size)
    return CUT_OFF if _is_short(file, head, start, size) else None


def _is_short(file: BinaryIO, head: bytes, start: int, size: int) -> bool:
    if head[:4] == b"OggS":
        return _ends_within_a_page(file, start, size)
    for length, at in PACKETS:
        if len(head) > 2 * length + at and {head[at + n * length] for n in range(3)} == {0x47}:
            return size % length > 0
    told = _told(head)
    if told is None and head[:3] == b"ID3":  # MP3: a tag, maybe with a picture, then the first frame
        tag = 10 + sum((byte & 127) << 7 * n for n, byte in enumerate(reversed(head[6:10])))
        file.seek(start + tag)
        told = _told_by_mp3(file.read(min(HEAD, max(0, size - tag))))
        told = None if told is None else tag + told
    return told is not None and told > size + 8  # some leave out bytes that only fill up


def _told(head: bytes) -> int | None:
    """How many bytes a file has by its header; None if that does not tell."""
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        return 8 + size if size < UNKNOWN else None
    if head[:4] == EBML:
        content, size = _sized(head, 4)
        if size is None or head[content + size :][:4] != SEGMENT:
            return None
        content, size = _sized(head, content + size + 4)
        return None if size is None else content + size
    if head[:3] == b"FLV" and (at := head.find(b"filesize\0")) >= 0:  # as float64, if it is there
        size = head[at + 9 : at + 17]
        return int(min(*struct.unpack(">d", size), 2**62)) if len(size) == 8 and size[0] < 0x7F else None
    if (at := head.find(ASF)) >= 0:
        return int.from_bytes(head[at + 40 : at + 48], "little") or None
    return _told_by_mp3(head)


def _sized(head: bytes, at: int) -> tuple[int, int | None]:
    """Where an element of EBML begins whose size is written at `at`, and that size; None if it is unknown."""
    length = 9 - head[at].bit_length() if len(head) > at and head[at] else 9
    value = int.from_bytes(head[at : at + length], "big") & (1 << 7 * length) - 1
    is_known = length < 9 and len(head) >= at + length and value != (1 << 7 * length) - 1
    return at + length, value if is_known else None


def _told_by_mp3(head: bytes) -> int | None:
    """By the Xing header in the first frame of MP3."""
    if len(head) < 2 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    at = max(head.find(name, 0, 64) for name in (b"Xing", b"Info"))
    flags = int.from_bytes(head[at + 4 : at + 8], "big")
    if at < 0 or not flags & 2:
        return None
    at += 12 if flags & 1 else 8
    return int.from_bytes(head[at : at + 4], "big") or None


def _cut_in_a_box(file: BinaryIO, start: int, size: int) -> str | None:
    """Of mp4, whose boxes each begin with their size and name; its index is called moov."""
    at, names = 0, []
    while at < size and len(names) < BOXES:
        file.seek(start + at)
        box = file.read(min(16, size - at))
        length = int.from_bytes(box[:4], "big")
        length = int.from_bytes(box[8:], "big") if length == 1 else length
        if length < 8 or not box[4:8].isalnum():  # to the end of the file, or no box at all
            return None
        at += length
        names.append(box[4:8])
    if at <= size:
        return None
    return CUT_OFF if b"moov" in names[:-1] else "is cut off before its index: fetch it again"


def _ends_within_a_page(file: BinaryIO, start: int, size: int) -> bool:
    file.seek(start + max(0, size - TAIL))
    tail = file.read(min(TAIL, size))
    at = tail.rfind(b"OggS")
    if at < 0 or len(tail) < at + 27 + tail[at + 26 :][0]:
        return True
    segments = tail[at + 26]
    return len(tail) < at + 27 + segments + sum(tail[at + 27 : at + 27 + segments])


def has_damaged_page(file: BinaryIO, start: int, size: int) -> bool:
    """Whether an Ogg file holds a page with a wrong sum, or bytes between two pages: what FFmpeg leaves out
    without a word. Tags before the first page and after the last are neither.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, end = data.find(b"OggS", start, start + size), start + size
        while at >= 0 and at + 27 <= end:
            content = at + 27 + data[at + 26]
            after = content + sum(data[at + 27 : content])
            page = data[at : at + 22] + bytes(4) + data[at + 26 : after]
            if after <= end and ogg_sum(page) != int.from_bytes(data[at + 22 : at + 26], "little"):
                return True
            at = data.find(b"OggS", after, end)
            if at > after:
                return True
    return False


def ogg_sum(page: bytes) -> int:
    """The sum of a page whose own sum is taken to be 0 (RFC 3533): a CRC-32 that begins with 0 and takes the
    highest bit of each byte first, where zlib's begins with ones and the lowest.
    """
    reflected = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def describe(head: bytes) -> str | None:
    """What a file is that FFmpeg does not open, and what to do; None if its first bytes do not tell."""
    again = "fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: git lfs pull fetches that"
    if head[4:8] == b"ftyp":
        return f"it is cut off before its index, or damaged: {again}"
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    if CONTROL.search(text):
        return None
    kind = "a web page" if text.lstrip()[:1] == "<" else "text"
    return f"it is {kind}, not video ({' '.join(text.split())[:40]!r}): {again}"


def adts_rate(packet: bytes) -> int | None:
    """The sample rate that a packet of AAC without a container tells, before SBR; None if it tells none."""
    head = bytes(memoryview(packet)[:3])
    index = head[2] >> 2 & 15 if len(head) == 3 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 else len(ADTS)
    return ADTS[index] if index < len(ADTS) else None
