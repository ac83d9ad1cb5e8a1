"""The folder of a run: whose it is, its checkpoints, its metrics, and the clips that could not be read."""

import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data.clips import Failure
from .data.decode import ClipError

CONFIG = "config.json"
CONTENTS = (CONFIG, "metrics.jsonl", "quarantine.jsonl", "checkpoints", "pictures", "tensorboard", "model")


def check_run(run: Path, settings: dict, restart: bool) -> None:
    """Whether a run with these settings may use the folder; nothing is written or deleted.

    Raises:
        ValueError: it is no folder, belongs to something else, or holds a run with other settings.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run {run} is not a folder")
    if not (run / CONFIG).exists():
        if restart and run.exists() and any(run.iterdir()):
            raise ValueError(f"--run {run} is not a run folder (no {CONFIG}): not deleting it")
        return
    before = read_settings(run)
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed and not restart:
        differences = ", ".join(
            f"--{name.replace('_', '-')} {before.get(name)} -> {settings[name]}" for name in changed
        )
        raise ValueError(
            f"--run {run} holds a run with other settings ({differences}): "
            "choose another --run, or --restart to delete it"
        )


def begin_run(run: Path, settings: dict, restart: bool, device: torch.device) -> None:
    """Makes the run folder this run's own. A restart deletes what a run writes, and nothing else."""
    if restart:
        for name in CONTENTS:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    environment = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        device=str(device),
        machine=platform.machine(),
    )
    partial = run / f".{CONFIG}"
    partial.write_text(json.dumps(dict(settings=settings, environment=environment), indent=2) + "\n")
    os.replace(partial, run / CONFIG)


def read_settings(run: Path) -> dict:
    """The settings in the config.json of a run."""
    try:
        return json.loads((run / CONFIG).read_text())["settings"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run / CONFIG} is damaged, or not the configuration of a run") from error


def save_checkpoint(accelerator: Accelerator, run: Path, epoch: int) -> None:
    """Written aside and renamed, so that a checkpoint is whole or not there; then the older one goes."""
    final = run / "checkpoints" / f"epoch-{epoch:05d}"
    partial = final.with_suffix(".partial")
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, final)
        for other in final.parent.iterdir():
            if other != final:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, if there is any."""
    found = [path for path in (run / "checkpoints").glob("epoch-*") if path.name[6:].isdecimal()]
    return max(found, key=epoch_of, default=None)


def epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("epoch-"))


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON lines file; a line that a killed process left half written is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class MetricsFile:
    """metrics.jsonl, one object a line; on resume, rows after the checkpoint are dropped."""

    def __init__(self, path: Path, active: bool, last_step: int):
        self.path, self.active = path, active
        if active:
            kept = [row for row in read_rows(path) if self.precedes(row, last_step)]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    @staticmethod
    def precedes(row: dict, last_step: int) -> bool:
        """Whether a row is from before the checkpoint; a run that begins anew (last_step 0) keeps none."""
        return last_step > 0 and row["step"] <= last_step and row.get("when") != "after"

    def write(self, **row) -> None:
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class Quarantine:
    """Names and counts the clips that could not be read; they are left out of their batch, never replaced."""

    def __init__(self, path: Path):
        self.path = path
        self.reasons = {row["path"]: row["reason"] for row in read_rows(path)}

    def add(self, when: str, failures: Iterable[Failure | ClipError]) -> None:
        for failure in failures:
            path = str(failure.path)
            if path in self.reasons:
                continue
            tqdm.write(f"cannot read {path}: {failure.reason}")
            self.reasons[path] = failure.reason
            with self.path.open("a") as file:
                file.write(json.dumps(dict(when=when, path=path, reason=failure.reason)) + "\n")

    def watch(self, loader: DataLoader, when: str) -> Iterator[dict]:
        """The batches of a loader, with their failures put on record."""
        for batch in loader:
            self.add(when, batch["failures"])
            yield batch

    def summary(self) -> str:
        if not self.reasons:
            return "every clip could be read"
        names = ", ".join(sorted(self.reasons)[:10]) + (", ..." if len(self.reasons) > 10 else "")
        return f"{len(self.reasons)} clips could not be read, see {self.path}: {names}"
