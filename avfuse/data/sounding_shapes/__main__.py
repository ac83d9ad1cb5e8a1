"""Write Sounding Shapes into a folder: `python -m avfuse.data.sounding_shapes OUT`."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ...command import begin, read
from .build import Settings, generate


@dataclass(frozen=True)
class Command:
    """Generate Sounding Shapes: H.264 + AAC clips of moving shapes, one of which sounds, with labels, masks.

    Interrupted, it goes on where it was when it is called again with the same settings.
    """

    root: Path
    """Folder for the data set; made if need be."""
    settings: Settings
    workers: int | None = None
    """Processes; one per core by default."""
    contact_sheet: bool = True
    """Draw some clips with their sounds into contact_sheet.png in that folder."""


def main(command: Command) -> None:
    from .sheet import contact_sheet  # brings matplotlib

    generate(command.root, workers=command.workers, **asdict(command.settings))
    if command.contact_sheet:
        print(contact_sheet(command.root, command.root / "contact_sheet.png"))


if __name__ == "__main__":
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    begin("avfuse.data.sounding_shapes", read(Command, config=config), main)
