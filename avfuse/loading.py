"""Which class a saved model is: the encoder of any checkpoint, and the models of downstream tasks."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .encoder import FEATURES, AVEncoder
from .files import printable, some
from .mae import AVMAE
from .pretrained import CONFIG, file_at, license_parts, make_for, read_config, weights_at
from .released import encoder_weights, from_deepavfusion, read_weights
from .weight_files import read_metadata, read_safetensors

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
    path, named = Path(checkpoint), f"checkpoint {printable(checkpoint)}"
    if os.path.isfile(path):
        return load_released(path)
    config = read_config(checkpoint)
    saved = config.get("class")
    if saved in ("AVEncoder", "AVMAE"):
        model = (AVMAE if saved == "AVMAE" else AVEncoder).from_pretrained(checkpoint)
        return getattr(model, "encoder", model)
    if not saved or "encoder" not in config.get("model", ()):
        content = f"a model of class {printable(saved)}" if saved else _contents(path)
        raise ValueError(f"{named} must hold an AVEncoder or AVMAE, but holds {content}")
    # The encoder out of the model of a task, of which nothing else is made.
    weights = encoder_weights(weights_at(checkpoint))
    description = config["model"]["encoder"]
    encoder = make_for(weights, lambda: AVEncoder.from_config(description), f"{checkpoint}: {CONFIG}")
    license_parts(encoder, config.get("facts"), checkpoint)
    return encoder


def load_released(
    path: str | os.PathLike, of_classifier: Callable[[dict], nn.Module] | None = None
) -> nn.Module:
    """The encoder in a file of released weights; or what `of_classifier` makes of those of a classifier."""
    named = f"checkpoint {printable(path)}"
    try:
        weights = read_weights(path)
        if of_classifier and any(f"{name}_head.weight" in weights for name in FEATURES):
            return of_classifier(weights)
        has_head = any(name.endswith("_head.weight") for name in weights)
        model = from_deepavfusion(encoder_weights(weights) if has_head else weights)
    except ValueError as error:
        raise ValueError(f"{named} is no released DeepAVFusion model: {error}") from error
    encoder = getattr(model, "encoder", model)
    if not isinstance(encoder, AVEncoder):
        raise ValueError(f"{named} holds a single {type(encoder).__name__}, no encoder")
    return encoder


def load_model(kind: type[nn.Module], run: str | os.PathLike) -> nn.Module:
    """The model that a downstream task has left in its run folder, in eval mode.

    Args:
        kind: its class: `avfuse.tasks.classifier.Classifier`, `avfuse.tasks.segment.Segmenter`,
            `avfuse.tasks.localize.Localizer` or `avfuse.tasks.separator.Separator`.
        run: the run folder, or what it holds as model/, wherever that is now.

    Raises:
        ValueError: there is none of this class, or it is damaged.
    """
    if read_config(run).get("class") != "AVEncoder":
        return kind.from_pretrained(run)
    path = file_at(run, HEAD)
    head, encoder = read_safetensors(path), load_encoder(run)
    try:
        options = json.loads(read_metadata(path)["options"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        fault = printable(repr(error))
        raise ValueError(f"{path} is not that of a {kind.__name__}: {fault}") from error
    weights = head | {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}

    def make() -> nn.Module:
        try:
            return kind(encoder, **options)
        except TypeError as error:
            raise ValueError(f"{path} is not that of a {kind.__name__}: {error}") from error

    return make_for(kind.current(weights), make, str(path))


def _contents(path: Path) -> str:
    if not path.is_dir():
        return f"no {CONFIG} of an avfuse model"
    names = sorted(entry.name for entry in path.iterdir())
    return (some(names, most=8) or "nothing") + (
        ": a run that has not ended" if "checkpoints" in names else ""
    )
