"""The semantics of the paper's released code, quirk by quirk, so that its weights give its outputs.

Names and shapes of parameters are those of the released state dicts; the quirks are listed in each class.
Where the released dense module forms all pairs, this one uses the exact identity of
`avfuse.ops.pair_attention`.
"""

import functools
import math
import os
import re

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from .checks import check_choice, check_count, check_flag, check_positive, check_size, is_plain
from .encoder import AVEncoder
from .fusion import (
    NORM_EPS,
    STATE,
    Fusion,
    Stream,
    Variant,
    initialize_linear,
    split_state,
    summary,
    union_mask,
    value_bias_of_pairs,
)
from .inputs import InputSettings
from .mae import AVMAE
from .ops.pair_attention import Side, attend_pairs, masked_attention
from .pretrained import make_for
from .vit import plain_vit, ratio_of
from .weight_files import read_pth, read_safetensors, state_dict

INTERACTIONS = {"dense_mmi": "dense", "factorized_mmi": "factorized", "token": "token", "none": "none"}
RATIOS = ("attn_ratio", "mlp_ratio")
SOURCE = "state_dict_or_path"  # as errors call the weights
DECODER_NAME = re.compile(r"^(image|audio)_decoder_")


class ReleasedFusion(Fusion):
    """What the released fusion blocks share: the residual adds to the *normalised* tokens, which replace the
    input; the softmax scale comes from the full width, (D / H) ** -0.5, whatever the query width.
    """

    def __init__(self, dim, num_heads, *, mlp_ratio=1.0):
        super().__init__()
        self.dim = self.image_dim = self.audio_dim = dim
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.norm1_mm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm1_img = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm1_aud = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    @property
    def norm_weight(self) -> Tensor:
        return self.norm2.weight

    def fuse(self, fusion: Tensor, image: Stream, audio: Stream) -> Tensor:
        image = image._replace(tokens=self.norm1_img(image.tokens))
        audio = audio._replace(tokens=self.norm1_aud(audio.tokens))
        fusion = self.norm1_mm(fusion)
        fusion = fusion + self.attend(fusion, image, audio)
        return fusion + self.mlp(self.norm2(fusion))

    def halves(self, name: str) -> tuple[Tensor, Tensor]:
        """The weight of a released Linear over concatenated pairs, as one map of each token of a pair."""
        linear = self.attn[name]
        if not is_plain(linear):
            raise ValueError(
                f"attn.{name} of {type(self).__name__} must be a plain Linear without hooks, adapters or "
                f"quantization: its weight is used in halves, got {type(linear).__name__}"
            )
        return linear.weight.chunk(2, dim=1)

    def side(self, key: Tensor, value: Tensor, mask: Tensor | None) -> Side:
        """Of projections (B, N, width)."""
        return Side(self.split_heads(key), self.split_heads(value), mask)

    def attend_pairs(self, query: Tensor, image: Side, audio: Side, value_bias: Tensor) -> Tensor:
        """Queries (B, F, width) -> (B, F, value width)"""
        attended = attend_pairs(self.split_heads(query), image, audio, scale=self.scale)
        return self.merge_heads(attended) + value_bias_of_pairs(value_bias, image.mask, audio.mask)

    def attend_tokens(self, query: Tensor, side: Side) -> Tensor:
        """Queries (B, F, width) -> (B, F, value width)"""
        return self.merge_heads(masked_attention(self.split_heads(query), *side, self.scale))


class ReleasedDense(ReleasedFusion):
    """Released "dense_mmi": one Linear over concatenated pairs, first D columns for audio, last for image."""

    def __init__(self, dim, num_heads, *, attn_ratio=0.25, mlp_ratio=1.0):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio)
        width = int(dim * attn_ratio)
        self.attn = linears(q=(dim, width), kv=(2 * dim, 2 * width), proj=(width, dim))
        initialize_linear(self)

    def attend(self, fusion, image, audio):
        audio_weight, image_weight = self.halves("kv")
        image_side = self.side(*F.linear(image.tokens, image_weight).chunk(2, dim=-1), image.mask)
        audio_side = self.side(*F.linear(audio.tokens, audio_weight).chunk(2, dim=-1), audio.mask)
        value_bias = self.attn["kv"].bias.chunk(2)[1]  # the key bias cancels in the softmax
        attended = self.attend_pairs(self.attn["q"](fusion), image_side, audio_side, value_bias)
        return self.attn["proj"](attended)


