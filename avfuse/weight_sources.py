"""What files, folders, models in memory and dictionaries hold of weights, and what they tell about them: name
and licence, how transformers were made, which inputs they saw.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .checks import is_number
from .files import printable
from .inputs import InputSettings
from .pretrained import CONFIG, WEIGHTS
from .vit import describe_vit
from .weight_files import StateDict, read_metadata, read_pth, read_safetensors, state_dict

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of red, green and blue
STATED = (  # where a folder may tell: file, way to a table in it, names of the two
    (CONFIG, ("pretrained_cfg",), ("mean", "std")),  # timm
    (CONFIG, (), ("mean", "std")),  # its files of before
    (CONFIG, ("model", "inputs"), ("image_mean", "image_std")),  # avfuse
    (CONFIG, ("model", "encoder", "inputs"), ("image_mean", "image_std")),
    ("preprocessor_config.json", (), ("image_mean", "image_std")),  # transformers
)


class ReadWeights(NamedTuple):
    """What a file, a timm model or a dictionary holds."""

    name: str
    weights: dict[str, Tensor]
    dropped: dict[str, str]  # what lies beside the weights
    steps: tuple[str, ...] = ()  # how the names came from those in the file
    licence: str | None = None  # if it is stated
    family: str = "ViT"
    normalisation: Normalisation | None = None  # of the images that they saw, if it is stated
    made: dict = {}  # by branch, how their transformers are made, see `describe_vit`; their "inputs"


def read(source) -> ReadWeights:
    """Weights, and what they say about themselves. No code in a file is run."""
    if isinstance(source, nn.Module):
        config = getattr(source, "pretrained_cfg", None)  # of a wrapper, if it tells what is in it
        source = unwrapped(source)
        config = config or getattr(source, "pretrained_cfg", None)
        name, licence, family = timm_origin(config, type(source).__name__)
        made = made_by(source)
        own = made["inputs"]
        saw = (own.image_mean, own.image_std) if own else normalisation_in(config, "mean", "std")
        tensors = tensors_of(source.state_dict(), "weights")
        return ReadWeights(name, *tensors, licence, family, saw, made)
    if isinstance(source, dict):
        return ReadWeights("a state dict", *tensors_of(source, "weights"))
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"weights must be a path, a model or a dictionary, got {type(source).__name__}")
    path = Path(source)
    file = path / WEIGHTS if os.path.isdir(path) else path
    what = f"weights {printable(path)}"
    if not os.path.isfile(file):
        raise ValueError(f"{what}: there is no file {printable(file)}")
    if file.suffix != ".safetensors":
        return ReadWeights(path.name, *tensors_of(read_pth(file), what))
    tensors = tensors_of(read_safetensors(file), what)
    licence = read_metadata(file).get("licence")
    name, family, is_of_folder = path.name, "ViT", file.name == WEIGHTS
    if is_of_folder and not licence:
        name, licence, family = timm_origin(config_beside(file), name)
    saw = normalisation_beside(file) if is_of_folder else None
    return ReadWeights(name, *tensors, licence, family, saw, made_beside(file) if is_of_folder else {})


def tensors_of(content: object, what: str) -> StateDict:
    return state_dict(content, what, kept=("blocks", "patch_embed"))


def unwrapped(module: nn.Module) -> nn.Module:
    """What was compiled, averaged, or handed to several processes: the one thing in it, by a known name."""
    inside = dict(module.named_children())
    if inside.keys() in ({"module"}, {"_orig_mod"}) and not [*module.parameters(recurse=False)]:
        return unwrapped(*inside.values())
    return module


def made_by(module: nn.Module) -> dict:
    """How the transformers of a module are made, by branch, and its "inputs"; of one, the same for both."""
    encoder = getattr(module, "encoder", module)
    made = {branch: described(getattr(encoder, branch, encoder)) for branch in ("image", "audio")}
    return made | dict(inputs=getattr(encoder, "given_inputs", None))


def described(vit: nn.Module) -> dict:
    """How a transformer is made; {} if that cannot be told."""
    try:
        return describe_vit(vit) if isinstance(vit, VisionTransformer) else {}
    except ValueError:
        return {}


def made_beside(file: Path) -> dict:
    """The same, as the config.json in the folder of a model of avfuse tells it."""
    config = json_beside(file, CONFIG)
    made = config.get("model") if config.get("library") == "avfuse" else None
    made = made.get("encoder", made) if isinstance(made, dict) else {}
    tables = {n: made[n] for n in ("image", "audio", "inputs") if isinstance(made.get(n), dict)}
    try:
        return tables | dict(inputs=InputSettings(**tables["inputs"]) if "inputs" in tables else None)
    except (TypeError, ValueError):  # of another version
        return tables | dict(inputs=None)


def grid_in(made: dict) -> tuple[int, int] | None:
    """Rows and columns of the patches of a transformer that is made so; None if it is not told."""
    sizes = [made.get("img_size"), made.get("patch_size")]
    try:
        (height, width), (rows, columns) = sizes
        return int(height // rows), int(width // columns)
    except (TypeError, ValueError, ArithmeticError):  # of a damaged config.json
        return None


def json_beside(file: Path, name: str) -> dict:
    """What another file in the same folder holds; {} if nothing can be read there."""
    try:
        content = json.loads((file.parent / name).read_bytes()) if (file.parent / name).is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def config_beside(file: Path) -> dict:
    """The `pretrained_cfg` in the config.json of a model that timm saved; {} of another."""
    config = json_beside(file, CONFIG)
    trained = config.get("pretrained_cfg")
    return {"architecture": config.get("architecture")} | trained if isinstance(trained, dict) else {}


def normalisation_beside(file: Path) -> Normalisation | None:
    """What files in the folder tell of it, of pixels from 0 to 1."""
    for name, way, keys in STATED:
        table = json_beside(file, name)
        if table.get("do_normalize") is False or table.get("do_rescale") is False:
            continue
        scale = table.get("rescale_factor", 1 / 255)
        if not (is_number(scale) and math.isclose(scale, 1 / 255, rel_tol=0.01)):
            continue
        for key in way:
            table = table.get(key) if isinstance(table, dict) else None
        if stated := normalisation_in(table, *keys):
            return stated
    return None


def normalisation_in(table: object, mean: str, std: str) -> Normalisation | None:
    """Three numbers each, of which deviations are positive; None if a table holds anything else."""
    found = [table.get(name) if isinstance(table, dict) else None for name in (mean, std)]
    try:
        InputSettings(image_mean=found[0], image_std=found[1])
    except ValueError:
        return None
    return tuple(found[0]), tuple(found[1])


def timm_origin(config: dict | None, name: str) -> tuple[str, str | None, str]:
    """Name, licence and family of a model with this `pretrained_cfg`; without one, it is called `name`."""
    if not config or not isinstance(config.get("architecture"), str):
        return name, None, "ViT"
    tag, licence = config.get("tag"), config.get("license")
    name = config["architecture"] + (f".{tag}" if tag else "")
    return name, licence if isinstance(licence, str) else None, "timm ViT"
