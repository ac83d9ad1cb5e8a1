"""Saving, loading and optimizing a whole model: safetensors, config.json and model card; parameter groups by
decay and layer.
"""

import json
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from .files import aside, printable, some
from .model_card import check_facts, check_origins, licence_of, model_card, strictest
from .vit import check_rebuilt
from .weight_files import check_tensors, misfits, read_safetensors, write_safetensors

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # of files with weights
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # the bare names that the hub has, too, are more often slips
STRAYS = 100  # parameters unlike all weights, after which a model is not made any further
UNSAVED = 2**26  # bytes of buffers that a model may have besides its weights


def __getattr__(name: str):
    """Where `load_encoder` and `load_model` were before avfuse.loading, which builds on this module."""
    if name in ("load_encoder", "load_model"):
        return getattr(import_module("avfuse.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Pretrained(ModelHubMixin, library_name="avfuse"):
    """`save_pretrained(dir)`, `from_pretrained(dir_or_hub_id)` and `push_to_hub(id)` for a model that can
    state its `to_config()` and be made `from_config(...)`. A folder that exists is read without the network.

    `facts`, a dictionary about the run that the weights come from, is kept in config.json and shown by the
    model card (README.md), see `avfuse.model_card.model_card`.

    An instance of a subclass is saved as what it is derived from: its own `from_pretrained` gives it back.
    Inside another model it is refused.

    Raises:
        ValueError: what should be loaded is neither a folder nor a name, or is damaged or another model; or
            what should be saved has a part that config.json cannot describe.
    """

    facts: dict | None = None
    home = "avfuse"  # the module to import the class from
    mark: str | None = None  # a key that only the to_config() of this subclass holds: its parent looks for it

    former: dict[str, str] = {}  # names that parts had in models saved before -> those of today

    @classmethod
    def current(cls, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights by the names of today; ValueError if two are of one name."""
        parts = ((name.partition("."), weight) for name, weight in weights.items())
        renamed = {cls.former.get(part, part) + dot + rest: weight for (part, dot, rest), weight in parts}
        if len(renamed) < len(weights):
            raise ValueError(f"weights: {some(sorted(set(weights) - set(renamed)))} are there by two names")
        return renamed

    def fitted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of another model of this class, in those parts that this one has."""
        return weights

    @classmethod
    def kind_of(cls, config: dict) -> type["Pretrained"]:
        """The class that a config is of: this one, or the subclass of it whose mark the config bears."""
        if config.get("released"):
            import_module("avfuse.released")  # where those subclasses are
        return next((kind for kind in cls.__subclasses__() if config.get(kind.mark)), cls)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ):
        """The model saved in a folder, left in that of a run or published under a name on the Hugging Face
        hub, in eval mode. The options are those of `huggingface_hub.hf_hub_download`.
        """
        options = dict(
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        source = pretrained_model_name_or_path
        config = read_config(source, **options)
        if not config:
            raise ValueError(f"{printable(source)} holds no {CONFIG} of an avfuse model")
        if config.get("class") != _saved_as(cls):
            saved = printable(config.get("class"))
            raise ValueError(f"{printable(source)} holds a model of class {saved}, not {_saved_as(cls)}")
        weights = cls.current(weights_at(source, **options))
        model = make_for(weights, lambda: cls.from_config(config["model"]), f"{source}: {CONFIG}")
        model.facts = config.get("facts")
        check_facts(model.facts or {})
        check_origins(model._origins())
        license_parts(getattr(model, "encoder", model), model.facts, source)
        return model

    def parameter_groups(self, weight_decay: float = 0.05) -> list[dict]:
        """Optimizer groups `{"params", "weight_decay", "layer"}` of all that is trained.

        1-D parameters (biases, norms) and tables of pair biases are not decayed. `layer` is 0 for embeddings
        and tokens, 1..depth for the blocks of all three branches of the encoder, depth + 1 for what follows:
        a layer-wise decay multiplies the rate by d**(depth + 1 - layer).
        """
        encoder, groups = getattr(self, "encoder", self), {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = _layer_of(name, encoder)
            is_bias = parameter.ndim < 2 or name.endswith(("pair_bias", "time_bias.table"))
            decay = 0.0 if is_bias else weight_decay
            group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "layer": layer})
            group["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, repo_id=None, push_to_hub=False, **options
    ) -> str | None:
        """Writes model.safetensors, config.json and the model card (README.md) into a folder, and with
        `push_to_hub` publishes them as `repo_id`, by default the name of the folder; the options are those of
        `push_to_hub`. A model that cannot be saved leaves what is in the folder as it was.
        """
        config = {"library": "avfuse", "class": _saved_as(type(self)), "model": self.to_config()}
        config |= {"facts": self.facts} if self.facts else {}
        # Of numbers that are not finite, as a mean over nothing is, JSON has none.
        config = json.loads(json.dumps(config, default=plain_number), parse_constant=lambda _: None)
        with torch.device("meta"):
            rebuilt = type(self).from_config(config["model"])
        check_rebuilt(rebuilt, self)
        card = self.generate_model_card()
        licence = licence_of(self.facts or {}, self._origins())
        metadata = {"format": "pt"} | ({"licence": licence} if licence else {})
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with aside(folder / CONFIG) as partial:  # renamed last: neither is new if one cannot be written
            partial.write_text(json.dumps(config, indent=2) + "\n")
            write_safetensors(folder / WEIGHTS, self.state_dict(), metadata)
        card.save(folder / CARD)  # that of these weights, in the place of an older one
        return self.push_to_hub(repo_id or folder.name, **options) if push_to_hub else None

    def generate_model_card(self, *_, **__):
        """The `huggingface_hub.ModelCard` that is saved with the weights, and pushed."""
        classes = getattr(self, "class_names", None)
        return model_card(_saved_as(type(self)), self.facts or {}, self._origins(), self.home, classes)

    def _origins(self) -> dict[str, dict[str, str]]:
        return getattr(self, "encoder", self).origins


def _saved_as(cls) -> str:
    """The public class: a `ReleasedEncoder` is saved, and loaded again, as an `AVEncoder`."""
    return next(base.__name__ for base in cls.__mro__ if Pretrained in base.__bases__)


def license_parts(encoder: nn.Module, facts: dict | None, source: str | os.PathLike) -> None:
    """Has the transformers of an encoder go with the licence that is stated for the model it was in."""
    licence = (facts or {}).get("licence")
    source = Path(source).resolve().name if os.path.exists(source) else str(source)  # no path of this machine
    for branch in (encoder.image, encoder.audio) if isinstance(licence, str) else ():
        origin = getattr(branch, "origin", None) or dict(weights=source, family="avfuse", licence=licence)
        branch.origin = origin | {"licence": strictest([origin["licence"], licence])}


def file_at(source: str | os.PathLike, name: str, **options) -> Path:
    """A file of a saved model, in its folder, in that of its run or under a name on the hub, which is asked
    only for what cannot be meant as a path.
    """
    folder = Path(source)
    if os.path.isdir(folder):
        is_model = os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / CONFIG)
        is_run = os.path.isdir(folder / "model") and not is_model
        return folder / ("model" if is_run else "") / name
    if folder.suffix not in SUFFIXES and not HUB_ID.fullmatch(os.fspath(source)):
        raise HFValidationError(f"{printable(source)} is no OWNER/NAME")
    if folder.suffix in SUFFIXES or folder.parent.is_dir() or folder.parts[0] == "runs":
        raise ValueError(f"{printable(source)} is no file or folder")
    if options.get("force_download") or not (host := unreachable_hub()):
        return Path(hf_hub_download(os.fspath(source), name, **options))
    try:
        return Path(hf_hub_download(os.fspath(source), name, **options | {"local_files_only": True}))
    except LocalEntryNotFoundError as error:
        raise LocalEntryNotFoundError(f"there is no copy here, and no way to {host}") from error


def unreachable_hub() -> str | None:
    """The hub's host, where its name means nothing here and there is no proxy: asked for a file, it would be
    called again for half a minute.
    """
    host = urlsplit(constants.ENDPOINT).hostname
    with suppress(OSError):
        if getproxies() or socket.getaddrinfo(host, None):
            return None
    return host


def read_config(source: str | os.PathLike, **options) -> dict:
    """What config.json says of a saved model, of that of a run, or of a name on the hub: its "class" and how
    to make it; {} if it is none of avfuse's.

    Raises:
        ValueError: there is no folder and nothing on the hub of that name, or it is damaged.
    """
    try:
        file = file_at(source, CONFIG, **options)
    except HFValidationError as error:
        what = f"{printable(source)} is no file, no folder and no name on the hub"
        raise ValueError(f"{what}, which is OWNER/NAME") from error
    except (OSError, EntryNotFoundError) as error:
        raise ValueError(
            f"{printable(source)} is no file or folder, nor found on the hub: {printable(error)}"
        ) from error
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else None
    except OSError as error:
        raise ValueError(f"{printable(source)}: {CONFIG} cannot be read: {printable(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(source)}: {CONFIG} is damaged: {printable(error)}") from error
    if not isinstance(config, dict) or config.get("library") != "avfuse":
        return {}
    kinds = {"class": str, "model": dict, "facts": dict | None}
    if not all(isinstance(config.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{printable(source)}: {CONFIG} is damaged: it must tell a class and its model")
    return config


def weights_at(source: str | os.PathLike, **options) -> dict[str, Tensor]:
    """All weights of a saved model.

    Raises:
        ValueError: they are not there, cannot be fetched or are damaged.
    """
    try:
        file = file_at(source, WEIGHTS, **options)
    except (OSError, EntryNotFoundError) as error:  # of the hub
        raise ValueError(f"{WEIGHTS} of {printable(source)} cannot be fetched: {printable(error)}") from error
    return read_safetensors(file)


def make_for(weights: dict[str, Tensor], make: Callable[[], nn.Module], source: str) -> nn.Module:
    """The module that `make` makes, with exactly these weights, in eval mode.

    It is made on the meta device first, where it takes no memory: a small file may ask for a model of any
    size, and what does not fit is refused by its names and shapes.

    Args:
        weights: all of them.
        make: called twice.
        source: what told how to make it, for the error.
    """
    check_tensors(weights, source)
    try:
        with torch.device("meta"), at_most(weights):
            plan = make()
    except Exception as error:  # what config.json says may lead to any
        fault = error if isinstance(error, ValueError) else f"{source} is damaged: {error!r}"
        raise ValueError(printable(fault)) from error
    check_fit(plan, weights)
    unsaved = sum(buffer.nbytes for name, buffer in plan.named_buffers() if name not in weights)
    if unsaved > UNSAVED:
        raise ValueError(f"{printable(source)} asks for {unsaved} bytes beside the weights")
    return load_strictly(make(), weights)


@contextmanager
def at_most(weights: dict[str, Tensor]) -> Iterator[None]:
    """While this lasts, the making of modules ends once too many parameters have shapes that are not left
    among the weights: a hundred million layers need not be counted.
    """
    left = Counter(tuple(weight.shape) for weight in weights.values())
    strays, thread = [], threading.get_ident()

    def compare(_module, name, parameter):
        if parameter is None or threading.get_ident() != thread:
            return
        left[tuple(parameter.shape)] -= 1
        if left[tuple(parameter.shape)] < 0:
            strays.append(f"{name} {tuple(parameter.shape)}")
        if len(strays) > STRAYS:
            raise ValueError(f"the weights do not fit: there is none for {', '.join(strays[:3])}, ...")

    hook = nn.modules.module.register_module_parameter_registration_hook(compare)
    try:
        yield
    finally:
        hook.remove()


def check_fit(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises ValueError unless there is exactly one finite tensor for each place."""
    if faults := misfits(weights, module.state_dict()):
        raise ValueError(f"the weights do not fit {type(module).__name__}: {faults}")


def plain_number(value: object) -> float | int | bool:
    """That of NumPy as Python's, which config.json can hold."""
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f"config.json cannot hold a {type(value).__name__}: {value!r}")


def check_has_memory(module: nn.Module) -> None:
    if any(place.is_meta for place in module.state_dict().values()):
        raise ValueError(f"{type(module).__name__} on the meta device has no memory for weights")


def load_strictly(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module with exactly these weights, none missing and none left over, in eval mode."""
    check_fit(module, weights)
    check_has_memory(module)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def _layer_of(name: str, encoder: nn.Module) -> int:
    depth = encoder.depth
    if "decoder" in name:
        return depth + 1
    block = re.search(r"(\w+?)[._]blocks\.(\d+)\.", name)
    if block:
        return encoder.block_layers.get(block[1], range(depth))[int(block[2])] + 1
    embedding = re.search(
        r"patch_embed|pos_embed|cls_token|reg_token|norm_pre|fusion_tokens|frame_embed", name
    )
    return 0 if embedding else depth + 1
