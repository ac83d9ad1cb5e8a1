"""Saving, loading and optimizing a whole model: safetensors, config.json and model card; parameter groups by
decay and layer.
"""

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .model_card import licence_of, model_card

if TYPE_CHECKING:  # it builds on this module
    from .encoder import AVEncoder

WEIGHTS, CONFIG, CARD, HEAD = "model.safetensors", "config.json", "README.md", "head.safetensors"


class Pretrained(
    ModelHubMixin,
    library_name="avfuse",
    tags=["audio-visual", "masked-autoencoder"],
):
    """`save_pretrained(dir)`, `from_pretrained(dir_or_hub_id)` and `push_to_hub(id)` for a model that can
    state its `config()` and be made `from_config(...)`. A folder that exists is read without the network.

    `facts`, a dictionary of what is to be told about the run that the weights come from, is kept in
    config.json and told by the model card (README.md), see `avfuse.model_card.model_card`.

    Raises:
        ValueError: what should be loaded is neither a folder nor a name, or is damaged or another model; or
            what should be saved has a part that config.json cannot describe.
    """

    facts: dict | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """The model saved in a folder or under a name on the Hugging Face hub, in eval mode.

        Options are those of `huggingface_hub.ModelHubMixin.from_pretrained` (revision, token, cache_dir,
        local_files_only, force_download).
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except HFValidationError as error:
            raise ValueError(
                f"pretrained_model_name_or_path {str(pretrained_model_name_or_path)!r} is neither a folder "
                "nor a name on the hub"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {CONFIG} is damaged: {error}") from error

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {"library": "avfuse", "class": _saved_as(type(self)), "model": self.config()}
        config |= {"facts": self.facts} if self.facts else {}
        config, card = json.dumps(config, indent=2) + "\n", self.generate_model_card()
        licence = licence_of(self.facts or {}, self._origins())
        metadata = {"format": "pt"} | ({"licence": licence} if licence else {})
        write_safetensors(save_directory / WEIGHTS, self.state_dict(), metadata)
        (save_directory / CONFIG).write_text(config)
        card.save(save_directory / CARD)  # that of these weights, in the place of an older one

    def generate_model_card(self, *_, **__):
        """The `huggingface_hub.ModelCard` that is saved with the weights, and pushed."""
        return model_card(_saved_as(type(self)), self.facts or {}, self._origins())

    def _origins(self) -> dict[str, dict[str, str]]:
        return getattr(self, "encoder", self).origins

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, config=None
    ):
        if config is None or config.get("library") != "avfuse":
            raise ValueError(f"{model_id} holds no {CONFIG} of an avfuse model")
        if config.get("class") != _saved_as(cls):
            raise ValueError(f"{model_id} holds a model of class {config.get('class')}, not {_saved_as(cls)}")
        try:
            model = cls.from_config(config["model"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{model_id}: {CONFIG} is damaged: {error!r}") from error
        local = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            local = hf_hub_download(
                model_id,
                WEIGHTS,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        model.facts = config.get("facts")
        return load_strictly(model, read_safetensors(local))


def load_encoder(checkpoint: str | os.PathLike) -> "AVEncoder":
    """The encoder of whatever training left or others published, in eval mode.

    Args:
        checkpoint: a run folder (its model/ is meant), the folder of a saved `AVMAE` or `AVEncoder`, the name
            of one on the Hugging Face hub, or a file of released DeepAVFusion weights (.pth, .safetensors) of
            an autoencoder, an encoder or a classifier.

    Raises:
        ValueError: it is none of these, or damaged: names it and, of a folder, what it holds.
    """
    from .encoder import AVEncoder  # all three build on this module
    from .mae import AVMAE
    from .released import encoder_weights, from_deepavfusion, read_weights

    path = Path(checkpoint)
    if path.is_file():
        try:
            weights = read_weights(path)
            is_classifier = any(name.endswith("_head.weight") for name in weights)
            model = from_deepavfusion(encoder_weights(weights) if is_classifier else weights)
        except ValueError as error:
            raise ValueError(f"checkpoint {checkpoint} is no released DeepAVFusion model: {error}") from error
    else:
        source = path / "model" if (path / "model").is_dir() else checkpoint
        saved = _class_at(source)
        if saved not in ("AVEncoder", "AVMAE"):
            found = f"a model of class {saved}" if saved else _contents(path)
            raise ValueError(f"checkpoint {checkpoint} must hold an AVEncoder or AVMAE, but holds {found}")
        model = (AVMAE if saved == "AVMAE" else AVEncoder).from_pretrained(source)
    encoder = model.encoder if isinstance(model, AVMAE) else model
    if not isinstance(encoder, AVEncoder):
        raise ValueError(f"checkpoint {checkpoint} holds a single {type(model).__name__}, no encoder")
    return encoder


def save_model(folder: Path, model: nn.Module, options: dict) -> None:
    """A model around an encoder: the encoder, as every program takes it for its --checkpoint, and beside it
    the head, with the options that the model was made with besides the encoder.
    """
    model.encoder.save_pretrained(folder)
    head = {name: t for name, t in model.state_dict().items() if not name.startswith("encoder.")}
    write_safetensors(folder / HEAD, head, dict(options=json.dumps(options)))


def load_model(kind: type[nn.Module], run: str | os.PathLike) -> nn.Module:
    """The model that a downstream task has left in its run folder, in eval mode.

    Args:
        kind: its class: `avfuse.tasks.classifier.Classifier`, `avfuse.tasks.segment.Segmenter`,
            `avfuse.tasks.localize.Localizer` or `avfuse.tasks.separator.Separator`.
        run: the run folder.

    Raises:
        ValueError: there is none of this class, or it is damaged.
    """
    head = Path(run) / "model" / HEAD
    weights = read_safetensors(head)
    encoder = load_encoder(run)
    try:
        with safe_open(head, "pt") as file:
            options = json.loads((file.metadata() or {})["options"])
        model = kind(encoder, **options)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{head} is not that of a {kind.__name__}: {error!r}") from error
    return load_strictly(model, weights | {f"encoder.{n}": t for n, t in encoder.state_dict().items()})


def _class_at(source: str | os.PathLike) -> str | None:
    """The class in the config.json of a folder or of a name on the hub; None if it is none of avfuse's."""
    try:
        is_folder = Path(source).is_dir()
        file = Path(source) / CONFIG if is_folder else hf_hub_download(os.fspath(source), CONFIG)
        config = json.loads(Path(file).read_text()) if Path(file).is_file() else None
    except HFValidationError as error:
        raise ValueError(f"checkpoint {source} is no file, no folder and no name on the hub") from error
    except (OSError, EntryNotFoundError) as error:
        raise ValueError(
            f"checkpoint {source} is no file or folder, nor found on the hub: {error}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {source}: {CONFIG} is damaged: {error}") from error
    is_ours = isinstance(config, dict) and config.get("library") == "avfuse"
    return config.get("class") if is_ours else None


