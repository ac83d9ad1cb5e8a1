"""The folder of a run: whose it is, its settings and data, its metrics, the clips that could not be read."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from ..data.clips import Clip, Failure
from ..data.container import ClipError
from ..data.find import Found
from ..data.hold_out import Sides, size_of
from ..data.sets.folders import TESTS
from ..files import (
    address,
    append_row,
    lock,
    printable,
    read_rows,
    some,
    sweep,
    write_json,
    write_rows,
    write_text,
)
from ..inputs import InputSettings
from ..pretrained import CONFIG, WEIGHTS
from ..rules import marks, option
from .checkpoints import list_checkpoints
from .faults import RunError
from .settings import FRESH, RUN_FILES, Formerly, LoopConfig, settings_of

HELD_OUT = "held-out.txt"  # the clips that were, where the data name none to test on
SIDES = "sides.json"  # these and those that were trained on, for the runs that begin with this one
(FILE, FILE_BEFORE), LOCK = RUN_FILES, ".lock"
NAMED = 20  # unreadable clips that are named on the terminal
CONTENTS = (  # of the folder, beside that file
    "index.html metrics.jsonl neighbours.jsonl quarantine.jsonl results.json held-out.txt sides.json "
    "checkpoints faults model pictures sounds tensorboard"
).split()


def check_run(config: LoopConfig) -> LoopConfig:
    """Whether a run with these settings may use its folder; nothing is written or deleted. Returns them, as
    those of an older run that goes on.

    Raises:
        ValueError: it is no folder, belongs to something else, or holds a run with other settings.
    """
    check_place(config)
    before = read_run(config.run)
    is_model = (config.run / WEIGHTS).is_file() and (config.run / CONFIG).is_file()
    if is_model and not (before and file_of(config.run).name == CONFIG):
        raise ValueError(
            f"--run-dir {printable(config.run)} is the folder of a saved model ({WEIGHTS}), which would be "
            "loaded in place of the one that is trained: move it away"
        )
    if not before:
        check_no_remains(config)
        return config
    if config.restart:
        check_restart(config)
        return config
    return check_settings(config, before)


def check_place(config: LoopConfig) -> None:
    """Raises ValueError unless the folder can be made, or written to."""
    run = config.run
    try:
        str(run).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--run-dir {printable(run)} has a name that is not UTF-8") from error
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run-dir {printable(run)} is not a folder")
    if config.data is not None and run.resolve() == config.data.resolve():
        raise ValueError(f"--run-dir {printable(run)} is the folder of --data: give it its own")
    above = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        why = "is read-only" if above.is_dir() else "is not a folder"
        raise ValueError(f"--run-dir {printable(run)} cannot be written: {printable(above)} {why}")
    for name in (LOCK, FILE, FILE_BEFORE, "metrics.jsonl", "quarantine.jsonl"):
        if os.path.lexists(run / name) and not (run / name).is_file():  # a pipe would be waited for
            raise ValueError(f"--run-dir {printable(run)}: {name} is no regular file")


def check_no_remains(config: LoopConfig) -> None:
    """Raises ValueError if a folder without a run holds what would be taken for that of one, or deleted."""
    run = config.run
    there = (path.name for path in run.iterdir()) if run.exists() else ()
    others = [name for name in there if name != LOCK and not re.fullmatch(r"\..*\.part", name)]
    if others and config.restart:
        raise ValueError(f"--run-dir {printable(run)} is not a run folder (no {FILE}): not deleting it")
    if "checkpoints" in others:
        raise ValueError(f"--run-dir {printable(run)} holds checkpoints of a run whose {FILE} is gone")
    if lost := sorted({*others} & {*CONTENTS}):
        raise ValueError(
            f"--run-dir {printable(run)} is not a run folder (no {FILE}), but holds {some(lost)}"
        )


def check_restart(config: LoopConfig) -> None:
    """Raises ValueError if a restart would delete links, or the weights that it is to begin with."""
    run, checkpoint = config.run, Path(getattr(config, "checkpoint", FRESH))
    kept = {checkpoint.resolve(), *checkpoint.resolve().parents}
    deleted = {(run / name).resolve() for name in CONTENTS}
    if checkpoint.exists() and (kept & deleted or checkpoint.resolve() == run.resolve()):
        raise ValueError(f"--restart would delete --checkpoint {printable(checkpoint)}")
    for name in (*CONTENTS, file_of(run).name):
        if (run / name).is_symlink():
            raise ValueError(f"--restart does not delete links: {printable(run / name)} is one")


def check_settings(config: LoopConfig, before: dict) -> LoopConfig:
    """The settings, with those of an older run that goes on; ValueError naming what differs from its own."""
    run, former = config.run, former_settings(config, before)
    config = replace(config, **former)
    if lacking := sorted(settings_of(config, fixed=True).keys() - before["settings"].keys() - former.keys()):
        raise ValueError(
            f"--run-dir {printable(run)} holds a run of another command or version (it has no "
            f"{some([option(type(config), name) for name in lacking])}): {instead(config, before)}"
        )
    differences = ", ".join(
        printable(f"{option(type(config), name)} {before['settings'].get(name)} -> {value}")
        for name, value in sorted(settings_of(config, fixed=True).items())
        if not is_same(before["settings"].get(name, former.get(name)), value)
    )
    if differences:
        raise ValueError(
            f"--run-dir {printable(run)} holds a run with other settings ({differences}): give it its own to "
            f"go on, or {instead(config, before)}"
        )
    return config


def is_same(then: object, now: object) -> bool:
    """Whether a setting has not changed; a checkpoint may be spelled in another way."""
    if then == now or not (isinstance(then, str) and isinstance(now, str)):
        return then == now
    return os.path.isdir(then) and os.path.isdir(now) and os.path.samefile(then, now)


def former_settings(config: LoopConfig, before: dict) -> dict:
    """The settings that there were not yet when a run began, with what it does instead."""
    former = {name: mark.value for name, mark in marks(type(config)) if isinstance(mark, Formerly)}
    return {name: value for name, value in former.items() if name not in before["settings"]}


def instead(config: LoopConfig, before: dict) -> str:
    """What to do where a folder holds another run; one on other data is not offered for deletion."""
    other = "choose another --run-dir"
    if (config.run / "model").is_dir():
        other += f" (with --checkpoint {printable(config.run)} to begin with this model)"
    is_same = before["settings"].get("data") == settings_of(config)["data"]
    return other + (", or --restart to delete it" if is_same else "")


def whats_new(config: LoopConfig, clips: Sequence[Clip]) -> str:
    """The names of the clips that a run did not have, if it is on record which it had."""
    if (before := read_sides(config.run)) is None:
        return ""
    sides = zip(clips, before.of(clips, config.data or Path()), strict=True)
    new = [clip.path for clip, side in sides if side is None]
    return f"; new: {some(new)}" if new else ""


def has_begun(run: Path) -> bool:
    """Whether a run has left anything that depends on its clips. One that has stopped before, because too
    many could not be read, begins with those that there are now.
    """
    return bool(list_checkpoints(run)) or (run / "results.json").exists()


def begin_run(
    config: LoopConfig,
    found: Found,
    device: torch.device,
    processes: int = 1,
    extended_at: int = 0,
    inputs: dict | None = None,
) -> IO:
    """Makes the run folder this run's own, for as long as the file that is returned stays open. A restart
    deletes what a run writes, and nothing else. `extended_at` is as for `warmup_cosine`; `inputs` are those
    of the model, by name.

    Raises:
        ValueError: another process is at work in it, or the data set is not that of the run it holds.
    """
    run, clips = config.run, found.train
    data, written = describe_data(clips), when_written(clips)
    if found.test and found.test is not clips:
        data["test"] = describe_data(found.test)["sha256"]
    run.mkdir(parents=True, exist_ok=True)
    file = (run / LOCK).open("a")
    lock(file, f"--run-dir {printable(run)} is in use by another process")
    check_run(config)  # another one may have begun and ended there since the first check
    for folder in run, run / "model":
        sweep(folder)
    before = {} if config.restart else read_run(run)
    if config.restart:
        for path in (run / name for name in CONTENTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif before and has_begun(run):
        known = {name: value for name, value in data.items() if name != "test" or name in before["data"]}
        if before["data"] != known:
            then, now = printable(before["data"].get("clips")), data["clips"]
            where = ", in what is tested on," if before["data"].get("sha256") == data["sha256"] else ""
            raise ValueError(
                f"--data has changed{where} since the run in {printable(run)} began ({then} clips then, {now}"
                f" now{whats_new(config, clips)}): it would not go on as it was; {instead(config, before)}"
            )
        warn_of_changes(config, before, written, processes)
    environment = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        device=str(device),
        processes=processes,
        machine=platform.machine(),
    )
    earlier = file_of(run)  # there until all else is deleted: a restart that is cut short can be repeated
    newest = max(written.values(), default=0)
    former = former_settings(config, before) if before else {}  # which stay unsaid, for the next start
    settings = {name: value for name, value in settings_of(config).items() if name not in former}
    content = dict(settings=settings, data=data, environment=environment, newest=newest, inputs=inputs)
    if extended_at:
        content |= dict(extended_at=extended_at)
    write_json(run / FILE, content)
    if earlier.name == FILE_BEFORE:  # its name is now that of models alone
        earlier.unlink()
    return file


def warn_of_changes(config: LoopConfig, before: dict, written: dict[Path, int], processes: int) -> None:
    """Tells of what may keep a run from going on as it was, and is no reason to refuse it."""
    draws = any(getattr(config, name, 0) for name in ("mixup", "drop_path", "batch_norm"))
    then = before["settings"].get("micro_batch"), before["environment"].get("processes", processes)
    if draws and then != (config.micro_batch, processes):
        tqdm.write(
            f"WARNING: losses depend on --micro-batch, which was {then[0]}, and on the number of "
            f"processes, which was {then[1]}"
        )
    changed = [path for path, time in written.items() if time > before.get("newest", math.inf)]
    if changed:  # or copied: only the times tell
        tqdm.write(
            f"WARNING: {len(changed)} files of --data have been written since the run "
            f"{printable(config.run)} began: {some(changed)}. If they hold something else now, it does not "
            "go on as it was"
        )


def file_of(run: Path) -> Path:
    """The file that says what the run in a folder is."""
    old_only = (run / FILE_BEFORE).exists() and not (run / FILE).exists()
    return run / (FILE_BEFORE if old_only else FILE)


def read_run(run: Path) -> dict:
    """The "settings" and "data" of the run in a folder, dictionaries both, its "environment", the "inputs" of
    its model (`InputSettings`), if they are on record, and at which step it was extended, if at all; {} if
    there is none.

    Raises:
        ValueError: the file that should hold them is damaged, or something else.
    """
    path = file_of(run)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = dict(data={}, environment={}, extended_at=0, inputs=None) | content
        kinds = dict(settings=dict, data=dict, extended_at=int, inputs=dict | None)
        if all(isinstance(content[name], kind) for name, kind in kinds.items()):
            return content | dict(inputs=content["inputs"] and InputSettings(**content["inputs"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{printable(path)} is damaged, or not that of a run")


# --- which clips were held out ------------------------------------------------------------------------------


def write_sides(config: LoopConfig, found: Found) -> None:
    """Puts on record which clips are held out, for people; and all clips, for runs that begin with this."""
    own, before = read_sides(config.run), read_sides(source_run(config))
    earlier = sorted((own and own.earlier) or (before and before.known) or ())
    if found.held_out:
        names = "".join(f"{clip.source or clip.path}\n" for clip in found.test)
        write_text(config.run / HELD_OUT, names, errors="surrogateescape")
    elif not earlier:
        return
    held = found[:2] if found.held_out else ((), ())  # what trains on all is told by `has_trained_on_all`
    train, test = ({c.name(config.data): size_of(c) for c in side} for side in held)
    sides = dict(said=found.test_name, train=[*train], test=[*test], sizes=train | test, earlier=earlier)
    write_json(config.run / SIDES, sides)


def run_before(config: LoopConfig) -> Path | None:
    """The folder of the run that this one goes on with, or else of that whose model it begins with."""
    source = source_run(config)
    if config.restart or not (config.run / FILE).is_file():
        return source
    was_told = (config.run / SIDES).is_file()  # a start that was killed may not have come to that
    return config.run if was_told or source is None else source


def source_run(config: LoopConfig) -> Path | None:
    """The folder of the run whose model this one begins with."""
    checkpoint = Path(getattr(config, "checkpoint", FRESH))
    runs = [checkpoint, *([checkpoint.parent] if checkpoint.name == "model" else [])]
    return next((run for run in runs if (run / FILE).is_file()), None)


def read_sides(run: Path | None) -> Sides | None:
    """Which clips a run has held out, and which not; None if none.

    Raises:
        ValueError: the file that says so is damaged.
    """
    if run is None or not (run / SIDES).is_file():
        return None
    root = read_run(run)["settings"].get("data")
    try:
        sides = json.loads((run / SIDES).read_text(encoding="utf-8"))
        return Sides(root=root, **dict(sizes={}, earlier=[]) | sides)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{printable(run / SIDES)} is damaged: {printable(repr(error))}") from error


def has_trained_on_all(run: Path, data: Path) -> bool:
    """Whether a run has trained on all clips of a folder, which it was given, or one above it."""
    above, folder = Path(str(read_run(run)["settings"].get("data"))), Path(address(data) or data.resolve())
    if (run / HELD_OUT).exists() or above not in (folder, *folder.parents):
        return False
    return "".join(folder.relative_to(above).parts[:1]).lower() not in TESTS


def describe_data(clips: Sequence[Clip]) -> dict:
    """How many clips there are, and a hash of their names, sizes, streams and labels, in order: what decides
    which clip a step reads.
    """
    common = os.path.commonpath([clip.path.parent for clip in clips])
    described = hashlib.sha256()
    for clip in clips:
        name = os.path.relpath(clip.path, common)
        size = size_of(clip)
        streams = (clip.streams.video, clip.streams.audio) if clip.streams else None
        described.update(repr((name, size, streams, sorted(clip.labels.items()))).encode())
    return dict(clips=len(clips), sha256=described.hexdigest())


def when_written(clips: Sequence[Clip]) -> dict[Path, int]:
    """File or shard -> when it was last written, nanoseconds since 1970; none of those that have gone."""
    times = {}
    for file in dict.fromkeys(clip.part.file if clip.part else clip.path for clip in clips):
        with suppress(OSError):
            times[file] = file.stat().st_mtime_ns
    return times


class MetricsFile:
    """metrics.jsonl, one object a line; on resume, rows after the checkpoint are dropped."""

    def __init__(
        self,
        path: Path,
        active: bool,
        last_step: int,
        extended_at: int = 0,
        measured_again: bool = False,
    ):
        self.path, self.active = path, active
        if active:
            options = dict(extended_at=extended_at, measured_again=measured_again)
            write_rows(path, [row for row in read_rows(path) if self.precedes(row, last_step, **options)])

    @staticmethod
    def precedes(row: dict, last_step: int, extended_at: int, measured_again: bool) -> bool:
        """Whether a row is from before the checkpoint; a run that begins anew (last_step 0) keeps none. What
        was measured at the end is measured again, but for the end of the run before it was extended; so may
        be what was measured at the checkpoint.
        """
        step, when = row.get("step"), row.get("when")
        if type(step) is not int or last_step == 0 or step > last_step:
            return False
        if when == "after":
            return step <= extended_at
        return when != "during" or step < last_step or not measured_again

    def write(self, **row) -> None:
        if self.active:
            append_row(self.path, row)


class TooManyUnreadable(RunError):
    """More clips could not be read than a run may lose."""


def are_too_many(unreadable: int, share: float, clips: int) -> bool:
    """Whether these are more than a share of the clips; 29 are no more than 0.29 of 100."""
    return unreadable > share * clips + 1e-6


class Quarantine:
    """Names and counts the clips that could not be read; they are left out of their batch, never replaced.

    The file keeps all that was ever found; the share that a run may lose is counted from this start on, so
    that a disk which was away for a while does not end the run for good.
    """

    def __init__(self, path: Path, active: bool, clips: int, max_share: float):
        self.path, self.active, self.clips, self.max_share = path, active, clips, max_share
        self.reasons: dict[str, str] = {}
        rows = [row for row in read_rows(path) if {"path", "reason"} <= row.keys()]
        self.written = {row["path"] for row in rows}
        if active and path.exists():  # drops what a killed process left half written
            write_rows(path, rows)

    def add(self, when: str, failures: Iterable[Failure | ClipError]) -> None:
        """Puts failures on record; every process is told of all, one of them (`active`) writes.

        Raises:
            TooManyUnreadable: by now more than the share that a run may lose.
        """
        for failure in failures:
            path = str(failure.path)
            if path in self.reasons:
                continue
            self.reasons[path] = failure.reason
            if self.active:
                self.say(failure)
            if self.active and path not in self.written:
                append_row(self.path, dict(when=when, path=path, reason=failure.reason))
        if are_too_many(len(self.reasons), self.max_share, self.clips):
            share = math.ceil(100 * len(self.reasons) / self.clips) / 100
            raise TooManyUnreadable(
                f"{len(self.reasons)} of {self.clips} clips could not be read, more than --max-unreadable "
                f"{self.max_share:g}: see {self.path}. Once they can be, or with --max-unreadable {share:g}, "
                "the same command goes on"
            )

    def say(self, failure: Failure | ClipError) -> None:
        if len(self.reasons) <= NAMED:
            more = f" (all others are named in {self.path})" if len(self.reasons) == NAMED else ""
            tqdm.write(printable(f"cannot read {failure.path}: {failure.reason}{more}"))

    def summary(self) -> str:
        if not self.reasons:
            return "every clip could be read"
        names = some(sorted(self.reasons), most=10)
        return f"{len(self.reasons)} clips could not be read, see {printable(self.path)}: {names}"
