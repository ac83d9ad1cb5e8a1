"""Audio-visual early fusion: a few fusion tokens read every pair of one image token and one audio token."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .lazy import module_of

# The kernels lie beside this package in a checkout, inside it in a wheel, and are avfuse.kernels in both.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from .data.clips import read_clip
    from .encoder import AVEncoder
    from .exporting import export
    from .fusion import DenseFusion, FactorizedFusion, TokenFusion
    from .inputs import InputSettings
    from .loading import load_encoder
    from .mae import AVMAE
    from .ops.pair_attention import pair_attention, pair_attention_weights
    from .presets import create_encoder
    from .released import from_deepavfusion
    from .tasks.saved import load
    from .weights import load_audio_weights, load_image_weights

# Where the names above are. They are imported when first asked for: `avfuse --help` needs none of the
# libraries that they bring.
HOMES = {
    "data.clips": ("read_clip",),
    "encoder": ("AVEncoder",),
    "exporting": ("export",),
    "fusion": ("DenseFusion", "FactorizedFusion", "TokenFusion"),
    "inputs": ("InputSettings",),
    "loading": ("load_encoder",),
    "mae": ("AVMAE",),
    "ops.pair_attention": ("pair_attention", "pair_attention_weights"),
    "presets": ("create_encoder",),
    "released": ("from_deepavfusion",),
    "tasks.saved": ("load",),
    "weights": ("load_audio_weights", "load_image_weights"),
}


def __getattr__(name: str):
    """A public name, or a module of the package."""
    for home, names in HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(f".{home}", __name__), name)
            return globals()[name]
    return module_of(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "AVEncoder",
    "AVMAE",
    "DenseFusion",
    "FactorizedFusion",
    "InputSettings",
    "TokenFusion",
    "create_encoder",
    "export",
    "from_deepavfusion",
    "load",
    "load_audio_weights",
    "load_encoder",
    "load_image_weights",
    "pair_attention",
    "pair_attention_weights",
    "read_clip",
]
