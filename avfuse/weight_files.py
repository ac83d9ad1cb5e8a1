"""Files of weights: read without running code, written whole or not at all; whether what they hold can fill a
model.
"""

import argparse
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import aside, printable, some

MISFITS = 4  # of tensors that do not fit, those that a message gives
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # beside whole numbers
PLACES = ("model", "state_dict")  # under which files keep their weights
AVERAGES = ("model_ema", "state_dict_ema", "ema", "teacher")  # and a running average of them
SHARED = 4  # times that tensors may share the same memory, as tied weights do


def check_file(path: str | os.PathLike) -> None:
    """Raises ValueError unless weights can be read here: a regular file, or a link to one."""
    if not os.path.isfile(path):
        reason = "it is no regular file" if os.path.lexists(path) else "there is none"
        raise ValueError(f"weights {printable(path)} cannot be read ({reason})")


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name."""
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {printable(path)} cannot be read: {printable(error)}") from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors, by name."""
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {printable(path)} cannot be read: {printable(error)}") from error


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file aside."""
    with aside(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as any new file here; safetensors 0.8 lets nobody but the owner read
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata=metadata)
        partial.chmod(mode)


BYTES = re.compile(rb"c(?:builtins|__builtin__)\nbytearray\n")  # torch makes as many as a pickle asks for


def read_pth(path: str | os.PathLike) -> dict:
    """What torch.save wrote, of which only tensors and plain containers are accepted: no code runs.

    Published checkpoints keep their command line as an `argparse.Namespace`. It is let in because it is such
    a container: reading one sets its attributes, to values under the same restriction, and calls nothing.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\3\4"  # what torch looks at, too
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                unpacked = sum(member.file_size for member in members)
                if unpacked > os.path.getsize(path) or any(member.compress_type for member in members):
                    raise zipfile.BadZipFile("torch.save compresses nothing")
                # By member, not by name: several may have one.
                pickles = [archive.read(m) for m in members if m.filename.lower().endswith(".pkl")]
        else:
            with open(path, "rb") as file:
                pickles = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)]
        if any(map(BYTES.search, pickles)):
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no checkpoint, it raises whatever they lead to
        reason = refusal(error)
        raise ValueError(f"weights {printable(path)} is no file of weights alone ({reason})") from error


def refusal(error: Exception) -> str:
    """Why torch.load did not read a file. Its own words are advice to read it unsafely."""
    blocked = re.search(r"GLOBAL (\S+)", str(error))
    if blocked:
        return f"it holds {printable(blocked[1])}, which is no tensor and might run code"
    return f"it is damaged, or not of torch.save: {type(error).__name__}"


class StateDict(NamedTuple):
    """The tensors in what torch.save wrote."""

    weights: dict[str, Tensor]
    beside: dict[str, str]  # what lies beside them, with the reason why it is left out
    steps: tuple[str, ...]  # how it was taken apart, for people


def state_dict(content: object, what: str, *, kept: Collection[str] = ()) -> StateDict:
    """Tensors by name, by themselves or under a name: one of `PLACES`, or of `AVERAGES` if there are no
    others. A prefix that all names share, such as "module." of distributed training, is taken off, but for
    the parts in `kept`.
    """
    weights, beside, steps = content, {}, []
    for _ in range(3):  # one may lie in another
        places = [key for key in (*PLACES, *AVERAGES) if isinstance(weights, dict) and key in weights]
        if not places or isinstance(weights[places[0]], Tensor):
            break
        beside |= {str(key): "not a weight" for key in weights if key != places[0]}
        beside |= {key: f"weights beside those of {places[0]!r}" for key in places[1:]}
        steps += [f"of {places[0]!r}"] if places[0] in AVERAGES else []
        weights = weights[places[0]]
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{what} must hold tensors by name, by itself or under 'model' or 'state_dict'")
    check_tensors(weights, what)
    if "n_averaged" in weights:  # beside the "module." of torch's AveragedModel
        beside["n_averaged"] = "not a weight"
    weights = {name: weight for name, weight in weights.items() if name != "n_averaged"}
    prefix = shared_prefix(weights, kept)
    steps += [f"without the prefix {printable(repr(prefix))}"] if prefix else []
    return StateDict({name[len(prefix) :]: weights[name] for name in weights}, beside, tuple(steps))


def shared_prefix(names: Collection[str], kept: Collection[str]) -> str:
    """The dotted parts with which all of several names begin, up to one in `kept`."""
    prefix = ""
    for part in min(names, default="").split(".")[:-1] if len(names) > 1 else ():
        if part in kept or not all(name.startswith(f"{prefix}{part}.") for name in names):
            break
        prefix += f"{part}."
    return prefix


def check_tensors(weights: dict[str, Tensor], what: str) -> None:
    """Raises ValueError, with the name, unless all are plain numbers, as many as their memory holds: a few
    bytes in a file can pretend to be a tensor of any size.
    """
    held = {}
    for name, weight in weights.items():
        if oddity := odd(weight):
            raise ValueError(f"{what}: {printable(repr(name))} is {oddity}")
        storage = weight.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    if sum(weight.nbytes for weight in weights.values()) > SHARED * sum(held.values()):
        raise ValueError(f"{what}: its tensors are {SHARED} times as large as the memory that they share")


def odd(weight: object) -> str:
    """What keeps an object from being a plain tensor, "" if nothing does."""
    if not isinstance(weight, Tensor):
        return f"no tensor but a {type(weight).__name__}"
    if weight.is_nested:  # which has no shape
        return "a nested tensor"
    for is_odd, what in (
        (weight.layout != torch.strided, f"a tensor of layout {weight.layout}"),
        (weight.device.type == "meta", "a tensor without numbers (on the meta device)"),
        (weight.is_quantized, "a quantized tensor"),
        (weight.is_complex(), "a complex tensor"),
        (weight.is_floating_point() and weight.dtype not in NUMBERS, f"a tensor of {weight.dtype}"),
        (not weight.numel(), f"an empty tensor of shape {tuple(weight.shape)}"),
    ):
        if is_odd:
            return what
    if weight.nbytes > weight.untyped_storage().nbytes():
        return f"a tensor of shape {tuple(weight.shape)} made of fewer numbers"
    return ""


def misfits(weights: dict[str, Tensor], places: dict[str, Tensor]) -> str:
    """What keeps weights from filling the places of a model, "" if nothing does."""
    both = [name for name in places if name in weights]
    faults = {
        "missing": [name for name in places if name not in weights],
        "without a place": [name for name in weights if name not in places],
        "of another shape": [
            f"{name} is {tuple(weights[name].shape)}, not {tuple(places[name].shape)}"
            for name in both
            if weights[name].shape != places[name].shape
        ],
        "of another kind": [
            f"{name} is {weights[name].dtype}, not {places[name].dtype}"
            for name in both
            if weights[name].is_floating_point() != places[name].is_floating_point()
        ],
        "not finite": [  # as what they become: a float64 may be too large for a float32
            name for name in both if not weights[name].to(places[name].dtype).isfinite().all()
        ],
    }
    return "; ".join(f"{fault}: {some(names, MISFITS)}" for fault, names in faults.items() if names)
