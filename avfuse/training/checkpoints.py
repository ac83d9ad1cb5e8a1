"""Checkpoints of a run: whole or not there, verified before they are read, the latest few kept.

    checkpoints/step-00000240/      what Accelerate saves: model, optimizer, schedule, random states
                    manifest.json   the step, and size and SHA-256 of every file beside it

The manifest is written last, everything is synced, and only then does the folder get its name. Model weights
are safetensors; the rest is read with `weights_only=True`, so that no code in a checkpoint is ever run.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from .faults import RunError

MANIFEST, AVERAGE = "manifest.json", "average.safetensors"


class CheckpointError(RunError):
    """A checkpoint could not be written, or none of those that are there can be read."""


def save_checkpoint(
    accelerator: Accelerator, run: Path, step: int, keep: int, average: nn.Module | None = None
) -> Path:
    """Saves the state of all processes after `step`, and an average of the weights if there is one; then
    deletes all but the latest `keep` checkpoints.

    Raises:
        CheckpointError: it could not be written (a full disk); those from before are untouched.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if average is not None:  # by hand: what Accelerate stores for others it would unpickle unsafely
                save_file(average.state_dict(), partial / AVERAGE)
            seal(partial, step)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one, else the run would have begun after it
            os.replace(partial, final)
            sync(final.parent)
            for old in list_checkpoints(run)[keep:]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        rest = list_checkpoints(run)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. "
            + (f"The last whole one is {rest[0].name}." if rest else "There is none before it.")
        ) from error
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, run: Path, average: nn.Module | None = None) -> int:
    """Restores the latest whole checkpoint and returns its step; 0 if there never was one. A damaged one is
    named and passed over for the one before.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    (checkpoint,) = broadcast_object_list([latest_whole(run) if accelerator.is_main_process else None])
    if checkpoint is None:
        return 0
    try:
        accelerator.load_state(checkpoint)
        if average is not None:
            average.load_state_dict(load_file(checkpoint / AVERAGE))
    except (OSError, pickle.UnpicklingError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0]  # torch goes on to advise reading it unsafely
        raise CheckpointError(f"checkpoint {checkpoint} does not fit this run: {reason}") from error
    return step_of(checkpoint)


def latest_whole(run: Path) -> Path | None:
    """The latest checkpoint that is as it was written, None if there is no checkpoint at all."""
    for partial in (run / "checkpoints").glob("*.partial"):  # of a process that was killed
        shutil.rmtree(partial)
    found = list_checkpoints(run)
    for count, checkpoint in enumerate(found):
        fault = damage(checkpoint)
        if not fault:
            for passed_over in found[:count]:  # so that they are not counted among those to keep
                os.replace(passed_over, passed_over.with_name(f"damaged-{passed_over.name}"))
            return checkpoint
        tqdm.write(f"checkpoint {checkpoint} is damaged ({fault}): passing it over")
    if found:
        raise CheckpointError(f"no checkpoint in {run / 'checkpoints'} can be read; --restart begins anew")
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, latest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def seal(folder: Path, step: int) -> None:
    """Writes the manifest of the files in a folder and syncs it all to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = dict(bytes=path.stat().st_size, sha256=digest(path))
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(dict(step=step, files=files), indent=2) + "\n")
    sync(manifest)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    sync(folder)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, "" if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["step"] != step_of(folder):
            return f"it is of step {manifest['step']}"
        for name, file in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != file["bytes"] or digest(path) != file["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
