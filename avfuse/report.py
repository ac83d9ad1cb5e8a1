"""The index.html of a run: `python -m avfuse.report RUN`."""

from .command import begin, read
from .options import run_folder

if __name__ == "__main__":
    begin("avfuse.report", read(run_folder))

from pathlib import Path

from .files import printable
from .training.report import write_report


def main(run: Path) -> None:
    """Writes RUN/index.html, and says where it is.

    Raises:
        ValueError: the folder is not that of a run.
    """
    print(printable(write_report(run)))
