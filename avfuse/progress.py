"""How far a long piece of work is, for people."""

import math
import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(iterable: Iterable | None = None, *, shown: bool = True, **options) -> tqdm:
    """tqdm's bar on a terminal; elsewhere, such as in a log file, a line for every tenth of the way.

    Args:
        iterable, options: as for tqdm. A bar that it would not `leave` on the screen has no lines.
        shown: whether there is anything to see.
    """
    shown = shown and sys.stderr is not None  # as it is where whoever began the process has closed it
    if not (sys.stderr and sys.stderr.isatty()) and (shown := shown and options.get("leave", True)):
        total = options["total"] if "total" in options else len(iterable)
        options |= dict(file=Lines(), miniters=max(1, total // 10), mininterval=0, maxinterval=math.inf)
        options |= dict(bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed}{postfix}")
    return tqdm(iterable, disable=not shown, **options)


class Lines:
    """Standard error, on which each state of a bar is a line of its own."""

    last = ""

    def write(self, text: str) -> None:
        if text.strip() not in ("", self.last):  # a bar says the last one twice
            self.last = text.strip()
            sys.stderr.write(f"{self.last}\n")

    def flush(self) -> None:
        sys.stderr.flush()
