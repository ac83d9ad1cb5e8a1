"""Look through a data folder once: decode every clip, write a manifest that training reads, and a report.

What has been looked at is kept in a journal as it comes, so that a check that was interrupted goes on where
it was, and a later one opens only what is new or has changed.
"""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..files import lock, printable, write_text
from ..progress import progress_bar
from . import manifest
from .class_folders import described
from .clips import MEMORY
from .container import ClipError
from .decode import GENERATION
from .find import list_data
from .listing import Listing
from .manifest import Entry, Header
from .sets.folders import split_folders
from .table import Clip
from .workers import WorkerFailure, WorkerPool

REPORT, MISSING, JOURNAL = "avfuse-report.txt", "avfuse-missing.txt", ".avfuse-manifest.journal"
SILENT = 1e-3  # peak below which a clip counts as silent: -60 dB
STILL = 0.5  # grey levels of motion below which its pictures count as one
APART = 1.0  # seconds between the ends of its pictures and its sound that are worth a word
FAR = 64  # frames between key frames that make a random frame slow to reach
LARGE = 480  # pixels of the shorter side that are more than training needs
SHOWN = 5  # clips that the report names of each kind

# Advice of the report.
REPAIR = "fetch them again, then repeat this command: it opens only what has changed"
COMPARE = "{} names them all; numbers from part of a test set do not compare with others'"
LEAKED = "delete those to train on: they would be tested on what they were trained on"
STOPS = "training leaves them out, and stops over more than 1 % of such (--max-unreadable)"
DROPPED = "training leaves them out, or keeps them with --missing keep"
USED = "they are used as they are; delete them if that is not meant"
MONO = "invert one of them: ffmpeg -i IN -af 'pan=stereo|c0=c0|c1=-1*c1' -c:v copy OUT"
UNEQUAL = (
    "the last picture stays, or the end of the sound is repeated mirrored; cut them if that is not meant"
)
JOINED = "what is read at such a time may be of either part; write them anew: ffmpeg -i IN OUT.mp4"
SLOW = (  # for the published runs: 360 pixels, a key frame every 16 frames
    "reading them is slow; encode them anew: ffmpeg -i IN -vf scale=-2:360 -c:v libx264 -g 16 -keyint_min 16 "
    "-sc_threshold 0 -c:a aac OUT.mp4"
)


def check(
    root: str | Path,
    *,
    out: str | Path | None = None,
    data_set: str = "auto",
    every_picture: bool = True,
    workers: int = 8,
    timeout: float = 600.0,
    progress: bool = True,
) -> str:
    """Look at every clip of a data folder, and write the manifest, the report and a list of what is missing.

    Args:
        root: the data folder; nothing in it is changed.
        out: where to write; by default `root`, where training looks for a manifest.
        data_set: how it is laid out, one of `find.DATA_SETS`; "auto" tells by its files.
        every_picture: decode all pictures; else key frames only, faster and blind to damage in between.
        workers: processes that decode; 0 decodes in this one.
        timeout: seconds that a clip may take.
        progress: show a progress bar.

    Returns:
        The report, for people, with a few names of each kind; the file has all of them.

    Raises:
        ValueError: the folder is not laid out as its data set should be, holds shards or no clip, or another
            check of it is under way.
    """
    root, out = Path(root), Path(root if out is None else out)
    if manifest.has_manifest(root) and any(entry.start >= 0 for entry in manifest.read_entries(root)):
        raise ValueError(f"{root} holds shards: check the folder that they were made of")
    listing = list_data(root, data_set)
    clips = list(listing.clips())
    if not clips:
        raise ValueError(f"folder {root} has no clip to check: {'; '.join(listing.summary())}")
    header = Header(
        name=listing.name,
        classes={name: list(names) for name, names in listing.classes.items()},
        expected=dict(listing.expected),
        missing=listing.count_missing(),
        test_list=listing.test_list,
    )
    out.mkdir(parents=True, exist_ok=True)
    with _journal(out) as (known, note):
        look = partial(_look, root, every_picture)
        ready = [_known(known, root, clip, every_picture) for _, clip in clips]
        todo = [at for at, entry in enumerate(ready) if entry is None]
        bar = dict(total=len(ready), initial=len(ready) - len(todo), desc="Checking", unit="clip")
        with WorkerPool(look, workers, timeout=timeout, memory=MEMORY) as pool:
            looked = pool.map(clips[at][1] for at in todo)
            for at, entry in zip(todo, progress_bar(looked, shown=progress, **bar), strict=True):
                is_lost = isinstance(entry, WorkerFailure)
                ready[at] = _failed(root, clips[at][1], entry.reason) if is_lost else entry
                note(ready[at])
        entries = [
            replace(entry, split=split, labels=dict(clip.labels))
            for (split, clip), entry in zip(clips, ready, strict=True)
        ]
        report, whole = (describe(listing, entries, out, most) for most in (SHOWN, sys.maxsize))
        manifest.write(out, header, entries)
        missing = "".join(f"{split}\t{name}\n" for split, name in _missing(listing))
        write_text(out / MISSING, missing, errors="surrogateescape", synced=True)
        write_text(out / REPORT, whole, synced=True)
    return report


