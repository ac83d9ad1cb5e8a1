"""What the benchmarks with a page of their own share: their cells are trained, kept in a file and shown."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from measure import RESULTS, ROOT, begin_record, write_record
from plots import digest, save
from tables import filled, markdown, terminal
from tqdm import tqdm


@dataclass(frozen=True)
class CellOptions:
    """What every one of them can be given."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, masks and order; what is trained and judged on is the same for all."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that train cells side by side, one thread each."""
    report: bool = False
    """Only write the page, and its plot, from the result file."""


class Page(NamedTuple):
    """Where the cells of a benchmark are kept, and how they are shown."""

    name: str  # of the benchmark and its page
    keys: tuple[str, ...]  # of a cell, the seed last; options that are their plurals choose which to do
    parts: Callable[[dict], list]  # what the page says of a record
    draw: Callable[[dict], Figure] | None = None
    device: str = "cpu"  # which trains the cells

    @property
    def path(self) -> Path:
        return ROOT / f"benchmarks/{self.name}.md"

    @property
    def result(self) -> Path:
        """The file that is shown: of cells that a GPU has trained, if there are any."""
        on_gpu = self.file("cuda")
        return on_gpu if on_gpu.exists() else self.file("cpu")

    def file(self, device: str) -> Path:
        return RESULTS / f"{self.name}-{device}.json"

    @property
    def title(self) -> str:
        """Of the section and the plot."""
        return self.name.replace("_", "-")

    def sections(self, record: dict) -> dict[str, str]:
        """What the section of the page should hold."""
        return {self.title: markdown(self.parts(record))}

    def plots(self, record: dict) -> dict[Path, tuple]:
        if self.draw is None:
            return {}
        return {ROOT / f"docs/{self.title}.png": (digest(record), partial(self.draw, record))}

    def write(self) -> dict:
        """Page and plot anew from the result file, which is returned."""
        record = json.loads(self.result.read_text())
        self.path.write_text(filled(self.path.read_text(), self.sections(record)))
        save(self.plots(record))
        return record

    def show(self) -> None:
        """Writes the page, and prints its tables."""
        print(terminal(part for part in self.parts(self.write()) if not isinstance(part, str)))

    def fixed(self, options: CellOptions) -> dict:
        """The options that must not differ between the cells of a file."""
        free = {"workers", "report", *(f"{key.removesuffix('s')}s" for key in self.keys)}
        return {name: value for name, value in asdict(options).items() if name not in free}

    def train(
        self, options: CellOptions, cells: list[tuple], train_cell: Callable[..., dict], **settings
    ) -> None:
        """Trains the cells that the file of `device` lacks, adds each to it as it ends, and writes the page.

        Args:
            cells: values that make a cell, whose names are in `keys`.
            train_cell: called with options and a cell, gives its results by name.
            settings: more that must not differ between the cells of a file.
        """
        fixed = self.fixed(options) | dict(device=self.device) | settings
        fixed = json.loads(json.dumps(fixed))  # as they come back from the file
        record, file = begin_record(self.name, fixed, "") | dict(cells=[]), self.file(self.device)
        if file.exists():
            before = json.loads(file.read_text())
            if before["settings"] != fixed:
                raise ValueError(
                    f"{file.name} holds cells of other settings {before['settings']}: move it away"
                )
            record["cells"] = before["cells"]
        done = {tuple(cell[key] for key in self.keys) for cell in record["cells"]}
        missing = [cell for cell in cells if cell not in done]
        if not missing:
            return
        bar = tqdm(desc="cells", unit="cell", initial=len(cells) - len(missing), total=len(cells))
        with processes(min(options.workers, len(missing))) as pool:
            try:
                for ended in as_completed([pool.submit(train_cell, options, cell) for cell in missing]):
                    record["cells"].append(ended.result() | dict(commit=record["commit"]))
                    write_record(file, record)
                    self.write()
                    bar.update()
            finally:  # a cell that failed, or Ctrl-C: begin no other
                pool.shutdown(cancel_futures=True)


def processes(count: int) -> ProcessPoolExecutor:
    """Fresh ones of one thread each: a fork of a process with threads may hang."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def by_seed(cells: Iterable[dict], value: str, *keys: str) -> dict[tuple, list[float]]:
    """Values of the cells that share these keys, in the order of their seeds."""
    found = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        found.setdefault(tuple(cell[key] for key in keys), []).append(cell[value])
    return found
