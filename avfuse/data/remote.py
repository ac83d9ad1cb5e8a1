"""Data that lie elsewhere: below the address of a web server, or wherever fsspec reaches.

Nothing but what the user has given is asked. The manifest there says which bytes a clip is, and their hash;
they are fetched when the clip is read, in one request, and not kept.
"""

import hashlib
import re
import time
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from ..files import address
from .container import ClipError, Part
from .decode import ClipReader

WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each new try
SILENCE = 20.0  # seconds without a byte before a try is given up
LARGEST = 2**31  # bytes that are taken from a web server at once
DESCRIPTORS = Path("/proc/self/fd")  # on Linux, opens again a file that has no name
PASSING = (408, 425, 429, *range(500, 600))  # HTTP states that a new try may not meet


def fetch_file(path: Path, root: Path) -> tuple[IO, Path]:
    """A temporary copy of a file below the address that `root` is, and a path that opens it in this process.

    Raises:
        ValueError: it cannot be fetched.
    """
    url = _url(path, root)
    try:
        return _temporary(read(url))
    except (OSError, ValueError, ImportError) as error:  # the latter of what fsspec needs for this address
        raise ValueError(f"{url} cannot be fetched: {error}") from error


def open_part(path: Path, part: Part, root: Path) -> ClipReader:
    """A reader of a clip below the address that `root` is, from a temporary copy.

    Raises:
        ClipError: it cannot be fetched, is another than the manifest tells of, or cannot be opened.
    """
    try:
        content = read(_url(part.file, root), part.start, part.start + part.size)
    except (OSError, ValueError) as error:
        raise ClipError(path, f"cannot be fetched: {error}") from error
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise ClipError(path, "what was fetched has another hash than the manifest says")
    file, copy = _temporary(content)
    reader = ClipReader(path, Part(copy, 0, part.size))
    reader.file = file  # deleted when nothing refers to it
    return reader


def read(url: str, start: int = 0, end: int | None = None) -> bytes:
    """Bytes of a file, to its end if none is given. Faults that may pass are met with patience, and what was
    cut short is gone on with where it ended.

    Raises:
        OSError, ValueError: they cannot be had, with the reason.
    """
    content, fault = bytearray(), None
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        try:
            more, end = _request(url, start + len(content), end)
            content += more
            if start + len(content) == end:
                return bytes(content)
            fault = f"it was cut off, {len(content)} of {end - start} bytes came"
        except (OSError, HTTPException) as error:
            missing = isinstance(error, (FileNotFoundError, PermissionError))
            if missing or isinstance(error, HTTPError) and error.code not in PASSING:
                raise
            fault = error
    raise OSError(f"{fault} (tried {1 + len(WAITS)} times)")


def _request(url: str, start: int, end: int | None) -> tuple[bytes, int]:
    """Bytes of a file from `start` on, maybe fewer than there are up to the end, and where that is."""
    if not url.startswith(("http://", "https://")):
        from fsspec.core import url_to_fs

        files, path = url_to_fs(url)
        content = files.cat_file(path, start, end)
        return content, start + len(content) if end is None else end
    last = "" if end is None else end - 1
    with urlopen(Request(url, headers={"Range": f"bytes={start}-{last}"}), timeout=SILENCE) as answer:
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"] or "")
        if part is None or int(part[1]) != start:
            raise ValueError("the server does not send the range of bytes that it is asked for")
        end = int(part[2]) if end is None else end
        if end - start > LARGEST:
            raise ValueError(f"it would be {end - start:,} bytes, more than {LARGEST:,}")
        return answer.read(end - start), end


def _url(path: Path, root: Path) -> str:
    url, name = address(root), path.relative_to(root).as_posix()
    return f"{url}/{quote(name) if url.startswith('http') else name}"


def _temporary(content: bytes) -> tuple[IO, Path]:
    """A file with this content, and a path that opens it. Where it can be, it is one without a name, of which
    nothing is left behind when this process is killed, as a worker is whose clip hangs.
    """
    is_nameless = DESCRIPTORS.is_dir()
    file = (TemporaryFile if is_nameless else NamedTemporaryFile)(prefix="avfuse-")
    file.write(content)
    file.flush()
    return file, DESCRIPTORS / str(file.fileno()) if is_nameless else Path(file.name)