# --- looking at one clip, in a worker -----------------------------------------------------------------------


def _look(root: Path, every_picture: bool, clip: Clip) -> Entry:
    """All there is to know of a file."""
    entry = replace(_failed(root, clip, None), every_picture=every_picture, generation=GENERATION)
    try:
        if clip.path.is_file():  # reading from a pipe or a device would wait for ever
            with open(clip.path, "rb") as file:
                entry = replace(entry, sha256=hashlib.file_digest(file, "sha256").hexdigest())
        with clip.open() as reader:
            entry = replace(entry, **reader.streams._asdict())
            return replace(entry, **reader.survey(every_picture=every_picture))
    except ClipError as error:
        return replace(entry, error=error.reason)
    except OSError as error:
        return replace(entry, error=f"cannot be opened: {error.strerror}")


def _failed(root: Path, clip: Clip, reason: str | None) -> Entry:
    """A file of which only its name is known, and its size if it has one."""
    try:
        state = clip.path.stat()
    except OSError:
        state = None
    return Entry(
        path=clip.path.relative_to(root).as_posix(),
        split="",
        labels={},
        bytes=state.st_size if state else 0,
        modified=state.st_mtime_ns if state else 0,
        error=reason,
    )


# --- the journal --------------------------------------------------------------------------------------------


@contextmanager
def _journal(out: Path) -> Iterator[tuple[dict[str, Entry], Callable[[Entry], None]]]:
    """What is known from before, by path, and what to call with each new entry. The journal is gone once all
    is written.
    """
    path = out / JOURNAL
    if path.is_symlink():
        raise ValueError(f"{path} is a link: it is not written to")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: it is not written to")
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        lock(file, f"folder {out} is being checked by another process")
        known = {}
        with suppress(ValueError):  # of an older manifest what can be read
            if manifest.has_manifest(out):
                manifest.read_header(out)
                for entry in manifest.read_entries(out):
                    known[entry.path] = entry
        file.seek(0)
        for line in file:
            try:
                entry = manifest.parse(line)
            except ValueError:  # half written when it was killed
                continue
            known[entry.path] = entry
        file.write("\n")  # ends such a line

        def note(entry: Entry) -> None:
            file.write(manifest.dump(entry) + "\n")
            file.flush()

        yield known, note
        path.unlink()


def _known(known: dict[str, Entry], root: Path, clip: Clip, every_picture: bool) -> Entry | None:
    """The entry of a file that has not changed since it was looked at as closely."""
    entry = known.get(clip.path.relative_to(root).as_posix())
    if entry is None or not entry.sha256 or every_picture > entry.every_picture:
        return None
    if entry.generation != GENERATION:
        return None
    now = _failed(root, clip, None)
    return entry if (now.bytes, now.modified) == (entry.bytes, entry.modified) else None


def _missing(listing: Listing) -> Iterator[tuple[str, str]]:
    return ((split, name) for split, names in listing.missing.items() for name in names)


# --- the report ---------------------------------------------------------------------------------------------


