"""Saving, loading and optimizing a whole model: safetensors + config.json, and parameter groups by decay and
layer.
"""

import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_CARD = """---
{{ card_data }}
---

An audio-visual model of the library avfuse: weights and a `config.json` that carries the input transforms.

```python
import avfuse

avfuse.AVMAE.from_pretrained("FOLDER_OR_NAME")  # or avfuse.AVEncoder: config.json says which
```
"""


class Pretrained(
    ModelHubMixin,
    library_name="avfuse",
    tags=["audio-visual", "masked-autoencoder"],
    model_card_template=MODEL_CARD,
):
    """`save_pretrained(dir)`, `from_pretrained(dir_or_hub_id)` and `push_to_hub(id)` for a model that can
    state its `config()` and be made `from_config(...)`. A folder that exists is read without the network.

    Raises:
        ValueError: what should be loaded is neither a folder nor a name, or is damaged or another model; or
            what should be saved has a part that config.json cannot describe.
    """

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
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # Written aside and renamed: an interrupted save leaves the old file or none, never half of one.
        save_file(weights, save_directory / f".{WEIGHTS}", metadata={"format": "pt"})
        os.replace(save_directory / f".{WEIGHTS}", save_directory / WEIGHTS)
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

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
        return load_strictly(model, read_safetensors(local))


def _saved_as(cls) -> str:
    """The public class: a `ReleasedEncoder` is saved, and found again, as an `AVEncoder`."""
    return next(base.__name__ for base in cls.__mro__ if Pretrained in base.__bases__)


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {path} cannot be read: {error}") from error


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
