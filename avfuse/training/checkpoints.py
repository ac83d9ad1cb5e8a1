"""Checkpoints of a run: whole or not there, verified before they are read, the latest few kept.

    checkpoints/step-00000240/      what Accelerate saves: model, optimizer, schedule, random states
                    average.safetensors   the average of the weights (--ema)
                    manifest.json   the step, and size and SHA-256 of every file beside it

The manifest is written last, everything is synced, and only then does the folder get its name. Model weights
are safetensors; the rest is read with `weights_only=True`, so that no code in a checkpoint is ever run.
"""

import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..files import is_regular, printable, some
from ..weight_files import refusal
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
            remove(partial)
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if average is not None:  # by hand: what Accelerate stores for others it would unpickle unsafely
                save_file(average.state_dict(), partial / AVERAGE)
            seal(partial, step)
            remove(final)  # a damaged one, else the run would have begun after it
            os.replace(partial, final)
            sync(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # before it is told how much is free
        rest = list_checkpoints(run)
        need = size_of([accelerator._models, accelerator._optimizers, average])
        raise CheckpointError(
            f"checkpoint {printable(final)} could not be written: {lack(run, need) or printable(error)}. "
            + (f"The last whole one is {rest[0].name}." if rest else "There is none before it.")
        ) from error
    if accelerator.is_main_process:
        for old in list_checkpoints(run)[keep:]:
            with suppress(OSError):  # which the next one tries again
                remove(old)
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
        # On a GPU, where Accelerate would put them, the counts of steps would be asked for by every step.
        accelerator.load_state(checkpoint, map_location="cpu")
        if average is not None:
            average.load_state_dict(load_file(checkpoint / AVERAGE))
    except (OSError, pickle.UnpicklingError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = refusal(error) if isinstance(error, pickle.UnpicklingError) else printable(error)
        raise CheckpointError(
            f"checkpoint {printable(checkpoint)} does not fit this run: {reason}"
        ) from error
    for model in (*accelerator._models, *([average] if average is not None else [])):
        if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
            raise CheckpointError(
                f"checkpoint {printable(checkpoint)} holds weights that are not finite: {some(broken)}. "
                "Delete it to go on from the one before, or --restart"
            )
    return step_of(checkpoint)


def size_of(state: object) -> int:
    """Bytes of all tensors in modules, optimizers and nested containers."""
    if isinstance(state, Tensor):
        return state.nbytes
    if hasattr(state, "state_dict"):
        state = state.state_dict()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, parts))


def lack(folder: Path, need: int) -> str:
    """That the disk is full, if `need` more bytes do not fit into a folder; "" if they do. torch and
    safetensors do not tell a full disk from other faults; the system does.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(need, 1))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free
            return (
                f"the disk is full ({error.strerror}): a checkpoint needs {need / 1e6:.1f} MB, and "
                f"{free / 1e6:.1f} MB are free"
            )
    return ""


def latest_whole(run: Path) -> Path | None:
    """The latest checkpoint that is as it was written, None if there is no checkpoint at all."""
    for partial in (run / "checkpoints").glob("*.partial"):  # of a process that was killed
        remove(partial)
    found = list_checkpoints(run)
    for count, checkpoint in enumerate(found):
        fault = damage(checkpoint)
        if not fault:
            for passed_over in found[:count]:  # so that they are not counted among those to keep
                damaged = passed_over.with_name(f"damaged-{passed_over.name}")
                remove(damaged)
                os.replace(passed_over, damaged)
            return checkpoint
        tqdm.write(printable(f"checkpoint {checkpoint} is damaged ({fault}): passing it over"))
    if found:
        raise CheckpointError(
            f"no checkpoint in {printable(run / 'checkpoints')} can be read; --restart begins anew"
        )
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
    """What is wrong with a checkpoint, "" if nothing is. It may hold regular files and folders alone: no link
    leads out of it, no pipe or device is read.
    """
    try:
        there = [folder, *folder.rglob("*")]
        if strange := [path for path in there if not is_regular(path) and not is_folder(path)]:
            return f"{strange[0].name} is neither a file nor a folder"
        names = {path.relative_to(folder).as_posix() for path in there if is_regular(path)}
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["step"] != step_of(folder):
            return f"it is of step {manifest['step']}"
        for name, file in manifest["files"].items():
            path = folder / name
            if name not in names:
                return f"there is no file {name}"
            if path.stat().st_size != file["bytes"] or digest(path) != file["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def is_folder(path: Path) -> bool:
    """Whether this is a folder, itself no link."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Deletes a folder or file, and of a link the link, if there is one."""
    shutil.rmtree(path) if is_folder(path) else path.unlink(missing_ok=True)


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
