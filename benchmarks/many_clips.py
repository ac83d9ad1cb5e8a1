"""Does a data set of 100,000 clips start quickly, and does reading it fill the memory?

The clips are links to a few, listed in a manifest as `python -m avfuse.data check` writes it: what is
measured is the handling of clips, not the disk.
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import measure
import torch
from tables import aligned
from torch.utils.data import BatchSampler

from avfuse import InputSettings
from avfuse.data import manifest, sounding_shapes
from avfuse.data.clips import ClipDataset, ClipLoader, ClipSampler
from avfuse.data.find import find_data

FILES = 8  # that the links lead to
BATCH = 32
MIB = 2**20


@dataclass(frozen=True)
class Options(measure.FileOptions):
    """Start-up time and memory of reading a data set, by its number of clips and by how many were decoded.

    Memory is that which a process shares with no other, of the main process and of one reader.
    """

    rows: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Clips in the manifest."""
    decoded: tuple[int, ...] = (100, 1_000, 2_000, 4_000)
    """After how many decoded clips the memory is measured, in rising order; an epoch at most."""


def main(options: Options) -> dict:
    options = replace(options, out=options.out or measure.RESULTS / "many_clips-cpu.json")
    record = measure.begin_record("many_clips", asdict(options) | {"device": "cpu"}, options.note)
    record["rows"] = {}
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_data_set(Path(folder), rows)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                record["rows"][rows] = fresh.submit(measure_rows, folder, options.decoded).result()
        print(f"{rows:,} clips: {record['rows'][rows]}", flush=True)
    print(aligned(table(measure.write_record(options.out, record))))
    return record


def write_data_set(root: Path, rows: int) -> None:
    """`rows` links to a few short clips, and the manifest that names them."""
    few = root / "few"
    sounding_shapes.generate(few, train=FILES, test=0, size=64, seconds=1.0, progress=False)
    clips = find_data(few, lambda line: None, progress=False, workers=0).train
    entries = []
    for row in range(rows):
        clip = clips[row % FILES]
        path = Path("train", f"{row // 1000:04d}", f"{row:07d}.mp4")
        (root / path.parent).mkdir(parents=True, exist_ok=True)
        os.link(clip.path, root / path)
        stat = os.stat(clip.path)
        entries.append(
            manifest.Entry(
                path=path.as_posix(),
                split="train",
                labels={},
                bytes=stat.st_size,
                modified=stat.st_mtime_ns,
                **clip.streams._asdict(),
            )
        )
    manifest.write(root, manifest.Header(expected={"train": rows}), entries)


def measure_rows(root: str, moments: tuple[int, ...]) -> dict:
    """Seconds until the clips are found and until the first batch is there, and memory by clips decoded."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = find_data(root, lambda line: None, progress=False)
    result = dict(seconds_to_find=round(time.perf_counter() - began, 2), memory=[])
    dataset = ClipDataset(found.train, InputSettings(), train=True)
    sampler, read, moments = ClipSampler(dataset, train=True), 0, list(moments)
    with ClipLoader(dataset, workers=1) as loader:
        for batch in loader.batches(BatchSampler(sampler, BATCH, drop_last=False)):
            if not read:
                result["seconds_to_first_batch"] = round(time.perf_counter() - began, 2)
            if batch["failures"]:
                raise ValueError(f"{batch['failures'][0].path.name} cannot be read")
            read += len(batch["index"])
            if read >= moments[0]:
                (reader,) = (child.pid for child in multiprocessing.active_children())
                mib = {
                    name: own_memory(pid) / MIB for name, pid in (("main", os.getpid()), ("reader", reader))
                }
                result["memory"].append(dict(decoded=read, **{name: round(m, 1) for name, m in mib.items()}))
                moments = [moment for moment in moments if moment > read]
            if not moments:
                break
    return result


def own_memory(pid: int) -> int:
    """Bytes that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def table(record: dict) -> list[tuple]:
    """A row for each number of clips and each moment at which memory was measured."""
    rows = [("clips", "found after", "first batch after", "decoded", "main process", "reader")]
    for clips, result in record["rows"].items():
        start = f"{int(clips):,}", f"{result['seconds_to_find']} s", f"{result['seconds_to_first_batch']} s"
        for moment in result["memory"]:
            memory = (f"{moment[process]:.0f} MiB" for process in ("main", "reader"))
            rows.append((*start, f"{moment['decoded']:,}", *memory))
            start = "", "", ""
    return rows


def summary(record: dict) -> str:
    clips, result = max(record["rows"].items(), key=lambda row: int(row[0]))
    first, last = result["memory"][0], result["memory"][-1]
    return (
        f"{int(clips):,} clips in a manifest are found in {result['seconds_to_find']:.0f} s, and the first "
        f"batch is there after {result['seconds_to_first_batch']:.0f} s; a reader has "
        f"{first['reader']:.0f} MiB of its own after {first['decoded']:,} decoded clips and "
        f"{last['reader']:.0f} MiB after {last['decoded']:,}."
    )


if __name__ == "__main__":
    measure.run(main, Options)
