"""Which class a saved model is: the encoder of any checkpoint, and the models of downstream tasks."""

import json
import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import nn

from .encoder import AVEncoder
from .files import read_metadata, read_safetensors, some
from .mae import AVMAE
from .pretrained import CONFIG, WEIGHTS, load_strictly
from .released import encoder_weights, from_deepavfusion, read_weights

HEAD = "head.safetensors"  # of the model of a task, which was once saved as its encoder and this


def load_encoder(checkpoint: str | os.PathLike) -> AVEncoder:
    """The encoder of whatever training left or others published, in eval mode.

    Args:
        checkpoint: a run folder (its model/ is meant), the folder of a saved `AVMAE`, `AVEncoder` or model of
            a task, the name of one on the Hugging Face hub, or a file of released DeepAVFusion weights (.pth,
            .safetensors) of an autoencoder, an encoder or a classifier.

    Raises:
        ValueError: it is none of these, or damaged: names it and, of a folder, what it holds.
    """
    path = Path(checkpoint)
    if path.is_file():
        try:
            weights = read_weights(path)
            is_classifier = any(name.endswith("_head.weight") for name in weights)
            model = from_deepavfusion(encoder_weights(weights) if is_classifier else weights)
            encoder = getattr(model, "encoder", model)
        except ValueError as error:
            raise ValueError(f"checkpoint {checkpoint} is no released DeepAVFusion model: {error}") from error
    else:
        source = path / "model" if (path / "model").is_dir() else checkpoint
        config = _config_at(source)
        saved = config.get("class")
        if saved in ("AVEncoder", "AVMAE"):
            model = (AVMAE if saved == "AVMAE" else AVEncoder).from_pretrained(source)
            return getattr(model, "encoder", model)
        if not saved or "encoder" not in config.get("model", ()):
            content = f"a model of class {saved}" if saved else _contents(path)
            raise ValueError(f"checkpoint {checkpoint} must hold an AVEncoder or AVMAE, but holds {content}")
        return _encoder_of(source, config)
    if not isinstance(encoder, AVEncoder):
        raise ValueError(f"checkpoint {checkpoint} holds a single {type(encoder).__name__}, no encoder")
    return encoder


def _encoder_of(source: str | os.PathLike, config: dict) -> AVEncoder:
    """The encoder out of the model of a task, of which nothing else is made."""
    try:
        encoder = AVEncoder.from_config(config["model"]["encoder"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: {CONFIG} is damaged: {error!r}") from error
    weights = read_safetensors(_file_at(source, WEIGHTS))
    return load_strictly(encoder, encoder_weights(weights))


def load_model(kind: type[nn.Module], run: str | os.PathLike) -> nn.Module:
    """The model that a downstream task has left in its run folder, in eval mode.

    Args:
        kind: its class: `avfuse.tasks.classifier.Classifier`, `avfuse.tasks.segment.Segmenter`,
            `avfuse.tasks.localize.Localizer` or `avfuse.tasks.separator.Separator`.
        run: the run folder.

    Raises:
        ValueError: there is none of this class, or it is damaged.
    """
    folder = Path(run) / "model"
    if _config_at(folder).get("class") != "AVEncoder":
        return kind.from_pretrained(folder)
    weights, encoder = read_safetensors(folder / HEAD), load_encoder(run)
    try:
        model = kind(encoder, **json.loads(read_metadata(folder / HEAD)["options"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / HEAD} is not that of a {kind.__name__}: {error!r}") from error
    return load_strictly(model, weights | {f"encoder.{n}": t for n, t in encoder.state_dict().items()})


def _file_at(source: str | os.PathLike, name: str) -> Path:
    """A file of a saved model, in a folder or under a name on the hub."""
    return Path(source) / name if Path(source).is_dir() else Path(hf_hub_download(os.fspath(source), name))


def _config_at(source: str | os.PathLike) -> dict:
    """The config.json of a folder or of a name on the hub; {} if it is none of avfuse's."""
    try:
        file = _file_at(source, CONFIG)
        config = json.loads(file.read_text()) if file.is_file() else None
    except HFValidationError as error:
        raise ValueError(f"checkpoint {source} is no file, no folder and no name on the hub") from error
    except (OSError, EntryNotFoundError) as error:
        raise ValueError(
            f"checkpoint {source} is no file or folder, nor found on the hub: {error}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {source}: {CONFIG} is damaged: {error}") from error
    return config if isinstance(config, dict) and config.get("library") == "avfuse" else {}


def _contents(path: Path) -> str:
    if not path.is_dir():
        return f"no {CONFIG} of an avfuse model"
    names = sorted(entry.name for entry in path.iterdir())
    return (some(names, most=8) or "nothing") + (
        ": a run that has not ended" if "checkpoints" in names else ""
    )