class ReleasedFactorized(ReleasedFusion):
    """Released "factorized_mmi": pairs of the raw outputs of the aggregation attentions (no residual, no MLP
    before); one shared residual and MLP over all fusion and aggregation tokens; full-width values.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        fusion_tokens=16,
        image_aggregation_tokens=8,
        audio_aggregation_tokens=8,
        attn_ratio=0.25,
        mlp_ratio=1.0,
    ):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio)
        self.split_sizes = [fusion_tokens, image_aggregation_tokens, audio_aggregation_tokens]
        width = int(dim * attn_ratio)
        self.attn = nn.ModuleDict()
        for part in "attn_v", "attn_a":
            self.attn[part] = linears(q=(dim, dim), kv=(dim, 2 * dim), proj=(dim, dim))
        self.attn.update(linears(q=(dim, width), k=(2 * dim, width), v=(2 * dim, dim), proj=(dim, dim)))
        self.attn["k"].bias.requires_grad_(False)  # it cancels in the softmax: never used, never trained
        initialize_linear(self)

    def attend(self, fusion, image, audio):
        fusion, image_aggregate, audio_aggregate = split_state(fusion, self.split_sizes)
        image_aggregate = self.aggregate(self.attn["attn_v"], image_aggregate, image)
        audio_aggregate = self.aggregate(self.attn["attn_a"], audio_aggregate, audio)

        image_key, audio_key = self.halves("k")
        image_value, audio_value = self.halves("v")
        attended = self.attend_pairs(
            self.attn["q"](fusion),
            self.projected(summary(image_aggregate, image), image_key, image_value),
            self.projected(summary(audio_aggregate, audio), audio_key, audio_value),
            self.attn["v"].bias,
        )
        return torch.cat([self.attn["proj"](attended), image_aggregate, audio_aggregate], dim=1)

    def projected(self, stream, key_weight, value_weight):
        tokens = stream.tokens
        return self.side(F.linear(tokens, key_weight), F.linear(tokens, value_weight), stream.mask)

    def aggregate(self, attn, aggregate, stream):
        side = self.side(*attn["kv"](stream.tokens).chunk(2, dim=-1), stream.mask)
        return attn["proj"](self.attend_tokens(attn["q"](aggregate), side))


class ReleasedToken(ReleasedFusion):
    """Released "token": one softmax over image and audio tokens, without the fusion tokens; its scale is that
    of its own query width.
    """

    def __init__(self, dim, num_heads, *, attn_ratio=0.25, mlp_ratio=1.0):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio)
        width = int(dim * attn_ratio)
        self.scale = (width // num_heads) ** -0.5
        self.attn = linears(q=(dim, width), kv=(dim, 2 * width), proj=(width, dim))
        initialize_linear(self)

    def attend(self, fusion, image, audio):
        key, value = self.attn["kv"](torch.cat([image.tokens, audio.tokens], dim=1)).chunk(2, dim=-1)
        side = self.side(key, value, union_mask(image, audio))
        return self.attn["proj"](self.attend_tokens(self.attn["q"](fusion), side))


def linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
    """Linear layers by name, of widths (in, out)."""
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


VARIANTS = {
    "dense": Variant(ReleasedDense, RATIOS),
    "factorized": Variant(ReleasedFactorized, (*RATIOS, *STATE), STATE),
    "token": Variant(ReleasedToken, RATIOS),
    "none": Variant(None),
}


class ReleasedEncoder(AVEncoder):
    """The released encoder: its blocks, and *all* fusion and aggregation tokens feed the uni-modal blocks and
    the decoders. (Its "token" variant calls the block with image and audio exchanged, which
    `from_deepavfusion` undoes.)
    """

    mark = "released"
    variants = VARIANTS

    @functools.wraps(AVEncoder.__init__)  # its signature too, which the hub mixin reads
    def __init__(self, image, audio, **options):
        super().__init__(image, audio, **options)
        for branch in self.image, self.audio:
            branch.pos_embed.requires_grad_(False)  # released: fixed sine-cosine

    def visible_fusion(self, state):
        return state

    def to_config(self):
        return super().to_config() | {self.mark: True}


class ReleasedAutoencoder(AVMAE):
    """The released autoencoder: its decoders train their positions."""

    mark = ReleasedEncoder.mark  # of its encoder's config

    @functools.wraps(AVMAE.__init__)
    def __init__(self, encoder, **options):
        super().__init__(encoder, **options)
        for decoder in self.image_decoder, self.audio_decoder:
            decoder.pos_embed.requires_grad_(True)


def from_deepavfusion(state_dict_or_path, *, config: dict | None = None) -> nn.Module:
    """The module that released DeepAVFusion weights belong to, with those weights, in eval mode.

    Args:
        state_dict_or_path: a checkpoint file (read with `weights_only=True`, or safetensors), a dictionary
            {"state_dict": ...}, or a state dict, of the autoencoder (-> `AVMAE`), a bare encoder (->
            `AVEncoder`) or a single fusion block.
        config: what names and shapes cannot tell, by the released names: image_size and audio_size (height,
            width), num_heads, the token counts, fusion_layers ("all", "none" or "0-1"), decoder_heads, the
            mask ratios, norm_loss. Defaults: heads D/64, tokens 16/8/8, square images, audio of 8 patch rows,
            16 decoder heads, norm_loss True.

    Raises:
        ValueError: weights of none of these models, an unknown config key, or weights that do not fit
            strictly.

    The weights began as MAE's and AudioMAE's, whose licence `AVEncoder.origins` names.
    """
    weights = read_weights(state_dict_or_path)
    settings = infer_settings(weights) | check_config(config)
    dim, heads = settings["embed_dim"], settings["num_heads"]
    if heads < 1 or dim % heads:
        raise ValueError(f"config: num_heads must divide the width of {dim}, got {heads}")
    if "norm1_mm.weight" in weights:
        variant = VARIANTS[INTERACTIONS[settings["interactions"]]]
        if variant.block is None:
            raise ValueError("config: interactions is 'none', but the weights are those of a fusion block")
        return make_for(weights, lambda: variant.make(dim, settings), SOURCE)
    is_autoencoder = any(name.startswith("encoder.") for name in weights)
    if is_autoencoder:
        weights = {DECODER_NAME.sub(r"\1_decoder.", name): weight for name, weight in weights.items()}
    make = make_released_autoencoder if is_autoencoder else make_released_encoder
    return make_for(exchange_token_norms(weights, settings), lambda: make(settings), SOURCE)


def read_weights(source: str | os.PathLike | dict) -> dict[str, Tensor]:
    """The state dict in a file or dictionary."""
    if isinstance(source, (str, os.PathLike)):
        source = read_safetensors(source) if os.fspath(source).endswith(".safetensors") else read_pth(source)
    if not isinstance(source, dict):
        raise ValueError(f"{SOURCE} must be a path or a dictionary, got {type(source).__name__}")
    return state_dict(source, SOURCE, kept=("encoder",)).weights  # of which an autoencoder is known


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those below "encoder.", as an encoder by itself names them."""
    below = [name for name in weights if name.startswith("encoder.")]
    return {name.removeprefix("encoder."): weights[name] for name in below}


