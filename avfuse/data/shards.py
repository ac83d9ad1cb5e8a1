"""Clips in tar shards (WebDataset): fewer and larger files, read by the same command as a folder.

A shard holds a clip and its manifest entry as `000000123.mp4` and `000000123.json`. The manifest beside the
shards says at which byte each clip begins, so that a clip is addressed by its index as in any other folder:
an epoch reads each once, in any number of processes, and a run resumes where it was.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..files import aside, is_regular, leads_out, printable, some
from ..progress import progress_bar
from . import manifest
from .manifest import Entry
from .workers import WorkerFailure, WorkerPool

PATIENCE = 24 * 3600.0  # seconds in which a shard must be written


class Plan(NamedTuple):
    """A shard to be written."""

    name: str
    clips: list[tuple[str, Entry]]  # with the names that they have in it


def shard(
    root: str | Path,
    out: str | Path,
    *,
    size: int = 10**9,
    seed: int = 0,
    workers: int = 4,
    progress: bool = True,
) -> str:
    """Write the clips of a folder that has a manifest into shards, `<split>-<number>.tar`, and a manifest.

    Clips are dealt to shards in an order of their own (the hash of seed and path), so that each shard is a
    fair sample. Shards that are there and hold what they should are kept.

    Args:
        root: the data folder.
        out: folder for the shards; made if need be.
        size: bytes of a shard; the last clip may exceed it.
        seed: another seed, another order.
        workers: processes that write; 0 writes in this one.
        progress: show a progress bar.

    Returns:
        What was written and what was left out, for people.

    Raises:
        ValueError: `size` is not positive, `root` has no manifest, or `out` holds another data set.
        OSError: a shard cannot be written; what is whole stays, and the same call goes on.
    """
    root, out = Path(root), Path(out)
    if size <= 0:
        raise ValueError(f"size must be a positive number of bytes, got {size}")
    if not manifest.has_manifest(root):
        raise ValueError(f"{printable(root)} has no manifest: python -m avfuse.data check {root}")
    header, entries = manifest.read_header(root), list(manifest.read_entries(root))
    if any(entry.start >= 0 for entry in entries):
        raise ValueError(f"{printable(root)} holds shards already")
    if manifest.has_manifest(out) and any(entry.start < 0 for entry in manifest.read_entries(out)):
        raise ValueError(f"{printable(out)} holds another data set")
    broken = [entry for entry in entries if entry.error is not None]
    whole = [entry for entry in entries if entry.error is None]
    gone = [entry for entry in whole if not _is_there(root, entry)]
    left_out = {id(entry) for entry in gone}
    plans = list(_plan([entry for entry in whole if id(entry) not in left_out], size, seed))
    if not plans:
        raise ValueError(f"{printable(root)} has no clip to put into shards")
    out.mkdir(parents=True, exist_ok=True)
    (out / manifest.FILE).unlink(missing_ok=True)  # it may be of shards that are about to be replaced
    sharded = []
    bar = progress_bar(total=len(whole) - len(gone), desc="Sharding", unit="clip", shown=progress)
    with WorkerPool(partial(_write, root, out), workers, timeout=PATIENCE) as pool, bar:
        for plan, written in zip(plans, pool.map(plans), strict=True):
            if isinstance(written, WorkerFailure):
                raise OSError(f"{printable(out / plan.name)}: {printable(written.reason)}")
            sharded += written
            bar.update(len(written))
    manifest.write(out, header, sharded)
    lines = [f"{len(sharded)} clips in {len(plans)} shards in {printable(out)}"]
    for what, entries in (("were broken", broken), ("have gone or changed since the check", gone)):
        if entries:
            names = some([entry.path for entry in entries])
            lines.append(f"{len(entries)} {what}, and are in no shard: {names}")
    if others := sorted({path.name for path in out.glob("*.tar")} - {plan.name for plan in plans}):
        lines.append(f"{len(others)} other files there are no part of these: {some(others)}")
    return "\n".join(lines)


def _is_there(root: Path, entry: Entry) -> bool:
    path = root / entry.path
    return not leads_out(path, root) and path.is_file() and path.stat().st_size == entry.bytes


def _plan(entries: list[Entry], size: int, seed: int) -> Iterator[Plan]:
    """Which clip goes into which shard, and under which name."""
    for split in dict.fromkeys(entry.split for entry in entries):
        dealt = sorted((entry for entry in entries if entry.split == split), key=partial(_turn, seed))
        clips, filled, number = [], 0, 0
        for at, entry in enumerate(dealt):
            suffix = PurePosixPath(entry.path).suffix.lower()
            clips.append((f"{at:09d}{suffix if re.fullmatch('[.][a-z0-9]+', suffix) else '.bin'}", entry))
            filled += entry.bytes
            if filled >= size or at == len(dealt) - 1:
                yield Plan(f"{split}-{number:06d}.tar", clips)
                clips, filled, number = [], 0, number + 1


def _turn(seed: int, entry: Entry) -> bytes:
    return hashlib.sha256(f"{seed}/{entry.path}".encode(errors="surrogateescape")).digest()


# --- one shard, in a worker ---------------------------------------------------------------------------------


def _write(root: Path, out: Path, plan: Plan) -> list[Entry]:
    """The entries of a shard's clips; it is written unless it is there as it should be."""
    path = out / plan.name
    found = _index(path, plan)
    if found is None:
        with aside(path, synced=True) as partial_:
            _write_tar(partial_, root, plan)
        found = _index(path, plan)
    modified = path.stat().st_mtime_ns
    return [
        replace(entry, path=f"{plan.name}/{name}", source=entry.path, start=start, modified=modified)
        for (name, entry), start in zip(plan.clips, found, strict=True)
    ]


def _write_tar(path: Path, root: Path, plan: Plan) -> None:
    from webdataset import TarWriter

    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for name, entry in plan.clips:
            content = (root / entry.path).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise ValueError(f"{entry.path} has changed since it was checked: check again")
            key, suffix = name.split(".")
            tar.write({"__key__": key, suffix: content, "json": _describe(entry)})


def _describe(entry: Entry) -> bytes:
    """What a shard says of a clip itself, for other readers of it."""
    kept = {name: value for name, value in vars(entry).items() if name not in ("modified", "source")}
    return json.dumps(kept).encode()


def _index(path: Path, plan: Plan) -> list[int] | None:
    """Where each clip of a shard begins; None unless it holds them and their descriptions, to the byte."""
    wanted = {name: (entry.bytes, entry.sha256) for name, entry in plan.clips}
    for name, entry in plan.clips:
        text = _describe(entry)
        wanted[f"{name.split('.')[0]}.json"] = (len(text), hashlib.sha256(text).hexdigest())
    starts = {}
    if not is_regular(path):
        return None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                size, sha256 = wanted.get(member.name, (-1, None))
                if member.size != size or not member.isreg() or member.issparse():
                    return None
                if hashlib.file_digest(tar.extractfile(member), "sha256").hexdigest() != sha256:
                    return None
                starts[member.name] = member.offset_data
    except (OSError, ValueError, EOFError, tarfile.TarError):
        return None
    return [starts[name] for name, _ in plan.clips] if starts.keys() == wanted.keys() else None
