"""Write Sounding Shapes into a folder: `python -m avfuse.data.sounding_shapes OUT`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...command import begin, read
from ...rules import COUNT, check_rules
from .build import Settings, generate


@dataclass(frozen=True)
class Command:
    """Generate Sounding Shapes: H.264 + AAC clips of shapes, one of which sounds, with labels, masks.

    Interrupted, it goes on where it was when it is called again with the same settings.
    """

    root: Path
    """Folder for the data set; made if need be."""
    settings: Settings
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"], help_behavior_hint=""), COUNT] = None
    """Processes. Default: one per core."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Show no progress."""
    contact_sheet: bool = True
    """Draw some clips with their sounds into contact_sheet.png in that folder."""

    __post_init__ = check_rules


def main(command: Command) -> None:
    from .sheet import contact_sheet  # brings matplotlib

    options = dict(workers=command.workers, progress=not command.quiet)
    generate(command.root, **options, **asdict(command.settings))
    if command.contact_sheet:
        print(contact_sheet(command.root, command.root / "contact_sheet.png"))


if __name__ == "__main__":
    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    begin("avfuse.data.sounding_shapes", read(Command, *markers), main)
