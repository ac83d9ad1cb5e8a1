"""Saving, loading and optimizing a whole model: safetensors, config.json and model card; parameter groups by
decay and layer.
"""

import json
import re
from pathlib import Path

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from .files import read_safetensors, write_json, write_safetensors
from .model_card import licence_of, model_card

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class Pretrained(
    ModelHubMixin,
    library_name="avfuse",
    tags=["audio-visual", "masked-autoencoder"],
):
    """`save_pretrained(dir)`, `from_pretrained(dir_or_hub_id)` and `push_to_hub(id)` for a model that can
    state its `to_config()` and be made `from_config(...)`. A folder that exists is read without the network.

    `facts`, a dictionary about the run that the weights come from, is kept in config.json and shown by the
    model card (README.md), see `avfuse.model_card.model_card`.

    Raises:
        ValueError: what should be loaded is neither a folder nor a name, or is damaged or another model; or
            what should be saved has a part that config.json cannot describe.
    """

    facts: dict | None = None
    home = "avfuse"  # the module to import the class from
    mark: str | None = None  # a key that only the to_config() of this subclass holds: its parent looks for it

    @classmethod
    def kind_of(cls, config: dict) -> type["Pretrained"]:
        """The class that a config is of: this one, or the subclass of it whose mark the config bears."""
        return next((kind for kind in cls.__subclasses__() if config.get(kind.mark)), cls)

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
        config = {"library": "avfuse", "class": _saved_as(type(self)), "model": self.to_config()}
        config |= {"facts": self.facts} if self.facts else {}
        card = self.generate_model_card()
        licence = licence_of(self.facts or {}, self._origins())
        metadata = {"format": "pt"} | ({"licence": licence} if licence else {})
        write_safetensors(save_directory / WEIGHTS, self.state_dict(), metadata)
        write_json(save_directory / CONFIG, config)
        card.save(save_directory / CARD)  # that of these weights, in the place of an older one

    def generate_model_card(self, *_, **__):
        """The `huggingface_hub.ModelCard` that is saved with the weights, and pushed."""
        return model_card(_saved_as(type(self)), self.facts or {}, self._origins(), self.home)

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


def _saved_as(cls) -> str:
    """The public class: a `ReleasedEncoder` is saved, and loaded again, as an `AVEncoder`."""
    return next(base.__name__ for base in cls.__mro__ if Pretrained in base.__bases__)


def load_strictly(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module with exactly these weights, none missing and none left over, in eval mode."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit a {type(module).__name__}: {error}") from error
    return module.eval()


def parameter_groups(model: nn.Module, encoder: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups `{"params", "weight_decay", "layer"}` of a model that is, or holds, this encoder.

    1-D parameters (biases, norms) and tables of pair biases are not decayed. `layer` is 0 for embeddings and
    tokens, 1..depth for the blocks of all three branches, depth + 1 for what follows: a layer-wise decay
    multiplies the rate by d**(depth + 1 - layer).
    """
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, encoder)
        decay = weight_decay if parameter.ndim > 1 and not name.endswith("pair_bias") else 0.0
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "layer": layer})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layer_of(name: str, encoder: nn.Module) -> int:
    depth = encoder.depth
    if "decoder" in name:
        return depth + 1
    block = re.search(r"(\w+?)[._]blocks\.(\d+)\.", name)
    if block:
        return encoder.block_layers.get(block[1], range(depth))[int(block[2])] + 1
    embedding = re.search(r"patch_embed|pos_embed|cls_token|reg_token|norm_pre|fusion_tokens", name)
    return 0 if embedding else depth + 1
