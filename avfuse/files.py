"""Files: written whole or not at all, read without running code, kept inside a folder, named in one line."""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

NAMED = 3  # of many names, those that a message gives


# --- writing ------------------------------------------------------------------------------------------------


@contextmanager
def aside(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A hidden name beside `path` to write to, renamed to `path` at the end: whatever happens meanwhile,
    `path` holds the old content or the new one, never half of it.

    Args:
        path: the file to write; if it is a link, the link is replaced, not what it leads to.
        synced: whether the content must be on the disk before the file gets its name.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.unlink(missing_ok=True)  # it may be a link
        yield partial
        if synced:
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, errors: str = "strict", synced: bool = False) -> None:
    """Writes a text file aside, in UTF-8; `errors` says what becomes of characters that it cannot hold."""
    with aside(path, synced=synced) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


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


# --- weights ------------------------------------------------------------------------------------------------


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {path} cannot be read: {error}") from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors, by name."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {path} cannot be read: {error}") from error


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file aside."""
    with aside(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as any new file here; safetensors 0.8 lets nobody but the owner read
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata=metadata)
        partial.chmod(mode)


def read_pth(path: str | os.PathLike) -> dict:
    """What torch.save wrote, of which only tensors and plain containers are accepted: no code runs.

    Published checkpoints keep their command line as an `argparse.Namespace`. It is let in because it is such
    a container: reading one sets its attributes, to values under the same restriction, and calls nothing.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no checkpoint, it raises whatever they lead to
        # torch begins with advice to read it unsafely: only what comes after that is repeated.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(
            f"weights {path} is no file of weights alone ({type(error).__name__}: {reason})"
        ) from error


def state_dict(content: object, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name in what torch.save wrote, by themselves or under a name, without the prefix that
    distributed training adds; and what lies beside them, with the reason why it is left out.
    """
    places = [key for key in ("model", "state_dict") if isinstance(content, dict) and key in content]
    weights = content[places[0]] if places else content
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{what} must hold tensors by name, by itself or under 'model' or 'state_dict'")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise ValueError(f"{what}: {name!r} is no tensor but a {type(weight).__name__}")
    beside = {str(key): "not a weight" for key in content if key != places[0]} if places else {}
    return {name.removeprefix("module."): weight for name, weight in weights.items()}, beside


# --- names --------------------------------------------------------------------------------------------------


def inside(root: Path, name: str) -> Path:
    """`root / name`, if it lies inside the folder `root` once links are followed, else a ValueError."""
    path = root / name
    if leads_out(path, root):
        raise ValueError(f"path {name!r} leaves the data folder {root}")
    return path


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path lies outside the folder `root` once links are followed, or leads nowhere."""
    try:
        target = path.resolve()
        return target.is_symlink() or not target.is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # no name for a file
        return True  # or, before Python 3.13, a link that leads to itself, which is its own target since then


def printable(text: object) -> str:
    """A name from outside as one line that any terminal can show: what is not printable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def some(names: Sequence[object], most: int = NAMED, *, separator: str = ", ") -> str:
    """The first names, printable, and how many there are besides: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(printable, names[:most])) + more