def _contents(path: Path) -> str:
    if not path.is_dir():
        return f"no {CONFIG} of an avfuse model"
    names = sorted(entry.name for entry in path.iterdir())
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (listed or "nothing") + (": a run that has not ended" if "checkpoints" in names else "")


def _saved_as(cls) -> str:
    """The public class: a `ReleasedEncoder` is saved, and found again, as an `AVEncoder`."""
    return next(base.__name__ for base in cls.__mro__ if Pretrained in base.__bases__)


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {path} cannot be read: {error}") from error


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written aside and renamed: an interrupted save leaves the old file or none, never
    half of one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as any new file here; safetensors 0.8 lets nobody but the owner read
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata=metadata)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_pth(path: str | os.PathLike) -> dict:
    """What torch.save wrote, of which only tensors and plain containers are accepted: no code runs.

    Published checkpoints keep their command line as an `argparse.Namespace`. It is let in because it is such
    a container: reading one sets its attributes, to values under the same restriction, and calls nothing.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no checkpoint, it raises whatever they lead to
        # torch begins with advice to read it unsafely: only what comes after that is told.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(
            f"weights {path} is no file of weights alone ({type(error).__name__}: {reason})"
        ) from error


def load_strictly(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module with exactly these weights, none missing and none left over, in eval mode."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit a {type(module).__name__}: {error}") from error
    return module.eval()


def parameter_groups(model: nn.Module, depth: int, weight_decay: float) -> list[dict]:
    """Optimizer groups `{"params", "weight_decay", "layer"}`.

    1-D parameters (biases, norms) and tables of pair biases are not decayed. `layer` is 0 for embeddings and
    tokens, 1..depth for the blocks of all three branches, depth + 1 for what follows: a layer-wise decay
    multiplies the rate by d**(depth + 1 - layer).
    """
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, depth)
        decay = weight_decay if parameter.ndim > 1 and not name.endswith("pair_bias") else 0.0
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "layer": layer})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layer_of(name: str, depth: int) -> int:
    if "decoder" in name:
        return depth + 1
    block = re.search(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    embedding = re.search(r"patch_embed|pos_embed|cls_token|reg_token|norm_pre|fusion_tokens", name)
    return 0 if embedding else depth + 1
