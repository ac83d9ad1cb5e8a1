"""Whatever avfuse has saved, as the model that it is: `avfuse.load(path)`."""

import os

from torch import nn

from ..encoder import AVEncoder
from ..files import printable
from ..loading import HEAD, load_encoder, load_model, load_released
from ..mae import AVMAE
from ..pretrained import file_at, read_config
from .classifier import Classifier, load_classifier
from .localize import Localizer
from .segment import Segmenter
from .separator import Separator

MODELS = {kind.__name__: kind for kind in (AVEncoder, AVMAE, Classifier, Localizer, Segmenter, Separator)}


def load(path: str | os.PathLike) -> nn.Module:
    """The model that training has left, or that was saved or published, in eval mode: an `AVEncoder`, an
    `AVMAE`, or the model of a task.

    Args:
        path: a run folder, a folder that `save_pretrained` wrote, the name of a model on the Hugging Face
            hub, or a file of released DeepAVFusion weights, which gives their classifier or their encoder.

    Raises:
        ValueError: it is none of these, or damaged.
    """
    if os.path.isfile(path):
        return load_released(path, load_classifier)
    kind = read_config(path).get("class")
    if kind is None:
        return load_encoder(path)  # which says what there is
    if kind not in MODELS:
        raise ValueError(f"{printable(path)} holds a {printable(kind)}, a class not known here")
    if os.path.isdir(path) and file_at(path, HEAD).is_file():
        return with_head(path)
    return MODELS[kind].from_pretrained(path)


def with_head(path: str | os.PathLike) -> nn.Module:
    """The model of a task that was saved as its encoder and a head, which tells by what it fits."""
    for kind in (Classifier, Localizer, Segmenter, Separator):
        try:
            return load_model(kind, path)
        except ValueError as error:
            fault = error
    raise ValueError(f"{printable(path)} was saved as an encoder and a head, which fits no task: {fault}")