def describe(listing: Listing, entries: list[Entry], out: Path, most: int) -> str:
    """The report: what is there, and what is amiss with what to do about it, the gravest first, with `most`
    names each.
    """
    good = [entry for entry in entries if entry.error is None]
    lines = [
        listing.coverage(),
        f"{len(entries)} clips looked at, {sum(entry.seconds for entry in good) / 3600:.2f} hours, "
        f"{sum(entry.bytes for entry in entries) / 1e9:.2f} GB; {len(good)} can be decoded"
        + ("" if all(entry.every_picture for entry in entries) else " (of some only key frames were)"),
        *listing.notes,
        *_folders(listing, entries),
    ]
    broken = [f"{entry.path}: {entry.error}" for entry in entries if entry.error is not None]
    missing = [f"{split}: {name}" for split, name in _missing(listing)]
    for what, names, advice in (
        (f"cannot be decoded; {STOPS}", broken, REPAIR),
        ("are missing", missing, COMPARE.format(out / MISSING)),
        ("are in two splits with the same content", _leaks(good), LEAKED),
        *listing.amiss(),
        *_odd(good),
    ):
        if names:
            lines += ["", f"{len(names)} {what}", *(f"    {printable(name)}" for name in names[:most])]
            lines += [f"    and {len(names) - most} more"] if len(names) > most else []
            lines.append(f"  -> {advice}")
    if listing.extra:
        lines += ["", f"{listing.extra} videos in the folder are in no list, and not used"]
    lines += [line for other in listing.others() for line in ("", other)]
    return "\n".join(map(printable, lines)) + "\n"


def _folders(listing: Listing, entries: list[Entry]) -> list[str]:
    """What a classifier would take for the classes of a plain folder, if all its clips lie in sub-folders."""
    if listing.classes:
        return []
    folders = split_folders(listing.root)
    below = [(listing.root / e.path).relative_to(folders[e.split]).parts for e in entries]
    counts = Counter(parts[0] for parts in below if len(parts) > 1)
    return described(dict(sorted(counts.items()))) if counts.total() == len(below) else []


def _odd(good: list[Entry]) -> Iterator[tuple[str, list[str], str]]:
    """What is odd about clips that can be decoded: what it is, the names, and what to do about it."""
    heard, seen = ([e for e in good if getattr(e, stream)] for stream in ("audio", "video"))
    yield "have no sound", [e.path for e in good if not e.audio], DROPPED
    yield "have no pictures", [e.path for e in good if not e.video], DROPPED
    mute = [e for e in heard if e.peak < SILENT]
    cancelled = [e.path for e in mute if (e.loudest or 0.0) >= SILENT]
    yield (
        "have channels that cancel each other: their mean, which is what is read, is silent",
        cancelled,
        MONO,
    )
    silent = [e.path for e in mute if (e.loudest or 0.0) < SILENT]
    yield f"are silent (peak below {SILENT:g})", silent, USED
    apart = [e for e in seen if e.audio and abs(e.picture_end - e.sound_end) > APART]
    ends = [f"{e.path} (pictures end at {e.picture_end:.1f} s, sound at {e.sound_end:.1f} s)" for e in apart]
    yield "have pictures and sound of unequal length", ends, UNEQUAL
    yield "have times that go back, as where files were joined", [e.path for e in good if e.goes_back], JOINED
    still = [e.path for e in seen if e.motion is not None and e.motion < STILL]
    yield "show one still picture", still, USED
    far = [f"{e.path} ({e.key_frame_every})" for e in seen if e.key_frame_every > FAR]
    yield f"have up to more than {FAR} frames between key frames", far, SLOW
    large = [f"{e.path} ({e.width} x {e.height})" for e in seen if min(e.width, e.height) > LARGE]
    yield f"are larger than {LARGE} pixels", large, SLOW


def _leaks(entries: list[Entry]) -> list[str]:
    """Clips with the same bytes in several splits."""
    splits, first = defaultdict(set), {}
    for entry in entries:
        splits[entry.sha256].add(entry.split)
        first.setdefault((entry.sha256, entry.split), entry.path)
    return [
        " = ".join(f"{split}: {first[sha256, split]}" for split in sorted(names))
        for sha256, names in splits.items()
        if len(names) > 1
    ]
