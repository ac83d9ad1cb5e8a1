"""The index.html of a run: `python -m avfuse.report RUN`."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from .files import printable
from .training.report import write_report


def main(run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]) -> None:
    """Write RUN/index.html: how far a training run is, its curves, probe, pictures, unreadable clips.

    Training writes this page by itself; use this for a run that is going on, or that crashed. It reads what
    the folder holds and changes nothing but index.html. Open the page in any browser: it needs no server.

    Args:
        run: Run folder, as given to `python -m avfuse.train --run-dir`.
    """
    print(printable(write_report(run)))


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m avfuse.report")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(error)}")
