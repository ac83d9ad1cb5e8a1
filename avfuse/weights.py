"""Weights that others trained, as the start of an encoder's transformers: MAE, AudioMAE, AST, any ViT by the
names of timm or transformers, and the branches of whole audio-visual models.

Nothing is lost silently: a table names every tensor as used, converted (and how) or dropped (and why).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .checks import check_choice, check_size
from .files import printable
from .inputs import IMAGENET_MEAN, IMAGENET_STD, InputSettings
from .model_card import UNKNOWN, strictest
from .pretrained import check_has_memory
from .weight_files import misfits
from .weight_sources import Normalisation, ReadWeights, described, grid_in, read

AXES = ("frequency-time", "time-frequency")
LICENCES = {  # of what their authors published; DeepAVFusion's weights began as MAE's and AudioMAE's
    "MAE": "CC-BY-NC-4.0",
    "AudioMAE": "CC-BY-NC-4.0",
    "AST": "BSD-3-Clause",
    "DeepAVFusion": "CC-BY-NC-4.0",
}
AUDIOMAE_GRID = (64, 8)  # patches of 1024 frames x 128 mel bins
AST_GRID = (12, 101)  # patches of 128 mel bins x 1024 frames, which overlap

KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"
PREFIXES = ("cls_token", "dist_token", "reg_token")  # in the order of their tokens and positions
BRANCH = re.compile(r"(?:encoder\.)?(image|audio)\.")  # of a whole audio-visual model
DECODER = re.compile(r"decoder.*|mask_token")
DISPENSABLE = {  # what a transformer that has no place for it can do without
    DECODER: "decoder of the masked autoencoder",
    re.compile(r"(head|head_dist|pre_logits|cls_classifier|distillation_classifier)\..*"): "classifier",
    re.compile(r"(fc_norm|attn_pool|pooler)\..*"): "pooling",
    re.compile(r"cls_token"): "the transformer has no class token",
    re.compile(r"dist_token"): "the transformer has no distillation token, to which the others attended",
    re.compile(r"reg_token"): "the transformer has no register tokens",
}
TRANSFORMERS = {  # names of the library transformers -> timm's
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
TRANSFORMERS_LAYER = {  # the same of a layer; those of version 5 in memory follow those in files
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.q_proj": "attn.query",
    "attention.k_proj": "attn.key",
    "attention.v_proj": "attn.value",
    "attention.o_proj": "attn.proj",
}
TRANSFORMERS_ROOT = re.compile(r"(vit|deit|audio_spectrogram_transformer)\.")
COMPUTED = "num_heads", "act_layer", "norm_layer", "norm_eps"  # what a transformer makes of its weights
# Fields of InputSettings that say what a spectrogram holds.
OF_SPECTROGRAMS = "front_end sample_rate window hop mel_bins max_frequency audio_mean audio_std".split()


@dataclass(frozen=True)
class Origin:
    """Where weights come from; kept in config.json and shown by the model card."""

    weights: str  # name of the file, folder or model
    family: str
    licence: str


@dataclass(frozen=True)
class LoadedWeights:
    """What became of every tensor of a file; as a string, a table for people."""

    branch: str  # image or audio
    axes: str | None  # of audio
    origin: Origin
    used: tuple[str, ...]
    converted: dict[str, str]  # name -> what was done to it
    dropped: dict[str, str]  # name -> why
    names: tuple[str, ...] = ()  # how the names above came from those in the file, if they differ
    inputs: str = ""  # what they were trained on, if it is not what the model has had until now
    differs: tuple[str, ...] = ()  # in what their transformer computed something else, as far as is known

    def __str__(self) -> str:
        origin = self.origin
        trained = f" on {self.axes.replace('-', ' x ')}" if self.axes else ""
        told = f"{origin.weights}: {origin.family}{trained}, licence {origin.licence}"
        lines = [f"{self.branch} weights {printable(told)}"]
        lines += [f"  names      {', '.join(self.names)}"] if self.names else []
        lines += [f"  used       {parts(self.used)}"]
        for what in dict.fromkeys(self.converted.values()):
            names = [name for name, done in self.converted.items() if done == what]
            lines.append(f"  converted  {parts(names) if names[1:] else printable(names[0])}: {what}")
        for reason in dict.fromkeys(self.dropped.values()):
            names = [name for name, why in self.dropped.items() if why == reason]
            lines.append(f"  dropped    {parts(names)}: {reason}")
        lines += [f"  inputs     {self.inputs}"] if self.inputs else []
        lines += [f"  differs    {printable(', '.join(self.differs))}"] if self.differs else []
        return "\n".join(lines)


def load_image_weights(
    model: nn.Module,
    weights: "str | os.PathLike | nn.Module | dict",
    *,
    grid: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
) -> LoadedWeights:
    """Starts the image transformer of a model from weights that others trained. The mean and deviation of the
    images that they saw, where a model in memory or a file beside model.safetensors tells them, or the family
    is MAE, become those of the model (`AVEncoder.inputs`), and the table says so.

    Args:
        model: an `AVEncoder`, anything that has one as its `encoder` (an `AVMAE`), or a VisionTransformer.
        weights: a file (.safetensors, or one of torch.save, of which no code is run), a folder that holds
            model.safetensors, a timm model, or a state dict. By the official names of MAE, pretrained or
            fine-tuned, or by timm's; of a whole DeepAVFusion or avfuse model the image branch is taken.
        grid: rows and columns of the patches that the file has positions of. Default: as timm's model or the
            config.json of avfuse says, else those of a square.
        say: gets the table of what was used, converted and dropped, with the licence.

    Positions of another grid are interpolated (bicubic, antialiased), and a class token that the transformer
    does not have is dropped with its position. The licence stays with the transformer: `AVEncoder.origins`.

    Raises:
        ValueError: no weights, or a tensor that is missing, misshaped, not finite, or has no place: named.
    """
    return load(model, "image", weights, axes=None, grid=grid, say=say)


def load_audio_weights(
    model: nn.Module,
    weights: "str | os.PathLike | nn.Module | dict",
    *,
    axes: Literal["frequency-time", "time-frequency"] | None = None,
    grid: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
) -> LoadedWeights:
    """Starts the audio transformer of a model from weights that others trained, AudioMAE's for instance.

    AudioMAE reads spectrograms as time x frequency, avfuse as frequency x time: the axes of the patch kernel
    are swapped and the positions re-ordered, so that the transposed input gives the same tokens.

    Args:
        model, weights, say: see `load_image_weights`.
        axes: of the spectrograms that the weights were trained on. Default: "time-frequency" for AudioMAE
            (a class token and 64 x 8 patches), else "frequency-time".
        grid: patches of those spectrograms along their two axes, in the order of `axes`. Default: along the
            frequencies as many as timm's model or the config.json of avfuse says, else as AudioMAE (8 of
            time-frequency weights) or the transformer has.

    Raises:
        ValueError: see `load_image_weights`.
    """
    if axes is not None:
        check_choice("axes", axes, AXES)
    return load(model, "audio", weights, axes=axes, grid=grid, say=say)


def load(model, branch, source, *, axes, grid, say) -> LoadedWeights:
    vit = transformer_of(model, branch)
    if grid is not None:
        check_size("grid", grid, "(rows, columns)")
    content = read(source)
    theirs, own = content.made.get(branch, {}), described(vit)
    weights, dropped = branch_of(content.weights, branch)
    weights, joined = from_transformers(weights)
    family = family_of(content, weights, branch, is_whole=bool(dropped))
    if branch == "audio" and axes is None:
        is_turned = grid_in(theirs) == AUDIOMAE_GRID[::-1]  # already, as where avfuse has loaded it
        axes = "time-frequency" if family == "AudioMAE" and not is_turned else "frequency-time"
    weights, converted = convert(weights, vit, axes, grid or grid_of(weights, theirs))
    converted = joined | converted
    weights, without_place = drop(weights, vit)
    if faults := misfits(weights, vit.state_dict()):  # else there is one finite tensor for each place
        transformer = f"a transformer of {len(vit.blocks)} layers and width {vit.embed_dim}"
        raise ValueError(f"{printable(content.name)} does not fit {transformer}: {faults}")
    with torch.no_grad():
        for name, place in vit.state_dict().items():
            place.copy_(weights[name])

    licences = [licence for licence in (content.licence, LICENCES.get(family)) if licence]
    origin = Origin(content.name, family, strictest(licences) or UNKNOWN)
    vit.origin = asdict(origin)
    used = tuple(name for name in weights if name not in converted)
    dropped = content.dropped | dropped | without_place
    names = (*content.steps, "those of transformers turned into timm's") if joined else content.steps
    encoder, saw = getattr(model, "encoder", model), content.normalisation
    heard = content.made.get("inputs")
    if heard is None and family in ("AudioMAE", "AST"):
        heard = InputSettings.audiomae()
    inputs = adapt_images(encoder, vit, saw, family) if branch == "image" else of_sounds(encoder, heard)
    others = [name for name in COMPUTED if name in theirs and name in own and theirs[name] != own[name]]
    differs = tuple(f"{name} {theirs[name]} there, {own[name]} here" for name in others)
    loaded = LoadedWeights(branch, axes, origin, used, converted, dropped, names, inputs, differs)
    say(str(loaded))
    return loaded


def transformer_of(model: nn.Module, branch: str) -> VisionTransformer:
    encoder = getattr(model, "encoder", model)
    vit = getattr(encoder, branch, encoder)
    if not isinstance(vit, VisionTransformer):
        kind = type(model).__name__
        raise ValueError(f"model must have an encoder or be a timm VisionTransformer, got {kind}")
    check_has_memory(vit)
    return vit


def of_sounds(encoder: nn.Module, theirs: InputSettings | None) -> str:
    """What there is to say of the spectrograms that audio weights saw, if an encoder has others."""
    inputs = getattr(encoder, "given_inputs", None)
    if theirs is None or inputs is None and theirs != InputSettings.audiomae():
        return ""
    others = [n for n in OF_SPECTROGRAMS if inputs is None or getattr(inputs, n) != getattr(theirs, n)]
    if not others:
        return ""
    if theirs == InputSettings.audiomae():
        return "trained on Kaldi filter banks of 10 s, see InputSettings.audiomae()"
    return f"trained on spectrograms of {', '.join(f'{name} {getattr(theirs, name)}' for name in others)}"


def adapt_images(
    encoder: nn.Module, vit: VisionTransformer, normalisation: Normalisation | None, family: str
) -> str:
    """Has the images of an encoder normalised as those were that its new weights saw, and notes it where timm
    does; what there is to say of that.
    """
    inputs = getattr(encoder, "given_inputs", None)
    if normalisation is None and family == "MAE":
        normalisation = IMAGENET_MEAN, IMAGENET_STD
    if normalisation is None:
        return ""
    mean, std = normalisation
    vit.pretrained_cfg = dict(getattr(vit, "pretrained_cfg", None) or {}, mean=mean, std=std)
    if inputs and normalisation == (inputs.image_mean, inputs.image_std):
        return ""
    said = f"trained on images of mean {mean} and deviation {std}"
    if inputs is None:
        return "" if normalisation == (IMAGENET_MEAN, IMAGENET_STD) else said
    encoder.given_inputs = replace(inputs, image_mean=mean, image_std=std)
    return f"{said}, by which the model normalises them from now on"


# --- names --------------------------------------------------------------------------------------------------


def branch_of(weights: dict[str, Tensor], branch: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of one transformer, and what is dropped if they are those of a whole model."""
    if not {match[1] for name in weights if (match := BRANCH.match(name))} == {"image", "audio"}:
        return dict(weights), {}
    chosen, dropped = {}, {}
    for name, weight in weights.items():
        match = BRANCH.match(name)
        if match and match[1] == branch:
            chosen[name[match.end() :]] = weight
        else:
            dropped[name] = f"of an audio-visual model, but not of its {branch} transformer"
    return chosen, dropped


