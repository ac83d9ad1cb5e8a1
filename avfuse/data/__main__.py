"""Prepare a data folder: `python -m avfuse.data check PATH`, `python -m avfuse.data shard PATH OUT`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..choices import DataSet
from ..command import SAID, begin, read
from ..rules import COUNT, NOT_NEGATIVE, SECONDS, check_rules

FORMER = {"--timeout": "--clip-timeout", "--pictures": "--decode"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """Decode every clip of a data folder once, and write a manifest that training reads instead of the files'
    headers, with a report of what is missing, broken or odd, and what to do about it.

    Interrupted, it goes on where it was when it is called again; later it opens only what has changed.
    """

    path: tyro.conf.Positional[Path]
    """The data folder."""
    out: Annotated[Path | None, SAID] = None
    """Where to write. Default: into the folder, where training looks for the manifest."""
    data_set: DataSet = "auto"
    """How the folder is laid out; auto tells by its files."""
    decode: Literal["all", "key-frames"] = "all"
    """Which pictures: key frames alone take a fraction of the time, and miss damage in between."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"]), NOT_NEGATIVE] = 8
    """Processes that decode."""
    clip_timeout: Annotated[float, SECONDS] = 600.0
    """Seconds that a clip may take."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Show no progress."""

    __post_init__ = check_rules


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Write the clips of a data folder that has a manifest into tar shards (WebDataset), which training reads
    like any folder: `python -m avfuse.train --data OUT`.

    Interrupted, it goes on where it was when it is called again.
    """

    path: tyro.conf.Positional[Path]
    """The data folder; `check` it first."""
    out: tyro.conf.Positional[Path]
    """Folder for the shards; made if need be."""
    megabytes: Annotated[int, COUNT] = 1000
    """Size of a shard, about."""
    seed: int = 0
    """Of the order in which clips are dealt to shards."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"]), NOT_NEGATIVE] = 4
    """Processes that write."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Show no progress."""

    __post_init__ = check_rules


def parse(args: Sequence[str], prog: str) -> Check | Shard:
    """The command line, in which the names that options had before are taken, too."""
    args = [FORMER.get(name, name) + sign + value for name, sign, value in (a.partition("=") for a in args)]
    kinds = Annotated[Check, tyro.conf.subcommand("check")] | Annotated[Shard, tyro.conf.subcommand("shard")]
    return read(kinds, description=__doc__)(args=args, prog=prog)


def main(command: Check | Shard) -> None:
    from .check import check  # these bring torch
    from .shards import shard

    options = dict(workers=command.workers, progress=not command.quiet)
    try:
        if isinstance(command, Check):
            options |= dict(out=command.out, data_set=command.data_set, timeout=command.clip_timeout)
            print(check(command.path, every_picture=command.decode == "all", **options))
        else:
            options |= dict(size=command.megabytes * 10**6, seed=command.seed)
            print(shard(command.path, command.out, **options))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    begin("avfuse.data", parse, main)
