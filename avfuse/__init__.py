"""Audio-visual early fusion: a few fusion tokens read every pair of one image token and one audio token."""

from importlib import import_module
from pathlib import Path

# The kernels lie beside this package in a checkout, inside it in a wheel, and are avfuse.kernels in both.
# This comes before the imports below, which may need it.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from . import loading, pretrained
from .encoder import AVEncoder
from .fusion import DenseFusion, FactorizedFusion, TokenFusion
from .inputs import InputSettings
from .loading import load_encoder
from .mae import AVMAE
from .ops.pair_attention import pair_attention, pair_attention_weights
from .presets import create_encoder
from .released import from_deepavfusion
from .weights import load_audio_weights, load_image_weights

# Where they were before avfuse.loading, which builds on avfuse.pretrained.
pretrained.load_encoder, pretrained.load_model = loading.load_encoder, loading.load_model

# Imported when first asked for: these build on the model, and bring the libraries of readers and pictures.
LATER = {"load": "tasks.saved", "read_clip": "data.clips"}


def __getattr__(name: str):
    if name in LATER:
        return getattr(import_module(f".{LATER[name]}", __name__), name)
    if name in ("data", "tasks", "training"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'avfuse' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "AVEncoder",
    "AVMAE",
    "DenseFusion",
    "FactorizedFusion",
    "InputSettings",
    "TokenFusion",
    "create_encoder",
    "from_deepavfusion",
    "load",
    "load_audio_weights",
    "load_encoder",
    "load_image_weights",
    "pair_attention",
    "pair_attention_weights",
    "read_clip",
]