def from_transformers(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights by timm's names, and what was done to which, if their names are those of transformers."""
    renamed, joined = {}, {}
    for old, weight in weights.items():
        name = TRANSFORMERS_ROOT.sub("", old, count=1) if TRANSFORMERS_ROOT.match(old) else old
        layer = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            name = f"blocks.{layer[1]}.{TRANSFORMERS_LAYER.get(layer[2], layer[2])}.{layer[3]}"
        name = re.sub(r"^classifier\.", "head.", TRANSFORMERS.get(name, name))
        renamed[name] = weight
    if KERNEL not in renamed or KERNEL in weights or len(renamed) < len(weights):
        return weights, {}
    for query in [name for name in renamed if ".attn.query." in name]:
        thirds = [query.replace(".query.", f".{third}.") for third in ("query", "key", "value")]
        if all(name in renamed and renamed[name].shape == renamed[query].shape for name in thirds):
            name = query.replace(".query.", ".qkv.")
            renamed[name] = torch.cat([renamed.pop(third) for third in thirds])
            joined[name] = "query, key and value joined"
    return renamed, joined


def family_of(content: ReadWeights, weights: dict[str, Tensor], branch: str, is_whole: bool) -> str:
    """Whose weights these are, by their names and shapes; of MAE's, by the name of the file too."""
    if is_whole:
        return "DeepAVFusion" if any("norm1_mm" in name for name in content.weights) else "avfuse"
    kernel, positions = weights.get(KERNEL), weights.get(POSITIONS)
    if branch == "audio":
        rows = 1 + math.prod(AUDIOMAE_GRID)
        is_one_channel = kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 1
        fits = is_one_channel and positions is not None and positions.ndim == 3 and positions.shape[1] == rows
        if is_one_channel and "dist_token" in weights:
            return "AST"
        return "AudioMAE" if fits and "cls_token" in weights else content.family
    is_mae = any(DECODER.fullmatch(name) for name in weights) or has_fixed_positions(weights)
    return "MAE" if is_mae or re.search(r"(?<![a-z])mae(?![a-z])", content.name.lower()) else content.family


def has_fixed_positions(weights: dict[str, Tensor]) -> bool:
    """Whether positions are sine-cosine ones: 0 for the class token, then the sines and cosines of 0."""
    table = weights.get(POSITIONS)
    if table is None or table.ndim != 3 or table.shape[1] < 2 or "cls_token" not in weights:
        return False
    values = [set(row.unique().tolist()) for row in table[0, :2]]
    return values == [{0.0}, {0.0, 1.0}]


# --- converting ---------------------------------------------------------------------------------------------


def convert(weights, vit, axes, grid) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in the shapes and under the names of the transformer, and what was done to which."""
    weights, converted, places = dict(weights), {}, vit.state_dict()
    if "norm.weight" in places and "norm.weight" not in weights:
        for name in ("norm.weight", "norm.bias"):
            if f"fc_{name}" in weights:
                weights[name] = weights.pop(f"fc_{name}")
                converted[name] = f"fc_{name}, behind the pool, becomes that of the tokens"
    if axes == "time-frequency" and KERNEL in weights and weights[KERNEL].ndim == 4:
        weights[KERNEL] = weights[KERNEL].transpose(2, 3)
        converted[KERNEL] = "from time x frequency to frequency x time: axes swapped"
    is_table = POSITIONS in places and POSITIONS in weights and weights[POSITIONS].ndim == 3
    if is_table and all(name in weights for name in PREFIXES if name in places):  # else `misfits` names it
        weights[POSITIONS], steps = fit_positions(weights, vit, axes, grid)
        if steps:
            converted[POSITIONS] = ", ".join(steps)
    return weights, converted


def fit_positions(weights, vit, axes, grid) -> tuple[Tensor, list[str]]:
    """The table (1, prefix + rows * columns, D) of positions for the transformer's tokens, and the steps."""
    table, steps, new = weights[POSITIONS], [], tuple(vit.patch_embed.grid_size)
    tokens = {
        name: weights[name].shape[1] for name in PREFIXES if name in weights and weights[name].ndim == 3
    }
    if axes and "dist_token" in tokens and table.shape[1] == sum(tokens.values()) + math.prod(AST_GRID):
        grid = grid or AST_GRID
    prefix, old = find_grid(table.shape[1], sum(tokens.values()), new, axes, grid)
    kept, patches = table[:, :prefix], table[:, prefix:]
    if prefix:
        rows = dict(zip(tokens, kept.split(list(tokens.values()), dim=1), strict=True))
        kept = torch.cat([kept[:, :0], *(row for name, row in rows.items() if name in vit.state_dict())], 1)
        steps += [f"row of {name} dropped" for name in rows if name not in vit.state_dict()]
    if axes == "time-frequency":
        patches, old = patches.unflatten(1, old).transpose(1, 2).flatten(1, 2), old[::-1]
        steps.append("re-ordered from time x frequency to frequency x time")
    if old != new:
        patches = resample_abs_pos_embed(patches, list(new), list(old), num_prefix_tokens=0)
        steps.append(f"interpolated from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches")
    return torch.cat([kept, patches], dim=1), steps


def grid_of(weights: dict[str, Tensor], made: dict) -> tuple[int, int] | None:
    """Rows and columns of the patches, as their transformer is made; None where the table of positions has
    another number of rows: it may have been replaced by hand.
    """
    grid, table = grid_in(made), weights.get(POSITIONS)
    if grid is None or table is None or table.ndim != 3:
        return None
    prefix = sum(weights[name].shape[1] for name in PREFIXES if name in weights and weights[name].ndim == 3)
    return grid if table.shape[1] - math.prod(grid) in (0, prefix) else None


def find_grid(rows: int, prefix: int, new: tuple, axes, grid) -> tuple[int, tuple[int, int]]:
    """How many rows of a table of positions belong to prefix tokens (all or none), and the others' grid."""
    for count in dict.fromkeys((prefix, 0)):
        patches = rows - count
        side = math.isqrt(max(0, patches))
        if grid is not None:
            guess = tuple(grid)
        elif axes == "time-frequency":
            guess = patches // AUDIOMAE_GRID[1], AUDIOMAE_GRID[1]
        elif patches == math.prod(new):
            guess = new
        elif axes == "frequency-time":
            guess = new[0], patches // new[0]
        else:
            guess = side, side
        if 0 < math.prod(guess) == patches:
            return count, guess
    fault = "is not (rows, columns) of them" if grid else "is needed: they are no grid by themselves"
    raise ValueError(f"{POSITIONS} has {rows} rows, {prefix} of them for prefix tokens or none; grid {fault}")


def drop(weights, vit) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Without what the transformer has no place for and can do without, and the reasons for that."""
    places = vit.state_dict()
    without_place = [name for name in weights if name not in places]
    dropped = {
        name: reason
        for name in without_place
        for names, reason in DISPENSABLE.items()
        if names.fullmatch(name)
    }
    return {name: weight for name, weight in weights.items() if name not in dropped}, dropped


# --- saying -------------------------------------------------------------------------------------------------


def parts(names: Iterable[str]) -> str:
    """ "blocks (144 tensors), norm (2 tensors), pos_embed" of their names"""
    counts = Counter(name.split(".")[0] for name in names)
    parts = ((printable(part), count) for part, count in counts.items())
    return ", ".join(f"{part} ({count} tensors)" if count > 1 else part for part, count in parts)