def infer_settings(weights: dict[str, Tensor]) -> dict:
    """Settings that names and shapes imply, and defaults for the rest."""
    encoder = {name.removeprefix("encoder."): weight for name, weight in weights.items()}
    prefix = "" if "norm1_mm.weight" in weights else r"fusion_blocks\.\d+\."
    block = {re.sub(f"^{prefix}", "", name): w for name, w in encoder.items() if re.match(prefix, name)}
    if not prefix:
        dim = size_of(block, "norm1_mm.weight", 0)
    elif "fusion_tokens" in encoder and "image.pos_embed" in encoder and "audio.pos_embed" in encoder:
        dim = size_of(encoder, "fusion_tokens", 2)
    else:
        raise ValueError(
            f"{SOURCE} holds no DeepAVFusion autoencoder, encoder or fusion block; "
            f"its names begin with {sorted(weights)[:3]}"
        )
    settings = dict(
        embed_dim=dim,
        num_heads=max(1, dim // 64),
        attn_ratio=0.25,
        mlp_ratio=1.0,
        interactions="none",
        fusion_tokens=16,
        image_aggregation_tokens=8,
        audio_aggregation_tokens=8,
        decoder_heads=16,
        image_mask_ratio=0.75,
        audio_mask_ratio=0.8,
        norm_loss=True,
    )
    if block:
        is_factorized = any(name.startswith("attn.attn_a.") for name in block)
        is_dense = not is_factorized and size_of(block, "attn.kv.weight", 1) == 2 * dim
        settings |= dict(
            attn_ratio=ratio_of(size_of(block, "attn.q.weight", 0), dim),
            mlp_ratio=ratio_of(size_of(block, "mlp.fc1.weight", 0), dim),
            interactions="factorized_mmi" if is_factorized else "dense_mmi" if is_dense else "token",
        )
    if prefix:
        settings |= infer_encoder(encoder, settings["interactions"])
    if any(name.startswith("encoder.") for name in weights):  # an autoencoder
        settings |= dict(
            decoder_dim=size_of(weights, "image_decoder_embed.weight", 0),
            decoder_depth=count_blocks(weights, "image_decoder_blocks"),
        )
    return settings


def infer_encoder(encoder: dict[str, Tensor], interactions: str) -> dict:
    patch_size = size_of(encoder, "image.patch_embed.proj.weight", 3)
    image_patches, audio_patches = (size_of(encoder, f"{name}.pos_embed", 1) for name in ("image", "audio"))
    side = math.isqrt(image_patches)
    layers = sorted(
        {int(match[1]) for name in encoder if (match := re.match(r"fusion_blocks\.(\d+)\.", name))}
    )
    inferred = dict(
        patch_size=patch_size,
        depth=count_blocks(encoder, "image.blocks"),
        image_size=(side * patch_size, side * patch_size),
        audio_size=(8 * patch_size, audio_patches // 8 * patch_size),
        fusion_layers="-".join(map(str, layers)) or "none",
    )
    if interactions != "factorized_mmi":  # which has aggregation tokens among them
        inferred["fusion_tokens"] = size_of(encoder, "fusion_tokens", 1)
    return inferred


def size_of(weights: dict[str, Tensor], name: str, dim: int) -> int:
    """The size of a weight along `dim`, from which settings are inferred."""
    if name not in weights or weights[name].ndim <= dim:
        raise ValueError(f"{SOURCE} holds no {name}, or one without dimension {dim}")
    return weights[name].shape[dim]


def count_blocks(weights: dict[str, Tensor], blocks: str) -> int:
    pattern = re.escape(blocks) + r"\.(\d+)\."
    numbers = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if not numbers:
        raise ValueError(f"{SOURCE} holds no {blocks}")
    if max(numbers) >= len(numbers):
        raise ValueError(f"{SOURCE} holds {blocks}.{max(numbers)} but only {len(numbers)} of {blocks}")
    return len(numbers)


def check_layers(name: str, layers: object) -> None:
    if not re.fullmatch(r"all|none|\d+(-\d+)*", str(layers)):
        raise ValueError(f"{name} must be 'all', 'none' or like '0-1', got {layers!r}")


CHECKS = {  # of the keys of a config, by the released names
    **dict.fromkeys(("embed_dim", "num_heads", "depth", "patch_size", *STATE), check_count),
    **dict.fromkeys(("decoder_dim", "decoder_depth", "decoder_heads"), check_count),
    **dict.fromkeys((*RATIOS, "image_mask_ratio", "audio_mask_ratio"), check_positive),
    **dict.fromkeys(("image_size", "audio_size"), check_size),
    "interactions": functools.partial(check_choice, choices=tuple(INTERACTIONS)),
    "fusion_layers": check_layers,
    "norm_loss": check_flag,
}


def check_config(config: dict | None) -> dict:
    if not (config is None or isinstance(config, dict)):
        raise ValueError(f"config must be a dictionary, got {type(config).__name__}")
    config = dict(config or {})
    unknown = sorted(set(config) - set(CHECKS))
    if unknown:
        raise ValueError(f"config has unknown keys {', '.join(unknown)}; known are {', '.join(CHECKS)}")
    for name, value in config.items():
        CHECKS[name](f"config: {name}", value)
    return config


def make_released_encoder(settings: dict) -> ReleasedEncoder:
    sizes = {name: settings[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    image = plain_vit(3, settings["image_size"], **sizes)
    audio = plain_vit(1, settings["audio_size"], **sizes)
    for branch in image, audio:
        branch.origin = dict(weights="DeepAVFusion", family="DeepAVFusion", licence="CC-BY-NC-4.0")
    layers = settings["fusion_layers"]
    if layers not in ("all", "none"):
        layers = [int(layer) for layer in str(layers).split("-")]
    return ReleasedEncoder(
        image,
        audio,
        interactions=INTERACTIONS[settings["interactions"]],
        fusion_layers=layers,
        inputs=released_inputs(settings),
        **{name: settings[name] for name in ("num_heads", *STATE, *RATIOS)},
    )


def make_released_autoencoder(settings: dict) -> ReleasedAutoencoder:
    names = "decoder_dim", "decoder_depth", "decoder_heads", "image_mask_ratio", "audio_mask_ratio"
    options = {name: settings[name] for name in names}
    encoder = make_released_encoder(settings)
    return ReleasedAutoencoder(encoder, norm_target=settings["norm_loss"], **options)


def released_inputs(settings: dict) -> InputSettings | None:
    """The paper's transforms where the sizes are its own; else what the encoder derives from its sizes."""
    paper = InputSettings()
    sizes = tuple(settings["image_size"]), tuple(settings["audio_size"])
    return paper if sizes == ((224, 224), (128, 192)) else None


def exchange_token_norms(weights: dict, settings: dict) -> dict:
    """In a released token encoder, norm1_aud normalises image tokens and norm1_img audio tokens."""
    if settings["interactions"] != "token":
        return weights
    exchanged = {"norm1_aud": "norm1_img", "norm1_img": "norm1_aud"}
    return {re.sub("norm1_(aud|img)", lambda m: exchanged[m[0]], name): w for name, w in weights.items()}
