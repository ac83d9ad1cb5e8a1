"""Saving, loading and optimizing a whole model: safetensors + config.json, and parameter groups by decay and
layer.
"""

import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Pretrained(ModelHubMixin, library_name="avfuse", tags=["audio-visual", "masked-autoencoder"]):
    """`save_pretrained(dir)`, `from_pretrained(dir_or_hub_id)` and `push_to_hub(id)` for a model that can
    state its `config()` and be made `from_config(...)`. A folder that exists is read without the network."""

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
        model = cls.from_config(config["model"])
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
        model.load_state_dict(load_file(local), strict=True)
        return model.eval()


def _saved_as(cls) -> str:
    """The public class: a `ReleasedEncoder` is saved, and found again, as an `AVEncoder`."""
    return next(base.__name__ for base in cls.__mro__ if Pretrained in base.__bases__)


def parameter_groups(model: nn.Module, depth: int, weight_decay: float) -> list[dict]:
    """Optimizer groups `{"params", "weight_decay", "layer"}`.

    1-D parameters (biases, norms) are not decayed. `layer` is 0 for embeddings and tokens, 1..depth for the
    blocks of all three branches, depth + 1 for what follows: a layer-wise decay multiplies the rate by
    d**(depth + 1 - layer).
    """
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, depth)
        decay = weight_decay if parameter.ndim > 1 else 0.0
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
