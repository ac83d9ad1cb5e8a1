"""Files and tables: written whole or not at all, kept inside a folder; text from outside, made fit for a
terminal, Markdown or HTML.
"""

import csv
import errno
import fcntl
import html
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

NAMED = 3  # of many names, those that a message gives
LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


# --- writing ------------------------------------------------------------------------------------------------


@contextmanager
def aside(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A hidden name beside `path` to write to, renamed to `path` at the end: whatever happens meanwhile,
    `path` holds the old content or the new one, never half of it.

    Args:
        path: the file to write; if it is a link, the link is replaced, not what it leads to.
        synced: whether the content must be on the disk before the file gets its name.
    """
    partial = partial_of(path)
    try:
        yield partial
        if synced:
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """A name of this call's own: containers that share a disk have processes of the same number, and what
    cannot be guessed is no link that somebody put there.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def sweep(folder: Path) -> None:
    """Deletes what processes that were killed have left half written in a folder."""
    for partial in folder.glob(".*.part"):
        partial.unlink(missing_ok=True)


def lock(file: IO, taken: str) -> None:
    """Keeps other processes out for as long as an open file stays open; the system sees to that however this
    one ends. Where the file system has no locks, a warning says so.

    Raises:
        ValueError: `taken`, if another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(taken) from None
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        where = printable(Path(file.name).parent)
        tqdm.write(f"WARNING: the file system of {where} has no locks: let no other process write there")


def write_text(path: Path, text: str, *, errors: str = "strict", synced: bool = False) -> None:
    """Writes a text file aside, in UTF-8; `errors` says what becomes of characters that it cannot hold."""
    with aside(path, synced=synced) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_target(option: str, path: Path) -> None:
    """Raises ValueError unless a file can be written at `path`, by beginning one; folders above are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        partial = partial_of(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"{option} {printable(path)} cannot be written: {error.strerror}") from error


def write_table(path: Path, rows: Iterable[dict]) -> None:
    """Writes a .csv or, by pyarrow, a .parquet file: a column for each name that a row has. What a row lacks
    stays empty; bytes of names that are no Unicode are escaped.
    """
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for cells in columns.values():
        cells[:] = [unicode(cell) if isinstance(cell, str) else cell for cell in cells]
    with aside(path) as partial:
        if path.suffix == ".parquet":
            from pyarrow import parquet, table

            parquet.write_table(table(columns), partial)
            return
        with open(partial, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])


# --- JSON lines ---------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON lines file, none if there is no such file. Lines that are no object are passed
    over: a process that was killed may have left half a line.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_row(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# --- names --------------------------------------------------------------------------------------------------


def inside(root: Path, name: str) -> Path:
    """`root / name`, if it lies inside the folder `root` once links are followed, else a ValueError."""
    path = root / name
    if leads_out(path, root):
        raise ValueError(f"path {name!r} leaves the data folder {printable(root)}")
    return path


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path lies outside the folder `root` once links are followed, or leads nowhere."""
    try:
        target = path.resolve()
        return target.is_symlink() or not target.is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # no name for a file
        return True  # or, before Python 3.13, a link that leads to itself, which is its own target since then


def address(folder: Path) -> str | None:
    """The address that stands in the place of a folder, with the second slash that `Path` has dropped; None
    if it is a folder.
    """
    parts = re.fullmatch("([a-z][a-z0-9+]+):/(.+)", str(folder))
    return f"{parts[1]}://{parts[2]}" if parts else None


def is_regular(path: str | os.PathLike) -> bool:
    """Whether this is a file as on a disk, itself no link: a pipe or a device may be read for ever."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def some(names: Sequence[object], most: int = NAMED, *, separator: str = ", ") -> str:
    """The first names, printable, and how many there are besides: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(printable, names[:most])) + more


# --- text from outside --------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """For a terminal: one line, in which what is not printable is escaped."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def unicode(name: str) -> str:
    """A name of a file, or of a class, in which bytes that are no UTF-8 are escaped."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def in_html(text: object) -> str:
    """For HTML, as text or as an attribute in quotes."""
    return html.escape("\t".join(map(printable, str(text).split("\t"))))


def in_markdown(text: object) -> str:
    """For Markdown, in a line that begins with something else: no HTML, link, picture, emphasis or column."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*_~$!\[\]|]|:(?=//)|(?<=www)[.]", r"\\\g<0>", text)
